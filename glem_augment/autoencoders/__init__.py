"""Image <-> the numbers that a flow models: frozen, published autoencoders. Nothing here knows of classes."""

from glem_augment.autoencoders.published import TAESD, Fetch, open_autoencoder
from glem_augment.autoencoders.standardised import Autoencoder, StandardisedAutoencoder, latent_shape

__all__ = ["TAESD", "Autoencoder", "Fetch", "StandardisedAutoencoder", "latent_shape", "open_autoencoder"]
