"""Do moves of photographs help, beside tuned stacks? Imagenette at 64 pixels with 20 images per class.

    GLEM_DATA=... python benchmarks/proof/photographs.py
    GLEM_DATA=... python benchmarks/proof/photographs.py --setting photographs_50  # 50 images per class
    GLEM_DATA=... python benchmarks/proof/photographs.py --setting photographs_128  # and resnet18 at 128 pixels
    GLEM_DATA=... python benchmarks/proof/photographs.py --fresh  # twenty other seeds, in another file

A small ResNet of timm is trained from scratch, in bfloat16, in 300 steps of 64 images. There are 14 stacks of other
operations, and as many trials of moves along modes of the pixels: seven on crop + flip, seven on the best other stack.
Adversarial moves attack the network in training. 100 training images of each class choose the stacks. They are never
trained on, and the seed of the choice measures nothing. Each seed draws other training images from the rest, and all
seeds are measured on the same test images.

The controls move images on crop + flip by Gaussian noise. Noise along modes has the covariance of the image's class.
Noise along pooled modes has the average of these covariances. Smooth noise has this average, averaged again over all
shifts of the image: energy, spectrum and colours are the same, but no shapes are left. Stored cells are not measured
again.

The stored seeds grew after results had been seen: 6, 9, 10 with 20 images, 6 and 10 with 50, 3 and 5 at 128 pixels.
`--fresh` takes the 20 seeds 200 to 219, whose number is fixed here, so nobody looks between them.

The two other settings choose nothing: they take the stacks that the first setting chose. At 128 pixels the model has 64
pixels, as the documentation advises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Interval, Rows, find_images, interval, parser, processors, publish
from benchmarks.proof.comparison import NETWORK, PLAIN, Comparison, Stack, moves
from glem_augment import GLEM, Adversarial, Mixup, Noise, Policy, open_data
from glem_augment.images.dataset import ImageData

NAME, SIZE, HELD, STEPS = "photographs", 64, 100, 300
TUNING, FRESH = 100, range(200, 220)  # the seed of the choice, and seeds that nobody has seen
COPIES = 16  # of each image, moved before a training, which shows an image about 48 times moved


@dataclass(frozen=True)
class Setting:
    """Images per class, how many roles of stacks are measured, the seeds of the stored rows and how many came first,
    the images' pixels, and the network of timm."""

    title: str
    per_class: int
    roles: int
    seeds: range
    first: range
    size: int = SIZE
    network: str = NETWORK


SETTINGS = {
    NAME: Setting("Few photographs per class (Imagenette, 64 pixels)", 20, 9, range(10), range(6)),
    "photographs_50": Setting("Fifty photographs per class (Imagenette, 64 pixels)", 50, 5, range(10), range(6)),
    "photographs_128": Setting(
        "Fifty photographs per class (resnet18 at 128 pixels)", 50, 3, range(5), range(3), 128, "resnet18"
    ),
}


def other(*image: str, batch: str = "") -> Stack:
    """A stack of torchvision's operations, named after them."""
    return Stack(", ".join([*image, batch] if batch else image), "other", image, batch)


JITTERED = other("ColorJitter 0.4")
OTHERS = (
    other(batch="CutMix"),
    other("RandomErasing", batch="CutMix"),
    other("TrivialAugmentWide", batch="CutMix"),
    other("TrivialAugmentWide", "RandomErasing", batch="MixUp"),
    *(other(f"RandAugment {magnitude}", "RandomErasing", batch="MixUp") for magnitude in (5, 9, 13)),
    JITTERED,
    other("ColorJitter 0.2"),
    other("ColorJitter 0.8"),
    other("ColorJitter 0.4", batch="CutMix"),
    other("ColorJitter 0.8", batch="CutMix"),
    other("ColorJitter 0.4", batch="MixUp"),
    other("ColorJitter 0.4", "RandomErasing", batch="CutMix"),
)


class Pooled(Noise):
    """Noise of the pooled covariance, of a model by `fit_pooled`; `smooth`: of its average over shifts."""

    def __init__(self, strength: float, smooth: bool = False) -> None:
        super().__init__(strength)
        self.smooth = smooth

    def draw(self, selected: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"eps": torch.randn(len(selected.rows), 3 * SIZE * SIZE, generator=generator)}  # the largest model's

    def move(self, batch: Any) -> Tensor:
        modes, eps = batch.model.pooled, self.strength * batch.drawn["eps"]
        if not self.smooth:
            return torch.addmm(batch.z, eps[:, : modes.rank] * modes.scales[0], modes.directions[0])
        return batch.z + smooth_fields(batch.model, eps[:, : batch.model.dim])


def smooth_fields(model: GLEM, white: Tensor) -> Tensor:
    """White noise [n, d] turned into smooth noise [n, d] with the energy, spectrum and colours of the pooled modes."""
    waves = torch.fft.rfft2(white.reshape(-1, *model.image_shape))
    field = torch.einsum("hwij,njhw->nihw", _colours(model), waves)
    return torch.fft.irfft2(field, s=model.image_shape[1:]).flatten(1)


@cache
def _colours(model: GLEM) -> Tensor:
    """The root of the pooled modes' power between the colours at each frequency: complex [H, W // 2 + 1, C, C]."""
    modes = model.pooled.scales[0][:, None] * model.pooled.directions[0]
    waves = torch.fft.rfft2(modes.view(-1, *model.image_shape).double(), norm="ortho")
    values, vectors = torch.linalg.eigh(torch.einsum("mihw,mjhw->hwij", waves, waves.conj()))
    return ((vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mH).cfloat()


STRENGTHS = 0.25, 0.5, 1.0
TRIED = (*map(Noise, STRENGTHS), *map(Adversarial, STRENGTHS), Mixup())
POOLED = Stack("pooled modes: noise 0.5", "pooled", policy=Pooled(0.5))
SMOOTH = Stack("smooth noise 0.5", "pooled", policy=Pooled(0.5, smooth=True))


def on(base: Stack, policy: Policy) -> Stack:
    """A stack with moves along modes of the pixels before its other operations."""
    move = moves("pixels", "pixel modes", policy)
    return move if base is PLAIN else replace(base, name=f"{base.name}, {move.name}", kind="pixels", policy=policy)


def few(data: ImageData, per_class: int, seed: int) -> tuple[ImageData, ImageData]:
    """Random images, equally many of each class, and the rest."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(data.targets == k))[:per_class] for k in range(len(data.classes))]
    drawn = np.isin(np.arange(len(data)), np.concatenate(rows))
    return data.subset(np.flatnonzero(drawn)), data.subset(np.flatnonzero(~drawn))


def fit(data: ImageData, rank: int, pooled: bool = False) -> GLEM:
    """A model of the pixels, of images of `SIZE` pixels."""
    x = resize(data.tensor(), [SIZE, SIZE], antialias=True) if data.image_shape[1] > SIZE else data.tensor()
    classes = None if pooled else data.classes
    return GLEM.fit((x, torch.from_numpy(data.targets)), rank=rank, pooled=pooled, classes=classes)


def fit_pooled(data: ImageData, rank: int) -> GLEM:
    """The same model, with the modes of the pooled covariance as `pooled`."""
    model = fit(data, rank)
    model.pooled = fit(data, rank * len(data.classes), pooled=True).modes
    return model


COMPARED = (
    ("class noise", "pooled noise"), ("class noise", "smooth noise"), ("class noise", "ColorJitter"),
    ("moves on crop + flip", "ColorJitter"), ("moves on the best other stack", "ColorJitter"),
)  # fmt: skip


def roles_of(name: str, best: Callable[[list[Stack]], Stack]) -> dict[str, Stack]:
    """The measured stacks of a setting by their roles; `best` chooses on the held-out images."""
    strongest = best([PLAIN, *OTHERS])
    ours = [best([on(base, policy) for policy in TRIED]) for base in (PLAIN, strongest)]
    roles = {
        "crop + flip": PLAIN, "best other stack": strongest, "moves on the best other stack": ours[1],
        "moves on crop + flip": ours[0], "ColorJitter": JITTERED,
        "fixed moves": on(strongest, Adversarial(0.25)), "class noise": on(PLAIN, Noise(0.5)),
        "pooled noise": POOLED, "smooth noise": SMOOTH,
    }  # fmt: skip
    return dict(list(roles.items())[: SETTINGS[name].roles])


def chosen_by(cells: list[dict[str, Any]]) -> Callable[[list[Stack]], Stack]:
    """The choice that the stored cells of the first setting give."""
    values = {cell["stack"]: cell["value"] for cell in cells if cell["seed"] == TUNING}
    return lambda tried: max(tried, key=lambda stack: values[stack.name])


def differences(
    name: str, cells: list[dict[str, Any]], chosen: list[dict[str, Any]], seeds: range
) -> dict[str, Interval]:
    """Differences between roles, by "one over two"; the pairs of `COMPARED` come last."""
    roles, value = roles_of(name, chosen_by(chosen)), {(cell["seed"], cell["stack"]): cell["value"] for cell in cells}
    bases = [
        (role, base) for role in roles for base in ("crop + flip", "best other stack") if roles[role] != roles[base]
    ]
    pairs = [*bases, *((one, two) for one, two in COMPARED if one in roles and two in roles)]
    return {
        f"{one} over {two}": interval(value[seed, roles[one].name] - value[seed, roles[two].name] for seed in seeds)
        for one, two in pairs
    }


def page(
    name: str, cells: list[dict[str, Any]], chosen: list[dict[str, Any]], seeds: range | None = None
) -> dict[str, Any]:
    """The page of a setting, from its cells and from the cells of the choice."""
    setting, roles = SETTINGS[name], roles_of(name, chosen_by(chosen))
    seeds = setting.seeds if seeds is None else seeds
    found, rows = differences(name, cells, chosen, seeds), []
    for stack in dict.fromkeys(roles.values()):
        what = [role for role in roles if roles[role] == stack]
        mean = interval(cell["value"] for cell in cells if cell["stack"] == stack.name and cell["seed"] in seeds)
        row = {
            "what": "; ".join(what),
            "stack": stack.name,
            "seeds": len(seeds),
            "accuracy": mean.mean,
            "+/-": mean.half,
        }
        for place, base in enumerate(("crop + flip", "best other stack"), 1):
            gain = found.get(f"{what[0]} over {base}", Interval(0.0, 0.0, len(seeds)))
            row |= {f"over {base}": gain.mean, f"+/- ({place})": gain.half}
        rows.append(row)
    command = f"python benchmarks/proof/photographs.py{f' --setting {name}' * (name != NAME)}"
    command += " --fresh" * (seeds == FRESH)
    compared = [
        {"difference": pair, "points": gain.mean, "+/-": gain.half, "seeds": gain.seeds}
        for pair, gain in found.items()
        if tuple(pair.split(" over ")) in COMPARED
    ]
    whole = {"title": setting.title, "command": command, "measured on": processors(cells), "rows": rows}
    return whole | {"Differences": compared}


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--setting", default=NAME, choices=tuple(SETTINGS))
    args.add_argument("--fresh", action="store_true", help="the seeds 200 to 219, which nobody has seen")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    name, setting = args.setting, SETTINGS[args.setting]
    folder = find_images(name, "imagenette128", "imagenette128")
    train, test = (open_data(folder, split, image_size=setting.size, channels=3) for split in ("train", "val"))
    held, pool = few(train, HELD, TUNING)
    most = setting.per_class - 1  # all modes that there are
    models = {"pixels": partial(fit, rank=most), "pooled": partial(fit_pooled, rank=most)}
    file = f"{name}_fresh" if args.fresh else name
    cells, chosen = (Rows(args.out / f"{each}.json", "cells") for each in (file, NAME))

    def measure(rows: Rows, stacks: list[Stack], seed: int) -> None:
        """Store percent for each stack, on the test images, or with the seed of the choice on the held-out images."""
        images, judged = few(pool, setting.per_class, seed)[0], held if seed == TUNING else test
        comparison = Comparison(models, STEPS, setting.network, copies=COPIES)
        for stack in stacks:
            rows.row(
                {"seed": seed, "stack": stack.name},
                partial(lambda stack: {"value": comparison.accuracy(stack, images, judged, seed)}, stack),
            )

    def best(tried: list[Stack]) -> Stack:
        if name == NAME:  # only the first setting chooses
            measure(chosen, tried, TUNING)
        return chosen_by(chosen.all())(tried)

    roles, seeds = roles_of(name, best), FRESH if args.fresh else setting.seeds
    for seed in seeds:
        measure(cells, list(dict.fromkeys(roles.values())), seed)
    publish(args.out, file, page(name, cells.all(), chosen.all(), seeds), {"cells": cells.all()})


if __name__ == "__main__":
    main()
