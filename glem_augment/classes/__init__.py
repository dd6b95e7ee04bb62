"""Classes in the latent space, fitted to statistics of their latents, which may be released privately."""
