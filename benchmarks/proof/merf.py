"""DP-MERF (Harder, Adamczewski & Park, AISTATS 2021): images of a network that matches a private mean embedding.

An image x [d] of class y adds phi(x) to row y of a sum [K, D]: phi(x) = (cos(W x), sin(W x)) / sqrt(D / 2), with random
frequencies W [D / 2, d]. |phi(x)| = 1, so one image changes the sum by 1 in L2. The sum plus normal noise of deviation
1 / mu is the only release. The number of images counts as public, and classes as equally large, as in the paper; both
favour the method. Network and constants are from the published experiment on Fashion-MNIST; its noise, for
exchanging an image, is larger than ours for adding or removing one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glem_augment.classes.privacy import Privacy

FEATURES, KERNEL, CODE, DECAY = 10_000, 127.0, 5, 0.9  # D, squared length of the kernel, noise numbers, rate per epoch


def frequencies(dim: int, count: int, generator: torch.Generator) -> Tensor:
    """W [count / 2, dim] of `count` random features of the kernel exp(-|x - x'|^2 / (2 KERNEL))."""
    return torch.randn(count // 2, dim, generator=generator) / math.sqrt(KERNEL)


def embedding(phase: Tensor, y: Tensor, classes: int) -> Tensor:
    """The sum [K, D] of images with W x in `phase` [n, D / 2], and labels y [n]."""
    features = torch.cat([phase.cos(), phase.sin()], 1) / math.sqrt(phase.shape[1])
    return F.one_hot(y, classes).to(features).T @ features


def release(
    x: Tensor, y: Tensor, weights: Tensor, classes: int, privacy: Privacy, generator: torch.Generator
) -> Tensor:
    """The noisy sum [K, D] of all images uint8 [n, ...]."""
    total = torch.zeros(classes, 2 * len(weights))
    for rows, labels in zip(x.split(1000), y.split(1000), strict=True):
        total += embedding(rows.flatten(1).float() / 255 @ weights.T, labels, classes)
    return total + torch.randn(total.shape, generator=generator) / privacy.mu_per_image


class ChannelsLast(nn.Unflatten):
    """Unflatten for faster convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous(memory_format=torch.channels_last)


class Generator(nn.Module):
    """Images in [0, 1] of `shape` (sides that 4 divides) from labels and 5 normal numbers."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.classes, small = classes, (16, shape[1] // 4, shape[2] // 4)
        width = math.prod(small)
        self.net = nn.Sequential(
            nn.Linear(CODE + classes, 200), nn.BatchNorm1d(200), nn.ReLU(),
            nn.Linear(200, width), nn.BatchNorm1d(width), ChannelsLast(1, small),
            nn.UpsamplingBilinear2d(scale_factor=2), nn.Conv2d(16, 8, 5, padding=2), nn.ReLU(),
            nn.UpsamplingBilinear2d(scale_factor=2), nn.Conv2d(8, shape[0], 5, padding=2), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, y: Tensor) -> Tensor:
        return self.net(torch.cat([torch.randn(len(y), CODE), F.one_hot(y, self.classes).float()], 1))


def private_images(
    x: Tensor, y: Tensor, classes: int, trial: tuple[float, int, int], privacy: Privacy, seed: int, per_class: int
) -> tuple[Tensor, Tensor]:
    """Private images uint8 [K per_class, ...] with labels, from a network trained on one release of images x, uint8.

    `trial` has the learning rate, epochs (of as many images as x has), and images of a step.
    """
    torch.manual_seed(seed)
    rate, epochs, batch = trial
    weights = frequencies(x[0].numel(), FEATURES, torch.default_generator)
    wanted = release(x, y, weights, classes, privacy, torch.default_generator) / len(x)
    net = Generator(tuple(x.shape[1:]), classes).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % classes
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
    for _ in range(epochs):
        for _ in range(len(x) // batch):
            with torch.autocast("cpu", torch.bfloat16):  # halves the time
                phase = (net(labels).flatten(1) @ weights.T).float()
            loss = (wanted - embedding(phase, labels, classes) / batch).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    labels = torch.arange(classes).repeat_interleave(per_class)
    with torch.no_grad():
        images = torch.cat([net.eval()(part) for part in labels.split(1000)])
    return (255 * images).round().to(torch.uint8), labels
