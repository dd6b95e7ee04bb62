"""Synthetic data sets: images drawn from the classes of a flow, alone, beside real images, or written to disk."""
