"""Where the latents of synthetic images come from: class Gaussians, RFCM, or mixtures of real latents.

A latent is a function of the seed, its class, its place within the class and the number of the attempt; it does not
depend on what else is drawn.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from glem_augment.checks import check_choice, check_number
from glem_augment.data.dataset import ImageData
from glem_augment.devices import check_worker_device, evaluating, move
from glem_augment.errors import DataError
from glem_augment.latent.modes import project_on_modes
from glem_augment.model.glem import GLEM

SOURCES = ("gaussian", "rfcm", "mixup")
# Items whose noise comes from one generator. Not the block of decoding: that one may be chosen to fit the
# memory without changing what is drawn.
NOISE_BLOCK = 16
_CHUNK = 256


class RealLatents:
    """Latents of real images, by class; in the CPU's memory (N * d * 4 bytes), where forked workers share them.

    Args:
        model: encodes, in the middle of each bin.
        images: of the flow's size, labelled with the flow's classes.

    Attributes:
        z: float32 [N, d], class after class; starts, counts: int64 [K].
        sha256: of the pixels and counts, hexadecimal: latents would differ in their last bits between machines.
        name: of the images.

    Raises:
        DataError: for images of another shape.
    """

    def __init__(self, model: GLEM, images: ImageData) -> None:
        if tuple(images.image_shape) != model.image_shape:
            raise DataError(
                f"{images.name} has images of {images.image_shape}, the flow takes {model.image_shape}: open them with "
                f"open_data(..., image_size={model.image_shape[1:]}, channels={model.image_shape[0]})"
            )
        check_worker_device(model.device)
        order = np.argsort(images.targets, kind="stable")
        self.counts = np.bincount(images.targets, minlength=model.num_classes)
        self.name, read, parts = images.name, hashlib.sha256(self.counts.tobytes()), []
        with torch.no_grad(), evaluating(model):
            for x, _ in images.batches(order, _CHUNK):
                read.update(x.numpy().tobytes())
                parts.append(model.encode(x)[0].cpu())
        self.z, self.sha256 = torch.cat(parts), read.hexdigest()
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])


def warn_of_single_images(classes: Sequence[str], counts: np.ndarray) -> None:
    """Warn of classes whose images can only be mixed with themselves.

    Args:
        counts: int64 [K], real images of each class that is to be drawn, 0 for the others.
    """
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    if single:
        warnings.warn(
            f"source='mixup' has one real image of {', '.join(single[:10])}{', ...' if len(single) > 10 else ''}: all "
            "synthetic ones will be copies of it; give more, or take another source",
            stacklevel=3,
        )


class LatentSource:
    """Draws latents.

    Args:
        model: with fitted modes for "rfcm" and "mixup".
        source: "gaussian", "rfcm", or "mixup": z_i + (1 - l) P (z_j - z_i) of two real latents of the class.
        seed: int >= 0.
        temperature: factor on the standard deviation; "mixup" has none.
        real: the latents of "mixup".
        modes: top modes that P of "mixup" keeps, None for 64 or as many as are stored; alpha: of its
            l ~ Beta(alpha, alpha), folded to [1/2, 1].

    Raises:
        ValueError, TypeError: for what is missing or out of range.
    """

    def __init__(
        self,
        model: GLEM,
        source: str,
        seed: int,
        temperature: float,
        real: RealLatents | None = None,
        modes: int | None = None,
        alpha: float = 1.0,
    ) -> None:
        check_choice("source", source, SOURCES)
        self.temperature = check_number("temperature", temperature, 0.0, float("inf"))
        self.alpha = check_number("alpha", alpha, 0.0, float("inf"), open_low=True)
        if source != "gaussian" and model.modes is None:
            raise ValueError(f"source={source!r} needs model.modes: fit them first with model.fit_modes(data)")
        if source == "mixup":
            if real is None:
                raise ValueError("source='mixup' mixes real images: give real=")
            modes = model.checked_modes(modes)
        self.model, self.source, self.seed, self.real, self.modes = model, source, seed, real, modes

    def draw(self, cls: np.ndarray, within: np.ndarray, attempt: int = 0) -> Tensor:
        """Latents float32 [n, d] on the model's device.

        Args:
            cls, within: int64 [n], class and place within it; attempt: 0, or the number of the replacement.
        """
        check_worker_device(self.model.device)
        with torch.no_grad():
            if self.source == "mixup":
                return self._mixed(cls, within, attempt)
            width = self.model.dim + (self._fitted().rank if self.source == "rfcm" else 0)
            noise = np.empty((len(cls), width), dtype=np.float32)
            for generator, rows, places in self._generators(cls, within, attempt):
                noise[rows] = generator.standard_normal((NOISE_BLOCK, width), dtype=np.float32)[places]
            eps = move(torch.from_numpy(noise), self.model.device).to(self.model.dtype)
            if self.source == "gaussian" and len(cls) and (cls == cls[0]).all():
                cls = cls[:1]  # a block of images is of one class: then one row for all of them
            y = move(torch.from_numpy(cls), self.model.device)
            if self.source == "rfcm":
                return self._fitted().sample_from_noise(y, eps, self.temperature)
            gaussians = self.model.gaussians
            return (self.temperature * gaussians.variance()[y].sqrt() * eps).add_(gaussians.mu[y])

    def _mixed(self, cls: np.ndarray, within: np.ndarray, attempt: int) -> Tensor:
        real = self.real
        assert real is not None
        first, second = np.empty(len(cls), dtype=np.int64), np.empty(len(cls), dtype=np.int64)
        share = np.empty(len(cls), dtype=np.float32)
        for generator, rows, places in self._generators(cls, within, attempt):
            c = int(cls[rows[0]])
            there = int(real.counts[c])
            i = generator.integers(there, size=NOISE_BLOCK)
            # Any other image; a class of one is mixed with itself.
            j = (i + generator.integers(1, max(2, there), size=NOISE_BLOCK)) % there
            mixed = generator.beta(self.alpha, self.alpha, size=NOISE_BLOCK)
            first[rows], second[rows] = real.starts[c] + i[places], real.starts[c] + j[places]
            share[rows] = np.minimum(mixed, 1 - mixed)[places]
        device = self.model.device
        z, other = (move(real.z[torch.from_numpy(rows)], device) for rows in (first, second))
        delta = move(torch.from_numpy(share), device)[:, None] * (other - z)
        directions = self._fitted().directions[:, : self.modes]
        return z + project_on_modes(delta, move(torch.from_numpy(cls), device), directions)

    def _generators(
        self, cls: np.ndarray, within: np.ndarray, attempt: int
    ) -> list[tuple[np.random.Generator, np.ndarray, np.ndarray]]:
        """One generator per class and block of NOISE_BLOCK places, with its rows and their places in the block."""
        number = within // NOISE_BLOCK
        key = cls * (number.max(initial=0) + 1) + number
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        found = []
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            rows = order[start:end]
            c, b = int(cls[rows[0]]), int(number[rows[0]])
            # SeedSequence mixes the numbers so that neighbouring seeds, classes and blocks are unrelated. (A zero at
            # the end changes nothing: attempt 0 is what a set without rejection holds.)
            sequence = np.random.SeedSequence([self.seed, c, b, attempt])
            generator = np.random.Generator(np.random.PCG64(sequence))
            found.append((generator, rows, within[rows] - b * NOISE_BLOCK))
        return found

    def _fitted(self):  # noqa: ANN202  (ClassModes, or what model.modes is)
        assert self.model.modes is not None
        return self.model.modes
