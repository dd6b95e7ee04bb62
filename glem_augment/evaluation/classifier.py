"""Small classifiers with the paper's recipes: the oracle on real images, CNNs and transformers on generated ones.

Sec. 5.1 and 5.2 of Enescu & Sahbi, ACCV 2024: a ResNet18 by SGD (momentum 0.9, weight decay 5e-4, one-cycle from 1e-3
to 0.1, crop and flip), a small vision transformer by Adam with a cosine schedule (after Gani et al., BMVC 2022). The
oracle is the ResNet18 trained on the real training set; its penultimate layer gives the features for FID and Coverage,
its verdicts the label reliability.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from glem_augment.errors import DataError, ModelFileError, TrainingError
from glem_augment.io import atomic_write
from glem_augment.training.config import AUGMENTATIONS
from glem_augment.training.image_ops import augment_batch

# channels per stage of the residual networks; "resnet18" is the paper's, the others are for CPUs.
_RESNETS = {"resnet18": (64, 128, 256, 512), "resnet18_half": (32, 64, 128, 256), "resnet18_quarter": (16, 32, 64, 128)}
# Gani et al. 2022: patch 4, 9 layers, width 192; and one that a CPU can train.
_VITS: dict[str, dict[str, Any]] = {
    "vit_small": dict(patch_size=4, embed_dim=192, depth=9, num_heads=12, mlp_ratio=2.0),
    "vit_micro": dict(patch_size=4, embed_dim=96, depth=4, num_heads=4, mlp_ratio=2.0),
}
ARCHITECTURES = (*_RESNETS, *_VITS)
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the defaults are the paper's ResNet18, with 200 epochs (the paper gives none).

    Attributes:
        arch: "resnet18" (3x3 stem, no pooling after it: for small images), the narrower "resnet18_half" and
            "resnet18_quarter", "vit_small", "vit_micro".
        epochs, batch_size: an epoch is as many steps as the data of one call of ``epoch_data`` gives.
        optimizer: "sgd" (momentum 0.9, one-cycle from a hundredth of ``lr`` to ``lr``) or "adam" (decoupled weight
            decay, warm-up over a twentieth of the run, cosine to zero).
        lr, weight_decay, label_smoothing: the peak learning rate, and as they say.
        augment: any of "flip", "crop", "rotate", "jitter".
        bf16: autocast the network in bfloat16 while training.
        seed: of weights, order and augmentation.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment", tuple(self.augment))
        for name, value, allowed in (("arch", self.arch, ARCHITECTURES), ("optimizer", self.optimizer, OPTIMIZERS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name in ("epochs", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        if not self.lr > 0 or not self.weight_decay >= 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "lr must be > 0, weight_decay >= 0 and label_smoothing in [0, 1), got "
                f"{self.lr}, {self.weight_decay}, {self.label_smoothing}"
            )
        unknown = sorted(set(self.augment) - set(AUGMENTATIONS))
        if unknown:
            raise ValueError(f"augment takes {', '.join(AUGMENTATIONS)}, got {unknown}")

    @classmethod
    def transformer(cls, **changes: Any) -> Recipe:
        """The small vision transformer's: Adam, cosine, flip and crop; ``changes`` as for the class."""
        start = dict(arch="vit_small", optimizer="adam", lr=2e-3, weight_decay=5e-2, label_smoothing=0.1)
        return cls(**{**start, **changes})


class Classifier(nn.Module):
    """A network with the normalisation of its inputs.

    Attributes:
        image_shape: (C, H, W). arch: see ``Recipe``. facts: how it was trained, and what its trainer adds (JSON).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, arch: str, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.arch, self.image_shape, self.num_classes = arch, tuple(image_shape), num_classes
        self.facts: dict[str, Any] = {}
        self.net = _network(arch, self.image_shape, num_classes)
        self.register_buffer("mean", torch.full((1, image_shape[0], 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, image_shape[0], 1, 1), 0.25))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalise(self, x: Tensor) -> Tensor:
        """uint8, or float in [0, 1], [B,C,H,W] to the network's input."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images must be [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        x = x.to(self.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images [B,C,H,W], uint8 or float in [0, 1]."""
        return self.net(self.normalise(x))

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Penultimate features [B, m] (after pooling) and logits [B, K]."""
        hidden = self.net.forward_features(self.normalise(x))
        features = self.net.forward_head(hidden, pre_logits=True)
        return features, self.net.get_classifier()(features)

    @torch.no_grad()
    def run(self, x: Tensor, batch_size: int = 512) -> tuple[Tensor, Tensor]:
        """Features [N, m] and logits [N, K] of all images, in eval mode, on the CPU."""
        self.eval()
        parts = [self.features_and_logits(part) for part in x.split(batch_size)]
        if not parts:
            raise DataError("no images to look at")
        return torch.cat([f.cpu() for f, _ in parts]), torch.cat([logits.cpu() for _, logits in parts])

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of images [N,C,H,W] given their class y int64 [N]; on generated images, the label reliability."""
        return float((self.run(x)[1].argmax(1) == y.cpu()).double().mean())

    # ---- files ---------------------------------------------------------------------------------------------------

    def weights_hash(self) -> str:
        """SHA-256 of the weights, 64 hex digits."""
        return hashlib.sha256(self._bytes({})).hexdigest()

    def _bytes(self, facts: dict[str, Any]) -> bytes:
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        about = dict(arch=self.arch, image_shape=list(self.image_shape), num_classes=self.num_classes, facts=facts)
        return safetensors_bytes(state, metadata={"classifier": json.dumps(about)})

    def save(self, path: str | Path) -> None:
        """Write weights and facts to one safetensors file, atomically."""
        with atomic_write(path) as file:
            file.write(self._bytes(self.facts))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Classifier:
        """Read what ``save`` wrote, in eval mode. Raises ModelFileError for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("classifier", "null"))
                if not isinstance(about, dict):
                    raise ModelFileError(f"{path} holds no classifier of glem-augment")
                result = cls(about["arch"], tuple(about["image_shape"]), about["num_classes"])
                result.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=True)
                result.facts = about["facts"]
        except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{path} can't be read: {error}; train the classifier again") from None
        return result.to(device, memory_format=torch.channels_last).eval()


def _network(arch: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    channels, height, width = image_shape
    if arch in _RESNETS:
        widths = _RESNETS[arch]
        # timm narrows what follows the stem only where the stem is a "deep" one; that is replaced in the next line.
        net = timm.create_model(
            "resnet18", num_classes=num_classes, in_chans=channels, channels=widths, stem_type="deep",
            stem_width=widths[0] // 2,
        )  # fmt: skip
        # Small images: a 7x7 convolution of stride 2 and a pooling would leave 8x8 of 32x32 pixels.
        net.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
        return net
    if arch not in _VITS:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    return VisionTransformer(img_size=(height, width), in_chans=channels, num_classes=num_classes, **_VITS[arch])


EpochData = Callable[[int], tuple[Tensor, Tensor]]


def train_classifier(
    data: EpochData | tuple[Tensor, Tensor],
    num_classes: int,
    recipe: Recipe,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Classifier:
    """Train a classifier from scratch.

    Args:
        data: images uint8 [N,C,H,W] and labels int64 [N]; or a function of the epoch giving such a pair, of one length,
            for sets that are generated anew or do not fit in memory. Normalisation comes from 10,000 images.
        num_classes: K.
        recipe: all settings.

    Returns:
        The classifier in eval mode, on ``device``.

    Raises:
        DataError: no images, or labels that do not fit. TrainingError: the loss is not finite.
    """
    epoch_data = data if callable(data) else lambda epoch: data
    x, y = _checked(epoch_data(0), num_classes)
    torch.manual_seed(recipe.seed)
    model = Classifier(recipe.arch, tuple(x.shape[1:]), num_classes)
    pixels = x[torch.linspace(0, len(x) - 1, min(len(x), 10_000)).long()].float() / 255  # often sorted by class
    model.mean.copy_(pixels.mean((0, 2, 3), keepdim=True))
    model.std.copy_(pixels.std((0, 2, 3), keepdim=True).clamp_min(1e-3))
    model = model.to(device, memory_format=torch.channels_last)
    batch = min(recipe.batch_size, len(x))
    steps = len(x) // batch
    optimizer, schedule = _optimizer(model, recipe, steps * recipe.epochs)
    model.train()
    bar = tqdm(total=steps * recipe.epochs, desc=recipe.arch, unit="step", disable=not progress, dynamic_ncols=True)
    for epoch in range(recipe.epochs):
        if epoch and callable(data):
            x, y = _checked(epoch_data(epoch), num_classes)
        g = torch.Generator().manual_seed(int(np.random.SeedSequence([recipe.seed, epoch]).generate_state(1)[0]))
        total = torch.zeros((), device=model.device)
        for rows in torch.randperm(len(x), generator=g)[: steps * batch].split(batch):
            images = augment_batch(x[rows].to(model.device), recipe.augment, g)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), y[rows].to(model.device), label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
            bar.update()
        if not bool(torch.isfinite(total)):  # once per epoch, so that steps need not wait for it
            bar.close()
            raise TrainingError(f"{recipe.arch} diverged in epoch {epoch}: lower the learning rate {recipe.lr}")
        bar.set_postfix(loss=float(total) / steps)
    bar.close()
    model.facts = {"recipe": asdict(recipe), "images_per_epoch": len(x)}
    return model.eval()


def _optimizer(
    model: nn.Module, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    if recipe.optimizer == "sgd":
        sgd = torch.optim.SGD(model.parameters(), recipe.lr / 100, momentum=0.9, weight_decay=recipe.weight_decay)
        # Starts at a hundredth of the peak, the paper's 1e-3 and 0.1; the momentum stays 0.9.
        return sgd, torch.optim.lr_scheduler.OneCycleLR(
            sgd, recipe.lr, total_steps=steps, div_factor=100, cycle_momentum=False
        )
    adam = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    warmup = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, share)


def _checked(pair: tuple[Tensor, Tensor], num_classes: int) -> tuple[Tensor, Tensor]:
    x, y = pair
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise DataError(f"images must be uint8 [N,C,H,W], got {x.dtype} {list(x.shape)}")
    if not len(x) or y.shape != (len(x),):
        raise DataError(f"need one label per image and at least one image, got {len(x)} and {list(y.shape)}")
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise DataError(f"labels must lie in 0..{num_classes - 1}, got {int(y.min())}..{int(y.max())}")
    return x, y
