"""`GLEM`: a model, with its configuration and files."""
