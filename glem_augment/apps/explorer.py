"""What the explorer shows, without its page.

Samples come from `SyntheticDataset`, and moves from `GLEMAugment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from glem_augment import GLEM, Adversarial, BadImageError, GLEMAugment, ImageData, Mixup, Noise, SyntheticDataset
from glem_augment.codec import PixelAdapter, to_uint8
from glem_augment.evaluation import ModelClassifier, Section, compose, memorisation_ratio, nearest, spread
from glem_augment.images import FolderSource, images_for, to_tensor

# Uploads with more pixels than cameras take are refused. Longer sides than a screen shows are reduced.
MOST_PIXELS, LONGEST = 50_000_000, 768
NEIGHBOURS = 12  # samples that are compared with real images


class Moved(NamedTuple):
    """A moved image, uint8 [C, H, W]; posterior [2, K] and likelihood [2] given the class, before and after the move;
    whether `GLEMAugment` rejects the move."""

    image: Tensor
    posterior: Tensor
    likelihood: Tensor
    rejected: bool


class _Shown(GLEMAugment):
    """The transform, which keeps its last moved images [n, C, H, W] in `moved`, even if it rejects them."""

    def _images(self, *values: Any) -> Tensor:
        self.moved = super()._images(*values)
        return self.moved


class Explorer:
    """Samples, moves, lines and measurements for the page. Images are uint8 [C, H, W] on the CPU, uploads of any size.

    Args:
        model: with modes, if images will be moved.
        sets: images of the model's shape, labelled by its class indices, and optionally training images. Pictures show
            the first set at full size.
    """

    def __init__(self, model: GLEM, sets: Sequence[ImageData]) -> None:
        model.pixel_range.need_8_bits("the page")
        self.model, self.sets, self.data = model, sets, sets[0]
        self.shown, self.pixels = sets[0].at_own_size(), PixelAdapter(model.image_shape)

    def samples(self, cls: int, temperature: float, source: Any, seed: int, count: int = 32) -> Tensor:
        """The first samples [count, C, H, W] that `glem generate` draws of a class."""
        return SyntheticDataset(self.model, {cls: count}, temperature, seed, source=source).images(range(count))

    def sample_sheet(self, cls: int, temperature: float, source: Any, seed: int) -> Image.Image:
        """A picture of samples with class, source, temperature and seed."""
        cells = self.samples(cls, temperature, source, seed).unflatten(0, (-1, 8))
        note = f"source {source}, temperature {temperature:g}, seed {seed}"
        return compose(f"Samples: {self.model.classes[cls]}", note, [Section("", cells)])

    def neighbours(self, cls: int, temperature: float, source: Any, seed: int) -> tuple[Image.Image, str]:
        """Samples above their nearest real images in pixels, and a sentence on memorisation."""
        samples = self.samples(cls, temperature, source, seed, NEIGHBOURS)
        flat, sections = samples.flatten(1), [Section("Samples", samples[None])]
        real = [data.tensor() for data in self.sets]
        for images, kind in zip(real, ("held-out", "training") if len(real) > 1 else ("real",), strict=True):
            distance, index = nearest(flat, images.flatten(1))
            labels = [f"{value:.0f}" for value in (distance / self.model.dim**0.5).tolist()]
            sections.append(Section(f"The nearest of {len(images)} {kind} images", images[index][None], labels))
        text = "With a train split, this compares distances to training images and to held-out images."
        if len(real) > 1:
            held_out, train = (images.flatten(1) for images in real)
            nearer = NEIGHBOURS * memorisation_ratio(flat, train, held_out)["share_nearer_train"]
            text = (
                f"{nearer:g} of {NEIGHBOURS} samples are nearer to a training image than to any of equally many "
                "held-out images. Without memorisation it is about half."
            )
        note = "the numbers are root mean squares of the pixels' differences, of 255"
        return compose(f"Nearest real images: {self.model.classes[cls]}", note, sections), text

    def picked(self, index: int, upload: str | None = None) -> tuple[Tensor, int]:
        """An uploaded file and its class by the model, or else image `index` of the data and its class."""
        if upload is None:
            return self.shown[index]
        image = read_upload(upload)
        return image, int(self.model.predict(self._small(image)))

    def _small(self, *images: Tensor) -> Tensor:
        """The images in the model's size and channels, uint8 [n, C, H, W]."""
        for image in images:
            self.pixels.check(image[None])
        return torch.cat([to_uint8(self.pixels.to_model(self.pixels.to_floats(image[None]))) for image in images])

    @torch.no_grad()
    def move(
        self,
        image: Tensor,
        cls: int,
        policy: Any,
        strength: float,
        seed: int = 0,
        coefficients: Sequence[float] | None = None,
    ) -> Moved:
        """Move an image along the modes of class `cls`.

        Args:
            policy: "mixup" draws a partner from the class, "adversarial" attacks the model's posterior.
            strength: in standard deviations; of mixup, twice 1 - keep.
            coefficients: of the top modes, in place of the draws of policy "noise".
        """
        modes = None if coefficients is None else len(coefficients)
        policies = {"mixup": Mixup(), "noise": Noise(strength), "adversarial": Adversarial(strength)}
        aug = _Shown(self.model, policies[policy], p=1.0, modes=modes, seed=seed)
        if policy == "adversarial":
            aug.attach(ModelClassifier(self.model))
        x, y = image[None].to(self.model.device), torch.tensor([cls])
        drawn = aug.draw(x, y)
        if coefficients is not None:
            drawn = drawn.having(eps=torch.tensor([coefficients], dtype=torch.float32))
        elif policy == "mixup":
            drawn = drawn.having(keep=torch.tensor([1 - strength / 2]))
        aug.replay(x, y, drawn)
        moved = aug.moved[0].cpu()
        small = self._small(image, moved)
        likelihood = self._likelihood(small, y.expand(2))
        return Moved(moved, self.model.posterior(small).cpu(), likelihood, aug.stats["rejected"] > 0)

    def _likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """-log p(x | y) [n] in the model's unit, such as bits/dim."""
        return (-self.model.log_prob(x, y) / self.model.likelihood[2]).cpu()

    @torch.no_grad()
    def between(self, first: Tensor, second: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """The straight line in latent space between two images.

        Returns:
            The image with that share of the second image, in the model's size; 41 shares from 0 to 1; their
            posteriors [41, K].
        """
        start, end = self.model.encode(self._small(first, second))[0]
        shares = torch.linspace(0, 1, 41)
        line = torch.lerp(start, end, torch.cat([shares, torch.tensor([share])])[:, None].to(start))
        image = to_uint8(self.model.decode(line[-1:]))[0].cpu()
        return image, shares, self.model.latent_classes.posterior(line[:-1]).cpu()

    @cached_property
    @torch.no_grad()
    def measured(self) -> tuple[Tensor, ...]:
        """Posteriors [N, K], likelihoods [N] and classes [N] of the data's images."""
        parts = []
        with tqdm(total=len(self.data), unit="image", desc="measuring", disable=None) as bar:
            for x, y in self.data.batches(np.arange(len(self.data)), 64):
                parts.append((self.model.posterior(x).cpu(), self._likelihood(x, y), y))
                bar.update(len(y))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def drawn(model: GLEM, most: int) -> ImageData:
    """Samples of evenly spread classes, at most 64, in place of real images."""
    classes = spread(model.num_classes, min(model.num_classes, most, 64)).tolist()
    samples = SyntheticDataset(model, dict.fromkeys(classes, min(most, 64) // len(classes)))
    return images_for(model, (samples.images(range(len(samples))).cpu(), samples.targets))


class _Upload(FolderSource):
    def where(self, index: int) -> str:
        return Path(self.paths[index]).name

    def open(self, index: int) -> Image.Image | Tensor:
        image = super().open(index)
        if isinstance(image, Tensor):
            return image
        if image.width * image.height > MOST_PIXELS:
            size = f"{image.width} x {image.height}"
            raise BadImageError(f"{self.where(index)} has {size} pixels, more than {MOST_PIXELS}: reduce it")
        image.thumbnail((LONGEST, LONGEST))  # a JPEG is decoded at about that size
        ImageOps.exif_transpose(image, in_place=True)  # telephones turn portraits by a tag
        return image


@lru_cache(maxsize=4)  # every move of a slider reads the same file
def read_upload(path: str) -> Tensor:
    """An untrusted image file: uint8 [C, H, W], one channel if it is grey, at most 768 pixels a side.

    Raises:
        BadImageError: no image, a damaged image, or too many pixels (found before they are decoded).
    """
    image = _Upload("upload", [], [], np.zeros(1, dtype=np.int64), [path])[0][0]
    if isinstance(image, Tensor):
        raise BadImageError("upload has more than 8 bits per channel: convert it to 8 bits")
    return to_tensor(image, len(image.getbands()))
