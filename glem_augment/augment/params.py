"""What a call of GLEMAugment draws at random, and counts of what became of the drawn rows."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glem_augment.devices import send
from glem_augment.random_state import WorkerCounts

__all__ = ["AugmentParams"]


@dataclass
class AugmentParams:
    """The random choices of one call, for n selected rows of a batch of B; `draw` gives them on the CPU.

    Attributes:
        rows: int64 [n], the rows to change, rising.
        cls: int64 [n], the flow class of each row, whose modes are used; -1: the flow does not have the class, and the
            row is passed through.
        eps: float32 [n, k], standard normal: the coefficients of k modes.
        partner: int64 [n], the partner's row in the batch; -1: the partner is drawn from the RFCM of its class.
        partner_cls: int64 [n], the flow class of the partner; -1: a row of a class that the flow does not have.
        l: float32 [n] in [1/2, 1], the share of the own image along the modes.
        seeds: int64 [n], of the numbers from which a partner is drawn, where one is.

    Policies "noise" and "adversarial" have only rows, cls and eps; "mixup" has all but eps. The rest is empty.
    """

    rows: Tensor
    cls: Tensor
    eps: Tensor
    partner: Tensor
    partner_cls: Tensor
    l: Tensor  # noqa: E741  (the paper's letter)
    seeds: Tensor

    def to(self, device: torch.device | str) -> AugmentParams:
        """The same parameters on another device."""
        return AugmentParams(**{f.name: send(getattr(self, f.name), torch.device(device)) for f in fields(self)})

    def where(self, mask: Tensor) -> AugmentParams:
        """The parameters of those selected rows for which `mask`, bool [n], holds."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        n = len(self.rows)
        return AugmentParams(**{name: value[mask] if len(value) == n else value for name, value in values.items()})


def choose_rows(batch: int, p: float, generator: torch.Generator) -> Tensor:
    """Rows to change, int64 [n], rising. Each is chosen with probability p; n is p * batch, rounded up or down.

    The number of rows would differ from batch to batch if a coin were tossed for each one, and whatever prepares itself
    for the shapes it meets (oneDNN, cuDNN's benchmark mode, torch.compile) would do so again and again.
    """
    n = math.floor(p * batch + float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu")))
    return torch.randperm(batch, generator=generator, device="cpu")[:n].sort().values


def draw_shares(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """max(l, 1 - l) for l ~ Beta(alpha, alpha): float32 [n] in [1/2, 1]."""
    # NumPy draws it, because torch.distributions takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    share = np.random.default_rng(seed).beta(alpha, alpha, n)
    return torch.tensor(np.maximum(share, 1.0 - share), dtype=torch.float32, device="cpu")


def normal(n: int, m: int, generator: torch.Generator) -> Tensor:
    """Standard normal float32 [n, m] on the CPU, whatever torch's defaults are."""
    return torch.randn(n, m, generator=generator, dtype=torch.float32, device="cpu")


class MoveCounts:
    """Counts of rows over all calls, here and in DataLoader workers.

    selected: rows chosen to be changed. replaced: of these, rows that were kept because the decoded image was not
    plausible, or the flow did not give the original back. unmapped: of these, rows that were kept because the flow does
    not have their class.
    """

    NAMES = ("selected", "replaced", "unmapped")
    FIRST, MOST = 100, 0.5  # a warning is given if more than this share of the first rows was kept as it was

    def __init__(self) -> None:
        self._counts = WorkerCounts(len(self.NAMES))
        self._unread: list[Tensor] = []
        self._judged = False

    def add(self, selected: int, unmapped: int, replaced: Tensor) -> None:
        """Add one call's counts. `replaced` is a number on the device of the batch, which need not wait for it."""
        own = self._counts.own()
        own[0] += selected
        own[2] += unmapped
        self._unread.append(replaced)
        if replaced.device.type == "cpu" or len(self._unread) >= self.FIRST:
            self._read()

    def stats(self) -> dict[str, int]:
        """All counts by name; reading them waits for the device."""
        self._read()
        return dict(zip(self.NAMES, self._counts.total().tolist(), strict=True))

    def _read(self) -> None:
        own = self._counts.own()
        own[1] += sum(int(count) for count in self._unread)
        self._unread.clear()
        selected, replaced, unmapped = own.tolist()
        if self._judged or selected < self.FIRST:
            return
        self._judged = True
        if replaced + unmapped > self.MOST * selected:
            warnings.warn(
                f"of the first {selected} images chosen {replaced} were kept as they were because the moved ones were "
                f"not plausible or the flow does not give the originals back, and {unmapped} because the flow does not "
                "have their class (see aug.stats). Fit the flow to images like these (model.adapt), lower the "
                "strength, or put the transform before strong crops, RandAugment and RandomErasing",
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        self._read()
        return self.__dict__
