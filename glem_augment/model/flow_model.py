"""A flow for images of one shape, with the facts about it: image to latent, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glem_augment.data.pixels import check_images, from_levels, to_levels
from glem_augment.flows import Bijection, MultiscaleFlow
from glem_augment.model.config import GLEMConfig

# Images per pass through the flow in the calls that take any number of them: bounds the memory of activations.
_CHUNK = 256


class FlowModel(nn.Module):
    """The part of a GLEM that knows nothing of class densities.

    A subclass says where latents live (``device``, ``dtype``): the identity has no parameters that could tell.
    """

    config: GLEMConfig
    flow: Bijection

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    # ---- facts -------------------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.config.image_shape

    @property
    def dim(self) -> int:
        """d = C * H * W."""
        return math.prod(self.image_shape)

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def num_classes(self) -> int:
        return len(self.config.class_ids)

    @property
    def classes(self) -> list[str]:
        """Class names in index order."""
        return list(self.config.class_names)

    @property
    def class_ids(self) -> list[str]:
        return list(self.config.class_ids)

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.config.class_names)}

    # ---- image <-> latent --------------------------------------------------------------------------------------

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Image to latent.

        Args:
            x: [B,C,H,W], uint8 or float in [0,1].
            generator: adds uniform dequantisation noise to uint8 images; without one the middle of the bin is taken.

        Returns:
            z [B, d] and log|det dz/dlevels| [B] in nats.

        Raises:
            TypeError, ValueError: wrong dtype, shape or (checked on the CPU) value range.
        """
        check_images(x, self.image_shape)
        parts = [self._encode(part, generator) for part in x.to(self.device).split(_CHUNK)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([z for z, _ in parts]), torch.cat([logdet for _, logdet in parts])

    def _encode(self, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        h = to_levels(x, self.bits, self.dtype, generator)
        z, logdet = self.flow(h)
        return z, logdet - self.dim * self.bits * math.log(2)

    def decode(self, z: Tensor, clamp: bool = True) -> Tensor:
        """Latent to image.

        Args:
            z: [B, d].
            clamp: cut the result to [0,1]; without it the exact inverse comes back, whatever its range.

        Returns:
            [B,C,H,W] float; bin middles of uint8 images come back as value / 255.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"expected latents of shape [B, {self.dim}], got {list(z.shape)}")
        z = z.to(self.device, self.dtype)
        parts = [from_levels(self.flow.inverse(part)[0], self.bits) for part in z.split(_CHUNK)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return x.clamp(0, 1) if clamp else x

    @torch.no_grad()
    def check_invertibility(self, x: Tensor) -> dict[str, float]:
        """Encode and decode without clamping, and compare.

        Args:
            x: [B,C,H,W] images.

        Returns:
            ``max_error`` and ``mean_error`` in uint8 steps over the finite pixels, ``within_half_step`` (share of all
            pixels whose error is below half a step, so that rounding gives the image back bit for bit) and
            ``non_finite`` (share of all pixels).
        """
        check_images(x, self.image_shape)
        worst, total, good, lost, count = 0.0, 0.0, 0, 0, 0
        for part in x.split(_CHUNK):
            wanted = from_levels(to_levels(part.to(self.device), self.bits, torch.float64), self.bits)
            error = (self.decode(self.encode(part)[0], clamp=False).double() - wanted).abs() * 255
            finite = torch.isfinite(error)
            lost += int((~finite).sum())
            error = error[finite]
            count += finite.numel()
            good += int((error < 0.5).sum())
            total += float(error.sum())
            worst = max(worst, float(error.max()) if error.numel() else math.inf)
        return {
            "max_error": worst,
            "mean_error": total / max(1, count - lost),
            "within_half_step": good / max(1, count),
            "non_finite": lost / max(1, count),
        }

    @torch.no_grad()
    def initialise(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Data-dependent start of the flow's ActNorms from the images ``x`` [B,C,H,W]; done ones stay as they are."""
        check_images(x, self.image_shape)
        if isinstance(self.flow, MultiscaleFlow):
            self.flow.initialise(to_levels(x.to(self.device), self.bits, self.dtype, generator))
