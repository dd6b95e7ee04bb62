"""Image <-> the numbers that a flow models: frozen, published autoencoders. Nothing here knows of classes."""

from glem_augment.autoencoders.by_name import Fetch, open_autoencoder
from glem_augment.autoencoders.standardised import Autoencoder, StandardisedAutoencoder, latent_shape
from glem_augment.autoencoders.taesd import TAESD

__all__ = ["TAESD", "Autoencoder", "Fetch", "StandardisedAutoencoder", "latent_shape", "open_autoencoder"]
