"""A model in use: images to latents and back, densities, classification and samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from glem_augment.checks import check_whole
from glem_augment.classes.classes import Classes
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.classes.modes import ClassModes
from glem_augment.codec.autoencoder import StandardisedAutoencoder
from glem_augment.codec.codec import Codec, Dequantisation
from glem_augment.codec.levels import draw_noise
from glem_augment.distributed import gather
from glem_augment.errors import ClassMismatchError
from glem_augment.flows import Flow
from glem_augment.images.dataset import ImageData
from glem_augment.model.config import GLEMConfig
from glem_augment.tensors import usable

_CHUNK = 256  # images per pass through the flow, which bounds the memory of activations

_Flow = TypeVar("_Flow", bound="LatentModel")


class LatentModel(nn.Module):
    """A codec, a flow, and class densities in its latents, for images of one shape.

    Images are [B,C,H,W], uint8 or float in [0,1]; float input is not rounded. A model of images of another dtype takes
    the images of its `pixel_range`. The codec turns images into numbers: the levels of pixels, the values of floats, or
    an autoencoder's standardised latents. The flow is exact, an autoencoder is not.

    Attributes:
        codec, flow, latent_classes: the three parts. `latent_classes` is replaced as a whole.
        image_shape: (C, H, W) of the images.
        dim: d, how many numbers the flow models: C H W of the pixels, or of the autoencoder's latents.
        bits: bits per channel that the flow models.
        pixel_range: the dtype of the images and the range of their values.
        classes, class_ids: K names, and K folder names or WordNet ids, in index order.
        class_to_idx: the index of each name; num_classes: K.
        config: the facts that `save` writes.
    """

    codec: Codec
    flow: Flow
    latent_classes: Classes

    def __init__(self, config: GLEMConfig) -> None:
        super().__init__()
        self.config, self.image_shape, self.dim, self.bits = config, config.image_shape, config.dim, config.bits
        self.pixel_range = config.pixel_range
        self.classes, self.class_ids = list(config.class_names), list(config.class_ids)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.num_classes = len(self.classes)

    # ---- facts ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.gaussians.mu.device

    @property
    def dtype(self) -> torch.dtype:
        return self.gaussians.mu.dtype

    @property
    def likelihood(self) -> tuple[str, str, float]:
        """How likelihoods are reported: a key, its unit in words, and the divisor of nats per image."""
        return self.codec.key, self.codec.unit, self.codec.divisor

    @property
    def numbers_are(self) -> str:
        """How images become the flow's numbers, in words."""
        named = self.config.autoencoder
        at = f"at {self.bits} bits" if self.pixel_range.dtype == "uint8" else f"of {self.pixel_range}"
        return at if named is None else f"through {named['name']}"

    @property
    def gaussians(self) -> ClassGaussians:
        """The Gaussian of every class."""
        return self.latent_classes.gaussians

    @property
    def modes(self) -> ClassModes | None:
        """The principal modes of every class, or None."""
        return self.latent_classes.modes

    @property
    def autoencoder(self) -> StandardisedAutoencoder | None:
        """The codec, if it is an autoencoder."""
        return self.codec if isinstance(self.codec, StandardisedAutoencoder) else None

    # ---- image <-> latent ----------------------------------------------------------------------------------------

    def _checked(self, x: Tensor) -> Tensor:
        """Images x on the model's device. TypeError, ValueError: another dtype, shape or range."""
        self.codec.check(x)
        return x.to(self.device)

    def numbers(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        """The flow's input for images x [B,C,H,W]: pixels in [-1/2, 1/2), or standardised latents; [B, *flow_shape].

        `noise` dequantises pixels on levels, see `codec.levels.to_levels`. An autoencoder's latents get none.
        """
        return self.codec.encode(x, noise)

    def encode(self, x: Tensor, generator: Dequantisation = None) -> tuple[Tensor, Tensor]:
        """Image to latent.

        Args:
            x: [B,C,H,W], integers or floats of `pixel_range`.
            generator: the source of uniform dequantisation noise, see `codec.levels.to_levels`; None: the middle of the
                bin. Without effect on an autoencoder's latents.

        Returns:
            z [B, d] and log|det| [B] in nats, of dz/dlevels or, with an autoencoder E, of dz/dE(x).

        Raises:
            TypeError, ValueError: wrong dtype, shape or (checked on the CPU) value range.
        """
        return self.numbers_and_latents(x, generator)[1:]

    def numbers_and_latents(self, x: Tensor, generator: Dequantisation = None) -> tuple[Tensor, Tensor, Tensor]:
        """The flow's numbers h [B, *flow_shape] of images x, with the z [B, d] and log|det| [B] of `encode`."""
        chunks = self._checked(x).split(self.codec.most)
        noise = generator.split(self.codec.most) if isinstance(generator, Tensor) else [generator] * len(chunks)
        numbers = [self.numbers(chunk, each) for chunk, each in zip(chunks, noise, strict=True)]
        latents = zip(*map(self.encode_numbers, numbers), strict=True)
        h, z, logdet = (torch.cat([*column]) for column in (numbers, *latents))
        return h, z, logdet

    def encode_numbers(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` for the result of `numbers`."""
        z, logdet = self.flow(h)
        return z, logdet + self.codec.logdet()

    def encode_batch(self, data: ImageData, x: Tensor, noise: Dequantisation = None) -> tuple[Tensor, Tensor]:
        """`encode` for a batch x of `data`, which may hold the flow's numbers already (`ImageData.with_numbers`)."""
        return self.encode_numbers(x.to(self.device, self.dtype)) if data.encoded else self.encode(x, noise)

    def decode(self, z: Tensor, clamp: bool = True) -> Tensor:
        """Latents z [B, d] to float images [B,C,H,W], clamped to the range; with `clamp=False` the exact inverse.

        Bin middles of uint8 images come back as value / 255, if there is no autoencoder. `pixel_range.from_floats`
        makes images of the dtype.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"expected latents of shape [B, {self.dim}], got {list(z.shape)}")
        x = self.decode_numbers(self.inverse(z.to(self.device, self.dtype)))
        return x.clamp(*self.pixel_range.limits) if clamp else x

    def inverse(self, z: Tensor) -> Tensor:
        """The flow's numbers [B, *flow_shape] of latents z [B, d]."""
        return torch.cat([self.flow.inverse(chunk)[0] for chunk in z.split(self.codec.most)])

    def decode_numbers(self, h: Tensor) -> Tensor:
        """`decode`, without `clamp`, for the result of `inverse`."""
        return torch.cat([self.codec.decode(chunk) for chunk in h.split(self.codec.most)])

    @torch.no_grad()
    def interpolate(self, x1: Tensor, x2: Tensor, steps: int = 8) -> Tensor:
        """Straight lines in latent space from the images x1 to x2 [B,C,H,W]: [B, steps, C, H, W] floats in the range.

        Both ends are included, so `steps` is at least 2.
        """
        check_whole("steps", steps, 2)
        z1, z2 = self.encode(x1)[0], self.encode(x2)[0]
        weight = torch.linspace(0, 1, steps, device=z1.device, dtype=z1.dtype)[:, None]
        lines = z1[:, None] * (1 - weight) + z2[:, None] * weight
        return self.decode(lines.flatten(0, 1)).unflatten(0, (x1.shape[0], steps))

    @torch.no_grad()
    def round_trip_error(self, x: Tensor) -> Tensor:
        """|decode(encode(x)) - x| of every pixel in uint8 steps, 1/255 of the range: [B,C,H,W].

        It is infinite where nothing finite came back. Below half a step, rounding gives the pixel back exactly.
        """
        return self._pixel_error(x, self.inverse(self.encode(x)[0]))

    def _pixel_error(self, x: Tensor, h: Tensor) -> Tensor:
        """|x' - x| in uint8 steps of images x and the x' that are decoded from the numbers h."""
        low, high = self.pixel_range.limits
        back = self.decode_numbers(h) if self.codec.exact else self.decode_numbers(h).clamp(low, high)
        away = back.double() - self.codec.target(x.to(self.device)).double()
        return away.abs().mul_(255 / (high - low)).nan_to_num_(nan=math.inf)

    @torch.no_grad()
    def flow_error(self, x: Tensor) -> Tensor:
        """`largest_change` of each image's numbers h by the flow and its inverse: [B].

        The unit is the range of a pixel, or the standard deviation of a channel of the autoencoder's latents.
        """
        h, z, _ = self.numbers_and_latents(x)
        return largest_change(h, self.inverse(z))

    @torch.no_grad()
    def check_invertibility(self, x: Tensor) -> dict[str, float]:
        """A summary of `round_trip_error` on the images `x` [B,C,H,W].

        Returns:
            `max_error` and `mean_error` of the finite pixels in uint8 steps, and two shares of all pixels:
            `within_half_step`, which rounding gives back exactly, and `non_finite`. With an autoencoder also the
            `psnr` in dB, and the largest `flow_error`.
        """
        errors, changes = [], []
        for part in x.split(_CHUNK):
            h, z, _ = self.numbers_and_latents(part)
            back = self.inverse(z)
            errors.append(self._pixel_error(part, back).cpu())
            changes.append(largest_change(h, back).cpu())
        error = torch.cat(errors)
        finite, count = error[error.isfinite()], max(1, error.numel())
        found = {
            "max_error": float(finite.max()) if finite.numel() else math.inf,
            "mean_error": float(finite.sum()) / max(1, finite.numel()),
            "within_half_step": float((finite < 0.5).sum()) / count,
            "non_finite": 1 - finite.numel() / count,
        }
        if not self.codec.exact:
            found["psnr"] = 20 * math.log10(255) - 10 * math.log10(max(1e-12, float(error.square().mean())))
            found["flow_error"] = float(torch.cat(changes).max())
        return found

    # ---- densities and classification ----------------------------------------------------------------------------

    def log_prob_per_class(self, x: Tensor, generator: Dequantisation = None) -> Tensor:
        """log p(x | y) of every class: [B, K] nats per image (Eq. 2)."""
        z, logdet = self.encode(x, 0 if generator is None else generator)
        return self.latent_classes.log_prob(z) + logdet[:, None]

    def log_prob(self, x: Tensor, y: Tensor | None = None, generator: Dequantisation = None) -> Tensor:
        """log p(x | y), or log p(x) under a uniform prior over classes if `y` is None: [B] nats per image."""
        z, logdet = self.encode(x, 0 if generator is None else generator)
        if y is None:
            return torch.logsumexp(self.latent_classes.log_prob(z), 1) - math.log(self.num_classes) + logdet
        y = self._check_labels(y, x.shape[0])
        return self.latent_classes.log_prob_of(z, y) + logdet

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """-log_prob / (d ln 2): [B]. ValueError: the codec has no levels."""
        if not self.codec.levels:
            raise ValueError(
                "bits/dim are of pixel levels, and this model has numbers without levels: use "
                "-model.log_prob(x) / model.dim, in nats per number"
            )
        return -self.log_prob(x, y) / self.codec.divisor

    def posterior(self, x: Tensor) -> Tensor:
        """p(y | x) of the generative classifier, see `Classes.posterior`: [B, K]. Deterministic."""
        return self.latent_classes.posterior(self.encode(x)[0])

    def predict(self, x: Tensor) -> Tensor:
        """argmax_y log N(f(x); mu_y, Sigma_y): int64 [B]."""
        return self.latent_classes.log_prob(self.encode(x)[0]).argmax(1)

    # ---- generation ----------------------------------------------------------------------------------------------

    def sample_latents(
        self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None, source: str = "gaussian"
    ) -> Tensor:
        """Latents of the classes `y`, int64 [B]: [B, d].

        Args:
            temperature: >= 0, multiplies the standard deviation.
            generator: on the CPU.
            source: "gaussian" (the learned class Gaussian) or "rfcm" (the mean and covariance that `fit_modes`
                estimated from real latents).

        Raises:
            ValueError: wrong labels (ClassMismatchError), a negative temperature, another source, "rfcm" without modes.
        """
        y = self._check_labels(y)
        return self.latent_classes.sampler(source).sample(y, temperature, generator)

    @torch.no_grad()
    def sample(
        self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None, source: str = "gaussian"
    ) -> Tensor:
        """Images of the classes `y`: [B,C,H,W] floats in the range, decoded from `sample_latents`."""
        return self.decode(self.sample_latents(y, temperature, generator, source))

    # ---- fitted to images ----------------------------------------------------------------------------------------

    def latents_of_classes(
        self, data: ImageData, rows: Sequence[np.ndarray], seed: int, count: Callable[[int], object] | None = None
    ) -> Callable[[int], Tensor]:
        """A function from the class y to the latents of the images `rows[y]`: [n, d] on the CPU.

        The dequantisation noise of a class depends on `seed` and y alone. `count` is told how many images were encoded.
        All ranks call the function together. Each encodes its share, and all get all latents.
        """

        @torch.no_grad()
        def latents(index: int) -> Tensor:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
            nothing, parts = torch.empty(0, self.dim, dtype=self.dtype), []
            for x, _, share in data.shared_batches(rows[index], _CHUNK):
                noise = draw_noise(x, generator, share) if self.codec.levels else None
                parts.append(self.encode_batch(data, x, noise)[0].cpu())
                if count is not None:
                    count(share.total)
            batches = zip_longest(*gather(parts), fillvalue=nothing)  # in the order of the images
            return torch.cat([part for batch in batches for part in batch])

        return latents

    def _check_labels(self, y: Tensor, batch: int | None = None) -> Tensor:
        y = torch.as_tensor(y)
        if y.ndim != 1 or y.is_floating_point() or batch not in (None, len(y)):
            raise ValueError(f"labels must be whole numbers of shape [{batch or 'B'}], got {y.dtype} {list(y.shape)}")
        if y.device.type == "cpu" and y.numel() and not (0 <= int(y.min()) and int(y.max()) < self.num_classes):
            raise ClassMismatchError(
                f"unknown class: labels run from {int(y.min())} to {int(y.max())}, the model has classes 0 to "
                f"{self.num_classes - 1} ({', '.join(self.classes[:5])}{', ...' if self.num_classes > 5 else ''})"
            )
        return y.to(self.device, torch.int64)

    def on(self: _Flow, device: torch.device | str | None) -> _Flow:
        """This model if it is on `device` already, or `device` is None; otherwise a copy of it there."""
        if device is None or usable(device) == self.device:
            return self
        return copy.deepcopy(self).to(device)


def largest_change(h: Tensor, back: Tensor) -> Tensor:
    """The largest |back - h| of each row [B, ...]: [B], infinite where it is not finite."""
    return (back - h).abs().flatten(1).amax(1).nan_to_num(nan=math.inf)
