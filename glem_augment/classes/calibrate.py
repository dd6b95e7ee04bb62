"""The temperature of the posterior, fitted to latents that took no part in the Gaussians of their class.

With diagonal covariances each kept latent z is left out of the Gaussian of its class. Without z a class of n latents
with mean m has

    m'  =  m - (z - m) / (n - 1),        SS'  =  SS - (z - m)^2 n / (n - 1),

so the fit costs no second pass. The pooled variance keeps the influence of z, one image among all. With full
covariances up to a fifth of each class is held out, and the classes are fitted again without these latents, since the
change of truncated modes has no closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glem_augment.checks import HIGHEST_TEMPERATURE
from glem_augment.classes.classes import Classes
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.classes.statistics import ClassStatistics

KEPT = 2000  # at most about so many latents fit the temperature


@torch.no_grad()
def left_out_temperature(
    statistics: ClassStatistics, gaussians: ClassGaussians, shrinkage: float, floor: float
) -> float:
    """T for diagonal Gaussians fitted with `shrinkage`, each kept latent left out of its class.

    `floor` is the least variance of a class without the latent.
    """
    scores = gaussians.log_prob(torch.cat(statistics.kept).to(gaussians.mu)).double()
    y = _labels(statistics.kept)
    pooled = statistics.pooled.squares / statistics.pooled.count
    own = []
    for z, each in zip(statistics.kept, statistics.classes, strict=True):
        factor, deviation = each.count / max(1, each.count - 1), z.double() - each.mean
        left = (each.squares - factor * deviation.square()).clamp_min(0)
        variance = shrunk_variance(left, torch.tensor(each.count - 2.0), pooled, shrinkage).clamp_min(floor)
        own.append(-0.5 * ((factor * deviation).square() / variance + variance.log() + math.log(2 * math.pi)).sum(1))
    scores[torch.arange(len(y)), y] = torch.cat(own)
    return fit_temperature(scores, y)


@torch.no_grad()
def held_out_temperature(statistics: ClassStatistics, fit: Callable[[ClassStatistics], Classes]) -> float:
    """T for classes that `fit` makes, from up to a fifth of each class's latents, which are held out."""
    most = [min(each.count // 5, len(z)) for each, z in zip(statistics.classes, statistics.kept, strict=True)]
    kept = [z[torch.arange(n) * len(z) // max(1, n)] for n, z in zip(most, statistics.kept, strict=True)]
    if not sum(map(len, kept)):
        return 1.0
    found = fit(statistics.without(kept))
    scores = found.log_prob(torch.cat(kept).to(found.gaussians.mu))
    return fit_temperature(scores, _labels(kept))


def _labels(latents: list[Tensor]) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(z) for z in latents]))


def shrunk_variance(scatter: Tensor, freedom: Tensor, pooled: Tensor, shrinkage: float) -> Tensor:
    """sigma_y^2 [.., d] from summed squares [.., d], degrees of freedom and v [d], see `classes.fit`."""
    # Without shrinkage the quotient is 0 / 0 for a class of one image.
    total = freedom + shrinkage
    return torch.where(total > 0, (scatter + shrinkage * pooled) / total, pooled)


@torch.no_grad()
def fit_temperature(scores: Tensor, y: Tensor) -> float:
    """The T >= 1 at which softmax(scores / T) gives the classes y the highest likelihood (Guo et al. 2017).

    The mean of -log softmax(b s)_y is convex in b = 1/T; bisection finds where its slope, the mean of
    sum_k p_k s_k - s_y, is zero. T = 1 is the floor: for a few images that are all recognised the best T would be 0.

    `scores` [N, K] are log p(x|y) of held-out images in nats, up to a constant per image; images whose scores are not
    all finite are left out. y is int64 [N].
    """
    scores = scores.double()
    scores = scores - scores.gather(1, y[:, None])
    scores = scores[scores.isfinite().all(1)]
    low, high = 1 / HIGHEST_TEMPERATURE, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if float(((middle * scores).softmax(1) * scores).sum()) > 0:
            high = middle
        else:
            low = middle
    return 1 / high
