"""The sizes of data, flows and classifiers in `paper.py`, one entry per kind of machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from benchmarks.paper.classifier import Recipe

_GLEM_DATA = os.environ.get("GLEM_DATA", "data")
_FASHION = f"torch/fashion_mnist@{_GLEM_DATA}/fashion-mnist"


@dataclass(frozen=True)
class DataSpec:
    """A source of images: `spec` and `image_size` as for `open_data`; `per_class`: number of images per class."""

    name: str
    spec: str
    image_size: int | None = None
    per_class: int | None = None


@dataclass(frozen=True)
class Scale:
    """Everything that costs time.

    Attributes:
        main, second: the data sets for the paper's CIFAR-100 and CIFAR-10.
        flow: settings of `TrainConfig` and `Research` for every flow; all are trained for as many steps.
        oracle, cnn, vit: recipes of the classifiers. measured: generated and real images, at most, for FID, Coverage
            and label reliability. sizes: of Table 4, in multiples of the training set. seeds: by default.
        neighbours: k of Coverage.
    """

    main: DataSpec
    second: DataSpec
    flow: dict[str, Any]
    oracle: Recipe
    cnn: Recipe
    vit: Recipe
    measured: int
    sizes: tuple[int, ...]
    seeds: int
    neighbours: int = 5


# Settings of all scales for GPUs.
_CIFAR: dict[str, Any] = dict(
    main=DataSpec("cifar100", "torch/cifar100@data"), second=DataSpec("cifar10", "torch/cifar10@data"),
    measured=10_000, seeds=1,
)  # fmt: skip
_PUBLISHED = dict(bits=5, augment=["flip", "crop", "rotate", "jitter"], warmup_steps=1000, modes_rank=0, sample_every=0)
_CROP = ("crop",)  # no "flip" for the flow of clothes, because all shoes point the same way
SCALES = {
    # A test that everything runs, in seconds; its numbers mean nothing.
    "smoke": Scale(
        main=DataSpec("fashion-mnist (bundled, 14x14)", "bundled:fashion-mnist", 14, 60),
        second=DataSpec("fashion-mnist (bundled, 12x12)", "bundled:fashion-mnist", 12, 40),
        flow=dict(
            preset="mef_tiny", flow_options=dict(depth=[1], blocks=[1], width=[8]), epochs=2, batch_size=60, bits=5,
            warmup_steps=4, modes_rank=0, sample_every=0,
        ),
        oracle=Recipe(arch="resnet18_quarter", epochs=2, batch_size=50, augment=_CROP),
        cnn=Recipe(arch="resnet18_quarter", epochs=1, batch_size=50, augment=_CROP),
        vit=Recipe.transformer(arch="vit_micro", epochs=1, batch_size=50, augment=_CROP),
        measured=100,
        sizes=(1, 2),
        seeds=1,
    ),
    # All tables take a night on one core.
    "cpu": Scale(
        main=DataSpec("fashion-mnist 16x16 (2,000 per class)", _FASHION, 16, 2000),
        second=DataSpec("cifar10 16x16 (2,000 per class)", f"{_GLEM_DATA}/cifar10", 16, 2000),
        flow=dict(
            preset="mef_tiny", flow_options=dict(depth=[4, 4], blocks=[1, 1], width=[32, 32]), epochs=8,
            batch_size=64, bits=5, warmup_steps=300, m_rounds=4, modes_rank=0, sample_every=0, val_fraction=0.05,
            precision="bf16",
        ),
        oracle=Recipe(arch="resnet18_quarter", epochs=15),
        cnn=Recipe(arch="resnet18_quarter", epochs=8, bf16=True),
        vit=Recipe.transformer(arch="vit_micro", epochs=15),
        measured=5000,
        sizes=(1, 2, 4, 8),
        seeds=3,
    ),
    # The published setting.
    "paper": Scale(
        **_CIFAR,
        flow=dict(
            **_PUBLISHED, preset="mef_glem", epochs=500, batch_size=512, val_fraction=0.0,
            m_steps=1, freeze_gaussians_at=0.2,  # one Adam step in each of 100 epochs
        ),
        oracle=Recipe(epochs=200),
        cnn=Recipe(epochs=200),
        vit=Recipe.transformer(epochs=200),
        sizes=(1, 2, 5, 10, 20, 50, 100),
    ),
}  # fmt: skip
