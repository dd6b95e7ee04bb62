"""SyntheticStream: synthetic images without an index, new ones in every epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from glem_augment.checks import Source, check_number, check_whole
from glem_augment.model.glem import GLEM, as_model
from glem_augment.synthetic.balance import class_values
from glem_augment.synthetic.dataset import BLOCK, to_pil
from glem_augment.synthetic.latents import Sampler


class SyntheticStream(IterableDataset):
    """An iterable data set of (PIL image, int): every epoch, worker and rank gives other images.

    Images are made in blocks; block number b is a function of seed, epoch and b alone. The workers of all ranks share
    the blocks out among themselves, so how many workers there are decides the order of an epoch's images, but not what
    they are. Every rank has equally many. Nothing is kept: it costs a decode per image and epoch.

    As with torch's `DistributedSampler`, call `set_epoch` before each epoch; otherwise every epoch has the same images.
    timm's train.py does so by itself. Without a `length` there is one epoch without an end.

    Args:
        model: a GLEM or its name.
        length: images per epoch, over all ranks and workers (rounded up to a multiple of the ranks); None: no end.
        weights: relative frequencies of the classes, K numbers >= 0, or a mapping to them from class names, ids or
            indices (the others get no image); None: all the same.
        temperature, seed, transform, target_transform, source, device, real, modes, alpha, min_confidence: as
            for `SyntheticDataset`.

    """

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        length: int | None = None,
        weights: Sequence[float] | Mapping[Any, float] | None = None,
        temperature: float = 0.8,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source: Source = "gaussian",
        device: torch.device | str | None = None,
        real: Any = None,
        modes: int | None = None,
        alpha: float = 1.0,
        min_confidence: float | None = None,
    ) -> None:
        model = as_model(model)
        self.length = None if length is None else check_whole("length", length, 1)
        given = [1.0] * model.num_classes if weights is None else class_values(model, weights, "weights", 0.0)
        frequencies = np.array([check_number(f"weights[{i}]", w, 0.0, math.inf) for i, w in enumerate(given)])
        if frequencies.sum() <= 0:
            raise ValueError("weights must not all be 0")
        self.probabilities = frequencies / frequencies.sum()
        self.transform, self.target_transform = transform, target_transform
        wanted = self.probabilities > 0
        drawing = (source, seed, temperature, real, modes, alpha, min_confidence)
        self.sampler = Sampler(model.on(device), *drawing, wanted)
        self.block = BLOCK
        self.classes, self.class_to_idx = list(model.classes), dict(model.class_to_idx)
        self._sender: tuple[int, int] | None = None  # rank and number of ranks of the process that sent this copy
        # In shared memory, so that persistent DataLoader workers see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that `iter` gives."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, before its iterator is made. It holds for the workers of a DataLoader too."""
        self._epoch.fill_(check_whole("epoch", epoch, 0))

    def __len__(self) -> int:
        """Images per epoch on this rank. Every worker of a DataLoader may end with a short batch of its own."""
        if self.length is None:
            raise TypeError("this SyntheticStream has no end, and so no length: give length=")
        return -(-self.length // self._ranks()[1])

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own, ranks = self._ranks()
        epoch, share = self.epoch, None if self.length is None else len(self)
        local = worker  # number of the block among those of this rank
        while share is None or local * self.block < share:
            count = self.block if share is None else min(self.block, share - local * self.block)
            yield from self._block(epoch, local * ranks + own, count)
            local += workers

    def _block(self, epoch: int, number: int, count: int) -> Iterator[tuple[Any, Any]]:
        """The first `count` items of a block."""
        sequence = np.random.SeedSequence([self.sampler.seed, epoch, number])
        y = np.random.default_rng(sequence).choice(len(self.probabilities), size=self.block, p=self.probabilities)
        # Each place is used once over all blocks and epochs; 2^40 images are enough for an epoch.
        within = epoch * 2**40 + number * self.block + np.arange(self.block)
        drawn = self.sampler.images(y[:count], within[:count])
        for picture, label in zip(to_pil(drawn.images), y[:count].tolist(), strict=True):
            yield (
                picture if self.transform is None else self.transform(picture),
                label if self.target_transform is None else self.target_transform(label),
            )

    def _ranks(self) -> tuple[int, int]:
        if self._sender is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return self._sender or (0, 1)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned, rather than forked, is not part of the process group.
        return self.__dict__ | {"_sender": self._ranks()}
