"""Does augmentation help on a user's images? One small network is trained with several stacks of augmentation.

All stacks crop and flip. Stacks compete within their kind: ordinary operations, and moves along the modes of pixels, of
an autoencoder's latents, or of a flow. Held-out training images choose the best stack of each kind, with one seed. The
chosen stacks are measured on the test images with several seeds. Differences have 95 % intervals (Student's t).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm.auto import tqdm

from glem_augment.augment.transform import GLEMAugment
from glem_augment.codec.plausible import to_uint8
from glem_augment.codec.resize import PixelAdapter
from glem_augment.errors import DataError
from glem_augment.evaluation.classifier import MEAN, STD, normalised, train_network
from glem_augment.evaluation.intervals import difference, interval
from glem_augment.evaluation.metrics import spread
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM

__all__ = ["Comparison", "Stack", "compare"]

COPIES, BATCH = 4, 64  # moved copies of an image at most, images per step
NETWORK, RATE, RATE_PRETRAINED = "test_resnet", 5e-3, 1e-3  # a small ResNet of timm, and learning rates
MODES = 64
BASE = "crop + flip"
FEWEST_STEPS, MOST_STEPS = 30, 3000


@dataclass(frozen=True)
class Stack:
    """Operations on training images, beside crop and flip.

    Attributes:
        name: for people.
        kind: "ordinary", "pixels", "autoencoder" or "flow": stacks compete within a kind.
        image: names of torchvision v2 transforms of single images. batch: "MixUp", "CutMix" or "".
        moves: settings of `GLEMAugment`; moved copies replace half of the images.
    """

    name: str
    kind: str
    image: tuple[str, ...] = ()
    batch: str = ""
    moves: tuple[tuple[str, Any], ...] = ()


PLAIN = Stack(BASE, "plain")
ORDINARY = (
    Stack("TrivialAugment", "ordinary", ("TrivialAugmentWide",)),
    Stack("TrivialAugment, RandomErasing", "ordinary", ("TrivialAugmentWide", "RandomErasing")),
    Stack("RandAugment, RandomErasing, Mixup", "ordinary", ("RandAugment", "RandomErasing"), "MixUp"),
    Stack("CutMix", "ordinary", (), "CutMix"),
    Stack("TrivialAugment, CutMix", "ordinary", ("TrivialAugmentWide",), "CutMix"),
    Stack("TrivialAugment, RandomErasing, Mixup", "ordinary", ("TrivialAugmentWide", "RandomErasing"), "MixUp"),
)
POLICIES: tuple[dict[str, Any], ...] = (
    dict(policy="noise", strength=0.5),
    dict(policy="noise", strength=1.0),
    dict(policy="mixup"),
)


def moves(kind: str, shown: str, policies: Sequence[dict[str, Any]] = POLICIES) -> tuple[Stack, ...]:
    """A stack of moves along the modes of a model for each of the settings of `GLEMAugment`."""
    stacks = []
    for settings in policies:
        words = (f"{value:g}" if key == "strength" else value for key, value in settings.items())
        stacks.append(Stack(f"{shown}: {' '.join(words)}", kind, moves=tuple(settings.items())))
    return tuple(stacks)


@dataclass
class Comparison:
    """Trains the network with one stack after another.

    Args:
        models: for each kind of moves, a function that makes a model with modes of some training images.
        steps: of each training. network, pretrained: see `train_network`.
        copies: moved copies of every image.
        tick: called after each step.
    """

    models: dict[str, Callable[[ImageData], GLEM]]
    steps: int
    network: str = NETWORK
    pretrained: bool = False
    copies: int = COPIES
    tick: Callable[[], object] = lambda: None
    _fitted: dict[tuple[str, ImageData], GLEM] = field(default_factory=dict)
    _copies: dict[tuple[Stack, ImageData], Tensor] = field(default_factory=dict)

    def accuracy(self, stack: Stack, train: ImageData, test: ImageData, seed: int) -> float:
        """Accuracy in percent on `test` of the network trained on `train` with this stack."""
        net, right = self.trained(stack, train, seed), 0
        with torch.inference_mode():
            for x, y in test.batches(np.arange(len(test)), 256):
                right += int((net(normalised(x)).argmax(1) == y).sum())
        return 100 * right / len(test)

    def trained(self, stack: Stack, train: ImageData, seed: int) -> torch.nn.Module:
        """The network trained on `train` with this stack, in eval mode; it expects normalised images."""
        classes, channels = len(train.classes), train.image_shape[0]
        rate = RATE_PRETRAINED if self.pretrained else RATE
        more: dict[str, Any] = dict(name=self.network, rate=rate, pretrained=self.pretrained)
        return train_network(self.batches(stack, train, seed), self.steps, channels, classes, seed, **more)

    def batches(self, stack: Stack, train: ImageData, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of normalised images and labels without end, a function of the seed."""
        x, y = train.tensor(), torch.from_numpy(train.targets)
        copies = self.moved(stack, train) if stack.moves else None
        rng, size = np.random.default_rng([seed, 7]), train.image_shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
        each = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                *(getattr(v2, name)() for name in stack.image),
            ]
        )
        mix = getattr(v2, stack.batch)(num_classes=len(train.classes)) if stack.batch else None
        while True:
            order = rng.permutation(len(x))
            for start in range(0, max(1, len(x) - BATCH + 1), BATCH):
                rows = torch.from_numpy(order[start : start + BATCH])
                images = x[rows]
                if copies is not None:
                    chosen = torch.from_numpy(rng.random(len(rows)) < 0.5)
                    view = torch.from_numpy(rng.integers(len(copies), size=len(rows)))
                    images = torch.where(chosen[:, None, None, None], copies[view, rows], images)
                with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
                    torch.set_rng_state(state)
                    images = normalised(torch.stack([each(image) for image in images]))
                    labels: Tensor = y[rows]
                    if mix is not None:
                        images, labels = mix(images, labels)
                    state = torch.get_rng_state()
                self.tick()
                yield images.contiguous(memory_format=torch.channels_last), labels

    def moved(self, stack: Stack, train: ImageData) -> Tensor:
        """Moved copies of all images, uint8 [copies, N, C, H, W], made once.

        Policy "adversarial" raises the loss of a network that was trained with crop + flip on the same images.
        """
        key = stack, train
        if key not in self._copies:
            aug = GLEMAugment(self.model(stack.kind, train), p=1.0, seed=0, **dict(stack.moves))
            if aug.policy == "adversarial":
                channels = train.image_shape[0]
                normalise = v2.Normalize([MEAN] * channels, [STD] * channels)
                aug.attach(torch.nn.Sequential(normalise, self.trained(PLAIN, train, 0)))
            x, y = train.tensor(), torch.from_numpy(train.targets)
            out = torch.empty(self.copies, *x.shape, dtype=torch.uint8)
            for view in range(self.copies):
                order = torch.from_numpy(np.random.default_rng([view, 11]).permutation(len(x)))
                for rows in order.split(BATCH):  # a new order for each copy, so that partners vary
                    out[view, rows] = aug(x[rows], y[rows])[0]
            self._copies[key] = out
        return self._copies[key]

    def model(self, kind: str, train: ImageData) -> GLEM:
        """The model with modes of the training images, made once."""
        key = kind, train
        if key not in self._fitted:
            self._fitted[key] = self.models[kind](train)
        return self._fitted[key]

    def best(
        self, stacks: Sequence[Stack], fit: ImageData, held: ImageData, seed: int = 0
    ) -> tuple[dict[str, Stack], dict[str, float]]:
        """The best stack of each kind on the images `held` after training on `fit`, and all accuracies by name."""
        found = {stack.name: self.accuracy(stack, fit, held, seed) for stack in stacks}
        kinds = dict.fromkeys(stack.kind for stack in stacks)
        return {k: max((s for s in stacks if s.kind == k), key=lambda s: found[s.name]) for k in kinds}, found


def parted(data: ImageData, every: int) -> tuple[ImageData, ImageData]:
    """The images in two parts; the second part has every `every`-th image of each class."""
    place = np.empty(len(data), dtype=np.int64)
    for k in range(len(data.classes)):
        rows = np.flatnonzero(data.targets == k)
        place[rows] = np.arange(len(rows))
    held = place % every == every - 1
    return data.subset(np.flatnonzero(~held)), data.subset(np.flatnonzero(held))


def advice(rows: Sequence[dict[str, Any]]) -> str:
    """One sentence from rows with name, kind and the accuracies of the same seeds; the first row is crop + flip."""
    ours = [row for row in rows if row["kind"] not in ("plain", "ordinary")]
    others = [row for row in rows if row["kind"] in ("plain", "ordinary")]
    strongest = max(others, key=lambda row: row["mean"])
    best = max(ours, key=lambda row: row["mean"], default=strongest)
    gain, half = difference(best, strongest)
    if best is not strongest and gain > half:
        return f"Use {best['name']}: {gain:+.1f} ± {half:.1f} points over {strongest['name']}, the best without it."
    gain, half = difference(strongest, rows[0])
    if strongest is not rows[0] and gain > half:
        return f"Use {strongest['name']}: {gain:+.1f} ± {half:.1f} points over {BASE}. Moves add nothing clear to it."
    return f"Nothing clearly beats {BASE} on these images: leave it out, or give it more time and more seeds."


def models_for(train: ImageData, autoencoder: str | None, flow: GLEM | None) -> dict[str, Callable[[ImageData], GLEM]]:
    """Makers of the model for each kind of moves: one pass over the training images, nothing is trained."""
    shape, ranks = train.image_shape, dict[str, Any](rank=MODES, progress=False)

    def identity(name: str | None, data: ImageData) -> GLEM:
        return GLEM.create("identity", shape, data.classes, autoencoder=name).adapt(data, **ranks)

    made: dict[str, Callable[[ImageData], GLEM]] = {"pixels": partial(identity, None)}
    if autoencoder is not None and shape[0] == 3:
        made["autoencoder"] = partial(identity, autoencoder)
    if flow is not None:
        pixels = PixelAdapter(flow.image_shape)

        def adapted(data: ImageData) -> GLEM:
            x = to_uint8(pixels.to_flow(pixels.to_unit(data.tensor())))
            return flow.adapt((x, data.targets), classes=data.classes, **ranks)

        made["flow"] = adapted
    return made


def compare(
    train: ImageData,
    test: ImageData,
    minutes: float = 10.0,
    seeds: int = 5,
    autoencoder: str | None = "taef2",
    flow: GLEM | None = None,
    network: str = NETWORK,
    pretrained: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Choose and measure stacks within about `minutes`; the result has `rows`, `advice` and the settings.

    Args:
        train, test: images of one shape with the same classes; sizes that the autoencoder divides.
        seeds: 2 to 10 trainings of every chosen stack.

    Raises:
        DataError: classes that differ, or a class with fewer than five images.
    """
    if train.classes != test.classes:
        raise DataError(f"training and test images differ in classes: {train.classes[:5]} and {test.classes[:5]}")
    if np.bincount(train.targets, minlength=len(train.classes)).min() < 5:
        raise DataError("every class needs at least 5 training images, a fifth of which are held out for the choice")
    began, models = time.monotonic(), models_for(train, autoencoder, flow)
    shown = {"pixels": "pixel modes", "autoencoder": f"{autoencoder} modes", "flow": "flow's modes"}
    stacks = [*ORDINARY, *(stack for kind in models for stack in moves(kind, shown[kind]))]
    fit, held = parted(train, 5)
    comparison = Comparison(models, FEWEST_STEPS, network, pretrained)
    copy = {kind: _seconds_per_copy(comparison.model(kind, fit)) for kind in models}  # of one image
    tried = {kind: sum(stack.kind == kind for stack in stacks) for kind in models}
    copying = sum((tried[kind] * len(fit) + len(train)) * seconds for kind, seconds in copy.items())
    began_step = time.monotonic()
    comparison.accuracy(ORDINARY[1], train, test.subset(range(min(64, len(test)))), 0)
    step = (time.monotonic() - began_step) / FEWEST_STEPS
    left = 60 * minutes - (time.monotonic() - began)
    comparison.copies = max(1, min(COPIES, int(0.4 * left / copying)))
    runs = len(stacks) + seeds * (2 + len(models))
    comparison.steps = int((left - comparison.copies * copying) / runs / step)
    comparison.steps = max(FEWEST_STEPS, min(MOST_STEPS, comparison.steps))
    bar = tqdm(total=runs * comparison.steps, unit="step", desc="compare", disable=not progress, dynamic_ncols=True)
    with bar:
        comparison.tick = bar.update
        chosen, tuned = comparison.best(stacks, fit, held)
        measured = {
            stack: [comparison.accuracy(stack, train, test, seed) for seed in range(seeds)]
            for stack in (PLAIN, *chosen.values())
        }
    rows = report(measured)
    return {
        "train": len(train), "test": len(test), "image_shape": list(train.image_shape), "classes": len(train.classes),
        "network": network, "pretrained": pretrained, "steps": comparison.steps, "batch": BATCH, "seeds": seeds,
        "rows": rows, "advice": advice(rows), "tuning": tuned, "seconds": round(time.monotonic() - began, 1),
        "pictures": {s.name: comparison.moved(s, train) for s in chosen.values() if s.moves},
    }  # fmt: skip


def report(measured: dict[Stack, list[float]]) -> list[dict[str, Any]]:
    """Rows of the accuracies of stacks, the first of which is crop + flip, with their gains over it."""
    rows: list[dict[str, Any]] = []
    for stack, values in measured.items():
        row: dict[str, Any] = {"name": stack.name, "kind": stack.kind, "accuracies": values}
        row |= {"mean": statistics.mean(values), "interval": interval(values)}
        rows.append(row)
        row["gain"], row["gain_interval"] = difference(row, rows[0]) if len(rows) > 1 else (0.0, 0.0)
    return rows


def _seconds_per_copy(model: GLEM) -> float:
    """The time of `GLEMAugment` for an image with this model."""
    x = torch.rand(8, *model.image_shape)
    aug, y = GLEMAugment(model, p=1.0, policy="noise", strength=0.5), torch.zeros(8, dtype=torch.int64)
    aug(x, y)
    began = time.monotonic()
    aug(x, y)
    return (time.monotonic() - began) / 8


def picture(train: ImageData, copies: dict[str, Tensor], columns: int = 8) -> Image.Image:
    """Training images above their moved copies."""
    rows = spread(len(train), min(columns, len(train)))
    cells = torch.stack([train.tensor()[rows], *(found[0, rows] for found in copies.values())])
    return compose("Training images and their moves", train.name, [Section("", cells, rows=["real", *copies])])
