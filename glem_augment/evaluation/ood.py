"""Telling images that the flow was not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glem_augment.errors import DataError
from glem_augment.evaluation.continuum import average_ranks
from glem_augment.model.glem import GLEM

OOD_SETS = ("noise", "rotated", "inverted")


def ood_images(x: Tensor, kind: str, seed: int = 0) -> Tensor:
    """Images out of the distribution, as many as in ``x`` uint8 [N,C,H,W].

    Args:
        kind: "noise" (uniform pixels), "rotated" (by 90 degrees, the shorter way round) or "inverted" (255 - x).
    """
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise TypeError(f"x must be uint8 images [N,C,H,W], got {x.dtype} {list(x.shape)}")
    if kind == "noise":
        return torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    if kind == "rotated":
        if x.shape[2] != x.shape[3]:
            raise DataError(f"images of {x.shape[2]}x{x.shape[3]} can't be turned by 90 degrees")
        return torch.rot90(x, 1, (2, 3)).contiguous()
    if kind == "inverted":
        return 255 - x
    raise ValueError(f"kind must be one of {', '.join(OOD_SETS)}, got {kind!r}")


@torch.no_grad()
def ood_scores(model: GLEM, x: Tensor, mean_nll: float | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Scores that are higher the less an image looks like the training data: each [N] float64.

    Args:
        x: uint8 [N,C,H,W]; mean_nll: nats per image, the mean of -log p(x) over training images, for the typicality.

    Returns:
        ``likelihood``: -log p(x), nats, uniform prior over classes; ``typicality``: |-log p(x) - mean_nll| (Nalisnick
        et al. 2019, batches of one), absent without ``mean_nll``; ``entropy``: of the class posterior, nats.
    """
    g = torch.Generator().manual_seed(seed)
    nll, entropy = [], []
    for part in x.split(256):
        scores = model.log_prob_per_class(part, g).double().cpu()
        nll.append(math.log(scores.shape[1]) - torch.logsumexp(scores, 1))
        log_posterior = torch.log_softmax(scores, 1)
        entropy.append(-(log_posterior.exp() * log_posterior).sum(1))
    result = {"likelihood": torch.cat(nll), "entropy": torch.cat(entropy)}
    if mean_nll is not None:
        result["typicality"] = (result["likelihood"] - mean_nll).abs()
    return result


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a score from ``outside`` [M] exceeds one from ``inside`` [N]; ties count half.

    By ranks (Mann & Whitney), since torchmetrics squeezes scores beyond [0, 1] through a sigmoid, where log-likelihoods
    of thousands of nats would all be equal.
    """
    n, m = len(inside), len(outside)
    if not n or not m:
        raise DataError(f"both sets need images, got {n} and {m}")
    scores = torch.cat([inside, outside]).double()
    if bool(torch.isnan(scores).any()):
        raise DataError("scores must not be NaN")
    return float((average_ranks(scores)[n:].sum() - m * (m + 1) / 2) / (n * m))
