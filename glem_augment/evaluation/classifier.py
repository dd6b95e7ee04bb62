"""A small classifier, trained on batches of labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glem_augment.images.dataset import ImageData

__all__ = ["BATCH", "LEARNING_RATE", "MEAN", "NETWORK", "STD", "accuracy", "fit_network", "new_network"]
__all__ += ["normalised", "random_batches", "train_network"]

# A timm network of 0.2 million weights, which learns from 1000 images in seconds on a CPU. A held-out quarter of the
# demo's training images, without augmentation, chose network and learning rate.
NETWORK, LEARNING_RATE = "test_byobnet", 1e-2
BATCH, MEAN, STD = 64, 0.5, 0.25  # images per step; by which images are normalised


def normalised(x: Tensor) -> Tensor:
    """Images uint8, normalised for the networks of this module: float."""
    return (x.float() / 255 - MEAN) / STD


def random_batches(data: ImageData, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random images, normalised, and labels, without end."""
    rng = np.random.default_rng(seed)
    while True:
        for x, y in data.batches(rng.permutation(len(data)), min(BATCH, len(data))):
            if len(y) > 1:
                yield normalised(x), y


def new_network(
    channels: int, num_classes: int, seed: int = 0, name: str = NETWORK, pretrained: bool = False
) -> torch.nn.Module:
    """A timm classifier on the CPU.

    Args:
        seed: of the initial weights. name: of the network in timm. pretrained: start from timm's weights.
    """
    import timm  # takes a second

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained, num_classes=num_classes, in_chans=channels)


def fit_network(
    network: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, rate: float = LEARNING_RATE
) -> torch.nn.Module:
    """Train a network on `steps` batches of normalised images float [B,C,H,W] and labels, hard or soft.

    AdamW with a cosine schedule, after a warm-up over a tenth of the steps.

    Args:
        rate: the highest learning rate.

    Returns:
        The network itself, in eval mode.
    """
    from timm.optim import create_optimizer_v2  # takes a second
    from timm.scheduler import CosineLRScheduler

    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out
    optimizer = create_optimizer_v2(network, opt="adamw", lr=rate, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=rate / 100, t_in_epochs=False
    )
    for step, (x, y) in zip(range(1, steps + 1), batches, strict=False):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step_update(step)
    return network.eval()


def train_network(
    batches: Iterable[tuple[Tensor, Tensor]], steps: int, channels: int, num_classes: int, seed: int = 0
) -> torch.nn.Module:
    """A new network after `fit_network`."""
    return fit_network(new_network(channels, num_classes, seed), batches, steps)


def accuracy(network: torch.nn.Module, data: ImageData) -> float:
    """Accuracy in percent of a network in eval mode on images uint8, which are normalised for it."""
    right = 0
    with torch.inference_mode():
        for x, y in data.batches(np.arange(len(data)), 256):
            right += int((network(normalised(x)).argmax(1) == y).sum())
    return 100 * right / len(data)
