"""The library at work on one page, demo-out/index.html, in about a minute. It needs no network and no GPU.

    python examples/demo.py
    python examples/demo.py --out my-demo --quick    # seconds: few images, numbers mean little

The images are in the package. All numbers of the page are measured while it is made, with small networks on the CPU.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from _common import fit, interval, new_network, normalised, percent
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from glem_augment import GLEM, GLEMAugment, Mixup, Privacy, SyntheticDataset, open_data

MODEL, IMAGES = "bundled:fashion-mnist", "bundled:fashion-mnist"  # of parts 1 and 2: a flow, real images of its classes
FASHION = "bundled:fashion-mnist"  # the images of parts 3 and 4
NETWORK = "test_byobnet"  # of timm, 0.2 million weights; the first two images of each class are shown
CLASSES = open_data(FASHION).classes
DELTA = 1e-4
BATCH, CROP = 64, 2  # images of a step, and pixels of the random crops of part 3


@dataclass
class Size:
    """How much the demo does."""

    partners: int = 6  # images of each class in part 1
    images: int = 1000  # of the private model, evenly over the classes
    tested: int = 500
    seeds: int = 3  # networks of each kind
    steps: int = 60  # of each training
    few_steps: int = 60  # of each training on few images
    drawn: int = 40  # images of each class, beside the few
    epsilon: float = 10.0


QUICK = Size(partners=2, images=100, tested=100, seeds=2, steps=3, few_steps=3, drawn=2, epsilon=50.0)


# ---- the parts -------------------------------------------------------------------------------------------------------


def flow_and_mixup(size: Size) -> str:
    """Images of each class, and three moves of each."""
    x, y = fashion("train", 10 * size.partners, IMAGES)
    model = GLEM.from_pretrained(MODEL)
    aug = GLEMAugment(model, Mixup(), p=1.0, classes=open_data(IMAGES).classes, seed=0)
    moved = [aug(x, y)[0] for _ in range(3)]
    found = f"Of {aug.stats['selected']} moves {aug.stats['rejected']} were rejected: then the image stays as it is."
    return section(
        "A pretrained flow in a training loop",
        f"""A flow maps an image to a latent vector and back, exactly. Each class has a mean there, and principal modes,
the directions in which its images vary. Mixup moves an image part of the way towards another image of its class, along
the modes, and decodes it. The flow, <code>{MODEL}</code>, comes with the package; others come from a folder or the
Hugging Face Hub by name. Below are a real image of each class and three moves of it.""",
        f"""\
from torch.utils.data import DataLoader
from glem_augment import GLEMAugment, Mixup, open_data

data = open_data("{IMAGES}")
aug = GLEMAugment("{MODEL}", Mixup(), p=0.5, classes=data.classes)
for x, y in DataLoader(data, 64, shuffle=True):
    x, y = aug(x, y)  # then your training step""",
        pictures(
            {
                "real": x[:: size.partners],
                **{f"moved {i}": images[:: size.partners] for i, images in enumerate(moved, 1)},
            }
        ),
        result(found),
    )


def balanced_set(size: Size) -> str:
    """Few images of most classes, filled up to equally many."""
    x, y = fashion("train", 100, IMAGES)
    keep = [10 * k + i for k in range(10) for i in range(10 - k)]
    classes = open_data(IMAGES).classes
    drawn = SyntheticDataset(MODEL, per_class="balance", real=(x[keep], y[keep]), seed=0)
    samples, labels = drawn.images(range(len(drawn))), torch.as_tensor(drawn.targets)
    rows = {name: torch.cat([x[keep][y[keep] == k], samples[labels == k]]) for k, name in enumerate(classes)}
    return section(
        "A balanced synthetic set",
        """The first class has ten images, and each later class has one less. <code>SyntheticDataset</code> draws the
missing images of every class from its mean and modes; it is a data set as torchvision's are, and <code>export</code>
writes it as an ImageFolder. Drawn images have a blue frame. An image depends on model, seed, class and place alone.""",
        f"""\
from glem_augment import RealAndSynthetic, SyntheticDataset

drawn = SyntheticDataset("{MODEL}", "balance", real=few)
both = RealAndSynthetic(few, drawn)""",
        pictures(rows, {name: 10 - k for k, name in enumerate(classes)}),
        result(f"{len(keep)} real and {len(drawn)} drawn images: 10 of each class."),
    )


def small_network(size: Size) -> str:
    """Networks that learn from few images of most classes, and from the same images and drawn ones."""
    x, y = fashion("train", 1000)
    test = fashion("test", size.tested)
    drawn = SyntheticDataset(MODEL, per_class=size.drawn, seed=0)
    samples, labels = drawn.images(range(len(drawn))), torch.as_tensor(drawn.targets)
    accuracies: dict[str, list[float]] = {"real and drawn images": [], "real images": []}
    for seed in range(size.seeds):
        # The steps were chosen on the first 50 images of each class, and with other draws.
        rows = torch.cat([(y == k).nonzero()[50 + 10 * seed :, 0][: 10 - k] for k in range(10)])
        few = x[rows], y[rows]
        both = torch.cat([few[0], samples]), torch.cat([few[1], labels])
        for name, images in zip(accuracies, (both, few), strict=True):
            batches = as_often(*images, size.few_steps, seed)
            accuracies[name].append(percent(fit(new_network(NETWORK, 1, 10, seed), batches, size.few_steps), *test))
    return section(
        "What it does for a small network",
        f"""A network (timm's {NETWORK}) starts from scratch. It learns for {size.few_steps} steps of {BATCH} images
from such a set of {len(few[1])} images, with 10 of the first class and 1 of the last, or from this set and {size.drawn}
drawn images of each class. Every class is shown equally often, with random crops. Each of {size.seeds} pairs of
networks has other real images; the networks of a pair differ in nothing else. All are tested on {len(test[1]):,} other
images. The flow was trained on 60,000 images of these classes, and the gain comes from these images. Samples of a flow
of the few images alone gained nothing in our measurements.""",
        f"""\
drawn = SyntheticDataset("{MODEL}", per_class={size.drawn})
both = RealAndSynthetic(few, drawn)""",
        table("trained on", accuracies),
        difference(accuracies),
    )


def private_set(size: Size) -> str:
    """Samples of a private model, and networks that are trained on them or on the real images."""
    x, y = fashion("train", size.images)
    test, each = fashion("test", size.tested), len(y) // 10
    model = GLEM.fit((x, y), "taef2", privacy=Privacy(size.epsilon, DELTA, images=len(y)), classes=CLASSES)
    drawn = SyntheticDataset(model, per_class=each, seed=0)
    samples = drawn.images(range(len(drawn)))
    sets = {"private samples": (samples, torch.as_tensor(drawn.targets)), "real images": (x, y)}
    accuracies: dict[str, list[float]] = {name: [] for name in sets}
    for name, values in accuracies.items():
        for seed in range(size.seeds):
            batches = as_often(*sets[name], size.steps, seed)
            values.append(percent(fit(new_network(NETWORK, 1, 10, seed), batches, size.steps), *test))
    return section(
        "Share images that you cannot share",
        f"""A model of {len(y):,} images of clothes is fitted with differential privacy, epsilon {size.epsilon:g} and
delta {DELTA:g}: with and without any one image, every outcome is about equally likely, by a factor of at most
e<sup>epsilon</sup>. At epsilon 10 this factor is 22,000, which is weak as a worst case; at epsilon 1 it is 2.7, and a
useful set then needs thousands of images of each class. All images that are drawn from the model have the same promise.
Below are a real image of each class and a private sample. The same network learns from {len(y):,} images of one kind,
and from nothing else, for {size.steps} steps of {BATCH} images with random crops, {size.seeds} networks for each
kind.""",
        f"""\
from glem_augment import GLEM, Privacy, SyntheticDataset

model = GLEM.fit("{FASHION}", "taef2",
                 privacy=Privacy(epsilon={size.epsilon:g}, delta={DELTA:g}, images={len(y)}))
shared = SyntheticDataset(model, per_class={each}, seed=0)""",
        pictures({name: sets[name][0][::each] for name in reversed(sets)}),
        table("trained on", accuracies),
        difference(accuracies),
    )


# ---- what the parts share --------------------------------------------------------------------------------------------


def fashion(split: str, count: int, name: str = FASHION) -> tuple[Tensor, Tensor]:
    """The first images of each class, `count` in all: uint8 [N, C, H, W] in the order of the classes, and labels."""
    data = open_data(name, split)
    x, y = data.tensor(), torch.as_tensor(data.targets)
    rows = torch.cat([(y == k).nonzero()[: count // 10, 0] for k in range(10)])
    return x[rows], y[rows]


def as_often(x: Tensor, y: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of normalised images with every class equally often, each shifted by up to CROP pixels."""
    torch.manual_seed(seed)
    crop = v2.RandomCrop(x.shape[-2:], padding=CROP)
    for rows in torch.multinomial(1 / y.bincount()[y].float(), BATCH * steps, replacement=True).split(BATCH):
        yield normalised(torch.stack([crop(image) for image in x[rows]])), y[rows]


# ---- HTML ------------------------------------------------------------------------------------------------------------


def section(title: str, text: str, code: str, *content: str) -> str:
    return "\n".join([f"<section><h2>{title}</h2>\n<p>{text}</p>\n<pre>{escape(code)}</pre>", *content, "</section>"])


def pictures(rows: dict[str, Tensor], real: dict[str, int] | None = None) -> str:
    """A table with a row of images uint8 [n, C, H, W] for each label; images after the first `real` ones are framed."""
    lines = []
    for label, images in rows.items():
        first = len(images) if real is None else real[label]
        cells = (
            f'<td><img alt="{escape(label)}"{" class=drawn" * (i >= first)} src="{data_uri(image)}"></td>'
            for i, image in enumerate(images)
        )
        lines.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    return f'<table class="cells"><tbody>{"".join(lines)}</tbody></table>'


def data_uri(image: Tensor) -> str:
    """An image, uint8 [C, H, W], as PNG inside an address."""
    file = io.BytesIO()
    to_pil_image(image).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def table(head: str, accuracies: dict[str, list[float]]) -> str:
    lines = [f"<tr><th>{head}</th><th>accuracy in %, 95 % interval</th><th>each network</th></tr>"]
    for name, values in accuracies.items():
        mean = f"{statistics.mean(values):.1f} ± {interval(values):.1f}"
        lines.append(f"<tr><td>{name}</td><td>{mean}</td><td>{', '.join(f'{v:.1f}' for v in values)}</td></tr>")
    return "\n".join(['<table class="numbers">', *lines, "</table>"])


def difference(accuracies: dict[str, list[float]]) -> str:
    """A difference in points of two kinds of training; one within its 95 % interval is no difference."""
    first, second = accuracies.values()
    each = [a - b for a, b in zip(first, second, strict=True)]
    gain, half = statistics.mean(each), interval(each)
    clear = "" if abs(gain) > half else ", which is no clear difference"
    return result(f"{' over '.join(accuracies).capitalize()}: {gain:+.1f} ± {half:.1f} points{clear}.")


def result(text: str) -> str:
    return f'<p class="found">{text}</p>'


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>glem-augment: a demonstration</title>
<style>
:root { color-scheme: light; --ink: #22252a; --soft: #626873; --line: #e3e4e8; --tint: #f6f6f8; --mark: #2f5d8a; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 17px/1.6 system-ui, "Segoe UI", Helvetica, sans-serif;
  counter-reset: part; }
main { max-width: 46rem; margin: 0 auto; padding: 3.5rem 1.25rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.015em; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .6rem; }
h2::before { counter-increment: part; content: counter(part); color: var(--mark); margin-right: .6em; }
p { margin: 0 0 1rem; }
.lead { font-size: 1.15rem; color: var(--soft); }
section { margin-top: 2.5rem; padding-top: 2rem; border-top: 1px solid var(--line); }
pre { margin: 0 0 1.25rem; padding: .8rem 1rem; background: var(--tint); border-radius: 6px;
  font: .82rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.found { padding-left: .9rem; border-left: 3px solid var(--mark); }
table { width: 100%; border-collapse: collapse; margin: 0 0 1.25rem; }
.numbers { font-size: .92rem; font-variant-numeric: tabular-nums; }
.numbers th { color: var(--soft); font-weight: 500; }
.numbers th, .numbers td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-bottom: 1px solid var(--line); }
.numbers td:nth-child(2) { white-space: nowrap; }
.cells { table-layout: fixed; }
.cells th { width: 5.6rem; font-size: .8rem; line-height: 1.25; font-weight: 500; color: var(--soft); text-align: left;
  padding: 2px; }
.cells td { padding: 2px; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
.drawn { outline: 3px solid var(--mark); outline-offset: -1px; }
footer { margin-top: 2.5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: .88rem;
  color: var(--soft); }
@media (max-width: 600px) {
  body { font-size: 16px; }
  main { padding: 2rem 1rem 3rem; }
  .cells th { width: 4.3rem; font-size: .7rem; }
  .cells th, .cells td { padding: 1px; }
  .drawn { outline-width: 2px; }
  .numbers { font-size: .85rem; }
}
</style>
</head>
<body>
<main>
<h1>What glem-augment does</h1>
<p class="lead">It makes training images for classifiers with a pretrained conditional flow: it moves real images along
the directions in which their class varies, and draws new ones. This page was made on your machine.</p>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="demo-out", help="folder for index.html (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="seconds: few images, numbers mean little")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small; beside other busy processes a second thread is slower by far
    size, began = QUICK if args.quick else Size(), time.monotonic()
    page = [PAGE, result("A quick run: the numbers mean little.") if args.quick else ""]
    for part in (flow_and_mixup, balanced_set, small_network, private_set):
        page.append(part(size))
        print(f"{part.__name__}: done after {time.monotonic() - began:.0f} s", flush=True)
    page.append(f"<footer>Made by examples/demo.py in {time.monotonic() - began:.0f} seconds.</footer>")
    page.append("</main>\n</body>\n</html>\n")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "index.html").write_text("\n".join(page), encoding="utf-8")
    print(f"open {args.out / 'index.html'} in a browser")


if __name__ == "__main__":
    main()
