"""A picture of a model at work on real images: moves, samples, interpolations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glem_augment.augment.policies import Noise
from glem_augment.augment.transform import GLEMAugment
from glem_augment.errors import DataError
from glem_augment.evaluation.pictures import Section, compose, short, unit
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM

KEPT = (0.9, 0.7, 0.5)
NOISE_STRENGTHS, DRAWS = (0.25, 0.5, 1.0), 3
TEMPERATURES = (0.5, 0.8, 1.0)
LINES, STEPS = 4, 8  # interpolations of a kind, and images of each
MAX_CLASSES, EACH = 10, 3  # classes with samples, and samples of each at each temperature


@torch.no_grad()
def preview(
    model: GLEM,
    data: ImageData | None,
    rows: int = 6,
    seed: int = 0,
    name: str = "",
    policies: Sequence[str] = (),
) -> Image.Image:
    """Moves at rising strength, samples and interpolations in one picture.

    Args:
        model: without stored class modes, moves and RFCM samples are left out.
        data: real images of the model's shape, labelled by the model's class indices; None: samples alone.
        rows: real images to move, of as many classes as possible.
        seed: the same call gives the same picture.
        name: of the model, for the title.
        policies: names of further policies, whose moves with their defaults are shown.

    Raises:
        DataError: no images.
    """
    if data is not None and not len(data):
        raise DataError(f"{data.name} holds no images")
    c, h, w = model.image_shape
    sections = [class_samples(model, seed)]
    if data is not None:
        kinds = () if model.modes is None else ("mixup", "noise", *policies)
        moves = [_moves(model, data, rows, kind, seed) for kind in kinds]
        sections = [*moves, *sections, *_interpolations(model, data, seed)]
    title = f"{name or model.origin or 'Model'}: {c}x{h}x{w} {model.numbers_are}, {model.num_classes} classes"
    return compose(title, sections)


# ---- the sections ----------------------------------------------------------------------------------------------------


def _moves(model: GLEM, data: ImageData, rows: int, policy: str, seed: int) -> Section:
    """Real images and their moves by GLEMAugment at rising strength, with one draw per row."""
    chosen, partners = _pairs(data, rows, seed)
    x, y = _load(data, np.concatenate([chosen, partners]), model.device)
    columns, n = {"real": x[:rows]}, rows
    if policy == "mixup":
        title = "Mixup along the modes: the part that the image keeps"
        aug = GLEMAugment(model, "mixup", p=1.0, class_map=range(model.num_classes), seed=seed)
        drawn = aug.draw(x, y)
        drawn = drawn.having(partner=torch.arange(2 * n).roll(n), partner_cls=drawn.cls).where(drawn.rows < n)
        for keep in KEPT:
            columns[f"{keep:g}"] = aug.replay(x, y, drawn.having(keep=torch.full((n,), keep)))[0][:n]
        columns["partner"] = x[n:]
    elif policy == "noise":
        title = "Noise along the modes, in standard deviations"
        for strength in NOISE_STRENGTHS:
            aug = GLEMAugment(model, Noise(strength), p=1.0, class_map=range(model.num_classes), seed=seed)
            columns[f"{strength:g}"] = aug(x[:n], y[:n])[0]
    else:
        title = f"Policy {policy}"
        aug = GLEMAugment(model, {"name": policy}, p=1.0, class_map=range(model.num_classes), seed=seed)
        columns |= {f"draw {number}": aug(x, y)[0][:n] for number in range(1, DRAWS + 1)}
    cells = torch.stack([unit(images, model.pixel_range) for images in columns.values()], 1)
    return Section(title, cells, list(columns), [model.classes[i] for i in y[:n].tolist()])


def class_samples(model: GLEM, seed: int) -> Section:
    """Samples of the first classes at several temperatures, from the class Gaussian and from the RFCM."""
    k = min(model.num_classes, MAX_CLASSES)
    y = torch.arange(k, device=model.device).repeat_interleave(EACH)
    columns, parts = [], []
    for name, source in {"Gaussian": "gaussian", **({} if model.modes is None else {"RFCM": "rfcm"})}.items():
        for temperature in TEMPERATURES:
            # All temperatures share their noise, so that a row shows the effect of temperature alone.
            x = model.sample(y, temperature, torch.Generator().manual_seed(seed), source)
            parts.append(unit(x, model.pixel_range).unflatten(0, (k, EACH)))
            columns += [f"{name}, T = {temperature:.1f}", *[""] * (EACH - 1)]
    return Section("Samples of each class", torch.cat(parts, 1), columns, model.classes[:k])


def _interpolations(model: GLEM, data: ImageData, seed: int) -> list[Section]:
    """Straight lines in latent space between two real images: within a class, and between two classes."""
    ends = [("within a class", *_pairs(data, LINES, seed + 1))]
    if len(np.unique(data.targets)) > 1:
        # Twice as many images, spread over the classes in order: images half of the list apart differ in class.
        spread = _pairs(data, 2 * LINES, seed + 2)[0]
        ends.append(("between two classes", spread[:LINES], spread[LINES:]))
    columns = ["real", *(f"{i / (STEPS - 1):.2f}" for i in range(1, STEPS - 1)), "real"]
    sections = []
    for what, starts, stops in ends:
        x1, x2 = (_load(data, indices, model.device)[0] for indices in (starts, stops))
        cells = unit(model.interpolate(x1, x2, STEPS), model.pixel_range)
        names = [[short(model.classes[data.targets[i]], 12) for i in pair] for pair in zip(starts, stops, strict=True)]
        rows = [" - ".join(dict.fromkeys(pair)) for pair in names]
        sections.append(Section(f"Straight lines in latent space {what}", cells, columns, rows))
    return sections


def _pairs(data: ImageData, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` images spread over the classes, and for each the index of another image of its class.

    An image that is alone in its class gets its index twice.
    """
    rng = np.random.default_rng([seed, 1])
    present = np.unique(data.targets)
    classes = present[np.arange(count) * len(present) // count]
    drawn = [rng.permutation(np.flatnonzero(data.targets == index)) for index in classes]
    return np.array([d[0] for d in drawn]), np.array([d[1 % len(d)] for d in drawn])


def _load(data: ImageData, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = next(iter(data.batches(indices, len(indices))))
    return x.to(device), y.to(device)
