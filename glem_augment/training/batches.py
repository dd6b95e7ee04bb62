"""The images of a run: their split, their order, and their batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glem_augment.codec.codec import Dequantisation
from glem_augment.distributed import Share
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM
from glem_augment.tensors import send
from glem_augment.training.augmentation import augment_batch
from glem_augment.training.config import TrainConfig

G_FRACTION, MAX_HELD_OUT = 0.1, 2000
EVAL_BATCH = 256
# So many numbers of latents fit in memory (60,000 of 784 are 190 MB); the least number of images of each class.
MOST_NUMBERS, LEAST_IMAGES = 60_000 * 784, 8
# Augments images uint8 [b,C,H,W], a part of a batch, with numbers from a generator: uint8 [b,C,H,W].
Augment = Callable[[Tensor, torch.Generator, Share], Tensor]


@dataclass(frozen=True)
class Split:
    """Disjoint, sorted indices of the images that train the flow (D_nf), fit the Gaussians (D_g) and only measure."""

    nf: np.ndarray
    g: np.ndarray
    val: np.ndarray


def stratified_split(targets: np.ndarray, num_classes: int, val_fraction: float, seed: int) -> Split:
    """Split every class in the same proportions (GLEM, Sec. 4.3: |D_g| = 0.1 |D|).

    Every class must have two images, and has at least one in `nf` and in `g`. A class of three images or more has one
    in `val`. The part `val_fraction` of each class for `val` is lowered where `val` would have more than about
    `MAX_HELD_OUT` images.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    scale = min(1.0, MAX_HELD_OUT / max(1.0, val_fraction * len(targets)))
    parts: dict[str, list[np.ndarray]] = {"nf": [], "g": [], "val": []}
    for index in range(num_classes):
        members = rng.permutation(np.nonzero(targets == index)[0])
        n = len(members)
        n_val = min(max(1, round(n * val_fraction * scale)), n - 2) if val_fraction > 0 and n >= 3 else 0
        n_g = min(max(1, round((n - n_val) * G_FRACTION)), n - n_val - 1)
        parts["val"].append(members[:n_val])
        parts["g"].append(members[n_val : n_val + n_g])
        parts["nf"].append(members[n_val + n_g :])
    return Split(**{name: np.sort(np.concatenate(value)).astype(np.int64) for name, value in parts.items()})


def epoch_order(indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Indices [steps, B] of the batches of one epoch, a function of seed and epoch alone.

    So a resumed run takes the batches of the killed run. A smaller last batch is dropped, unless it is the only one.
    """
    order = np.random.default_rng([seed, 0xE90C, epoch]).permutation(indices)
    batch = min(batch_size, len(order))
    steps = len(order) // batch
    return order[: steps * batch].reshape(steps, batch)


def seeded(seed: int, *key: int) -> torch.Generator:
    """A generator on the CPU, a function of the seed and the key."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def choose_views(x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    """One random view [b, C, h, w] of each of the images x [b, V, C, h, w], the part `share` of a batch."""
    view = torch.randint(x.shape[1], (share.total,), generator=generator)[share.rows].to(x.device)
    return x[torch.arange(len(x), device=x.device), view]


class Batches:
    """The images of a run, or the latents that they were encoded to.

    Args:
        augment: replaces the augmentation of the settings.

    Attributes:
        data: the images. With an autoencoder, its batches hold their latents. views: the data of the steps, with
            several latents of each image. split: see `stratified_split`.
    """

    def __init__(
        self, data: ImageData, config: TrainConfig, device: torch.device, augment: Augment | None = None
    ) -> None:
        self.data, self.views, self.config, self.device = data, data, config, device
        self.augment = augment or (lambda x, generator, part: augment_batch(x, config.augment, generator, part))
        counts = np.bincount(data.targets, minlength=len(data.classes))
        few = ", ".join([data.classes[k] for k in np.flatnonzero(counts < 2)][:5])
        if few:
            raise DataError(
                f"classes with fewer than the 2 images that a Gaussian needs: {few}; add images, or leave them out"
            )
        self.split = stratified_split(data.targets, len(data.classes), config.val_fraction, config.seed)

    def read(
        self, rows: np.ndarray, batch_size: int, data: ImageData | None = None
    ) -> Generator[tuple[Tensor, Tensor, Share], None, None]:
        """The batches of `ImageData.shared_batches` of `data`, by default of the run's data, on the device."""
        for x, y, share in (data or self.data).shared_batches(rows, batch_size, self.config.workers):
            yield send(x, self.device), send(y, self.device), share

    def epoch(
        self, rows: np.ndarray, epoch: int, steps: int, first: int = 0
    ) -> Generator[tuple[Tensor, Tensor, Share], None, None]:
        """The batches of an epoch over `rows` from number `first` to number `steps`; empty on a rank without rows.

        The images are not augmented.
        """
        order = epoch_order(rows, self.config.batch_size, self.config.seed, epoch)[:steps]
        x, size = torch.empty(0, *self.data.image_shape, dtype=torch.uint8), order.shape[1]
        nothing = x, torch.empty(0, dtype=torch.int64), Share(0, 0, size)
        batches = self.read(order[first:].reshape(-1), size, self.views)
        try:
            for _ in range(first, steps):
                yield next(batches, nothing)
        finally:
            batches.close()

    def augmented(self, x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
        """`x` uint8 [b,C,H,W] under the run's augmentation, or one of the views of latents [b,V,C,h,w]."""
        return choose_views(x, generator, share) if x.ndim == 5 else self.augment(x, generator, share)

    def numbers(self, model: GLEM, x: Tensor, noise: Dequantisation = None) -> Tensor:
        """The numbers of a batch x of `data` for the model's flow, without augmentation."""
        return x.to(model.dtype) if self.data.encoded else model.numbers(x, noise)

    def some_of_each_class(self, rows: np.ndarray, numbers: int) -> np.ndarray:
        """Some of `rows`, chosen at random and sorted; a class has at most `MOST_NUMBERS`, of `numbers` per image."""
        rows = np.random.default_rng([self.config.seed, 0x2EF17]).permutation(rows)
        most = max(LEAST_IMAGES, MOST_NUMBERS // numbers)
        classes = range(len(self.data.classes))
        return np.sort(np.concatenate([rows[self.data.targets[rows] == k][:most] for k in classes]))
