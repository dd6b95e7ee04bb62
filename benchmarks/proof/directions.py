"""Do the directions of moves matter? A class's modes, pooled modes and smooth ones, with moves of one length.

    GLEM_DATA=... python benchmarks/proof/directions.py
    GLEM_DATA=... python benchmarks/proof/directions.py --moves adversarial

Images of the settings and seeds of `augmentation/run.py`, and the networks, steps and controls of `photographs.py`,
which has a fifth setting. Noise of strength 0.5 goes along the modes of the class, along pooled modes, and in smooth
fields; beside it are crop + flip alone, and ColorJitter 0.4, which changes brightness and contrast of grey images.

Adversarial moves of strength 0.25 go along the modes of the class, along all pooled modes, and along as many smooth
random directions as the class has modes, drawn once for each class. In the two controls each move is stretched to the
length, in pixels before clipping, of the move that the same image would make along the modes of its class. Networks of
adversarial moves are trained in float32, which is faster on processors without bfloat16.

Nothing is chosen, and the seeds are 0 to 9. Each seed draws other training images; all test images are judged. Stored
rows are not measured again. A setting is in the table when all its seeds are stored.
"""

from __future__ import annotations

import itertools
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import (
    Interval,
    Named,
    Rows,
    find_images,
    holm,
    interval,
    parser,
    processors,
    publish,
    table,
    usage,
)
from benchmarks.proof import photographs
from benchmarks.proof.augmentation.data import make_task
from benchmarks.proof.augmentation.named import bold
from benchmarks.proof.augmentation.settings import SETTINGS
from benchmarks.proof.comparison import PLAIN, Comparison, Stack
from benchmarks.proof.photographs import COPIES, JITTERED, POOLED, SMOOTH, STEPS, TUNING, fit, fit_pooled, on
from glem_augment import GLEM, Adversarial, Noise, open_data
from glem_augment.images.dataset import ImageData

NAMES = ("fashion-10", "imagenette32-20", "cifar10-50", "fashion-50")
SEEDS = range(10)


class Directed(Adversarial):
    """Adversarial moves along pooled modes or smooth random directions, each as long as along the class's modes."""

    def __init__(self, strength: float = 0.25, smooth: bool = False) -> None:
        super().__init__(strength)
        self.smooth = smooth

    def draw(self, selected: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """`eps` of the class's modes, and `other` for as many directions as a control can have."""
        drawn = super().draw(selected, generator)
        return drawn | {"other": torch.randn(len(selected.rows), 1024, generator=generator)}

    def move(self, batch: Any) -> Tensor:
        length = (super().move(batch) - batch.z).norm(dim=1, keepdim=True)
        if self.smooth:
            fields = _smooth_directions(batch.model)[batch.cls]

            def along(c: Tensor) -> Tensor:
                return torch.einsum("nk,nkd->nd", c, fields)

            count = fields.shape[1]
        else:
            modes = batch.model.pooled
            count = modes.rank

            def along(c: Tensor) -> Tensor:
                return (c * modes.scales[0]) @ modes.directions[0]

        start = self.strength * batch.drawn["other"][:, :count]
        gradient = batch.loss_gradient(lambda c: batch.z + along(c), start)
        step = 0.5 * self.strength * count**0.5 * torch.nn.functional.normalize(gradient, dim=1)
        return batch.z + length * torch.nn.functional.normalize(along(start + step), dim=1)


@lru_cache(2)
def _smooth_directions(model: GLEM) -> Tensor:
    """Smooth random fields [K, k, d]: as many for each class as it has modes."""
    classes, count, dim = model.modes.directions.shape
    white = torch.randn(classes * count, dim, generator=torch.Generator().manual_seed(0))
    return photographs.smooth_fields(model, white).view(classes, count, dim)


STACKS = {
    "noise": {
        "crop + flip": PLAIN, "class noise": on(PLAIN, Noise(0.5)), "pooled noise": POOLED, "smooth noise": SMOOTH,
        "ColorJitter": JITTERED,
    },
    "adversarial": {
        "crop + flip": PLAIN, "class moves": on(PLAIN, Adversarial(0.25)),
        "pooled moves": Stack("pooled modes: adversarial 0.25", "pooled", policy=Directed()),
        "smooth moves": Stack("smooth directions: adversarial 0.25", "pooled", policy=Directed(smooth=True)),
    },
}  # fmt: skip
FILES = {"noise": "directions", "adversarial": "adversarial_directions"}
TITLES = {
    "noise": "Noise of one strength along the modes of the class, along pooled modes, and smooth",
    "adversarial": "Adversarial moves of one length along the modes of the class, pooled modes, and smooth directions",
}


def summary(rows: list[dict[str, Any]], stacks: dict[str, Stack]) -> list[dict[str, Any]]:
    """A line for each setting with all seeds: accuracies, and the class's modes over each of the other stacks."""
    found = []
    ours = next(what for what in stacks if what.startswith("class"))
    for name in dict.fromkeys(row["setting"] for row in rows):
        own: dict[str, dict[int, float]] = {what: {} for what in stacks}
        for row in rows:
            if row["setting"] == name:
                own[row["what"]][row["seed"]] = row["accuracy"]
        if any(len(values) < len(SEEDS) for values in own.values()):
            continue
        line: dict[str, Any] = {"setting": name, "seeds": len(SEEDS)}
        line |= {what: interval(values[seed] for seed in SEEDS).mean for what, values in own.items()}
        for what in stacks:
            if what != ours:
                gain = interval(own[ours][seed] - own[what][seed] for seed in SEEDS)
                line |= {f"over {what}": gain.mean, f"+/- ({what})": gain.half}
        found.append(line)
    return found


def page(rows: list[dict[str, Any]], moves: str) -> dict[str, Any]:
    """The page of the rows; gains are of the class's modes."""
    whole = {"title": TITLES[moves], "command": usage(__doc__).splitlines()[list(FILES).index(moves)]}
    return whole | {"measured on": processors(rows), "rows": summary(rows, STACKS[moves])}


def numbers(rows: list[dict[str, Any]], moves: str, cells: list[dict[str, Any]]) -> Named:
    """The table of these settings; of noise, also of `photographs.py`, which has stored `cells`."""
    stacks = STACKS[moves]
    what_of = {stack.name: what for what, stack in stacks.items()} if moves == "noise" else {}
    stored = [
        {"setting": "photographs", "what": what_of[cell["stack"]], "seed": cell["seed"], "accuracy": cell["value"]}
        for cell in cells
        if cell["stack"] in what_of and cell["seed"] != TUNING
    ]
    ours, *others = sorted(stacks, key=lambda what: not what.startswith("class"))
    lines, chances = [], list[float]()
    for row in summary(rows + stored, stacks):
        gains = [Interval(row[f"over {what}"], row[f"+/- ({what})"], row["seeds"]) for what in others]
        chances += [gain.chance if gain.mean > 0 else 1.0 for gain in gains]  # a clear loss is no clear gain
        lines.append([f"`{row['setting']}`", *(f"{row[what]:.1f} %" for what in (ours, *others)), *map(bold, gains)])
    corrected = holm(chances)  # over the whole table
    for i, what in enumerate(others):
        clear = sum(chance < 0.05 for chance in corrected[i :: len(others)])
        yield f"{FILES[moves]}: clear over {what}", f"{clear} of {len(lines)}"
    over = " | ".join(f"over {what}" for what in others)
    yield FILES[moves], table(f"setting | {' | '.join((ours, *others))} | {over}", lines)


@lru_cache(1)
def images_of(name: str, seed: int) -> tuple[ImageData, ImageData]:
    """The training images of a seed, and all test images."""
    if name == photographs.NAME:
        folder = find_images(name, "imagenette128", "imagenette128")
        train, test = (open_data(folder, split, image_size=photographs.SIZE, channels=3) for split in ("train", "val"))
        pool = photographs.few(train, photographs.HELD, TUNING)[1]
        return photographs.few(pool, photographs.SETTINGS[name].per_class, seed)[0], test
    task = make_task(SETTINGS[name], seed)
    train, test = (ImageData.from_tensors(*part, task.classes) for part in (task.train, task.test))
    return train, test


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--moves", choices=tuple(STACKS), default="noise")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows(args.out / f"{FILES[args.moves]}.json")
    names = NAMES if args.moves == "noise" else (*NAMES, photographs.NAME)
    for name, seed in itertools.product(names, SEEDS):
        # all modes that there are
        most = {**SETTINGS, **photographs.SETTINGS}[name].per_class - 1
        models = {"pixels": partial(fit, rank=most), "pooled": partial(fit_pooled, rank=most)}
        comparison = Comparison(models, STEPS, copies=COPIES, bf16=args.moves == "noise")
        for what, stack in STACKS[args.moves].items():

            def measure(what: Stack = stack, name: str = name, at: int = seed, by: Comparison = comparison) -> Any:
                return {"accuracy": by.accuracy(what, *images_of(name, at), at)}

            rows.row({"setting": name, "what": what, "seed": seed}, measure)
    publish(args.out, FILES[args.moves], page(rows.all(), args.moves), rows.all())


if __name__ == "__main__":
    main()
