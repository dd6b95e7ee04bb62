"""Decoded blocks of images in memory that DataLoader workers share: what one decodes, all can read."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
from torch import Tensor, nn

from glem_augment.synthetic.shared_memory import SharedArrays

# A process waits for a block of another one for twice the longest time that a block has taken, and these seconds.
# Until one has been decoded, nobody knows how long it takes: for the second number of seconds. Waiting too long only
# costs time after workers were stopped in the middle; too short, a block is decoded twice.
PATIENCE, FIRST_PATIENCE = 1.0, 30.0


class BlockStore:
    """Blocks of uint8 images: all of them where they fit into `cache_bytes`, else those used last (at least one).

    The memory is shared (see `SharedArrays`) and lives on when a worker ends: the workers of the next epoch find what
    those of the last one decoded.

    Args:
        sizes: images in each block.
        image_shape: (C, H, W).
        cache_bytes: of images to keep.

    Raises:
        ValueError: if the system refuses that much memory.
    """

    def __init__(self, sizes: Sequence[int], image_shape: tuple[int, int, int], cache_bytes: int) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        image_bytes = math.prod(image_shape)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        total, blocks = int(self._sizes.sum()), len(self._sizes)
        self.holds_all = total * image_bytes <= cache_bytes
        # Images of a slot, in which any block fits; without slots every block has its place.
        self._slot = int(self._sizes.max())
        slots = 0 if self.holds_all else max(1, cache_bytes // (self._slot * image_bytes))
        room = total if self.holds_all else slots * self._slot
        layout = {
            "offset": ((blocks,), np.int64),  # of a block's first image in `images`; -1: not there
            "started": ((blocks,), np.float64),  # when somebody began to decode it; -inf: nobody does
            "broken": ((blocks,), np.int64),  # its images that are not finite; -1: never decoded
            "judged": ((blocks, 4), np.float64),  # items, candidates, failed, sum of confidences
            "held": ((slots,), np.int64),  # the block in each slot; -1: none
            "used": ((slots,), np.int64),  # when, on the clock of `counts`
            "counts": ((3,), np.int64),  # clock; blocks decoded again; longest decode in microseconds
            "weights": ((1,), np.int64),  # see `agrees`; -1: nobody has decoded yet
            "images": ((room, *image_shape), np.uint8),
        }
        try:
            self._shared = SharedArrays(layout)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"the system refuses {room * image_bytes / 2**20:.0f} MiB for decoded images ({error}): give a smaller "
                "cache_bytes"
            ) from error
        self._open()
        for array in (self._offset, self._broken, self._held, self._weights):
            array.fill(-1)
        self._started.fill(-np.inf)

    def _open(self) -> None:
        arrays = self._shared.arrays
        self._offset, self._started, self._broken = arrays["offset"], arrays["started"], arrays["broken"]
        self._held, self._used, self._counts = arrays["held"], arrays["used"], arrays["counts"]
        self._images, self._judged, self._weights = arrays["images"], arrays["judged"], arrays["weights"]

    @property
    def can_be_sent(self) -> bool:
        """Whether a process that is being started now, and not forked, can share it by pickling."""
        return self._shared.can_be_sent

    def __getstate__(self) -> dict[str, Any]:
        return {k: self.__dict__[k] for k in ("_sizes", "_starts", "_slot", "holds_all", "_shared")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def agrees(self, fingerprint: int) -> bool:
        """Whether all that has been decoded so far was decoded by weights of this `fingerprint`, 0 or more; from now on
        it is to be."""
        with self._locked():
            if self._weights[0] < 0:
                self._weights[0] = fingerprint
            return int(self._weights[0]) == fingerprint

    @property
    def decoded_again(self) -> int:
        """Blocks that had been decoded before and had to give way since, in all processes together."""
        return int(self._counts[1])

    @property
    def not_finite(self) -> int:
        """Images in the blocks decoded so far whose values were not finite."""
        return int(self._broken.clip(min=0).sum())

    def not_finite_in(self, block: int) -> int:
        """Images of a block that has been decoded whose values were not finite."""
        return max(0, int(self._broken[block]))

    @property
    def blocks(self) -> int:
        """Blocks there are, decoded or not."""
        return len(self._sizes)

    def judged(self, first: int, last: int) -> np.ndarray:
        """Of blocks first ... last - 1 decoded so far: items, candidates, failed, sum of confidences; float64 [4]."""
        return self._judged[first:last].sum(axis=0)

    def read(self, blocks: np.ndarray, places: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy image places[i] of blocks[i] to out[i] where it is there; bool [n], which ones were.

        Args:
            blocks, places: int64 [n]; out: uint8 [n, C, H, W].
        """
        with self._locked():
            offset = self._offset[blocks]
            found = offset >= 0
            if found.all():
                np.take(self._images, offset + places, axis=0, out=out, mode="clip")
            elif found.any():
                out[found] = self._images[offset[found] + places[found]]
            self._touch(offset[found])
        return found

    def whole(self, block: int) -> np.ndarray | None:
        """A copy of a block, uint8 [m, C, H, W], or None."""
        with self._locked():
            offset = int(self._offset[block])
            if offset < 0:
                return None
            self._touch(np.array([offset]))
            return self._images[offset : offset + self._sizes[block]].copy()

    def claim(self, blocks: np.ndarray) -> int | None:
        """The first of `blocks` that is neither there nor being decoded, for the caller to decode; or None.

        A claim that is older than any decode takes is void: its process was stopped.
        """
        longest = self._counts[2] / 1e6
        patience = 2 * longest + PATIENCE if longest else FIRST_PATIENCE
        with self._locked():
            now = time.monotonic()
            free = blocks[(self._offset[blocks] < 0) & (self._started[blocks] < now - patience)]
            if len(free) == 0:
                return None
            self._started[free[0]] = now
            return int(free[0])

    def claim_ahead(self, last: int, most: int) -> int | None:
        """The first of the `most` blocks after `last` that is neither there nor being decoded, for the caller to
        decode; None too where there is too little room to keep blocks that nobody wants yet."""
        if not self.holds_all and len(self._held) < 4 * most:
            return None
        return self.claim(np.arange(last + 1, min(last + 1 + most, self.blocks)))

    def give_up(self, block: int) -> None:
        """Take back a claim: the block was not decoded after all."""
        self._started[block] = -np.inf

    def write(
        self, block: int, images: np.ndarray, not_finite: int, judged: tuple[int, int, float] = (0, 0, 0.0)
    ) -> None:
        """Keep a decoded block, uint8 [m, C, H, W], and what is known of it: see `judged`, the items left out."""
        with self._locked():
            if self._broken[block] >= 0 and self._offset[block] < 0:
                self._counts[1] += 1
            if self._offset[block] < 0:
                self._offset[block] = self._room(block)
            offset = int(self._offset[block])
            self._images[offset : offset + len(images)] = images
            self._touch(np.array([offset]))
            self._broken[block] = not_finite
            self._judged[block] = (len(images), *judged)
            if np.isfinite(self._started[block]):
                took = int(1e6 * (time.monotonic() - self._started[block]))
                self._counts[2] = max(int(self._counts[2]), took)
            self._started[block] = -np.inf

    def _room(self, block: int) -> int:
        """Where the block's images may be written."""
        if self.holds_all:
            return int(self._starts[block])
        slot = int(self._used.argmin())
        if self._held[slot] >= 0:
            self._offset[self._held[slot]] = -1
        self._held[slot] = block
        return slot * self._slot

    def _touch(self, offsets: np.ndarray) -> None:
        if not self.holds_all:
            self._counts[0] += 1
            self._used[offsets // self._slot] = self._counts[0]

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return self._shared.locked("the cache of a SyntheticDataset is", "make the data set again")


# Threads of a process decode one after the other. Each uses all its cores anyway, and while one decodes a flow keeps
# constants of its weights, a judge in training is switched to eval mode, and no weight may move.
_decoding = threading.RLock()


def one_at_a_time() -> contextlib.AbstractContextManager[Any]:
    """Hold this while a flow or a judge is used."""
    return _decoding


def _after_fork() -> None:
    # The thread that held it is not there in the child.
    global _decoding
    _decoding = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def move_if_sent(*things: Any) -> None:
    """Before modules and tensors are pickled for a process that is being spawned, move them to shared memory.

    Pickling does so too, but at any time: what another thread decodes from weights that are being moved is garbage.
    """
    if get_spawning_popen() is None:
        return
    with one_at_a_time():
        for thing in things:
            parts = [*thing.parameters(), *thing.buffers()] if isinstance(thing, nn.Module) else [thing]
            for tensor in parts:
                if isinstance(tensor, Tensor):
                    tensor.share_memory_()
