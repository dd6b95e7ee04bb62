"""Autoencoders of the diffusers library (the extra `diffusers`), which see images in [-1, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor, nn

from glem_augment.errors import ModelFileError


class DiffusersAutoencoder(nn.Module):
    """An AutoencoderKL, AutoencoderTiny or AutoencoderDC; see `Autoencoder`.

    Latents are scaled and shifted as the config says, `(h - shift_factor) * scaling_factor`. Of an AutoencoderKL the
    mean of the latent distribution is taken, so that an image has one latent.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, config = module, module.config
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.channels = int(config["latent_channels"])
        stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
        self.factor = 2 ** (len(stages) - 1)

    def encode(self, x: Tensor) -> Tensor:
        """RGB images [B,3,H,W] in [0, 1] to latents [B,C,h,w]."""
        found = self.module.encode(2 * x - 1)
        h = found.latent_dist.mean if hasattr(found, "latent_dist") else getattr(found, "latents", None)
        return ((found.latent if h is None else h) - self.shift) * self.scale

    def decode(self, h: Tensor) -> Tensor:
        """Latents [B,C,h,w] to RGB images [B,3,H,W], which may leave [0, 1] a little."""
        return (self.module.decode(h / self.scale + self.shift).sample + 1) / 2


def load_diffusers(folder: Path, kind: str) -> DiffusersAutoencoder:
    """The autoencoder of the class `kind` in a folder with config.json and safetensors weights, on the CPU.

    Raises:
        ModelFileError: damaged or foreign files.
    """
    try:
        module = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True, local_files_only=True)
        return DiffusersAutoencoder(module).eval().requires_grad_(False)
    except Exception as error:  # diffusers raises many kinds
        reason = str(error).partition("\n")[0]
        raise ModelFileError(f"{folder} can't be read as an {kind} of diffusers: {reason}") from None
