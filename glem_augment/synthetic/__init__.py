"""Synthetic data sets: images drawn from the classes of a model, alone, beside real images, or written to disk."""
