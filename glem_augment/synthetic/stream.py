"""SyntheticStream: synthetic images without an end or an index, always new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from glem_augment.checks import check_number, check_whole
from glem_augment.data.pixels import to_uint8_
from glem_augment.devices import evaluating
from glem_augment.model.glem import GLEM, as_model
from glem_augment.random_state import WorkerCounts, rank
from glem_augment.synthetic.balance import as_image_data, for_every_class
from glem_augment.synthetic.blocks import one_at_a_time
from glem_augment.synthetic.dataset import to_pil
from glem_augment.synthetic.epochs import Epochs
from glem_augment.synthetic.latents import LatentSource, RealLatents, warn_of_single_images
from glem_augment.synthetic.rejection import Oracle, Rejection, acceptance_report

JUDGED_ROWS = 64


class SyntheticStream(IterableDataset):
    """An iterable data set of (PIL image, int): every epoch, worker and rank gives other images.

    Images are made in blocks of `block`; block number b is a function of seed, epoch and b alone. The workers of all
    ranks share the blocks out among themselves, so the images of an epoch do not depend on how many workers there are,
    their order does. Every rank has equally many. Nothing is kept: it costs a decode per image and epoch, where a
    `SyntheticDataset` decodes once.

    An epoch begins with `iter`, here or in the workers of a DataLoader, which begin it together. The next one has the
    next number, whoever iterates: no images come twice when the number of workers changes, or after a look at the
    first ones. A look is an epoch too; `set_epoch` sets the number. Every rank counts for itself, and a copy
    (deepcopy, pickle) goes on from where the original was, so that both give the same images: give it another seed.

    Args:
        model: a GLEM or its name.
        length: images per epoch, over all ranks and workers (rounded up to a multiple of the ranks); None: no end.
        weights: of the classes, K numbers >= 0, or a mapping to them from all class names, ids or indices; None: all
            the same.
        temperature, seed, transform, target_transform, source, block, device, real, modes, alpha, min_confidence,
            oracle, max_attempts: as for `SyntheticDataset`.
        world: (rank, ranks); None: from torch.distributed, where it is initialised.

    Raises:
        ValueError, TypeError: for an argument out of range.
    """

    def __init__(
        self,
        model: GLEM | str,
        length: int | None = None,
        weights: Sequence[float] | Mapping[Any, float] | None = None,
        temperature: float = 0.8,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source: str = "gaussian",
        block: int = 64,
        device: torch.device | str | None = None,
        real: Any = None,
        modes: int | None = None,
        alpha: float = 1.0,
        min_confidence: float | None = None,
        oracle: Oracle | None = None,
        max_attempts: int = 20,
        world: tuple[int, int] | None = None,
    ) -> None:
        model = as_model(model)
        self.length = None if length is None else check_whole("length", length, 1)
        self.seed, self.block = check_whole("seed", seed, 0), check_whole("block", block, 1)
        self.probabilities = _probabilities(weights, model)
        self.rejection = Rejection.given(min_confidence, oracle, max_attempts)
        self.transform, self.target_transform = transform, target_transform
        self.model = model.on(device)
        latents = None
        if source == "mixup" and real is not None:
            images = as_image_data(model, real)
            there = np.bincount(images.targets, minlength=model.num_classes)
            if (self.probabilities[there == 0] > 0).any():
                raise ValueError("source='mixup' has no real image of some classes: give them weight 0")
            warn_of_single_images(model.classes, there * (np.asarray(self.probabilities) > 0))
            latents = RealLatents(self.model, images)
        self.latent_source = LatentSource(self.model, source, self.seed, temperature, latents, modes, alpha)
        self.classes, self.class_to_idx = list(model.classes), dict(model.class_to_idx)
        self.world = world
        self._epochs = Epochs()
        # Per class what `acceptance_report` takes.
        rows = JUDGED_ROWS if self.rejection is not None else 0
        self._judged = WorkerCounts(len(self.classes), 4, dtype=torch.float64, workers=rows)

    @property
    def epoch(self) -> int:
        """The next epoch's number, from 0."""
        return self._epochs.next(*self._place())

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next, where a run is resumed; otherwise they follow one another by themselves."""
        self._epochs.set(epoch)

    def __len__(self) -> int:
        """Images per epoch on this rank.

        Each worker ends with a batch of its own that may be short, so a DataLoader's length is exact with at most one
        worker, or where every worker has whole batches; it may give up to as many batches more as there are workers.
        """
        if self.length is None:
            raise TypeError("this SyntheticStream has no end, and so no length: give length=")
        return -(-self.length // self._place()[1])

    def _place(self) -> tuple[int, int]:
        """This process's rank and how many there are."""
        return self.world if self.world is not None else (rank(), _ranks())

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started anew, rather than forked, is not part of the process group.
        return {**self.__dict__, "world": self._place() if _ranks() > 1 else self.world}

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # Now, not with the first image, for which a worker may be too late: then it would count for the epoch after.
        return self._items(self._epochs.begin(*self._place()))

    def _items(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own, ranks = self._place()
        share = None if self.length is None else len(self)
        local = worker  # among the blocks of this rank
        while share is None or local * self.block < share:
            rest = self.block if share is None else min(self.block, share - local * self.block)
            yield from self._made(epoch, local * ranks + own, rest)
            local += workers

    def acceptance(self) -> dict[str, Any]:
        """What rejection did so far, in all workers of this process; as `SyntheticDataset.acceptance`.

        Raises:
            ValueError: for a stream without min_confidence.
        """
        if self.rejection is None:
            raise ValueError("nothing is rejected without min_confidence")
        return acceptance_report(self.rejection.min_confidence, self.classes, self._judged.total().numpy())

    def _count(self, y: np.ndarray, drawn: np.ndarray, confidence: np.ndarray, enough: float) -> None:
        classes = len(self.classes)
        items = np.bincount(y, minlength=classes)
        failed = np.bincount(y, weights=confidence < enough, minlength=classes)
        sums = np.bincount(y, weights=confidence, minlength=classes)
        row = np.stack([items, drawn, failed, sums], axis=1)
        self._judged.own().add_(torch.from_numpy(row))

    def _made(self, epoch: int, number: int, count: int) -> Iterator[tuple[Any, Any]]:
        sequence = np.random.SeedSequence([self.seed, epoch, number])
        y = np.random.default_rng(sequence).choice(len(self.probabilities), size=self.block, p=self.probabilities)
        # A place that no other block and epoch has; 2^40 are images enough for an epoch.
        within = epoch * 2**40 + number * self.block + np.arange(self.block)
        y, within = y[:count], within[:count]
        drawn = np.zeros(len(self.classes), dtype=np.int64)
        with one_at_a_time(), torch.no_grad(), evaluating(self.model):
            if self.rejection is None:
                x = self.model.decode(self.latent_source.draw(y, within), clamp=False)
            else:

                def draw(rows: Tensor, attempt: int) -> Tensor:
                    np.add.at(drawn, y[rows.numpy()], 1)
                    return self.latent_source.draw(y[rows.numpy()], within[rows.numpy()], attempt)

                accepted = self.rejection.select(self.model, torch.from_numpy(y), draw)
                self._count(y, drawn, accepted.confidence.numpy(), self.rejection.min_confidence)
                x = accepted.images if accepted.images is not None else self.model.decode(accepted.z, clamp=False)
        x = to_uint8_(x).cpu()
        for picture, label in zip(to_pil(x), y.tolist(), strict=True):
            yield (
                picture if self.transform is None else self.transform(picture),
                label if self.target_transform is None else self.target_transform(label),
            )


def _ranks() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _probabilities(weights: Sequence[float] | Mapping[Any, float] | None, model: GLEM) -> np.ndarray:
    num_classes = model.num_classes
    if weights is None:
        return np.full(num_classes, 1.0 / num_classes)
    if isinstance(weights, Mapping):
        weights = for_every_class(model, weights, "weights")
    if isinstance(weights, (Tensor, np.ndarray)):
        weights = weights.tolist()
    if not isinstance(weights, Sequence) or isinstance(weights, (str, bytes)):
        raise TypeError(f"weights must be {num_classes} numbers, got {weights!r}")
    found = np.array([check_number(f"weights[{i}]", w, 0.0, float("inf")) for i, w in enumerate(weights)])
    if len(found) != num_classes or found.sum() <= 0:
        raise ValueError(f"weights must be {num_classes} numbers from 0 that are not all 0, got {list(weights)!r}")
    return found / found.sum()
