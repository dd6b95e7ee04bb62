"""The demo: the library at work, in four parts, on one HTML page."""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from glem_augment import (
    GLEM,
    DataError,
    GLEMAugment,
    ImageData,
    Mixup,
    Noise,
    Policy,
    Privacy,
    SyntheticDataset,
    __version__,
    open_data,
)
from glem_augment.evaluation import (
    Section,
    classifier,
    compose,
    difference,
    evaluate,
    features_and_logits,
    interval,
    label_reliability,
    spread,
)
from glem_augment.images import images_for, open_source
from glem_augment.io import atomic_write, finite, save_png, write_json

PHOTOGRAPHS, COLOUR, FASHION = "bundled:photographs", "bundled:cifar10", "bundled:fashion-mnist"


@dataclass
class Size:
    """How much the demo does."""

    photographs: int = 4  # at most
    per_class: int = 10  # images of each class in the synthetic set
    images: int = 1000  # of Fashion-MNIST in each split, evenly over the classes; at most 1000
    round_trip: int = 250  # of the test images
    epsilon: float = 10.0  # of the private model
    seeds: int = 3  # networks for each kind of training images
    steps: int = 150  # of each training


QUICK = Size(photographs=2, per_class=2, images=100, round_trip=20, epsilon=50.0, seeds=2, steps=3)
DELTA = 1e-4


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


def make_page(out: Path, photos: str = PHOTOGRAPHS, quick: bool = False, progress: bool = True) -> None:
    """Write index.html, report.json, synthetic/ and a picture of each part to `out`, and print the results.

    Args:
        photos: photographs for the first part, see `open_data`; they need no classes.
        quick: a smoke test of seconds, whose numbers mean little.
    """
    # The networks are small. Beside other busy processes a second thread would make them slower by far.
    torch.set_num_threads(1)
    began, say = time.monotonic(), partial(print, flush=True)
    if not len(open_source(photos, unlabelled=True)):  # an error now, before anything is written
        raise DataError(f"{photos} holds no images")
    size = QUICK if quick else Size()
    say("glem demo: four parts, about a minute" if not quick else "glem demo, quick: the numbers mean little")
    makers: dict[str, Callable[[Size, bool], tuple[Part, dict[str, Any]]]] = {
        "private": private,
        "photographs": partial(photographs, photos),
        "synthetic": partial(synthetic, out),
        "flow": measured_flow,
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


def photographs(spec: str, size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """Photographs, moved by noise of two strengths and by mixup with the next one."""

    model = GLEM.from_pretrained(PHOTOGRAPHS)
    side = model.image_shape[1:]
    source = open_source(spec, unlabelled=True)
    rows = spread(len(source), min(size.photographs, len(source)))
    x = open_data(Subset(source, rows.tolist()), image_size=side, channels=3, progress=progress).tensor()
    n, y = len(x), torch.zeros(len(x), dtype=torch.int64)
    kinds: dict[str, Policy] = {"noise 0.5": Noise(0.5), "noise 1": Noise(1.0), "mixup": Mixup()}
    columns, moves = {"original": x}, {}
    for name, policy in tqdm(kinds.items(), desc="moving photographs", delay=2, disable=not progress):
        aug = GLEMAugment(model, policy, p=1.0, seed=0)
        drawn = aug.draw(x, y)
        if name == "mixup":  # a photograph that is alone is mixed with a draw
            partner = torch.arange(n).roll(-1) if n > 1 else torch.tensor([-1])
            drawn = drawn.having(partner=partner, partner_cls=y, keep=torch.full((n,), 0.5))
        columns[name] = aug.replay(x, y, drawn)[0]
        change = (columns[name].float() - x.float()).abs().mean()
        moves[name] = {"mean_change": float(change), "rejected": aug.stats["rejected"]}
    unsorted = "" if spec == PHOTOGRAPHS else ", channels=3, unlabelled=True"
    part = Part(
        {"photos": n, "data": spec, "side": side[0], "modes": aug.modes, "opened": json.dumps(spec) + unsorted},
        [f"{sum(move['rejected'] for move in moves.values())} of {3 * n} moves were rejected as not plausible."],
        Section("", torch.stack(list(columns.values()), 1), list(columns)),
        [("move", "mean change (0 to 255)", "rejected")],
    )
    part.table += [(name, f"{m['mean_change']:.1f}", f"{m['rejected']} of {n}") for name, m in moves.items()]
    return part, {"data": spec, "images": n, "moves": moves}


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
    """Samples of a private model, and networks that are trained on them, on the real images, or on a control."""
    flow = GLEM.from_pretrained(FASHION)
    train, test = (fashion(flow, split, size) for split in ("train", "test"))
    classes, each = len(train.classes), len(train) // len(flow.classes)
    shared = GLEM.fit(train, "taef2", privacy=Privacy(size.epsilon, DELTA), progress=progress)
    pixels = GLEM.fit(train, progress=False)
    sets = {"real images": train}
    for name, model in (("private samples", shared), ("samples of the pixels' Gaussians", pixels)):
        drawn = SyntheticDataset(model, per_class=each, seed=0)
        sets[name] = ImageData.from_tensors(drawn.images(range(len(drawn))), drawn.targets, drawn.classes)
    arms: dict[str, dict[str, Any]] = {}
    normal = classifier.MEAN, classifier.STD
    for name, data in sets.items():
        accuracies = []
        for seed in range(size.seeds):
            bar = {"total": size.steps, "unit": "step", "desc": f"{name} {seed + 1}", "disable": not progress}
            batches = tqdm(islice(classifier.random_batches(data, seed), size.steps), **bar)
            network = classifier.train_network(batches, size.steps, 1, classes, seed)
            logits = features_and_logits(network, test.tensor(), *normal)[1]
            accuracies.append(100 * label_reliability(logits, torch.from_numpy(test.targets)))
        arms[name] = {"accuracies": accuracies, "mean": statistics.mean(accuracies), "interval": interval(accuracies)}
    real, ours, control = arms
    gains = {f"{a} over {b}": difference(arms[a], arms[b]) for a, b in ((real, ours), (ours, control))}
    facts = shared.config.privacy
    assert facts is not None
    words: dict[str, Any] = {"train": f"{len(train):,}", "test": f"{len(test):,}", "seeds": size.seeds, "each": each}
    words |= {"network": classifier.NETWORK, "steps": size.steps, "batch": min(classifier.BATCH, len(train))}
    part = Part(
        words | {"epsilon": f"{size.epsilon:g}", "delta": f"{DELTA:g}", "modes": facts["expect"]["pooled_modes"]},
        [sentence(what, *gain) for what, gain in gains.items()],
        Section("", torch.stack([data.tensor()[::each] for data in sets.values()]), rows=["real", "private", "pixels"]),
        [("trained on", "accuracy in %, 95 % interval", "each network")],
    )
    for name, arm in arms.items():
        single = ", ".join(f"{value:.1f}" for value in arm["accuracies"])
        part.table.append((name, f"{arm['mean']:.1f} ± {arm['interval']:.1f}", single))
    differences = {what: {"mean": gain, "interval": half} for what, (gain, half) in gains.items()}
    found = {"train": len(train), "test": len(test), "privacy": facts, "arms": arms, "differences": differences}
    return part, found


def measured_flow(size: Size, progress: bool) -> tuple[Part, dict[str, Any]]:
    """The bundled flow as a classifier, and its round trip."""

    flow = GLEM.from_pretrained(FASHION)
    test = fashion(flow, "test", size)
    found = evaluate(flow, test, round_trip=size.round_trip, progress=progress)
    trip, accuracy = found["round_trip"], found["accuracy"]
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(test))
    part = Part(
        {"measured": f"{len(test):,}", "round_trip": size.round_trip},
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

    data = images_for(flow, FASHION, split=split, progress=False)
    return data.subset(spread(len(data), size.images))


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
    columns, small = list(section.columns), max(section.cells.shape[-2:]) <= 64
    rows = []
    for number, images in enumerate(section.cells):
        label = section.rows[number] if section.rows else ""
        names = [f"{label} {columns[i] if columns else i + 1}".strip() for i in range(len(images))]
        cells = (
            f'<td data-label="{escape(name)}"><img alt="{escape(name)}" src="{data_uri(image, small)}"></td>'
            for name, image in zip(names, images, strict=True)
        )
        head = f"<th>{escape(label)}</th>" if section.rows else ""
        rows.append(f"<tr>{head}{''.join(cells)}</tr>")
    head = f"<thead>{row('th', columns)}</thead>" if columns else ""
    return f'<table class="cells {"small" if small else "large"}">{head}<tbody>{"".join(rows)}</tbody></table>'


def data_uri(image: Tensor, lossless: bool) -> str:
    """An image, uint8 [C,H,W], as PNG or JPEG inside an address."""

    file, kind = io.BytesIO(), "png" if lossless else "jpeg"
    to_pil_image(image).save(file, kind, quality=92)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
