"""Does training converge by default? Every preset with every named method on five kinds of data.

    GLEM_DATA=... python benchmarks/proof/training_is_calm.py [--kinds K ...] [--presets P ...] [--methods M ...]

Every cell is a run with the default settings except for its length. It has as many epochs as fit into --steps (at least
one, at most the default), and is cut off after --seconds. On a CPU, large flows need more seconds. A run succeeds if
its held-out images end below the bits/dim of independent pixels, or if a message says that they do not. Stored cells
are not measured again (except with --again), so the same command resumes a stopped study. $GLEM_DATA holds cifar10/ and
imagenette128/.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images, parser, write_results
from benchmarks.paper.methods import METHODS
from benchmarks.paper.research import ResearchTrainer, split_settings
from glem_augment import GLEM, ImageData, open_data
from glem_augment.errors import TrainingError
from glem_augment.evaluation.metrics import held_out
from glem_augment.flows.presets import PRESETS
from glem_augment.io import atomic_write
from glem_augment.training import TimeUpError, TrainConfig

NAME = "training_is_calm"
POINTS, MEASURED = 12, 200  # of a curve; held-out images
CUT_OFF = "cut off"


def photographs(size: int, channels: int, classes: int, per_class: int, parts: int = 1) -> ImageData:
    """The first classes of CIFAR-10, then of Imagenette, each cut by brightness into `parts` classes.

    Images above 32x32 are Imagenette's alone, because enlarged images are not like photographs.
    """
    images: list[Tensor] = []
    for name in ("cifar10", "imagenette128")[size > 32 :]:
        data = open_data(find_images(NAME, name, name), "train", size, channels, cache_bytes=0, progress=False)
        for rows in data.rows_of_classes(per_class * parts)[: classes - len(images) // parts]:
            x = data.subset(rows).tensor()
            images += x[x.float().mean((1, 2, 3)).argsort()].chunk(parts)
    y = np.repeat(np.arange(len(images)), [len(x) for x in images])
    return ImageData.from_tensors(torch.cat(images), y, [str(k) for k in range(len(images))])


KINDS: dict[str, tuple[str, Callable[[], ImageData]]] = {
    "clothes": ("grey 24x24, 10 classes x 100", lambda: open_data("bundled:fashion-mnist", "train", 24)),
    "grey": ("grey 8x8, 2 classes x 5000", lambda: photographs(8, 1, 2, 5000)),
    "few": ("colour 16x16, 100 classes x 5", lambda: photographs(16, 3, 20, 5, parts=5)),
    "photos": ("colour 32x32, 20 classes x 400", lambda: photographs(32, 3, 20, 400)),
    "large": ("colour 64x64, 5 classes x 50", lambda: photographs(64, 3, 5, 50)),
}


class Watched(ResearchTrainer):
    """A run that records, at intervals, its step and the bits/dim of held-out images under the current flow."""

    curve: list[tuple[int, float]]

    def note(self) -> None:
        val = self.batches.split.val
        found = held_out(self.model, self.batches.read(val[:: math.ceil(len(val) / MEASURED)], 64))
        self.curve.append((self.step, found["val_bits_per_dim"]))

    def fit(self) -> GLEM:
        take = self.e_step.take

        def watched(*batch: Any) -> tuple[float, float]:
            if self.step % max(1, self.total_steps // POINTS) == 0:
                self.note()
            return take(*batch)

        self.e_step.take = watched  # type: ignore[method-assign]
        return super().fit()


def run_cell(data: ImageData, preset: str, name: str, steps: int, seconds: float) -> dict[str, Any]:
    """Train, and return the row with the result."""
    default = TrainConfig()
    own, research = split_settings(METHODS[name])
    config = TrainConfig(
        **own, preset=preset, modes_rank=0, sample_every=0, max_minutes=seconds / 60,
        epochs=min(default.epochs, max(1, steps * default.batch_size // len(data))),
    )  # fmt: skip
    began, message = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # returns after a divergence are counted below
        trainer = Watched(data, config, folder, device="cpu", progress=False, research=research)
        trainer.curve = []
        try:
            if trainer.fit().config.training["worse_than_independent_pixels"]:
                message = "The run says at its end that it is worse than independent pixels"
        except TimeUpError:
            message = CUT_OFF
        except TrainingError as error:
            message = str(error)
        trainer.note()
    bits, pixels = [value for _, value in trainer.curve], trainer.guard.pixels
    return {
        "bits/dim": bits[-1], "independent pixels": pixels,
        "below after": next((step for step, value in trainer.curve if value < pixels), None),
        "steps": trainer.step, "of": trainer.total_steps, "returns": trainer.rollbacks, "message": message,
        "seconds": time.monotonic() - began, "curve": trainer.curve,
    }  # fmt: skip


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind of data and preset, over the methods."""
    rows = []
    for kind, preset in itertools.product(KINDS, PRESETS):
        own = [cell for cell in cells if (cell["kind"], cell["preset"]) == (kind, preset)]
        if not own:
            continue
        above = [cell for cell in own if not cell["bits/dim"] < cell["independent pixels"]]
        bits, steps = [cell["bits/dim"] for cell in own], [cell["steps"] for cell in own]
        rows.append(
            {
                "data": f"{kind}: {KINDS[kind][0]}", "preset": preset, "methods": len(own),
                "independent pixels": own[0]["independent pixels"], "bits/dim": f"{min(bits):.2f} to {max(bits):.2f}",
                "steps": f"{min(steps)} to {max(steps)}", "below independent pixels": len(own) - len(above),
                **{
                    f"above, {case}": ", ".join(cell["method"] for cell in above if told == _told(cell))
                    for case, told in (("with a message", True), ("cut off too early", None), ("silent", False))
                },
            }
        )  # fmt: skip
    return rows


def _told(cell: dict[str, Any]) -> bool | None:
    """Whether a run reported that it failed; None if it was cut off too early to succeed."""
    return None if cell["message"] == CUT_OFF else bool(cell["message"])


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Small multiples: kinds of data by presets, a curve per method, and the line of independent pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds, presets = (
        [v for v in all_ if any(v in (c["kind"], c["preset"]) for c in cells)] for all_ in (KINDS, PRESETS)
    )
    figure = Figure(figsize=(max(9, 2.2 * len(presets)), 1.8 * len(kinds) + 1.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), len(presets), squeeze=False)
    for (i, kind), (j, preset) in itertools.product(enumerate(kinds), enumerate(presets)):
        axis, own = grid[i][j], [cell for cell in cells if (cell["kind"], cell["preset"]) == (kind, preset)]
        for cell in own:
            number = list(METHODS).index(cell["method"])
            axis.plot(
                *zip(*cell["curve"], strict=True),
                f"C{number % 10}{'-' if number < 10 else ':'}",
                lw=1,
                label=cell["method"],
            )
        if own:
            line = own[0]["independent pixels"]
            axis.axhline(line, color="black", ls="--", lw=1, label="independent pixels")
            axis.set_ylim(min(line, *(min(b for _, b in cell["curve"]) for cell in own)) - 0.2, line + 2)
        axis.tick_params(labelsize=6)
        axis.set_title(preset if i == 0 else "", fontsize=8)
        axis.set_ylabel(f"{kind}\n{KINDS[kind][0].replace(', ', chr(10))}" if j == 0 else "", fontsize=6)
    lines = {text: line for axis in grid.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=7, fontsize=7)
    figure.suptitle("bits/dim of held-out images, over training steps", fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    for option, choices in (("--kinds", KINDS), ("--presets", PRESETS), ("--methods", METHODS)):
        args.add_argument(option, nargs="+", choices=choices, default=list(choices), metavar="NAME")
    args.add_argument("--steps", type=int, default=300, help="of a run (%(default)s)")
    args.add_argument("--seconds", type=float, default=60, help="of a run, at most (%(default)s)")
    args.add_argument("--again", action="store_true", help="measure the chosen cells anew")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / f"{NAME}.json"
    names = ("kind", "preset", "method")
    stored = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    cells = {tuple(cell[name] for name in names): cell for cell in stored if cell["method"] in METHODS}
    for kind in args.kinds:
        keys = [key for key in itertools.product([kind], args.presets, args.methods) if args.again or key not in cells]
        data = KINDS[kind][1]() if keys else None
        for key in keys:
            cells[key] = dict(zip(names, key, strict=True)) | run_cell(data, *key[1:], args.steps, args.seconds)
            found = [cells[key] for key in itertools.product(KINDS, PRESETS, METHODS) if key in cells]
            title = "Bits/dim of runs with default settings"
            write_results(args.out, NAME, title, summary(found), {"cells": found}, show=False)
            print(*key, *(f"{name} {cells[key][name]}" for name in ("bits/dim", "steps", "message")), flush=True)
    draw(list(cells.values()), args.out / f"{NAME}.png")


if __name__ == "__main__":
    main()
