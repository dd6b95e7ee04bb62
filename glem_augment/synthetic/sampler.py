"""From items, each given by its class and its place within the class, to latents and images.

A latent is a function of the seed, its class, its place within the class and the number of the attempt. It never
depends on what else is drawn at the same time.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glem_augment.augment.moves import MARGIN, plausible
from glem_augment.checks import SOURCES, DrawSource, check_choice, check_number, check_whole
from glem_augment.data.dataset import ImageData
from glem_augment.data.pixels import to_uint8
from glem_augment.devices import evaluating
from glem_augment.latent.modes import project_on_modes
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.plan import Real

# One generator serves this many items of a class. This is not the block of decoding: changing it changes the draws.
NOISE_BLOCK = 16
MAX_ATTEMPTS = 5  # draws of an item whose images are not plausible; the last one stays
# The key in an export's settings that identifies the real images behind a mixup set.
REAL_IMAGES = "real_images_sha256"


@dataclass(frozen=True)
class Drawing:
    """How latents are drawn. The fields are arguments of `SyntheticDataset`."""

    source: DrawSource | None = None
    seed: int = 0
    temperature: float = 0.9
    modes: int | None = None
    alpha: float = 1.0


class RealLatents:
    """Latents `z` of real images, float32 [N, d] in the CPU's memory, class after class; `starts`, `counts`: int64 [K].

    `sha256` is of the pixels and counts, because the last bits of latents differ between machines.
    """

    def __init__(self, model: GLEM, images: ImageData) -> None:
        order = np.argsort(images.targets, kind="stable")
        self.counts = np.bincount(images.targets, minlength=model.num_classes)
        self.starts = np.cumsum(self.counts) - self.counts
        self.name, pixels, parts = images.name, hashlib.sha256(self.counts.tobytes()), []
        with torch.no_grad(), evaluating(model):
            for x, _ in images.batches(order, 256):
                pixels.update(x.numpy().tobytes())
                parts.append(model.encode(x)[0].cpu())
        self.z, self.sha256 = torch.cat(parts), pixels.hexdigest()


class Drawn(NamedTuple):
    """Latents [n, d] on the model's device; images uint8 [n, C, H, W] on the CPU; which are implausible, bool [n]."""

    latents: Tensor
    images: Tensor
    implausible: np.ndarray


class Sampler:
    """DrawSource latents and images.

    - "gaussian": z = mu_y + T sigma_y eps, from the class's diagonal Gaussian.
    - "rfcm": the mean and full covariance of the class's real latents, as stored in `model.modes`.
    - "mixup": z = z_i + (1 - l) P (z_j - z_i), two real latents of the class, P the projection on its top modes.

    l ~ Beta(alpha, alpha) is folded to [1/2, 1]. `wanted`, bool [K], says which classes will be drawn.
    """

    def __init__(self, model: GLEM, drawing: Drawing, real: Real | None, wanted: np.ndarray) -> None:
        source = drawing.source or ("gaussian" if model.modes is None else "rfcm")
        check_choice("source", source, SOURCES)
        self.model, self.source, self.seed = model, source, check_whole("seed", drawing.seed, 0)
        self.temperature = check_number("temperature", drawing.temperature, 0.0, math.inf)
        self.alpha = check_number("alpha", drawing.alpha, 0.0, math.inf, open_low=True)
        self.real: RealLatents | None = None
        if source != "gaussian" and model.modes is None:
            raise ValueError(f"source={source!r} needs model.modes: fit them first with model.fit_modes(data)")
        if source == "mixup":
            if real is None:
                raise ValueError("source='mixup' mixes real images: give real=")
            self.modes = model.checked_modes(drawing.modes)
            _check_counts(model, np.bincount(real.targets, minlength=model.num_classes), wanted)
            self.real = RealLatents(model, real.images(model))

    def settings(self) -> dict[str, Any]:
        """The settings that decide the images, for the manifest of an export."""
        found: dict[str, Any] = {
            "temperature": self.temperature,
            "seed": self.seed,
            "source": self.source,
            "attempts": MAX_ATTEMPTS,
        }
        if self.real is not None:
            found |= {"modes": self.modes, "alpha": self.alpha, REAL_IMAGES: self.real.sha256}
        return found

    @torch.no_grad()
    def draw(self, cls: np.ndarray, within: np.ndarray) -> Drawn:
        """Draw the items of the classes cls at the places within, int64 [n]; draws that are not plausible again."""
        with evaluating(self.model):
            z = self.latents(cls, within)
            x = self.model.decode(z, clamp=False)
            bad = ~plausible(x, MARGIN)
            for attempt in range(1, MAX_ATTEMPTS):
                rows = bad.nonzero()[:, 0]
                if not len(rows):
                    break
                again = rows.cpu().numpy()
                z[rows] = self.latents(cls[again], within[again], attempt)
                x[rows] = self.model.decode(z[rows], clamp=False)
                bad[rows] = ~plausible(x[rows], MARGIN)
        return Drawn(z, to_uint8(x).cpu(), bad.cpu().numpy())

    def latents(self, cls: np.ndarray, within: np.ndarray, attempt: int = 0) -> Tensor:
        """Latents float32 [n, d] of one attempt, on the model's device."""
        model = self.model
        if self.source == "mixup":
            return self._mix(cls, within, attempt)
        modes = model.modes if self.source == "rfcm" else None
        noise = np.empty((len(cls), model.dim + (0 if modes is None else modes.rank)), dtype=np.float32)
        for generator, _, rows, places in self._generators(cls, within, attempt):
            noise[rows] = generator.standard_normal((NOISE_BLOCK, noise.shape[1]), dtype=np.float32)[places]
        eps = torch.from_numpy(noise).to(model.device, model.dtype)
        y = torch.from_numpy(cls).to(model.device)
        if modes is not None:
            return modes.sample_from_noise(y, eps, self.temperature)
        return self.temperature * model.gaussians.variance()[y].sqrt() * eps + model.gaussians.mu[y]

    def _mix(self, cls: np.ndarray, within: np.ndarray, attempt: int) -> Tensor:
        real, fitted, device = self.real, self.model.modes, self.model.device
        assert real is not None and fitted is not None
        first, second = np.empty((2, len(cls)), dtype=np.int64)
        share = np.empty(len(cls), dtype=np.float32)  # 1 - l
        for generator, c, rows, places in self._generators(cls, within, attempt):
            count = int(real.counts[c])
            i = generator.integers(count, size=NOISE_BLOCK)
            # Any other image of the class; a class of one image is mixed with itself.
            j = (i + generator.integers(1, max(2, count), size=NOISE_BLOCK)) % count
            mix = generator.beta(self.alpha, self.alpha, size=NOISE_BLOCK)
            first[rows], second[rows] = real.starts[c] + i[places], real.starts[c] + j[places]
            share[rows] = np.minimum(mix, 1 - mix)[places]
        z, other = (real.z[rows].to(device) for rows in (first, second))
        delta = torch.from_numpy(share).to(device)[:, None] * (other - z)
        return z + project_on_modes(delta, torch.from_numpy(cls).to(device), fitted.directions[:, : self.modes])

    def _generators(
        self, cls: np.ndarray, within: np.ndarray, attempt: int
    ) -> Iterator[tuple[np.random.Generator, int, list[int], np.ndarray]]:
        """For each class and group of NOISE_BLOCK places: generator, class, rows, and their places in the group."""
        for (c, number), rows in rows_by_block(cls, within, NOISE_BLOCK).items():
            # SeedSequence makes neighbouring seeds, classes and groups unrelated.
            sequence = np.random.SeedSequence([self.seed, c, number, attempt])
            yield np.random.Generator(np.random.PCG64(sequence)), c, rows, within[rows] - number * NOISE_BLOCK


def _check_counts(model: GLEM, counts: np.ndarray, wanted: np.ndarray) -> None:
    """Refuse wanted classes without a real image to mix, and warn of classes with only one; counts: int64 [K]."""
    empty, single = ([model.classes[i] for i in np.flatnonzero(wanted & (counts == n))] for n in (0, 1))
    if empty:
        raise ValueError(
            f"source='mixup' has no real image of {', '.join(empty[:10])}: leave these classes out (per_class as a "
            "mapping, or weight 0), or take another source"
        )
    if single:
        warnings.warn(
            f"source='mixup' has one real image of {', '.join(single[:10])}: all synthetic ones will be copies of it; "
            "give more, or take another source",
            stacklevel=4,
        )


def rows_by_block(cls: np.ndarray, within: np.ndarray, size: int) -> dict[tuple[int, int], list[int]]:
    """The rows that lie in each block, given by class and number; a block has `size` places of one class."""
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, block in enumerate(zip(cls.tolist(), (within // size).tolist(), strict=True)):
        rows[block].append(row)
    return rows
