"""`GLEM`: a flow with class Gaussians, its configuration and its files."""
