"""Rejection: draw again until the flow's posterior, or a classifier of the user's, agrees with the class."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from glem_augment.checks import check_number, check_whole
from glem_augment.data.pixels import in_range
from glem_augment.devices import evaluating
from glem_augment.model.glem import GLEM

Oracle = Callable[[Tensor], Tensor]


class Accepted(NamedTuple):
    """Latents [n, d], their images [n, C, H, W] where they had to be decoded for the oracle (else None), confidence
    [n] in the class, and how many candidates were drawn."""

    z: Tensor
    images: Tensor | None
    confidence: Tensor
    candidates: int


@dataclass(frozen=True)
class Rejection:
    """min_confidence: in (0, 1], smallest probability of the class; oracle: judges images, None: the flow's posterior
    judges latents; max_attempts: candidates per item, of which the best is kept where none is good enough.

    An oracle gives probabilities, or logits, which are put through softmax. Which of them is told from its first batch
    (rows from 0 up that sum to 1, as near as its dtype can, are probabilities) and not asked again. A row with NaN has
    no say in that, and has confidence 0.
    """

    min_confidence: float
    oracle: Oracle | None
    max_attempts: int
    # Names this rejection among all there are.
    token: str = field(default_factory=lambda: secrets.token_hex(8), init=False, repr=False, compare=False)
    # Empty until the oracle's first batch, then whether it gives probabilities.
    _gives_probabilities: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # As plain numbers, which JSON can carry.
        least = check_number("min_confidence", self.min_confidence, 0.0, 1.0, open_low=True)
        object.__setattr__(self, "min_confidence", least)
        if self.oracle is not None and not callable(self.oracle):
            raise TypeError(f"oracle must take images and give probabilities, got {type(self.oracle).__name__}")
        object.__setattr__(self, "max_attempts", check_whole("max_attempts", self.max_attempts, 1))

    @classmethod
    def given(cls, min_confidence: float | None, oracle: Oracle | None, max_attempts: int) -> Rejection | None:
        """From the arguments of a data set; None where there is to be none. ValueError: an oracle with no measure."""
        if min_confidence is not None:
            return cls(min_confidence, oracle, max_attempts)
        if oracle is not None:
            raise ValueError("an oracle judges by min_confidence: give one, such as 0.5")
        return None

    @torch.no_grad()
    def select(self, model: GLEM, cls: Tensor, draw: Callable[[Tensor, int], Tensor]) -> Accepted:
        """The first candidate of each item that is good enough.

        Args:
            model: decodes.
            cls: int64 [n] on the CPU.
            draw: (int64 rows on the CPU, attempt) -> latents of these rows.
        """
        rows = torch.arange(len(cls))
        z = draw(rows, 0)
        images, confidence = self._judge(model, z, cls)
        candidates = len(cls)
        for attempt in range(1, self.max_attempts):
            rows = (confidence < self.min_confidence).nonzero()[:, 0]
            if len(rows) == 0:
                break
            new = draw(rows, attempt)
            new_images, new_confidence = self._judge(model, new, cls[rows])
            candidates += len(rows)
            better = new_confidence > confidence[rows]
            rows, there = rows[better], better.nonzero()[:, 0].to(z.device)
            z = z.index_copy(0, rows.to(z.device), new[there])
            confidence[rows] = new_confidence[better]
            if images is not None and new_images is not None:
                images = images.index_copy(0, rows.to(images.device), new_images[there])
        return Accepted(z, images, confidence, candidates)

    def _judge(self, model: GLEM, z: Tensor, cls: Tensor) -> tuple[Tensor | None, Tensor]:
        """Images (or None), and the confidence [n] on the CPU; 0 where it is not a number."""
        images = None
        if self.oracle is None:
            probability = model.posterior_from_latents(z)
        else:
            with evaluating(model):
                images = model.decode(z, clamp=False)
            seen = in_range(images)
            if isinstance(self.oracle, nn.Module):
                with evaluating(self.oracle):
                    output = self.oracle(seen)
            else:
                output = self.oracle(seen)
            probability = self._probabilities(output, len(z), model.num_classes)
            finite = torch.isfinite(images).flatten(1).all(dim=1, keepdim=True)
            probability = probability * finite.to(probability.device)
        own = probability.gather(1, cls.to(probability.device)[:, None])[:, 0]
        return images, own.nan_to_num(nan=0.0).float().cpu()

    def _probabilities(self, output: Tensor, n: int, num_classes: int) -> Tensor:
        """What the oracle gave, as probabilities float32 [n, K]; NaN or 0 in a row that is not usable."""
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape != (n, num_classes):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the oracle must give [{n}, {num_classes}], one number per class of the flow; got {got}")
        # Rounded to bfloat16, probabilities can miss a sum of 1 by half of its eps, which is 4e-3; a sum that the
        # oracle itself took in that dtype by more.
        tolerance = max(1e-3, 4 * torch.finfo(output.dtype).eps) if output.is_floating_point() else 1e-3
        output = output.float()
        # -inf is a fair logit, of a class that is ruled out.
        usable = (output < torch.inf).all(dim=1, keepdim=True)
        if not self._gives_probabilities:
            rows = output[usable[:, 0]]
            if len(rows) == 0:
                return torch.zeros_like(output)
            summed = (rows.sum(1) - 1).abs() < tolerance
            self._gives_probabilities.append(bool((rows >= 0).all()) and bool(summed.all()))
        return output.where(usable, 0.0) if self._gives_probabilities[0] else output.softmax(1)


def acceptance_report(min_confidence: float, classes: Sequence[str], rows: np.ndarray) -> dict[str, Any]:
    """What rejection did, for JSON; rows [K, 4]: items, candidates, failed and the sum of confidences per class."""
    per_class = {name: _rates(row) for name, row in zip(classes, rows, strict=True)}
    return {"min_confidence": min_confidence, "total": _rates(rows.sum(axis=0)), "classes": per_class}


def _rates(row: np.ndarray) -> dict[str, Any]:
    """From items, candidates, failed and the sum of confidences."""
    items, candidates, failed, confidence = (float(value) for value in row)
    return {
        "items": int(items),
        "candidates": int(candidates),
        "rate": (items - failed) / candidates if candidates else None,
        "failed": int(failed),
        "confidence": confidence / items if items else None,
    }
