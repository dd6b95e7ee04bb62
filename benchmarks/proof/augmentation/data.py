"""Images and flows of `augmentation/run.py`: the images of each seed and split, and flows by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import find_images
from benchmarks.paper.research import ResearchTrainer, split_settings
from benchmarks.proof.augmentation.settings import (
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
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig
from glem_augment.training.checkpoint import has_checkpoint

# name -> folder in $GLEM_DATA, another place, name of the test split
PLACES = {
    "fashion-mnist": ("fashion-mnist", None, "test"),
    "cifar10": ("cifar10", None, "test"),
    "imagenette": ("imagenette128", None, "val"),
    "mnist": ("mnist", None, "test"),
    "tiny-imagenet": ("tiny-imagenet", None, "val"),  # val/<wnid>/*.JPEG, by val_annotations.txt
    "notmnist": ("notmnist", None, "test"),  # glyphs of A to J; make_notmnist.py in commit 309e287 makes them
    "bundled": (None, "bundled:fashion-mnist", "test"),
}
VALIDATION_MOST, VALIDATION_SHARE = 200, 0.25  # images of a class


@dataclass
class Task:
    """The images of one setting and seed, uint8 [N,C,H,W] and int64 [N].

    `val` and `test` are the same for every seed; `train` is drawn by the seed from the other training images.
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: list[str]


@lru_cache
def images(name: str, split: str, size: int, channels: int) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a split in one size, their labels, and the class names.

    Raises:
        SystemExit: the data is not on this machine.
    """
    folder, otherwise, test = PLACES[name]
    found = otherwise if folder is None else find_images("augmentation", name, folder, otherwise)
    data = open_data(found, test if split == "test" else split, image_size=size, channels=channels)
    return data.tensor(), torch.from_numpy(data.targets), data.classes


def images_of(of: Setting | FlowRecipe, split: str, size: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """The images of a setting's or recipe's classes, with labels 0, 1, ... in the order of `classes`."""
    x, y, names = images(of.data, split, size or of.size, of.channels)
    if of.classes is None:
        return x, y, names
    table = torch.full((len(names),), -1)
    table[list(of.classes)] = torch.arange(len(of.classes))
    rows = (table[y] >= 0).nonzero()[:, 0]
    return x[rows], table[y[rows]], [names[c] for c in of.classes]


def split_rows(y: Tensor, num_classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows for validation and all other rows, split by class."""
    order = np.random.default_rng(0xA06).permutation(len(y))
    rows = [order[y.numpy()[order] == index] for index in range(num_classes)]
    held = [min(VALIDATION_MOST, max(1, int(VALIDATION_SHARE * len(part)))) for part in rows]
    return [(part[:count], part[count:]) for part, count in zip(rows, held, strict=True)]


def train_rows(setting: Setting, y: Tensor, num_classes: int, seed: int) -> np.ndarray:
    """The labelled images of a seed, as rows of the training split, in order.

    Raises:
        SystemExit: too few images.
    """
    rows = []
    for index, (held, rest) in enumerate(split_rows(y, num_classes)):
        wanted = counts(setting, num_classes)[index]
        if wanted > len(rest):
            raise SystemExit(
                f"augmentation: {setting.name} asks for {wanted} training images of class {index}; with {len(held)} "
                f"held out for validation there are {len(rest)}: is this the full data set?"
            )
        rows.append(np.random.default_rng([seed, index, 0x5B5E7]).permutation(rest)[:wanted])
    return np.sort(np.concatenate(rows))


def make_task(setting: Setting, seed: int, size: int | None = None) -> Task:
    """The `Task` of a setting and seed.

    Args:
        size: of the images, in place of the setting's, for a flow of another size.

    Raises:
        SystemExit: too few images, or test images of other classes.
    """
    x, y, classes = images_of(setting, "train", size)
    held = np.concatenate([held for held, _ in split_rows(y, len(classes))])
    picked = [torch.from_numpy(np.sort(part)) for part in (train_rows(setting, y, len(classes), seed), held)]
    test = images_of(setting, "test", size)
    if test[2] != classes:
        raise SystemExit(f"augmentation: the test images of {setting.name} have other classes than its training images")
    return Task(*((x[rows], y[rows]) for rows in picked), test[:2], classes)


def counts(setting: Setting, num_classes: int) -> list[int]:
    """Training images of every class."""
    if setting.imbalance == 1.0:
        return [setting.per_class] * num_classes
    fall = [setting.imbalance ** (-index / (num_classes - 1)) for index in range(num_classes)]
    return [max(2, round(setting.per_class * share)) for share in fall]


# ---- flows -----------------------------------------------------------------------------------------------------------


class Flows:
    """Flows by name, adapted to the labelled images of a task. `folder` holds trained flows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, setting: Setting, seed: int) -> str | Path:
        if name == "own":
            return self.folder / f"own-{setting.name}-{seed}"
        return BUNDLED.get(name) or (self.folder / name if name in FLOWS else name)

    def missing(self, name: str, setting: Setting) -> str | None:
        """Why a flow can't be used yet; None if it can, or if it is trained when needed ("own", the identity)."""
        where = self.path(name, setting, 0)
        if name == "own" or not isinstance(where, Path) or (where / "model.safetensors").is_file():
            return None
        return f"there is no flow {where}: python benchmarks/proof/augmentation/run.py --train-flow {name}"

    def adapted(self, name: str, setting: Setting, seed: int, task: Task, pooled: bool = False) -> GLEM:
        """The flow with the Gaussians and modes of the task's labelled images alone."""
        side = setting.flow_size or setting.size
        if name in ("identity", "taef2"):
            autoencoder = None if name == "identity" else name
            shape = (setting.channels, side, side)
            base = GLEM.create("identity", shape, task.classes, autoencoder=autoencoder).eval()
        else:
            where = self.path(name, setting, seed)
            if name == "own" and not (Path(where) / "model.safetensors").is_file():
                self._train_own(Path(where), setting, task)
            base = GLEM.from_pretrained(where)
        x, y = (
            task.train if base.image_shape[1] == setting.size else make_task(setting, seed, base.image_shape[1]).train
        )
        if pooled:  # one class of all images
            return base.adapt((x, torch.zeros_like(y)), classes=["image"], rank=min(64, base.dim))
        return base.adapt((x, y), classes=task.classes, rank=min(64, base.dim))

    def _train_own(self, out: Path, setting: Setting, task: Task) -> None:
        data = ImageData.from_tensors(*task.train, task.classes, name=setting.name)
        settings = {**FLOW_SETTINGS, **OWN_SETTINGS, "augment": PLAIN[setting.plain], "modes_rank": 0}
        own, research = split_settings(settings)
        config = TrainConfig(**own, epochs=max(1, OWN_IMAGES // len(data)))
        print(f"augmentation: training {out.name} on {len(data)} images", flush=True)
        ResearchTrainer(data, config, out, resume=has_checkpoint(out), research=research).fit()

    def train(self, name: str) -> None:
        """Train a flow of `FLOWS`, or resume its training."""
        if name not in FLOWS:
            raise SystemExit(f"augmentation: no recipe for a flow {name!r}; there are {', '.join(FLOWS)}")
        recipe, out = FLOWS[name], self.folder / name
        x, y, classes = images_of(recipe, "train")
        if not recipe.labels:
            rows = np.concatenate([rest for _, rest in split_rows(y, len(classes))])
            x, y, classes = x[rows], torch.zeros(len(rows), dtype=torch.int64), ["any"]
        settings = {**FLOW_SETTINGS, **recipe.settings, "epochs": recipe.epochs, "threads": torch.get_num_threads()}
        own, research = split_settings(settings)
        data = ImageData.from_tensors(x, y, classes, name=recipe.data)
        ResearchTrainer(data, TrainConfig(**own), out, resume=has_checkpoint(out), research=research).fit()
