"""`glem demo`: the library's main job on the bundled Fashion-MNIST images, in a few minutes.

The flow is measured and pictured, draws a small synthetic data set, and then augments the images that a small timm
network is trained on. The identity control does the same along the modes of the pixels. At the end the flow of colour
images draws its classes, and moves the user's photographs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import BUNDLED_IMAGES
from glem_augment.cli import common
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.evaluation.metrics import evaluate, moves_put_back, spread
from glem_augment.evaluation.preview import Section, compose, preview
from glem_augment.evaluation.quality import NETWORK, train_network
from glem_augment.io import save_png, write_json
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.dataset import SyntheticDataset

COLOUR = "bundled:cifar10"
BATCH = 50
DESCRIPTION = """\
Load a flow and the bundled Fashion-MNIST images; measure the flow; write pictures and a small synthetic data set;
then train a small timm network on 1000 images with and without GLEMAugment, with several seeds, and print both
accuracies, whichever is higher. Then draw images of the colour flow, and with --photos adapt it to photographs of yours
and draw moves of them. Needs no network and no GPU; a few minutes on 2 cores.
"""
EXAMPLES = """\
  glem demo
  glem demo --model runs/my-flow --quick
  glem demo --photos my-photos/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    parser.add_argument("--out", type=common.out_folder, default="demo-out", metavar="DIR", help="(default: demo-out)")
    flow = "a flow of Fashion-MNIST's classes (default: %(default)s)"
    parser.add_argument("--model", default="bundled:fashion-mnist", metavar="MODEL", help=flow)
    photos = "a folder of class folders with photographs, or another name of images as for glem adapt"
    parser.add_argument("--photos", metavar="DATA", help=photos)
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds: few images, numbers mean little")


@dataclass
class DemoSize:
    """How much the demo does."""

    seeds: int = 3  # training runs per arm
    epochs: int = 30  # of each run
    views: int = 4  # augmented copies of every training image
    p: float = 0.5  # how often a copy replaces the original
    per_class: int = 20  # synthetic images to write
    images: int = 1000  # real images used of the bundled 1000 per split, evenly over the classes


QUICK = DemoSize(seeds=1, epochs=2, views=1, per_class=2, images=100)


def run(args: argparse.Namespace) -> None:
    """Print the report, and write report.json, preview.png, synthetic/ and synthetic.png."""
    # Flow and network are small. Beside other busy processes a second thread would make them slower by far.
    torch.set_num_threads(1)
    size = QUICK if args.quick else DemoSize()
    out, name, progress = args.out, args.model, not args.quiet
    began = time.monotonic()
    model = GLEM.from_pretrained(name)
    train, test = (common.open_for(model, BUNDLED_IMAGES, split, progress=progress) for split in ("train", "test"))
    train, test = (data.subset(spread(len(data), size.images)) for data in (train, test))
    if model.modes is None:
        raise DataError(f"{name} has no class modes; train it with --modes-rank above 0")
    out.mkdir(parents=True, exist_ok=True)
    say = partial(print, flush=True)
    say(f"# glem demo\n\n## The flow on {len(test)} bundled test images\n\n`{model!r}`\n")
    if args.quick:
        say("**A quick run: these numbers mean little.**\n")
    measured = evaluate(model, test, progress=progress)
    trip = measured["round_trip"]
    say(f"- accuracy {100 * measured['accuracy']:.2f} % (top 5: {100 * measured['top5']:.2f} %)")
    say(f"- {measured['bits_per_dim']:.3f} bits/dim at {measured['bits']} bits, given the class")
    say(f"- calibration error {measured['ece']:.4f}")
    say(
        f"- round trip: {100 * trip['within_half_step']:.4f} % of the pixels within half a uint8 step, largest error "
        f"{trip['max_error']:.2g} steps"
    )

    say("\n## Pictures and a synthetic data set\n")
    save_png(preview(model, test), out / "preview.png")
    synthetic = SyntheticDataset(model, per_class=size.per_class, seed=0)
    synthetic.export(out / "synthetic", progress=progress, overwrite=True)
    save_png(sheet(synthetic, name, size), out / "synthetic.png")
    say("- `preview.png`: augmentations, samples and interpolations")
    say(f"- `synthetic/`: {size.per_class} images of each class, drawn together in `synthetic.png`")

    say(f"\n## A classifier on {len(train)} images, with and without augmentation\n")
    arms = compare(model, train, test, size, progress)
    steps = size.epochs * (len(train) // min(BATCH, len(train)))
    say(
        f"timm `{NETWORK}` from scratch, {steps} steps of {BATCH} images, AdamW, cosine schedule; the same batches\n"
        f"and no other augmentation in every arm; accuracy on {len(test)} test images after the last step: mean,\n"
        f"standard deviation, and every run. Augmented arms replace an image with probability {size.p} by one of\n"
        f"{size.views} copies made beforehand by `GLEMAugment` (mixup along the modes of the class; otherwise its\n"
        "defaults).\n"
    )
    for arm, result in arms.items():
        each = ", ".join(f"{100 * value:.1f}" for value in result["accuracies"])
        deviation = "" if result["std"] is None else f" ± {100 * result['std']:.2f}"
        say(f"- {arm}: {100 * result['mean']:.2f}{deviation} % ({each})")
    trained_on = model.config.training.get("images", "an unknown number")
    say(
        f"\n{verdict(arms)}\n\n"
        f"Not like for like: the classifier sees {len(train)} real images in every arm, but the flow and its modes\n"
        f"were fitted on other images too ({trained_on} in all), so what they add is knowledge that the {len(train)}\n"
        "do not hold. The identity arm has no such help: the same transform, along the modes of the images' pixels."
    )

    say(f"\n## Colour: `{COLOUR}`\n")
    colour = GLEM.from_pretrained(COLOUR)
    drawn = SyntheticDataset(colour, per_class=size.per_class)
    save_png(sheet(drawn, COLOUR, size), out / "synthetic-colour.png")
    say(f"- `synthetic-colour.png`: {size.per_class} images of each class")
    put_back = None if args.photos is None else adapted_to(args.photos, colour, out, say, progress)

    seconds = round(time.monotonic() - began, 1)
    report = {"model": name, "flow": measured, "size": vars(size), "arms": arms, "quick": args.quick}
    report["photos"] = None if put_back is None else {"folder": args.photos, "moves_put_back": put_back}
    write_json(out / "report.json", {**report, "seconds": seconds})
    say(f"\nDone in {seconds:.0f} s; the numbers are in {out / 'report.json'}")


def sheet(data: SyntheticDataset, name: str, size: DemoSize) -> Image.Image:
    """A picture of all images, one row for each class."""
    cells = data.images(range(len(data))).unflatten(0, (-1, size.per_class))
    drawn = f"{size.per_class} of each class from {name}, temperature {data.temperature}, seed {data.seed}"
    return compose("Synthetic images", drawn, [Section("", cells, rows=data.classes)])


def adapted_to(photos: str, flow: GLEM, out: Path, say: Callable[[str], None], progress: bool) -> dict[str, Any]:
    """Adapt the flow to photographs, draw its moves of them, and say how many would be put back; see
    `moves_put_back`."""
    data = common.open_resized(flow, photos, "train", progress=progress)
    model = flow.adapt(data, progress=progress)
    save_png(preview(model, data), out / "preview-photos.png")
    found = moves_put_back(model, data)
    say(f"- `preview-photos.png`: {COLOUR} adapted to the {len(data)} photographs in {photos}, and its moves of them")
    share, strength = 100 * found["mixup"], found["strength"]
    say(f"- {share:.0f} % of the mixup moves are put back; noise moves go as far as {strength:g} standard deviations")
    return found


# ---- the classifier ------------------------------------------------------------------------------------------------


def compare(model: GLEM, train: ImageData, test: ImageData, size: DemoSize, progress: bool) -> dict[str, Any]:
    """The accuracies of every arm. All arms share network, steps, batches and the seeds of both."""
    identity = GLEM.create("identity", model.image_shape, model.classes, model.class_ids, bits=model.bits)
    smallest = int(np.unique(train.targets, return_counts=True)[1].min())
    rank = min(model.modes.rank if model.modes is not None else 1, smallest - 1)
    identity.fit_modes(train, rank=rank)
    originals = train.tensor()[None]
    pools = {"no augmentation": originals}
    for name, source in (("GLEMAugment", model), ("identity control", identity)):
        aug = GLEMAugment(source.eval(), p=1.0, modes=rank, seed=0)
        copies = augmented_copies(aug, train, size.views, f"{name}: augmenting", progress)
        pools[name] = torch.cat([originals, copies])
    found: dict[str, list[float]] = {name: [] for name in pools}
    with tqdm(total=len(pools) * size.seeds * size.epochs, unit="epoch", desc="training", disable=not progress) as bar:
        for seed in range(size.seeds):
            for name, pool in pools.items():
                found[name].append(train_classifier(pool, train, test, seed, size, bar))
    return {
        name: {
            "accuracies": values,
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if size.seeds > 1 else None,
        }
        for name, values in found.items()
    }


def augmented_copies(aug: GLEMAugment, data: ImageData, views: int, desc: str, progress: bool) -> Tensor:
    """Augmented copies of all images, uint8 [views, N, C, H, W]. Batches are shuffled, so that partners vary.

    The copies are made once and serve all seeds, since on a CPU the flow costs more than the small network.
    """
    out = torch.empty(views, len(data), *data.image_shape, dtype=torch.uint8)
    with tqdm(total=views * len(data), unit="image", desc=desc, disable=not progress) as bar:
        for view in range(views):
            order = np.random.default_rng([0, view]).permutation(len(data))
            start = 0
            for x, y in data.batches(order, 250):
                out[view, torch.from_numpy(order[start : start + len(y)])] = aug(x, y)[0]
                start += len(y)
                bar.update(len(y))
    return out


def train_classifier(pool: Tensor, train: ImageData, test: ImageData, seed: int, size: DemoSize, bar: tqdm) -> float:
    """Train one network from scratch, and return its accuracy on `test` after the last step.

    `pool` holds the training images, and behind them the copies of all, if any: uint8 [1 + views, N, C, H, W]. No other
    augmentation is used, in any arm.
    """
    x, y = normalised(pool), torch.from_numpy(train.targets)
    batch = min(BATCH, len(train))
    steps_per_epoch = len(train) // batch

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step, (rows, view) in enumerate(epoch_batches(len(train), batch, seed, size, len(pool)), 1):
            yield x[view, rows], y[rows]
            bar.update(step % steps_per_epoch == 0)

    network = train_network(batches(), size.epochs * steps_per_epoch, train.image_shape[0], len(train.classes), seed)
    with torch.no_grad():
        predicted = torch.cat([network(part).argmax(1) for part in normalised(test.tensor()).split(250)])
    return float((predicted == torch.from_numpy(test.targets)).float().mean())


def epoch_batches(count: int, batch: int, seed: int, size: DemoSize, views: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows, and which of `views` views stands for each (0: the original). The rows depend on the seed alone."""
    for epoch in range(size.epochs):
        rng = np.random.default_rng([seed, epoch])
        order, replaced = rng.permutation(count), rng.random(count) < size.p
        view = np.where(replaced, rng.integers(min(1, views - 1), views, count), 0)
        for start in range(0, count - batch + 1, batch):
            yield torch.from_numpy(order[start : start + batch]), torch.from_numpy(view[start : start + batch])


def normalised(x: Tensor) -> Tensor:
    """uint8 images as floats with the mean and standard deviation of Fashion-MNIST taken out."""
    return (x.float() / 255 - 0.286) / 0.353


def verdict(arms: dict[str, Any]) -> str:
    """What the accuracies say. A difference within twice its standard error says nothing."""
    plain, ours = arms["no augmentation"], arms["GLEMAugment"]
    gain = 100 * (ours["mean"] - plain["mean"])
    if plain["std"] is None or ours["std"] is None:
        return f"With GLEMAugment {gain:+.2f} points; one seed can't tell this from chance."
    error = 100 * math.sqrt((plain["std"] ** 2 + ours["std"] ** 2) / len(plain["accuracies"]))
    clear = "more" if abs(gain) > 2 * error else "not more"
    return (
        f"With GLEMAugment {gain:+.2f} points, {clear} than twice the standard error of the difference ({error:.2f})."
    )
