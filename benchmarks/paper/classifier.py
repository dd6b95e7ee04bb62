"""Small classifiers with the paper's recipes: the oracle on real images, CNNs and transformers on generated images.

Recipes are from Sec. 5.1 and 5.2 of Enescu & Sahbi, ACCV 2024. The ResNet18 is trained by SGD (momentum 0.9, weight
decay 5e-4, one-cycle from 1e-3 to 0.1, crop and flip). A small vision transformer is trained by Adam with a cosine
schedule (after Gani et al., BMVC 2022). The oracle is the ResNet18 of the real training set. Its penultimate layer
gives the features for FID and coverage, and its predictions give the label reliability.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.common import descend
from examples._quality import features_and_logits, label_reliability
from glem_augment.errors import TrainingError
from glem_augment.io import atomic_write
from glem_augment.training.augmentation import augment_batch

# Channels per stage of the residual networks. "resnet18" is the paper's network; smaller networks are for CPUs.
_RESNETS = {"resnet18": (64, 128, 256, 512), "resnet18_quarter": (16, 32, 64, 128)}
_HALF = "_half"  # suffix of a name: the first convolution halves the image, which takes a quarter of the time
# The transformer of Gani et al. 2022 (patch 4, 9 layers, width 192), and a small one for CPUs.
_VITS: dict[str, dict[str, Any]] = {
    "vit_small": dict(patch_size=4, embed_dim=192, depth=9, num_heads=12, mlp_ratio=2.0),
    "vit_micro": dict(patch_size=4, embed_dim=96, depth=4, num_heads=4, mlp_ratio=2.0),
}


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained. The defaults are the paper's ResNet18, with 200 epochs (the paper gives none).

    Attributes:
        optimizer: "sgd" (one-cycle from a hundredth of `lr` to `lr`) or "adam" (decoupled weight decay, warm-up over a
            twentieth of the run, cosine to zero).
        augment: any of "flip", "crop", "rotate", "jitter".
        bf16: autocast the network in bfloat16 while training.
    """

    arch: str = "resnet18"
    epochs: int = 200
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augment: tuple[str, ...] = ("flip", "crop")
    bf16: bool = False
    seed: int = 0

    @classmethod
    def transformer(cls, **changes: Any) -> Recipe:
        """The small vision transformer's recipe."""
        start = dict(arch="vit_small", optimizer="adam", lr=2e-3, weight_decay=5e-2, label_smoothing=0.1)
        return cls(**{**start, **changes})


class Classifier(nn.Module):
    """A network that normalises its input. `facts` describes its training, as JSON values."""

    mean: Tensor
    std: Tensor

    def __init__(self, arch: str, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.arch, self.image_shape, self.num_classes = arch, tuple(image_shape), num_classes
        self.facts: dict[str, Any] = {}
        self.net = _network(arch, self.image_shape, num_classes)
        self.register_buffer("mean", torch.full((1, image_shape[0], 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, image_shape[0], 1, 1), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images uint8 [B,C,H,W]."""
        x = (x.to(self.mean.device).float() / 255 - self.mean) / self.std
        return self.net(x.contiguous(memory_format=torch.channels_last))

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, m] and logits [N, K] of images uint8, or float in [0, 1], on the CPU."""
        return features_and_logits(self.net, x, self.mean, self.std, batch_size=512)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return label_reliability(self.run(x)[1], y)

    def save(self, path: str | Path) -> None:
        """Write weights and facts to one safetensors file, atomically."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        about = [self.arch, list(self.image_shape), self.num_classes, self.facts]
        with atomic_write(path) as file:
            file.write(save(state, metadata={"classifier": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Classifier:
        """A classifier from a file of `save`, in eval mode."""
        with safe_open(path, framework="pt") as file:
            *about, facts = json.loads(file.metadata()["classifier"])
            result = cls(*about)
            result.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        result.facts = facts
        return result.to(device, memory_format=torch.channels_last).eval()


def _network(arch: str, image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    if arch in _VITS:
        return VisionTransformer(img_size=(height, width), in_chans=channels, num_classes=num_classes, **_VITS[arch])
    widths = _RESNETS[arch.removesuffix(_HALF)]
    # timm adapts the width after the stem only for a "deep" stem, which the next lines replace.
    net = timm.create_model(
        "resnet18", num_classes=num_classes, in_chans=channels, channels=widths, stem_type="deep",
        stem_width=widths[0] // 2,
    )  # fmt: skip
    # Small images: a 7x7 convolution of stride 2 and a pooling would leave 8x8 of 32x32 pixels.
    net.conv1 = nn.Conv2d(channels, widths[0], 3, 2 if arch.endswith(_HALF) else 1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def train_classifier(
    epoch_data: Callable[[int], tuple[Tensor, Tensor]],
    num_classes: int,
    recipe: Recipe,
    device: str | torch.device = "cpu",
) -> Classifier:
    """Train a classifier from scratch.

    Args:
        epoch_data: of the epoch, images uint8 [N,C,H,W] and labels int64 [N]; N is the same for all epochs.

    Returns:
        The classifier in eval mode, on `device`.

    Raises:
        TrainingError: the loss is not finite.
    """
    x, y = epoch_data(0)
    torch.manual_seed(recipe.seed)
    model = Classifier(recipe.arch, tuple(x.shape[1:]), num_classes)
    pixels = x[torch.linspace(0, len(x) - 1, min(len(x), 10_000)).long()].float() / 255  # often sorted by class
    model.mean.copy_(pixels.mean((0, 2, 3), keepdim=True))
    model.std.copy_(pixels.std((0, 2, 3), keepdim=True).clamp_min(1e-3))
    model = model.to(device, memory_format=torch.channels_last).train()
    batch = min(recipe.batch_size, len(x))
    steps = len(x) // batch
    optimizer, schedule = _optimizer(model, recipe, steps * recipe.epochs)
    for epoch in tqdm(range(recipe.epochs), desc=recipe.arch, unit="epoch", disable=None, dynamic_ncols=True):
        if epoch:
            x, y = epoch_data(epoch)
        g = torch.Generator().manual_seed(int(np.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0]))
        rows = torch.randperm(len(x), generator=g)[: steps * batch].split(batch)
        batches = ((augment_batch(x[own].to(device), recipe.augment, g), y[own].to(device)) for own in rows)
        with torch.autocast(model.mean.device.type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=False):
            total = descend(model, batches, optimizer, lambda _: schedule.step(), recipe.label_smoothing).sum()
        if not math.isfinite(float(total)):
            raise TrainingError(f"{recipe.arch} diverged in epoch {epoch}: lower the learning rate {recipe.lr}")
    model.facts = {"recipe": asdict(recipe), "images_per_epoch": len(x)}
    return model.eval()


def _optimizer(
    model: nn.Module, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    if recipe.optimizer == "sgd":
        sgd = torch.optim.SGD(model.parameters(), recipe.lr / 100, momentum=0.9, weight_decay=recipe.weight_decay)
        return sgd, torch.optim.lr_scheduler.OneCycleLR(
            sgd, recipe.lr, total_steps=steps, div_factor=100, cycle_momentum=False
        )
    adam = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    warmup = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, share)
