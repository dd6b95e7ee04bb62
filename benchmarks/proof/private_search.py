"""The experiment behind private sets: two or three rounds of one Gaussian mechanism, judged by a classifier of samples.

    python benchmarks/proof/private_search.py --latents /tmp/priv --data fm-pad --epsilon 1 --cells 8 --split val

The folder `--latents` has raw latents of TAEF2 (`fm-pad.npy`, `cifar.npy` [N, 32, 4, 4]), images and labels, and those
of the test set (`fm_x`, `fm_y`, `fm_xt`, `fm_yt`, and so on). The noise here is seeded, as in no release. The
classifier and the decoder run in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.paper.classifier import Recipe, train_classifier
from benchmarks.recipes.taef2_coordinates import FOLDER, OUT, coordinates
from glem_augment.autoencoders import load_taesd
from glem_augment.latent.denoise import Release, class_means, denoise, within_cells

K = 10
# Shares of mu^2: counts, sums and mean square of round 1, second moments of round 2, cells of round 3.
FIRST, SECONDS, CELLS = (0.02, 0.09, 0.01), 0.58, 0.30
CELL_SHARES = (0.1, 0.9)  # of round 3, for counts and sums
R1_QUANTILE, R2_FACTOR = 0.95, 1.1


def mu_of(epsilon: float, delta: float) -> float:
    """The mu of a Gaussian mechanism that is (epsilon, delta)-private."""

    def excess(mu: float) -> float:
        return ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 1e-3, 50)


class Noise:
    def __init__(self, mu: float, seed: int) -> None:
        self.mu, self.g = mu, torch.Generator().manual_seed(seed)

    def sd(self, share: float, unit: float = 1.0) -> float:
        """Of a statistic whose norm is at most `unit` and that has this share of mu^2."""
        return unit / (self.mu * math.sqrt(share))

    def like(self, values: Tensor, sd: float) -> Tensor:
        return values + sd * torch.randn(values.shape, generator=self.g, dtype=torch.float64)

    def symmetric(self, values: Tensor, sd: float) -> Tensor:
        e = torch.randn(values.shape, generator=self.g, dtype=torch.float64)
        low = torch.tril(e, -1) / math.sqrt(2)
        return values + sd * (low + low.mT + torch.diag_embed(e.diagonal(dim1=1, dim2=2)))


def clip(u: Tensor, r: float) -> Tensor:
    return u * (r / u.norm(dim=1, keepdim=True)).clamp(max=1)


def by_slot(values: Tensor, slot: Tensor, slots: int) -> Tensor:
    return torch.zeros(slots, *values.shape[1:], dtype=torch.float64).index_add_(0, slot, values)


def kmeans(x: Tensor, cells: int, g: torch.Generator, steps: int = 20) -> Tensor:
    c = x[torch.randperm(len(x), generator=g)[:cells]]
    for _ in range(steps):
        a = torch.cdist(x, c).argmin(1)
        c = torch.stack([x[a == i].mean(0) if (a == i).any() else c[i] for i in range(cells)])
    return c


def root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def private_classes(u: Tensor, y: Tensor, prior: Tensor, r1: float, noise: Noise, cells: int) -> tuple[Tensor, ...]:
    """Weights [K, C], means [K, C, d] and covariances [K, d, d] of latents u in public coordinates."""
    d = u.shape[1]
    # Round 1: counts, sums and mean squares.
    v = clip(u, r1)
    sd_count, sd_sum, sd_square = noise.sd(FIRST[0]), noise.sd(FIRST[1], r1), noise.sd(FIRST[2], r1 * r1)
    counts = noise.like(torch.bincount(y, minlength=K).double(), sd_count)
    sums = noise.like(by_slot(v, y, K), sd_sum)
    squares = noise.like(by_slot(v.square().sum(1), y, K), sd_square)
    m = class_means(counts, sums, sd_count, sd_sum, prior)
    n = counts.clamp_min(1)
    between = (sums.square().sum(1) - d * sd_sum**2) / n
    r2 = R2_FACTOR * math.sqrt(max(float((squares.sum() - between.sum()) / n.sum()), 0.01 * float(prior.sum())))
    # Round 2: second moments about the means that were released.
    share = SECONDS + (CELLS if cells == 1 else 0)
    v, sd = clip(u - m[y], r2), noise.sd(share, r2 * r2)
    seconds = noise.symmetric(torch.stack([v[y == k].T @ v[y == k] for k in range(K)]), sd)
    found = denoise(Release(counts, sums, m, seconds, sd_count, sd_sum, sd), prior)
    print("r1", round(r1, 2), "r2", round(r2, 2), "clipped", round(float(((u - m[y]).norm(dim=1) > r2).double().mean()), 3),
          "modes", found.pooled_modes, found.modes.tolist(), flush=True)  # fmt: skip
    if cells == 1:
        return torch.ones(K, 1, dtype=torch.float64), m[:, None], found.covariances
    # Round 3: counts and sums of cells, which k-means finds among samples of the first two rounds.
    draws = [torch.randn(4000, d, generator=noise.g, dtype=torch.float64) @ root(c).T for c in found.covariances]
    centres = torch.stack([kmeans(x, cells, noise.g) for x in draws])
    shift, cell = u - m[y], torch.empty_like(y)
    for k in range(K):
        cell[y == k] = torch.cdist(shift[y == k], centres[k]).argmin(1) + k * cells
    v = clip(shift - centres.reshape(-1, d)[cell], r2)
    sd_count, sd_sum = noise.sd(CELLS * CELL_SHARES[0]), noise.sd(CELLS * CELL_SHARES[1], r2)
    weights = noise.like(torch.bincount(cell, minlength=K * cells).double(), sd_count).clamp_min(1).reshape(K, cells)
    sums = noise.like(by_slot(v, cell, K * cells), sd_sum).reshape(K, cells, d)
    n = weights.clamp_min(5)[..., None]
    move, variance = sums / n, (sd_sum / n).square()
    t = ((n * n * (move.square() - variance)).sum() / (n * n * prior).sum()).clamp_min(0)
    means = centres + move * (t * prior / (t * prior + variance))
    means = means - (weights[..., None] * means).sum(1, keepdim=True) / weights.sum(1)[:, None, None]
    covariances = [within_cells(*parts) for parts in zip(found.covariances, weights, means, strict=True)]
    return weights, m[:, None] + means, torch.stack(covariances)


def draw(weights: Tensor, means: Tensor, covariances: Tensor, each: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    parts = []
    for w, m, c in zip(weights, means, covariances, strict=True):
        noise = torch.randn(each, m.shape[1], generator=g, dtype=torch.float64)
        parts.append(m[torch.multinomial(w, each, True, generator=g)] + noise @ root(c).T)
    return torch.cat(parts), torch.arange(len(means)).repeat_interleave(each)


@torch.no_grad()
def decode(h: Tensor, data: str) -> Tensor:
    model = load_taesd(FOLDER / "model.safetensors").bfloat16()
    x = torch.cat([model.decode(part.bfloat16()).float().clamp(0, 1) for part in h.split(500)])
    if data.startswith("fm"):  # 28x28 grey images, padded by 2
        x = x.mean(1, keepdim=True)[:, :, 2:-2, 2:-2]
    return (255 * x).round().to(torch.uint8)


def judge(x: Tensor, y: Tensor, real: list[tuple[Tensor, Tensor]], grey: bool, seed: int, epochs: int) -> list[float]:
    augment = ("crop",) if grey else ("flip", "crop")
    recipe = Recipe(arch="resnet18_quarter_half", epochs=epochs, augment=augment, seed=seed, bf16=True)
    found = train_classifier(lambda epoch: (x, y), K, recipe, progress=False)
    return [100 * found.accuracy(*images) for images in real]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--data", choices=["fm-pad", "cifar"], default="fm-pad")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--cells", type=int, default=1)
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, base, grey = time.time(), args.data.split("-")[0], args.data.startswith("fm")

    def stored(name: str) -> Tensor:
        return torch.from_numpy(np.load(args.latents / f"{name}.npy"))

    h, y = stored(args.data).double(), stored(f"{base}_y").long()
    held = torch.arange(len(y)) % 10 == 9
    if args.split == "val":
        real = stored(f"{base}_x")[held], y[held]
        h, y = h[~held], y[~held]
    else:
        real = stored(f"{base}_xt"), stored(f"{base}_yt").long()
    kind = "grey" if grey else "colour"
    model = {key.removeprefix(f"{kind}."): v for key, v in load_file(OUT).items() if key.startswith(kind)}
    a, c, prior = coordinates(model, *h.shape[2:])
    public = stored("cc0g" if grey else "cc0").double().flatten(1)  # latents of crops of the bundled photographs
    r1 = float(torch.quantile(((public - c) @ a.T).norm(dim=1), R1_QUANTILE))
    noise = Noise(mu_of(args.epsilon, args.delta), args.seed)
    classes = private_classes((h.flatten(1) - c) @ a.T, y, prior, r1, noise, args.cells)
    u, labels = draw(*classes, args.per_class, torch.Generator().manual_seed(args.seed))
    x = decode((u @ torch.linalg.inv(a).T + c).float().reshape(-1, *h.shape[1:]), args.data)
    (accuracy,) = judge(x, labels, [real], grey, args.seed, args.epochs)
    facts = [f"{k}={v}" for k, v in vars(args).items() if k != "latents"]
    line = f"{' '.join(facts)}: {accuracy:.2f} ({time.time() - start:.0f} s)"
    print(line, flush=True)
    with (args.latents / "search.log").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
