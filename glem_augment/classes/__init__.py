"""Classes in the latent space: their Gaussians, divergences, principal modes and full covariances."""
