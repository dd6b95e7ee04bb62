"""From a block of items (a class, and places within it) to uint8 images: drawing, rejection, decoding, the copy to the
CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glem_augment.data.pixels import to_uint8_
from glem_augment.devices import check_worker_device, evaluating
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.blocks import one_at_a_time
from glem_augment.synthetic.latents import LatentSource
from glem_augment.synthetic.rejection import Accepted, Rejection


class Decoded(NamedTuple):
    """A block on the CPU: uint8 [m, C, H, W], how many of its images are not finite, and what rejection did:
    candidates drawn, items that none was good enough for, sum of confidences (zeros without rejection)."""

    images: Tensor
    not_finite: int
    judged: tuple[int, int, float]


class _Decoding(NamedTuple):
    """A block on its way to the CPU: as `Decoded`, and what to wait for before looking (None: nothing)."""

    images: Tensor
    not_finite: Tensor
    judged: tuple[int, int, float]
    arrived: torch.cuda.Event | None

    def wait(self) -> Decoded:
        if self.arrived is not None:
            self.arrived.synchronize()
        return Decoded(self.images, int(self.not_finite), self.judged)


def _not_finite(x: Tensor) -> Tensor:
    """How many images of [n, C, H, W] have values that are not finite, int64 []."""
    total = x.sum()
    # Where one can look without waiting: almost never is there one.
    if x.device.type == "cpu" and math.isfinite(total):
        return torch.zeros((), dtype=torch.int64)
    return (~torch.isfinite(x)).flatten(1).any(dim=1).sum()


class BlockDecoder:
    """Decodes blocks; on CUDA one ahead, so that the host writes one block while the device decodes the next.

    Args:
        model: decodes. source: draws latents. rejection: None, or what draws them again.
        counts: images of each class. block: images of a block; the last one of a class has what is left.
    """

    def __init__(
        self, model: GLEM, source: LatentSource, rejection: Rejection | None, counts: Sequence[int], block: int
    ) -> None:
        self.model, self.source, self.rejection = model, source, rejection
        self.counts, self.block = counts, block
        self._ahead: dict[tuple[int, int], _Decoding] = {}

    def accepted(self, cls: int, number: int) -> Accepted:
        """What rejection keeps of block `number` of a class. Of a decoder with rejection only."""
        assert self.rejection is not None
        check_worker_device(self.model.device)
        y, within = self._items(cls, number)

        def draw(rows: Tensor, attempt: int) -> Tensor:
            return self.source.draw(y[rows.numpy()], within[rows.numpy()], attempt)

        with one_at_a_time():
            return self.rejection.select(self.model, torch.from_numpy(y), draw)

    def decode(self, cls: int, number: int) -> Decoded:
        """Block `number` of a class."""
        return (self._ahead.pop((cls, number), None) or self._start(cls, number)).wait()

    def decode_ahead(self, cls: int, number: int) -> None:
        """Start to decode a block for the next call of `decode`; of use on CUDA, where it need not be waited for. At
        most one block is under way; another call replaces it."""
        if (cls, number) not in self._ahead:
            self._ahead = {(cls, number): self._start(cls, number)}

    def _start(self, cls: int, number: int) -> _Decoding:
        accepted = None if self.rejection is None else self.accepted(cls, number)
        with one_at_a_time(), torch.no_grad(), evaluating(self.model):
            if accepted is None or accepted.images is None:
                z = self.source.draw(*self._items(cls, number)) if accepted is None else accepted.z
                x = self.model.decode(z, clamp=False)
            else:
                x = accepted.images
        # Not drawn again: item i would then no longer be a function of the seed alone.
        not_finite = _not_finite(x)
        images, judged = to_uint8_(x), self._judged(accepted)
        if images.device.type != "cuda":
            return _Decoding(images.cpu(), not_finite, judged, None)
        # Into pinned memory the copy runs by itself, while the host goes on to the next block.
        on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (images, not_finite)]
        for to, value in zip(on_host, (images, not_finite), strict=True):
            to.copy_(value, non_blocking=True)
        return _Decoding(*on_host, judged, torch.cuda.current_stream(images.device).record_event())

    def _items(self, cls: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Class and place within it of a block's items, int64 [m] each."""
        within = np.arange(number * self.block, min(self.counts[cls], (number + 1) * self.block))
        return np.full_like(within, cls), within

    def _judged(self, accepted: Accepted | None) -> tuple[int, int, float]:
        if accepted is None or self.rejection is None:
            return 0, 0, 0.0
        failed = int((accepted.confidence < self.rejection.min_confidence).sum())
        return accepted.candidates, failed, float(accepted.confidence.sum())

    def __getstate__(self) -> dict[str, Any]:
        # What is under way belongs to this process and its device.
        return {**self.__dict__, "_ahead": {}}
