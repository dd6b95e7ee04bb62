"""How images are drawn: each follows from the seed, its class and its place in the class.

A latent is a function of seed, class, place in the class and number of the attempt. It never depends on other items.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glem_augment.checks import SOURCES, DrawSource, check_choice, check_number, check_whole
from glem_augment.classes.modes import mix_along_modes
from glem_augment.images.dataset import as_image_data
from glem_augment.model.glem import GLEM
from glem_augment.precision import full_precision
from glem_augment.synthetic.plan import Real
from glem_augment.tensors import evaluating

NOISE_GROUP = 16  # places of a class that share a generator; another number would change the draws
TEMPERATURE, PRIVATE_TEMPERATURE = 0.9, 1.0  # by default; less than 1 was worse for sets of private models
MAX_ATTEMPTS = 5  # draws of an item at most; the last draw is kept
REAL_IMAGES = "real_images_sha256"  # the key in an export's settings that identifies the real images of a mixup


class RealLatents:
    """Latents `z` of real images, float32 [N, d] on the CPU, class after class; `starts`, `counts`: int64 [K].

    `sha256` is the hash of pixels and counts, because the last bits of latents differ between machines.

    Raises:
        ValueError: a class that will be drawn (`wanted`, bool [K]) has no real image.
    """

    def __init__(self, model: GLEM, real: Real, wanted: np.ndarray) -> None:
        self.counts = np.bincount(real.targets, minlength=model.num_classes)
        self.starts = np.cumsum(self.counts) - self.counts
        empty, single = ([model.classes[i] for i in np.flatnonzero(wanted & (self.counts == n))] for n in (0, 1))
        if empty:
            raise ValueError(
                f"source='mixup' has no real image of {', '.join(empty[:10])}: leave these classes out (per_class as a "
                "mapping), or take another source"
            )
        if single:
            warnings.warn(
                f"source='mixup' has one real image of {', '.join(single[:10])}, and all synthetic images of the class "
                "will be copies of it: give more, or take another source",
                stacklevel=4,
            )
        images = as_image_data(real.data, model.image_shape, pixel_range=model.pixel_range)
        self.name, pixels, parts = images.name, hashlib.sha256(self.counts.tobytes()), []
        with torch.no_grad(), evaluating(model):
            for x, _ in images.batches(np.argsort(real.targets, kind="stable"), 256):
                pixels.update(x.numpy().tobytes())
                parts.append(model.encode(x)[0].cpu())
        self.z, self.sha256 = torch.cat(parts), pixels.hexdigest()


class Drawn(NamedTuple):
    """Latents [n, d] on the model's device; images [n, C, H, W] on the CPU; which are out of range, bool [n]."""

    latents: Tensor
    images: Tensor
    out_of_range: np.ndarray


class Draws:
    """Draws latents and images of a model's classes.

    - "gaussian": z = mu_y + T sigma_y eps, from the class's diagonal Gaussian.
    - "rfcm": the mean and full covariance of the class's real latents, as stored in `model.modes`.
    - "mixup": z = z_i + (1 - l) P (z_j - z_i). z_i and z_j are real latents of the class, P projects on its top modes,
      and l ~ Beta(alpha, alpha) is folded to [1/2, 1].

    Args:
        real: the real images of "mixup".
        wanted: bool [K], which classes will be drawn.
        source, seed, temperature, modes, alpha: see `SyntheticDataset`.
    """

    def __init__(
        self,
        model: GLEM,
        real: Real | None,
        wanted: np.ndarray,
        source: DrawSource | None,
        seed: int,
        temperature: float | None,
        modes: int | None,
        alpha: float | None,
    ) -> None:
        source = source or ("gaussian" if model.modes is None else "rfcm")
        check_choice("source", source, SOURCES)
        unused = {"temperature": temperature} if source == "mixup" else {"modes": modes, "alpha": alpha}
        if given := [name for name, value in unused.items() if value is not None]:
            raise ValueError(f"source={source!r} takes no {' and no '.join(given)}: leave out what has no effect")
        self.model, self.source, self.seed = model, source, check_whole("seed", seed, 0)
        if temperature is None:
            temperature = TEMPERATURE if model.config.privacy is None else PRIVATE_TEMPERATURE
        self.temperature = check_number("temperature", temperature, 0.0, math.inf)
        self.alpha = check_number("alpha", 1.0 if alpha is None else alpha, 0.0, math.inf, open_low=True)
        self.real: RealLatents | None = None
        if source != "gaussian" and model.modes is None:
            raise ValueError(f"source={source!r} needs model.modes: fit them first with model.fit_modes(data)")
        if source == "mixup":
            if real is None:
                raise ValueError("source='mixup' mixes real images: give real=")
            self.modes = model.checked_modes(modes)
            self.real = RealLatents(model, real, wanted)

    def settings(self) -> dict[str, Any]:
        """The settings that decide the images, for the manifest of an export."""
        found = dict(temperature=self.temperature, seed=self.seed, source=self.source, attempts=MAX_ATTEMPTS)
        mixup = {} if self.real is None else {"modes": self.modes, "alpha": self.alpha, REAL_IMAGES: self.real.sha256}
        return found | mixup

    @torch.no_grad()
    def draw(self, cls: int, within: np.ndarray) -> Drawn:
        """Draw the items of a class at the places within, int64 [n], up to MAX_ATTEMPTS times."""
        model = self.model
        with evaluating(model):
            z = self.latents(cls, within)
            x = model.decode(z, clamp=False)
            bad = ~model.pixel_range.near(x)
            for attempt in range(1, MAX_ATTEMPTS):
                rows = bad.nonzero()[:, 0]
                if not len(rows):
                    break
                z[rows] = self.latents(cls, within[rows.cpu().numpy()], attempt)
                x[rows] = model.decode(z[rows], clamp=False)
                bad[rows] = ~model.pixel_range.near(x[rows])
        return Drawn(z, model.pixel_range.from_floats(x).cpu(), bad.cpu().numpy())

    def latents(self, cls: int, within: np.ndarray, attempt: int = 0) -> Tensor:
        """Latents float32 [n, d] of one attempt, on the model's device."""
        model, y = self.model, torch.full((len(within),), cls)
        if self.source == "mixup":
            return self._mix(y, cls, within, attempt)
        part = model.latent_classes.sampler(self.source)
        noise = np.empty((len(within), part.noise_size), dtype=np.float32)
        for generator, rows, places in self._generators(cls, within, attempt):
            noise[rows] = generator.standard_normal((NOISE_GROUP, noise.shape[1]), dtype=np.float32)[places]
        eps = torch.from_numpy(noise).to(model.device, model.dtype)
        with full_precision(model.device.type):
            return part.sample_from_noise(y, eps, self.temperature)

    def _mix(self, y: Tensor, cls: int, within: np.ndarray, attempt: int) -> Tensor:
        real, fitted, device = self.real, self.model.modes, self.model.device
        assert real is not None and fitted is not None
        start, count = int(real.starts[cls]), int(real.counts[cls])
        first, second = np.empty((2, len(within)), dtype=np.int64)
        away = np.empty(len(within), dtype=np.float32)  # 1 - keep
        for generator, rows, places in self._generators(cls, within, attempt):
            i = generator.integers(count, size=NOISE_GROUP)
            # Any other image of the class; a class of one image is mixed with itself.
            j = (i + generator.integers(1, max(2, count), size=NOISE_GROUP)) % count
            mix = generator.beta(self.alpha, self.alpha, size=NOISE_GROUP)
            first[rows], second[rows] = start + i[places], start + j[places]
            away[rows] = np.minimum(mix, 1 - mix)[places]
        z, other = (real.z[rows].to(device) for rows in (first, second))
        part = fitted.on_host(y, fitted.covariance_rows(fitted.rows_of(y.to(device), z)))
        keep, directions = 1 - torch.from_numpy(away).to(device), fitted.directions[:, : self.modes]
        with full_precision(device.type):
            return mix_along_modes(z, other, keep, part, directions, alone=True)[0]

    def _generators(
        self, cls: int, within: np.ndarray, attempt: int
    ) -> Iterator[tuple[np.random.Generator, np.ndarray, np.ndarray]]:
        """For each group of NOISE_GROUP places of a class: its generator, rows of `within`, and places in the group."""
        groups = within // NOISE_GROUP
        for number in np.unique(groups).tolist():
            rows = np.flatnonzero(groups == number)
            # SeedSequence makes neighbouring seeds, classes and groups unrelated.
            sequence = np.random.SeedSequence([self.seed, cls, number, attempt])
            yield np.random.Generator(np.random.PCG64(sequence)), rows, within[rows] - number * NOISE_GROUP
