"""Classes in the latent space, fitted to statistics of their latents, which may be released privately."""

from glem_augment.classes.gaussians import ClassModel, register_class_model

__all__ = ["ClassModel", "register_class_model"]
