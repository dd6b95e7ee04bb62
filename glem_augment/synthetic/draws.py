"""How images are drawn: each follows from the seed, its class and its place in the class, and never from other items.

Images are decoded in blocks, because the last bits of convolutions and matrix products depend on the batch size. The
blocks of a class begin at the places 0, 8, 16, 32, 64, and then at every 64th place, whatever its number of images. So
an image depends on its place alone, small classes decode few images in vain, and large ones use large batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glem_augment.checks import check_choice, check_number, check_whole
from glem_augment.model.glem import GLEM
from glem_augment.names import SOURCES, DrawSource
from glem_augment.precision import full_precision
from glem_augment.tensors import evaluating

BLOCKS = 8, 64  # the smallest and the largest block; other numbers would change the last bits of images
NOISE_GROUP = 16  # places of a class that share a generator; another number would change the draws
TEMPERATURE, PRIVATE_TEMPERATURE = 0.9, 1.0  # by default; less than 1 was worse for sets of private models
MAX_ATTEMPTS = 5  # draws of an item at most; the last draw is kept


class Drawn(NamedTuple):
    """Latents [n, d] on the model's device; images [n, C, H, W] on the CPU; which are out of range, bool [n]."""

    latents: Tensor
    images: Tensor
    out_of_range: np.ndarray


class Draws:
    """The draws of a set, block after block.

    - "gaussian": z = mu_y + T sigma_y eps, from the class's diagonal Gaussian.
    - "rfcm": the mean and full covariance of the class's real latents, as stored in `model.modes`.

    Args:
        counts: images of each of the model's K classes.
        order: the classes of an export, in the order of their labels.
        source, seed, temperature: see `SyntheticDataset`.

    Attributes:
        edges: the place at which each block of a class begins, and the end of the last block of the largest class.
        settings: everything else that decides the images, as JSON can hold it.
    """

    def __init__(
        self,
        model: GLEM,
        counts: Sequence[int],
        order: Sequence[int],
        source: DrawSource | None,
        seed: int,
        temperature: float | None,
    ) -> None:
        self.model, self.counts, self.order = model, counts, order
        self.source = source = source or ("gaussian" if model.modes is None else "rfcm")
        check_choice("source", source, SOURCES)
        if temperature is None:
            temperature = TEMPERATURE if model.config.privacy is None else PRIVATE_TEMPERATURE
        self.seed = check_whole("seed", seed, 0)
        self.temperature = check_number("temperature", temperature, 0.0, math.inf)
        self.edges = [0]
        while self.edges[-1] < max(counts):
            self.edges.append(self.edges[-1] + int(np.clip(self.edges[-1], *BLOCKS)))
        self.settings: dict[str, Any] = {"temperature": self.temperature, "seed": self.seed, "source": source}
        self.settings |= {"attempts": MAX_ATTEMPTS, "blocks": list(BLOCKS)}
        if source == "rfcm" and model.modes is None:
            raise ValueError(f"source={source!r} needs model.modes: fit them first with model.fit_modes(data)")

    def blocks(self) -> list[tuple[int, int]]:
        """(class, number) of every block, class after class in the order of their labels."""
        return [(c, n) for c in self.order for n, first in enumerate(self.edges) if first < self.counts[c]]

    def places(self, cls: int, number: int) -> range:
        """The places of a block, without the places beyond the class's count."""
        return range(self.edges[number], min(self.edges[number + 1], self.counts[cls]))

    @torch.no_grad()
    def draw(self, cls: int, number: int) -> Drawn:
        """Draw the items of a block, each up to MAX_ATTEMPTS times."""
        # The last block is drawn whole too: in a smaller batch its images would have other last bits.
        model, within = self.model, np.arange(self.edges[number], self.edges[number + 1])
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
        count = len(self.places(cls, number))
        return Drawn(z[:count], model.pixel_range.from_floats(x[:count]).cpu(), bad[:count].cpu().numpy())

    def latents(self, cls: int, within: np.ndarray, attempt: int = 0) -> Tensor:
        """Latents float32 [n, d] of one attempt, on the model's device."""
        model, y = self.model, torch.full((len(within),), cls)
        part = model.latent_classes.sampler(self.source)
        noise = np.empty((len(within), part.noise_size), dtype=np.float32)
        for generator, rows, places in self._generators(cls, within, attempt):
            noise[rows] = generator.standard_normal((NOISE_GROUP, noise.shape[1]), dtype=np.float32)[places]
        eps = torch.from_numpy(noise).to(model.device, model.dtype)
        with full_precision(model.device.type):
            return part.sample_from_noise(y, eps, self.temperature)

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
