"""Measures of generated images by their features [N, m]: FID, coverage, density, label reliability, memorisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 512  # rows of a distance matrix that are computed at a time


@torch.no_grad()
def features_and_logits(
    network: Any, x: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Penultimate features and logits of a timm network, in eval mode.

    Args:
        x: images [N,C,H,W] of the network's size, uint8 or float in [0, 1].
        mean, std: normalise the network's input, broadcast to [B,C,H,W].

    Returns:
        features [N, m] and logits [N, K], on the CPU.
    """
    device = next(network.parameters()).device
    features, logits, training = [], [], network.training
    network.eval()
    for part in x.split(batch_size):
        part = part.to(device)
        part = part.float() / 255 if part.dtype == torch.uint8 else part
        pooled = network.forward_head(network.forward_features((part - mean) / std), pre_logits=True)
        features.append(pooled.cpu())
        logits.append(network.get_classifier()(pooled).cpu())
    network.train(training)
    return torch.cat(features), torch.cat(logits)


def label_reliability(logits: Tensor, y: Tensor) -> float:
    """Share of generated images that a classifier of real images, with logits [N, K], assigns to their class y [N]."""
    return float((logits.argmax(1) == y.to(logits.device)).double().mean())


def feature_fid(real: Tensor, generated: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

        |m_r - m_g|^2 + tr(S_r + S_g) - 2 tr (S_r S_g)^1/2

    With S_r = R R^T, the symmetric matrix R^T S_g R has the eigenvalues of S_r S_g. The last trace is the sum of their
    square roots. The distance depends on the network and falls with the number of images, so state both.

    Args:
        real, generated: features [N, m] and [M, m]; N, M >= 2.

    Raises:
        ValueError: other shapes, too few rows, or values that are not finite.
    """
    real, generated = _check_features(real, generated, least=2)
    covariance, other = torch.cov(real.T).view(real.shape[1], -1), torch.cov(generated.T).view(real.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ other @ root).clamp_min(0).sqrt().sum()
    gap = (real.mean(0) - generated.mean(0)).square().sum()
    return float(gap + covariance.trace() + other.trace() - 2 * cross)


def coverage(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Coverage and density (Naeem et al., ICML 2020, Eq. 3 and 4; the same numbers as the `prdc` package).

        coverage = mean_i [min_j |r_i - g_j| < NND_k(r_i)]
        density  = 1/(k M) sum_ij [|r_i - g_j| < NND_k(r_i)]

    NND_k(r) is the distance of r to its k-th nearest other real image. Both depend on N, M and k, so state them.

    Args:
        real, generated: features [N, m] and [M, m]. k: neighbours, 1 <= k < N.

    Returns:
        `coverage` in [0, 1] and `density` >= 0.

    Raises:
        ValueError: other shapes, too few rows, or values that are not finite.
    """
    real, generated = _check_features(real, generated, least=k + 1)
    covered = inside = 0
    for part in real.split(_CHUNK):
        # The smallest distance in a row is the image's distance to itself, 0.
        radius = _squared_distances(part, real).kthvalue(k + 1, dim=1, keepdim=True).values
        near = _squared_distances(part, generated) < radius
        covered += int(near.any(1).sum())
        inside += int(near.sum())
    return {"coverage": covered / len(real), "density": inside / (k * len(generated))}


def memorisation_ratio(samples: Tensor, train: Tensor, held_out: Tensor) -> dict[str, float]:
    """How much nearer samples lie to training images than to held-out images.

    The larger real set is thinned to the size of the smaller set: the nearest of more images is nearer. Without
    memorisation the ratio is 1 and the share 1/2.

    Args:
        samples, train, held_out: features (or flattened pixels) [S, m], [N, m] and [M, m].

    Returns:
        `ratio`: median over samples of d(train) / d(held-out), each the distance to the nearest image.
        `share_nearer_train`: share of samples that are nearer to a training image; a tie counts half.
    """
    count = min(len(train), len(held_out))
    g = torch.Generator().manual_seed(0)
    to_train = nearest(samples, train[torch.randperm(len(train), generator=g)[:count]])[0]
    to_held_out = nearest(samples, held_out[torch.randperm(len(held_out), generator=g)[:count]])[0]
    tiny = torch.finfo(torch.float64).tiny
    tie = torch.isclose(to_train, to_held_out, rtol=1e-9, atol=0)
    nearer = torch.where(tie, 0.5, (to_train < to_held_out).double())
    return {
        "ratio": float((to_train.clamp_min(tiny) / to_held_out.clamp_min(tiny)).quantile(0.5)),
        "share_nearer_train": float(nearer.mean()),
    }


def nearest(x: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of every row of `x` [N, m] to the nearest row of `others` [M, m], float64 [N], and its index [N]."""
    x, others = _check_features(x, others)
    found = [_squared_distances(part, others).min(1) for part in x.split(_CHUNK)]
    return torch.cat([part.values for part in found]).sqrt(), torch.cat([part.indices for part in found])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances [N, M] of float64 rows, by one matrix product."""
    size = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(size, a, b.T, alpha=-2)
    # Equal rows have distance 0. Rounding leaves less than 1e-13 of |a|^2 + |b|^2.
    return squared.masked_fill_(squared < 1e-13 * size, 0.0)


def _check_features(first: Tensor, second: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets, float64 on the CPU, with at least `least` rows each.

    The mean of the first set becomes the origin: no measure depends on it, and sums of squares keep more digits.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        shapes = f"{list(first.shape)} and {list(second.shape)}"
        raise ValueError(f"features must be [N, m] and [M, m], got {shapes}: take both from one network")
    pair = first.detach().to("cpu", torch.float64), second.detach().to("cpu", torch.float64)
    for features in pair:
        if len(features) < least:
            raise ValueError(f"{len(features)} images are too few: at least {least} are needed")
        if not bool(features.isfinite().all()):
            raise ValueError("features are not finite: check the images and the network")
    centre = pair[0].mean(0)
    return pair[0] - centre, pair[1] - centre
