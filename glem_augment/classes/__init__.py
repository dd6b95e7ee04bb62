"""Classes in the latent space: statistics, Gaussians, modes, and the release of statistics with a privacy guarantee."""
