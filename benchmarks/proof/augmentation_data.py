"""Images and flows of ``augmentation.py``: who sees which images, cached as tensors, and flows by name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import find_images
from benchmarks.proof.augmentation_settings import (
    BUNDLED,
    FLOW_SETTINGS,
    FLOWS,
    OWN_IMAGES,
    OWN_SETTINGS,
    PLAIN,
    FlowRecipe,
    Setting,
)
from glem_augment import GLEM, open_data
from glem_augment.data.dataset import ImageData
from glem_augment.io import atomic_write
from glem_augment.training import TimeUpError, TrainConfig, Trainer
from glem_augment.training.checkpoint import has_checkpoint

# name -> folder in $GLEM_DATA, another place, name of the test split
PLACES = {
    "fashion-mnist": ("fashion-mnist", "/usr/share/datasets/fashion-mnist", "test"),
    "cifar10": ("cifar10", None, "test"),
    "imagenette": ("imagenette128", None, "val"),
    "mnist": ("mnist", None, "test"),
    "notmnist": ("notmnist", None, "test"),  # made by make_notmnist.py
    "bundled": (None, "bundled:fashion-mnist", "test"),
}
SHIPPED = tuple(PLACES)
VALIDATION_MOST, VALIDATION_SHARE = 200, 0.25  # images of a class


@dataclass
class Task:
    """The images of one setting and seed, uint8 [N,C,H,W] and int64 [N].

    ``val`` and ``test`` are the same for every seed; ``train`` is drawn by the seed from the other training images.
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: list[str]


class Library:
    """Opens data sets once, and keeps them decoded in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[tuple[Any, ...], tuple[Tensor, Tensor, list[str]]] = {}

    def images(self, name: str, split: str, size: int, channels: int) -> tuple[Tensor, Tensor, list[str]]:
        """All images of a split in one size, their labels, and the class names.

        Raises:
            SystemExit: the data is not on this machine.
        """
        key = (name, split, size, channels)
        if key not in self._open:
            file = self.folder / f"{name}-{split}-{channels}x{size}.npz"
            if not file.is_file():
                self._decode(file, *key)
            with np.load(file) as stored:
                x, y, classes = (stored[part] for part in ("x", "y", "classes"))
            self._open[key] = (torch.from_numpy(x), torch.from_numpy(y), [str(c) for c in classes])
        return self._open[key]

    def _decode(self, file: Path, name: str, split: str, size: int, channels: int) -> None:
        folder, otherwise, test = PLACES[name]
        found = otherwise if folder is None else find_images("augmentation", name, folder, otherwise)
        split = test if split == "test" else split
        data = open_data(found, split, image_size=size, channels=channels, progress=False)
        pixels = data.tensor()
        assert pixels is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            np.savez(out, x=pixels.numpy(), y=data.targets, classes=np.array(data.classes))

    def chosen(
        self, name: str, split: str, size: int, channels: int, classes: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor, list[str]]:
        """The images of some classes, numbered anew in their order."""
        x, y, names = self.images(name, split, size, channels)
        if classes is None:
            return x, y, names
        table = torch.full((len(names),), -1)
        table[list(classes)] = torch.arange(len(classes))
        rows = (table[y] >= 0).nonzero()[:, 0]
        return x[rows], table[y[rows]], [names[c] for c in classes]

    def rest(self, of: Setting | FlowRecipe) -> tuple[Tensor, Tensor]:
        """All training images that are not for validation, with their labels."""
        x, y, classes = self.chosen(of.data, "train", of.size, of.channels, of.classes)
        order = torch.from_numpy(np.random.default_rng(0xA06).permutation(len(y)))
        rows = [order[y[order] == index] for index in range(len(classes))]
        rows = torch.cat([part[held(len(part)) :] for part in rows])
        return x[rows], y[rows]

    def task(self, setting: Setting, seed: int, size: int | None = None) -> Task:
        """See ``Task``; ``size``: of the images, in place of the setting's, for a flow of another size."""
        shape = (size or setting.size, setting.channels)
        x, y, classes = self.chosen(setting.data, "train", *shape, setting.classes)
        order = np.random.default_rng(0xA06).permutation(len(y))
        check_enough(setting, y, classes)
        val, train = [], []
        for index, count in enumerate(counts(setting, len(classes))):
            rows = order[(y.numpy()[order] == index)]
            kept = held(len(rows))
            val.append(rows[:kept])
            train.append(np.random.default_rng([seed, index, 0x5B5E7]).permutation(rows[kept:])[:count])
        picked = [torch.from_numpy(np.sort(np.concatenate(part))) for part in (train, val)]
        test = self.chosen(setting.data, "test", *shape, setting.classes)
        if test[2] != classes:
            other = ", ".join(sorted(set(test[2]) ^ set(classes))) or "their order"
            raise SystemExit(
                f"augmentation: the test images of {setting.name} have other classes than its training images "
                f"({other}): is a folder missing, or called otherwise?"
            )
        return Task(*((x[rows], y[rows]) for rows in picked), test[:2], classes)


def held(count: int) -> int:
    """Validation images of a class with ``count`` training images."""
    return min(VALIDATION_MOST, max(1, int(VALIDATION_SHARE * count)))


def check_enough(setting: Setting, labels: Tensor, classes: list[str]) -> None:
    """SystemExit where a class has fewer training images than the setting asks for."""
    for index, count in enumerate(counts(setting, len(classes))):
        there = int((labels == index).sum())
        kept = held(there)
        if count > there - kept:
            raise SystemExit(
                f"augmentation: {setting.name} asks for {count} training images of {classes[index]!r}; with {kept} of "
                f"{there} held out for validation there are {there - kept}: is this the full data set?"
            )


def counts(setting: Setting, num_classes: int) -> list[int]:
    """Training images of every class."""
    if setting.imbalance == 1.0 or num_classes == 1:
        return [setting.per_class] * num_classes
    fall = [setting.imbalance ** (-index / (num_classes - 1)) for index in range(num_classes)]
    return [max(2, round(setting.per_class * share)) for share in fall]


# ---- flows -----------------------------------------------------------------------------------------------------------


class Flows:
    """Flows by name, adapted to the labelled images of a task. Trained ones are looked for in ``folder``."""

    def __init__(self, folder: Path, library: Library, rank: int = 64) -> None:
        self.folder, self.library, self.rank = folder, library, rank

    def path(self, name: str, setting: Setting, seed: int) -> str | Path | None:
        """Where a flow is; None for the identity."""
        if name == "identity":
            return None
        if name in BUNDLED:
            return BUNDLED[name]
        if name == "own":
            # Images of a task may change under one name; those of the other settings are named by them.
            images = setting.name if setting.data in SHIPPED else setting.data
            return self.folder / f"own-{images}-{seed}"
        return self.folder / name if name in FLOWS else name  # of --task: a folder, or a repository of the Hub

    def missing(self, name: str, setting: Setting) -> str | None:
        """Why a flow can't be used yet; None where it can, or is trained on the way ("own")."""
        where = self.path(name, setting, 0)
        if name == "own" or not isinstance(where, Path) or (where / "model.safetensors").is_file():
            return None
        return f"there is no flow {where}: python benchmarks/proof/augmentation.py --train-flow {name}"

    def adapted(self, name: str, setting: Setting, seed: int, task: Task) -> GLEM:
        """The flow with the Gaussians and modes of the task's labelled images, and of no others."""
        where = self.path(name, setting, seed)
        if name == "own" and not (where / "model.safetensors").is_file():
            self._train_own(where, setting, task)
        if where is None:
            side = setting.flow_size or setting.size
            base = GLEM.create("identity", (setting.channels, side, side), task.classes).eval()
        else:
            base = GLEM.from_pretrained(where)
        channels, size, _ = base.image_shape
        if channels != setting.channels:
            raise SystemExit(f"augmentation: {name} takes {channels} channels, {setting.name} has {setting.channels}")
        x, y = task.train if size == setting.size else self.library.task(setting, seed, size).train
        return base.adapt((x, y), classes=task.classes, rank=min(self.rank, base.dim), progress=False)

    def _train_own(self, out: Path, setting: Setting, task: Task) -> None:
        x, y = task.train
        data = ImageData.from_tensors(x, y, task.classes, name=setting.name)
        settings = {**FLOW_SETTINGS, **OWN_SETTINGS, "augment": PLAIN[setting.plain]}
        config = TrainConfig(**{**settings, "epochs": max(1, OWN_IMAGES // len(y)), "m_rounds": 1, "modes_rank": 0})
        print(f"augmentation: training {out.name} on {len(y)} images", flush=True)
        _fit(data, config, out)

    def train(self, name: str, seconds: float | None) -> bool:
        """Train a flow of ``FLOWS``, or go on with it, for at most so long. Returns whether it is finished."""
        if name not in FLOWS:
            raise SystemExit(f"augmentation: no recipe for a flow {name!r}; there are {', '.join(FLOWS)}")
        recipe = FLOWS[name]
        if recipe.labels:
            x, y, classes = self.library.chosen(recipe.data, "train", recipe.size, recipe.channels, recipe.classes)
        else:
            x, classes = self.library.rest(recipe)[0], ["any"]
            y = torch.zeros(len(x), dtype=torch.int64)
        data = ImageData.from_tensors(x, y, classes, name=recipe.data)
        settings = {**FLOW_SETTINGS, **recipe.settings, "epochs": recipe.epochs, "threads": torch.get_num_threads()}
        config = TrainConfig(**settings, max_minutes=None if seconds is None else max(0.05, seconds / 60))
        began = time.monotonic()
        try:
            _fit(data, config, self.folder / name)
        except TimeUpError as stop:
            print(f"augmentation: {stop} ({time.monotonic() - began:.0f} s); the same command goes on")
            return False
        return True


def _fit(data: ImageData, config: TrainConfig, out: Path) -> None:
    """Train, or go on from the checkpoint that is there."""
    Trainer(data, config, out, resume=has_checkpoint(out)).fit()
