"""The classifiers of ``augmentation.py`` and their training: the same steps, batches and start for every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.proof.augmentation_ops import Component, Learner, Stack, as_float
from glem_augment import GLEM

CLASSIFIERS = ("cnn", "resnet")
_EVAL_BATCH = 500


class Classifier(nn.Module):
    """A network on images in [0,1]: standardised inside, in bfloat16 where asked, so that whoever needs gradients with
    respect to the image has nothing to know."""

    def __init__(self, body: nn.Module, mean: Tensor, std: Tensor, bf16: bool) -> None:
        super().__init__()
        self.body, self.bf16 = body, bf16
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.body(x).float()


def make_body(name: str, channels: int, num_classes: int, size: int) -> nn.Module:
    """ "cnn": five 3x3 convolutions, 0.16 M parameters, two of stride 2 below 48 pixels, three below 96, then four;
    "resnet": timm's resnet18 at a quarter of the width, with the stem that is usual for small images, 0.7 M."""
    if name == "cnn":
        w = 24
        layers = [*_block(channels, w, 1 if size < 48 else 2), *_block(w, 2 * w, 2)]
        layers += _block(2 * w, 2 * w, 1 if size < 96 else 2)
        layers += [*_block(2 * w, 4 * w, 2), *_block(4 * w, 4 * w, 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, num_classes))
    if name == "resnet":
        body = timm.create_model("resnet18", num_classes=num_classes, channels=(16, 32, 64, 128))
        body.conv1 = nn.Conv2d(channels, body.conv1.out_channels, 3, 1 if size < 48 else 2, 1, bias=False)
        body.maxpool = nn.Identity()
        return body
    raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, got {name!r}")


def make_proxy(channels: int, num_classes: int) -> nn.Module:
    """Three 3x3 convolutions of stride 2, 24,000 parameters: what looks at images in a classifier's place."""
    layers = [*_block(channels, 16, 2), *_block(16, 32, 2), *_block(32, 64, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def _block(n_in: int, n_out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


def order_of(labels: Tensor, batch: int, steps: int, seed: int, oversampled: bool = True) -> Tensor:
    """Rows of every step, int64 [steps, batch]: passes over shuffled images, a function of labels and seed alone.

    Oversampled, a pass has equally many images of every class, those of a small class several times; where classes are
    equal, that changes nothing.
    """
    rng, parts, total = np.random.default_rng([seed, 0x0BDE2]), [], 0
    classes = [np.flatnonzero(labels.numpy() == index) for index in range(int(labels.max()) + 1)]
    oversampled = oversampled and len({len(rows) for rows in classes}) > 1
    each = -(-len(labels) // len(classes))
    while total < steps * batch:
        if oversampled:
            part = rng.permutation(np.concatenate([np.resize(rng.permutation(rows), each) for rows in classes]))
        else:
            part = rng.permutation(len(labels))
        parts.append(part)
        total += len(part)
    return torch.from_numpy(np.concatenate(parts)[: steps * batch].reshape(steps, batch))


def train(
    name: str,
    images: tuple[Tensor, Tensor],
    num_classes: int,
    components: list[Component],
    flows: Callable[[str], GLEM],
    steps: int,
    batch: int,
    seed: int,
    bf16: bool,
    teacher: nn.Module | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """Train one classifier from scratch.

    Args:
        images: uint8 [N,C,H,W], int64 [N].
        components: see ``Stack``.

    Returns:
        The network in eval mode, and ``seconds_per_step``, the ``augment_seconds_per_step`` in it and the
        ``train_loss`` of the last tenth of the steps. Seconds are of CPU time: other load does not count.
    """
    x, y = images
    batch = min(batch, len(y))
    torch.manual_seed(seed)
    everything = as_float(x).transpose(0, 1).flatten(1)
    body = make_body(name, x.shape[1], num_classes, x.shape[2]).to(memory_format=torch.channels_last)
    network = Classifier(body, everything.mean(1), everything.std(1).clamp_min(1e-3), bf16).train()
    learner, proxy = Learner(network, steps), None
    if "adversarial-proxy" in dict(components):
        proxy = Classifier(make_proxy(x.shape[1], num_classes), network.mean.flatten(), network.std.flatten(), bf16)
    rows = order_of(y, batch, steps, seed, oversampled="natural" not in dict(components))
    torch.manual_seed(seed + 1)  # torchvision's transforms draw from the global generator
    began = time.process_time()
    stack = Stack(components, flows, network, len(y), num_classes, seed, teacher, steps, proxy)
    augmenting = time.process_time() - began  # draws the synthetic pool
    late, losses = steps - max(1, steps // 10), []
    for step in range(steps):
        start = time.process_time()
        chosen, labels = stack(rows[step], x[rows[step]], y[rows[step]])
        augmenting += time.process_time() - start
        loss = learner.learn(chosen, labels)
        if step >= late:
            losses.append(float(loss))
    return network.eval(), {
        "seconds_per_step": (time.process_time() - began) / steps,
        "augment_seconds_per_step": augmenting / steps,
        "train_loss": float(np.mean(losses)),
    }


@torch.no_grad()
def accuracy(network: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    x, y = images
    right = sum(
        int((network(as_float(part)).argmax(1) == labels).sum())
        for part, labels in zip(x.split(_EVAL_BATCH), y.split(_EVAL_BATCH), strict=True)
    )
    return right / len(y)
