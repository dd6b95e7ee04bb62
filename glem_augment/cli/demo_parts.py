"""The four parts of the demo: moved photographs, a synthetic set, networks trained on samples alone, and a flow."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import BUNDLED_IMAGES
from glem_augment.data.dataset import ImageData, images_for, open_data
from glem_augment.data.sources import open_source
from glem_augment.evaluation.compare import difference, interval
from glem_augment.evaluation.metrics import evaluate, spread
from glem_augment.evaluation.preview import Section
from glem_augment.evaluation.quality import (
    NETWORK,
    ORACLE_BATCH,
    ORACLE_MEAN,
    ORACLE_STD,
    features_and_logits,
    label_reliability,
    random_batches,
    train_network,
)
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.dataset import SyntheticDataset

PHOTOGRAPHS, COLOUR, FASHION = "bundled:photographs", "bundled:cifar10", "bundled:fashion-mnist"


@dataclass
class Size:
    """How much the demo does."""

    photographs: int = 4  # at most
    per_class: int = 10  # images of each class in the synthetic set
    images: int = 1000  # of Fashion-MNIST in each split, evenly over the classes; at most 1000
    round_trip: int = 250  # of the test images
    seeds: int = 3  # networks for each kind of training images
    steps: int = 150  # of each training


QUICK = Size(photographs=2, per_class=2, images=100, round_trip=20, seeds=2, steps=3)


@dataclass
class Part:
    """One part of the page.

    Attributes:
        text: what was done. code: the command, or the lines of Python, that do it.
        found: sentences that the numbers carry.
        section: pictures. table: rows of text under a heading.
    """

    title: str
    text: str
    code: str
    found: list[str]
    section: Section | None = None
    table: Sequence[Sequence[str]] = ()


def photographs(spec: str, size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """Photographs, moved by noise of two strengths and by mixup with the next one."""
    model = GLEM.from_pretrained(PHOTOGRAPHS)
    side = model.image_shape[1:]
    source = open_source(spec, unlabelled=True)
    rows = spread(len(source), min(size.photographs, len(source)))
    data = open_data(Subset(source, rows.tolist()), image_size=side, channels=3, progress=progress)
    x, n = data.tensor(), len(data)
    y = torch.zeros(n, dtype=torch.int64)
    noise, mixup = dict(policy="noise", strength=0.5), dict(policy="mixup")
    kinds: dict[str, dict[str, Any]] = {"noise 0.5": noise, "noise 1": noise | {"strength": 1.0}, "mixup": mixup}
    columns, moves = {"original": x}, {}
    for name, settings in tqdm(kinds.items(), desc="moving photographs", delay=2, disable=not progress):
        aug = GLEMAugment(model, p=1.0, seed=0, **settings)
        drawn = aug.draw(x, y)
        if name == "mixup":  # a photograph that is alone is mixed with a draw
            partner = torch.arange(n).roll(-1) if n > 1 else torch.tensor([-1])
            drawn = replace(drawn, partner=partner, partner_cls=y, l=torch.full((n,), 0.5))
        columns[name] = aug.replay(x, y, drawn)[0]
        change = (columns[name].float() - x.float()).abs().mean()
        moves[name] = {"mean_change": float(change), "put_back": aug.stats["replaced"]}
    unsorted = "" if spec == PHOTOGRAPHS else ", channels=3, unlabelled=True"
    part = Part(
        "Move photographs",
        f"{n} photographs of {spec}, at {side[0]} pixels. An autoencoder turns each photograph "
        f"into latents. The latents move along {aug.modes} main directions in which photographs of one thing vary. "
        "Noise goes half a standard deviation or a whole one. Mixup goes half of the way to the next photograph, along "
        "the same directions. The directions come from other photographs. A move whose result is not plausible is put "
        "back: the photograph stays as it was.",
        "import torch\nfrom glem_augment import GLEMAugment, open_data\n\n"
        f"photos = open_data({json.dumps(spec)}, image_size={side[0]}{unsorted})\n"
        "x, y = photos.tensor(), torch.zeros(len(photos), dtype=torch.int64)\n"
        f'noise = GLEMAugment("{PHOTOGRAPHS}", p=1.0, policy="noise", strength=0.5)\n'
        f'mixup = GLEMAugment("{PHOTOGRAPHS}", p=1.0, policy="mixup")\n'
        "moved, labels = noise(x, y)",
        [f"{sum(move['put_back'] for move in moves.values())} of {3 * n} moves were put back as implausible."],
        Section("", torch.stack(list(columns.values()), 1), list(columns)),
        [("move", "mean change (0 to 255)", "put back")]
        + [(name, f"{m['mean_change']:.1f}", f"{m['put_back']} of {n}") for name, m in moves.items()],
    )
    return part, {"data": spec, "images": n, "moves": moves}


def synthetic(out: Path, size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """A synthetic set with as many images of each class, exported to a folder."""
    data = SyntheticDataset(COLOUR, per_class=size.per_class, seed=0)
    folder = out / "synthetic"
    data.export(folder, progress=progress, overwrite=True)
    cells = data.images(range(len(data))).unflatten(0, (-1, size.per_class))
    c, h, w = data.image_shape
    part = Part(
        "Draw a balanced data set",
        f"{size.per_class} new images of each of the {len(data.classes)} classes of CIFAR-10, {h}x{w} pixels. Every "
        "class has Gaussians in the latents of an autoencoder, and the images are draws from the Gaussians. Many "
        "images are blurred, and not all show their class.",
        f"glem generate {COLOUR} --per-class {size.per_class} --out {shlex.quote(str(folder))}",
        [f"{len(data)} images in {len(data.classes)} class folders lie in {folder}."],
        Section("", cells, rows=data.classes),
    )
    found = {"model": COLOUR, "folder": str(folder), "images": len(data), "classes": len(data.classes)}
    return part, found | {"per_class": size.per_class, "temperature": data.temperature, "seed": data.seed}


def classifiers(size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """Networks trained on real images alone, on samples of the flow alone, and on samples of the pixels' Gaussians."""
    flow = GLEM.from_pretrained(FASHION)
    train, test = (fashion(flow, split, size) for split in ("train", "test"))
    rank = flow.checked_modes(None)
    pixels = GLEM.create("identity", flow.image_shape, flow.classes, flow.class_ids)
    pixels = pixels.adapt(train, rank=rank, progress=False)
    models = {"real images": None, "samples of the flow": flow, "samples of the pixels' Gaussians": pixels}
    found: dict[str, list[float]] = {name: [] for name in models}
    first: dict[str, Tensor] = {}
    total = size.seeds * len(models) * size.steps
    with tqdm(total=total, unit="step", desc="training", disable=not progress) as bar:
        for seed in range(size.seeds):
            for name, model in models.items():
                data = train if model is None else drawn_like(model, train, seed)
                first.setdefault(name, data.tensor()[:: len(data) // len(data.classes)])
                network = train_network(
                    ticking(random_batches(data, seed), bar), size.steps, 1, len(data.classes), seed
                )
                logits = features_and_logits(network, test.tensor(), ORACLE_MEAN, ORACLE_STD)[1]
                found[name].append(100 * label_reliability(logits, torch.from_numpy(test.targets)))
    arms: dict[str, dict[str, Any]] = {
        name: {"accuracies": values, "mean": statistics.mean(values), "interval": interval(values)}
        for name, values in found.items()
    }
    real, ours, control = models
    gains = {f"{a} over {b}": difference(arms[a], arms[b]) for a, b in ((real, ours), (ours, control))}
    part = Part(
        "Train on samples alone",
        f"A small network learns Fashion-MNIST from {len(train):,} images of one kind, and from nothing else. The "
        "images are real, samples of the bundled flow, or samples of Gaussians of the pixels. The network is tested on "
        f"{len(test):,} real images. Each kind has {size.seeds} networks (timm's {NETWORK}, {size.steps} steps of "
        f"{min(ORACLE_BATCH, len(train))} images), and each network has new samples. The comparison is not like for "
        f"like. The flow was trained on {flow.config.training['images']:,} images. The Gaussians were fitted to the "
        f"{len(train):,} real images alone.",
        "from glem_augment import GLEM, SyntheticDataset, open_data\n\n"
        f'real = open_data("{BUNDLED_IMAGES}", "train")\n'
        f'pixels = GLEM.create("identity", real.image_shape, real.classes).adapt(real, rank={rank})\n'
        f'ours = SyntheticDataset("{FASHION}", per_class={len(train) // len(train.classes)}, seed=0)\n'
        f"theirs = SyntheticDataset(pixels, per_class={len(train) // len(train.classes)}, seed=0)",
        [sentence(what, *gain) for what, gain in gains.items()],
        Section("", torch.stack(list(first.values())), rows=["real", "flow", "pixels"]),
        [("trained on", "accuracy in %, 95 % interval", "each network")]
        + [
            (name, f"{arm['mean']:.1f} ± {arm['interval']:.1f}", ", ".join(f"{v:.1f}" for v in arm["accuracies"]))
            for name, arm in arms.items()
        ],
    )
    differences = {what: {"mean": gain, "interval": half} for what, (gain, half) in gains.items()}
    return part, {"train": len(train), "test": len(test), "arms": arms, "differences": differences}


def measured_flow(size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """The bundled flow as a classifier, and how well it gives images back."""
    flow = GLEM.from_pretrained(FASHION)
    test = fashion(flow, "test", size)
    found = evaluate(flow, test, round_trip=size.round_trip, progress=progress)
    trip, accuracy = found["round_trip"], found["accuracy"]
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))
    part = Part(
        "One flow, both ways",
        "The bundled flow maps an image to a latent and back. The class whose Gaussian fits the latent best is its "
        f"answer, so it classifies as well. It was measured on {len(test):,} test images, which it was not trained on.",
        f"glem eval {FASHION} {BUNDLED_IMAGES} --round-trip {size.round_trip}",
        [f"Of {trip['images']} images {100 * trip['within_half_step']:.4g} % of the pixels come back exactly."],
        table=[
            ("measure", "value"),
            ("accuracy in %, 95 % interval", f"{100 * accuracy:.1f} ± {100 * half:.1f}"),
            ("calibration error", f"{found['ece']:.3f}"),
            ("bits per dimension, given the class", f"{found['bits_per_dim']:.2f}"),
            ("largest error of a round trip (0 to 255)", f"{trip['max_error']:.2g}"),
        ],
    )
    return part, found | {"accuracy_interval": half}


def fashion(flow: GLEM, split: str, size: Size) -> ImageData:
    data = images_for(flow, BUNDLED_IMAGES, split=split, progress=False)
    return data.subset(spread(len(data), size.images))


def drawn_like(model: GLEM, real: ImageData, seed: int) -> ImageData:
    """Samples, as many of each class as `real` has."""
    data = SyntheticDataset(model, per_class=len(real) // len(real.classes), seed=seed)
    return ImageData.from_tensors(data.images(range(len(data))), data.targets, data.classes, data.class_ids)


def ticking(batches: Iterator[tuple[Tensor, Tensor]], bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield batch
        bar.update()


def sentence(what: str, gain: float, half: float) -> str:
    """A difference in points; one within its 95 % interval is no difference."""
    clear = "" if abs(gain) > half else ", which is no clear difference"
    return f"{what[0].upper()}{what[1:]}: {gain:+.1f} ± {half:.1f} points{clear}."
