"""The demo: the library at work, in four parts, on one HTML page."""

from __future__ import annotations

import base64
import io
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from glem_augment import GLEM, GLEMAugment, ImageData, Noise, Privacy, SyntheticDataset, __version__, open_data
from glem_augment.evaluation import (
    Section,
    classifier,
    compose,
    difference,
    evaluate,
    interval,
    spread,
)
from glem_augment.io import atomic_write, finite, save_png, write_json

COLOUR, FASHION = "bundled:cifar10", "bundled:fashion-mnist"


@dataclass
class Size:
    """How much the demo does."""

    per_class: int = 10  # images of each class in the synthetic set
    images: int = 1000  # of Fashion-MNIST in each split, evenly over the classes; at most 1000
    measured: int = 500  # test images for the bundled model
    round_trip: int = 100  # of these
    epsilon: float = 10.0  # of the private model
    seeds: int = 3  # networks for each kind of training images
    few_seeds: int = 3  # networks with moves and without, each pair on other images
    steps: int = 120  # of each training
    few_steps: int = 150  # of each training on few images; training images beside these few chose it over 120


QUICK = Size(
    per_class=2, images=200, measured=50, round_trip=20, epsilon=50.0, seeds=2, few_seeds=2, steps=3, few_steps=3
)
DELTA = 1e-4
# Of few images: images per class and per step, and pixels of the random crop.
FEW, FEW_BATCH, CROP = 10, 20, 2
USUAL = Noise(strength=0.5)  # the move to start with where no classifier is at hand


@dataclass
class Part:
    """A part of the page, whose text is in demo.html.

    Attributes:
        words: values of the placeholders in the text. found: sentences with the results.
        section: pictures. table: rows of text under a heading.
    """

    words: dict[str, Any]
    found: list[str]
    section: Section | None = None
    table: list[Sequence[str]] = field(default_factory=list)


def make_page(out: Path, quick: bool = False, progress: bool = True) -> None:
    """Write index.html, report.json, synthetic/ and a picture of each part to `out`, and print the results.

    Args:
        quick: a smoke test of seconds, whose numbers mean little.
    """
    # The networks are small. Beside other busy processes a second thread would make them slower by far.
    torch.set_num_threads(1)
    began, say = time.monotonic(), partial(print, flush=True)
    size = QUICK if quick else Size()
    say("glem demo: four parts, about a minute" if not quick else "glem demo, quick: the numbers mean little")
    makers: dict[str, Callable[[Size, bool], tuple[Part, dict[str, Any]]]] = {
        "private": private,
        "moves": moves,
        "synthetic": partial(synthetic, out),
        "model": measured_model,
    }
    report: dict[str, Any] = {"quick": quick, "size": vars(size)}
    page = {"quick": "<p class=found>A quick run: the numbers mean little.</p>" if quick else ""}
    for number, (name, make) in enumerate(makers.items(), 1):
        part, report[name] = make(size, progress)
        say(f"{number}. {name}: {' '.join(part.found)}")
        if part.section is not None:
            save_png(compose(name.capitalize(), "", [part.section]), out / f"{name}.png")
        page |= {key: escape(str(value)) for key, value in part.words.items()} | {name: shown(part)}
    report |= {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time(), 1)}
    write_json(out / "report.json", finite(report))
    page |= {"version": __version__} | {key: f"{report[key]:.0f}" for key in ("seconds", "cpu_seconds")}
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    with atomic_write(out / "index.html", "w") as file:
        file.write(template.substitute(page))
    say(f"Done in {report['seconds']:.0f} s. Open {out / 'index.html'} in a browser.")


# ---- the parts -------------------------------------------------------------------------------------------------------


def synthetic(out: Path, size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """A synthetic set with equally many images of each class, exported to a folder."""

    data, folder = SyntheticDataset(COLOUR, per_class=size.per_class, seed=0), out / "synthetic"
    data.export(folder, progress=progress, overwrite=True)
    cells = open_data(folder, progress=progress).tensor().unflatten(0, (-1, size.per_class))
    part = Part(
        {"per_class": size.per_class, "folder": shlex.quote(str(folder))},
        [f"{len(data)} images in {len(data.classes)} class folders lie in {folder}."],
        Section("", cells, rows=data.classes),
    )
    found = {"model": COLOUR, "folder": str(folder), "images": len(data), "classes": len(data.classes)}
    return part, found | {"per_class": size.per_class, "temperature": data.temperature, "seed": data.seed}


def private(size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """Samples of a private model, and networks that are trained on them or on the real images."""
    train, test = (fashion(split, size) for split in ("train", "test"))
    classes, each = len(train.classes), len(train) // len(train.classes)
    shared = GLEM.fit(train, "taef2", privacy=Privacy(size.epsilon, DELTA, images=len(train)), progress=progress)
    drawn = SyntheticDataset(shared, per_class=each, seed=0)
    samples = ImageData.from_tensors(drawn.images(range(len(drawn))), drawn.targets, drawn.classes)
    sets = {"real images": train, "private samples": samples}
    accuracies: dict[str, list[float]] = {}
    for name, data in sets.items():
        accuracies[name] = []
        for seed in range(size.seeds):
            batches = steps(classifier.random_batches(data, seed), size.steps, f"{name} {seed + 1}", progress)
            network = classifier.train_network(batches, size.steps, 1, classes, seed)
            accuracies[name].append(classifier.accuracy(network, test))
    facts = shared.config.privacy
    assert facts is not None
    words: dict[str, Any] = {"train": f"{len(train):,}", "test": f"{len(test):,}", "seeds": size.seeds, "each": each}
    words |= {"network": classifier.NETWORK, "steps": size.steps, "batch": min(classifier.BATCH, len(train))}
    words |= {"epsilon": f"{size.epsilon:g}", "delta": f"{DELTA:g}", "modes": facts["expect"]["pooled_modes"]}
    section = Section("", torch.stack([data.tensor()[::each] for data in sets.values()]), rows=["real", "private"])
    part, found = compared(words, "trained on", accuracies, section)
    return part, found | {"train": len(train), "test": len(test), "privacy": facts}


def moves(size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """Networks that learn from few images, with random crops, or with moves and the same crops; and moved images."""
    train, test = (fashion(split, size) for split in ("train", "test"))
    classes, by_class = len(train.classes), np.argsort(train.targets, kind="stable")
    accuracies: dict[str, list[float]] = {"crop and moves": [], "crop": []}
    for seed in range(size.few_seeds):
        few = train.subset(by_class.reshape(classes, -1)[:, seed * FEW : (seed + 1) * FEW].ravel())
        x, y = few.tensor(), torch.from_numpy(few.targets)
        model = GLEM.fit(few, progress=False)
        if seed == 0:
            aug = GLEMAugment(model, USUAL, p=1.0, seed=seed)
            section = Section(
                "", torch.stack([x, *(aug(x, y)[0] for _ in range(3))])[:, ::FEW], rows=["real", *3 * ["moved"]]
            )
        for name, values in accuracies.items():
            order = torch.Generator().manual_seed(seed)
            loader: Iterable[Any] = DataLoader(
                TensorDataset(classifier.normalised(x), y), FEW_BATCH, shuffle=True, generator=order
            )
            if name != "crop":
                aug = GLEMAugment(model, USUAL, mean=[classifier.MEAN], std=[classifier.STD], seed=seed)
                loader = aug.wrap(loader)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # torchvision's crops draw from torch's global generator
                batches = steps(cropped(loader), size.few_steps, f"{name} {seed + 1}", progress)
                network = classifier.train_network(batches, size.few_steps, 1, classes, seed)
                values.append(classifier.accuracy(network, test))
    words = {
        "few": FEW,
        "few_steps": size.few_steps,
        "pairs": size.few_seeds,
        "few_batch": FEW_BATCH,
        "crop": CROP,
        "strength": USUAL.strength,
    }
    part, found = compared(words, "training", accuracies, section)
    return part, found | {"images_per_class": FEW, "test": len(test), "policy": repr(USUAL)}


def measured_model(size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """The bundled model as a classifier, with its round trip."""
    model, test = GLEM.from_pretrained(FASHION), fashion("test", size)
    test = test.subset(spread(len(test), size.measured))
    found = evaluate(model, test, round_trip=size.round_trip, progress=progress)
    trip, right = found["round_trip"], found["accuracy"]
    half = 1.96 * math.sqrt(right * (1 - right) / len(test))
    part = Part(
        {"measured": f"{len(test):,}", "round_trip": size.round_trip},
        [f"Of {trip['images']} images {100 * trip['within_half_step']:.4g} % of the pixels come back exactly."],
        table=[
            ("measure", "value"),
            ("accuracy in %, 95 % interval", f"{100 * right:.1f} ± {100 * half:.1f}"),
            ("calibration error", f"{found['ece']:.3f}"),
            ("bits per dimension, given the class", f"{found['bits_per_dim']:.2f}"),
            ("largest error of a round trip (0 to 255)", f"{trip['max_error']:.2g}"),
        ],
    )
    return part, found | {"accuracy_interval": half}


# ---- what the parts share --------------------------------------------------------------------------------------------


def fashion(split: str, size: Size) -> ImageData:
    data = open_data(FASHION, split)
    return data.subset(spread(len(data), size.images))


def steps(batches: Iterable[Any], count: int, name: str, progress: bool) -> Iterable[Any]:
    """The batches of one training, with a bar."""
    return tqdm(islice(batches, count), total=count, unit="step", desc=name, disable=not progress)


def cropped(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of normalised images without end, each image shifted by up to CROP pixels over a black border."""
    while True:
        for x, y in loader:
            crop = v2.RandomCrop(x.shape[-2:], padding=CROP, fill=-classifier.MEAN / classifier.STD)
            yield torch.stack([crop(image) for image in x]), y


def compared(
    words: dict[str, Any], head: str, accuracies: dict[str, list[float]], section: Section
) -> tuple[Part, dict[str, Any]]:
    """The part and the report of two kinds of training, with the same seeds."""
    arms = {
        name: {"accuracies": values, "mean": statistics.mean(values), "interval": interval(values)}
        for name, values in accuracies.items()
    }
    (first, second), what = arms.values(), " over ".join(arms)
    gain, half = difference(first, second)
    part = Part(words, [sentence(what, gain, half)], section, [(head, "accuracy in %, 95 % interval", "each network")])
    for name, arm in arms.items():
        single = ", ".join(f"{value:.1f}" for value in accuracies[name])
        part.table.append((name, f"{arm['mean']:.1f} ± {arm['interval']:.1f}", single))
    return part, {"arms": arms, "difference": {"what": what, "mean": gain, "interval": half}}


def sentence(what: str, gain: float, half: float) -> str:
    """A difference in points; one within its 95 % interval is no difference."""
    clear = "" if abs(gain) > half else ", which is no clear difference"
    return f"{what[0].upper()}{what[1:]}: {gain:+.1f} ± {half:.1f} points{clear}."


# ---- HTML ------------------------------------------------------------------------------------------------------------


def shown(part: Part) -> str:
    """The pictures, the table and the sentences of a part."""
    lines = [] if part.section is None else [picture(part.section)]
    if part.table:
        head, *rows = part.table
        lines += ['<table class="numbers">', row("th", head), *(row("td", each) for each in rows), "</table>"]
    return "\n".join([*lines, f'<p class="found">{"<br>".join(map(escape, part.found))}</p>'])


def row(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"


def picture(section: Section) -> str:
    """The cells of a section as a table of images, so that its labels are text that stays legible on a small screen."""
    rows = []
    for label, images in zip(section.rows, section.cells, strict=True):
        cells = (
            f'<td><img alt="{escape(f"{label} {number}")}" src="{data_uri(image)}"></td>'
            for number, image in enumerate(images, 1)
        )
        rows.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    return f'<table class="cells"><tbody>{"".join(rows)}</tbody></table>'


def data_uri(image: Tensor) -> str:
    """An image, uint8 [C,H,W], as PNG inside an address."""
    file = io.BytesIO()
    to_pil_image(image).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
