"""The classifiers of `augmentation/run.py` and their training: the same steps, batches and start for every method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.common import descend
from benchmarks.proof.augmentation.ops import Component, Stack, as_float
from glem_augment import GLEM

CLASSIFIERS = ("cnn", "resnet")
LR, WEIGHT_DECAY, WARM_UP = 3e-3, 0.05, 0.15


class Classifier(nn.Module):
    """A network on images in [0, 1], which it standardises, optionally in bfloat16."""

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
    """The network of a name in `CLASSIFIERS`.

    "cnn": five 3x3 convolutions, 0.16 M parameters, two of stride 2 below 48 pixels, three below 96, then four.
    "strided cnn": "cnn" with the strides of images twice as large, in a third of the time.
    "resnet": timm's resnet18 at a quarter of the width, with the usual stem for small images, 0.7 M.
    """
    if name in ("cnn", "strided cnn"):
        w, size = 24, size * (2 if name == "strided cnn" else 1)
        layers = [*_block(channels, w, 1 if size < 48 else 2), *_block(w, 2 * w, 2)]
        layers += _block(2 * w, 2 * w, 1 if size < 96 else 2)
        layers += [*_block(2 * w, 4 * w, 2), *_block(4 * w, 4 * w, 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, num_classes))
    body = timm.create_model("resnet18", num_classes=num_classes, channels=(16, 32, 64, 128))
    body.conv1 = nn.Conv2d(channels, body.conv1.out_channels, 3, 1 if size < 48 else 2, 1, bias=False)
    body.maxpool = nn.Identity()
    return body


def _block(n_in: int, n_out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


def order_of(labels: Tensor, batch: int, steps: int, seed: int, oversampled: bool = True) -> Tensor:
    """Rows of every step, int64 [steps, batch]: passes over shuffled images, a function of labels and seed alone.

    An oversampled pass has equally many images of every class, so images of a small class occur several times.
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
    flows: Callable[[str, bool], GLEM],
    steps: int,
    batch: int,
    seed: int,
    bf16: bool,
    change: Callable[..., tuple[Tensor, Tensor]] | None = None,
    start: Classifier | None = None,
    lr: float = LR,
    prior: Tensor | None = None,
) -> Classifier:
    """One classifier, in eval mode.

    Args:
        images: uint8 [N,C,H,W], int64 [N]. components: see `Stack`.
        change: what happens to a batch before the stack, such as a `Pool`.
        start: a network of the same kind; training starts from its weights, except for the last layer's.
        prior: log-shares [K] of the classes, added to the logits in training (logit adjustment, Menon et al. 2021).
    """
    x, y = images
    batch = min(batch, len(y))
    torch.manual_seed(seed)
    everything = as_float(x).transpose(0, 1).flatten(1)
    body = make_body(name, x.shape[1], num_classes, x.shape[2]).to(memory_format=torch.channels_last)
    if start is not None:
        kept = {k: v for k, v in start.body.state_dict().items() if not k.startswith("fc.")}
        body.load_state_dict(kept, strict=False)
    network = Classifier(body, everything.mean(1), everything.std(1).clamp_min(1e-3), bf16).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=WARM_UP)
    rows = order_of(y, batch, steps, seed, oversampled="natural" not in dict(components))
    torch.manual_seed(seed + 1)  # torchvision's transforms draw from the global generator
    stack = Stack(components, flows, network, len(y), num_classes, seed)
    stack.first += [change] if change else []
    batches = (stack(chosen, x[chosen], y[chosen]) for chosen in rows)
    scores = network if prior is None else lambda x: network(x) + prior
    descend(scores, batches, optimizer, lambda _: schedule.step())
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    parts = zip(*(part.split(500) for part in images), strict=True)
    return sum(int((network(as_float(x)).argmax(1) == y).sum()) for x, y in parts) / len(images[1])
