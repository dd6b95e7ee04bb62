"""Labelled pictures: what a flow does with real images, and sheets of any images by class.

Every picture is a PIL image made of sections; a section is one grid of equal cells with a title, labels above its
columns and beside its rows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from glem_augment.augment.transform import GLEMAugment
from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError
from glem_augment.model.glem import GLEM

__all__ = ["Section", "compose", "contact_sheet", "preview"]

MIX_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
NOISE_STRENGTHS = (0.25, 0.5, 1.0, 1.5)
TEMPERATURES = (0.5, 0.8, 1.0)
MAX_CLASSES = 20
# Cells smaller than the first are enlarged by a whole factor, pixel by pixel; larger than the second are shrunk.
SMALLEST, LARGEST = 56, 96
_PADDING, _MARGIN, _GAP = 2, 18, 26
_TITLE, _LABEL, _NOTE = 20, 14, 13
_INK, _GREY, _PAPER = (20, 20, 20), (105, 105, 105), (255, 255, 255)


@dataclass
class Section:
    """One grid of cells.

    Attributes:
        title: above it; note: one smaller line below the title.
        cells: uint8 or float-in-[0,1] images [R, N, C, H, W]: R rows of N columns.
        columns: labels above columns, as (number of columns, text); rows: R labels.
        breaks: columns before which a little space separates what follows.
    """

    title: str
    cells: Tensor
    columns: Sequence[tuple[int, str]] = ()
    rows: Sequence[str] = ()
    note: str = ""
    breaks: Sequence[int] = field(default_factory=tuple)


@torch.no_grad()
def preview(
    model: GLEM,
    data: ImageData,
    rows: int = 6,
    policies: Sequence[str] = ("mixup", "noise"),
    modes: int | None = None,
    seed: int = 0,
) -> Image.Image:
    """Augmentations at rising strength, samples, and interpolations, in one picture.

    Args:
        model: a GLEM; without stored modes only what does not need them is drawn.
        data: real images in the flow's shape, labelled by the flow's class indices.
        rows: real images to augment, of as many classes as there are.
        policies: of the augmentation, "mixup" and "noise".
        modes: principal modes to move along, all that are stored by default.
        seed: of everything random; the same call gives the same picture.

    Raises:
        DataError: no images, or images of another shape. ValueError: more modes than the model has.
    """
    if not len(data):
        raise DataError(f"{data.name} holds no images")
    if tuple(data.image_shape) != tuple(model.image_shape):
        raise DataError(f"{data.name} has images of {data.image_shape}, the flow takes {model.image_shape}")
    sections: list[Section | list[Section]] = []
    if model.modes is not None:
        sections.append(augmentations(model, data, rows, policies, modes, seed))
    sections.append(samples(model, seed))
    sections.append(interpolations(model, data, seed))
    c, h, w = model.image_shape
    missing = "" if model.modes is not None else " No class modes are stored: no augmentations, no RFCM samples."
    return compose(
        f"{model.config.flow['preset']} flow, {c}x{h}x{w}, {model.num_classes} classes",
        f"real images from {data.name}.{missing}",
        sections,
    )


# ---- the sections ------------------------------------------------------------------------------------------------


def augmentations(
    model: GLEM, data: ImageData, rows: int, policies: Sequence[str], modes: int | None, seed: int
) -> Section:
    """Real images, and what GLEMAugment makes of them at rising strength: the same draw in every column of a row."""
    assert model.modes is not None
    used = model.modes.rank if modes is None else modes
    chosen, partners = _pairs(data, rows, seed)
    x, y = _stack(data, np.concatenate([chosen, partners]), model.device)
    n = len(chosen)
    columns: list[tuple[int, str]] = [(1, "real")]
    cells, breaks = [_unit(x[:n])], []
    for policy in policies:
        aug = GLEMAugment(model, p=1.0, policy=policy, modes=used, seed=seed)
        drawn = aug.draw(x, y)
        breaks.append(len(cells))
        if policy == "mixup":
            # The partner is the next image of the class, shown in the last column, where the class has two.
            own = torch.arange(2 * n, device=x.device)
            other = own.roll(n)
            alone = torch.from_numpy(np.concatenate([chosen == partners] * 2)).to(x.device)
            drawn = replace(
                drawn,
                partner=torch.where(alone, -1, other),
                source=torch.where(alone, 1, 0),
                partner_cls=drawn.cls,
            )
            for share in MIX_SHARES:
                cells.append(_unit(aug.apply(x, y, replace(drawn, l=torch.full_like(drawn.l, share)))[0][:n]))
                columns.append((1, f"l = {share:g}"))
            cells.append(_unit(x[n:]))
            columns.append((1, "partner"))
        else:
            for strength in NOISE_STRENGTHS:
                aug.strength = strength
                cells.append(_unit(aug.apply(x, y, drawn)[0][:n]))
                columns.append((1, f"s = {strength:g}"))
    what = {
        "mixup": "mixup keeps a share l of the image along them",
        "noise": "noise of s standard deviations along them",
    }
    return Section(
        "Augmentations of real images",
        torch.stack(cells, 1),
        columns,
        [model.classes[i] for i in y[:n].tolist()],
        f"{used} principal modes of the class; {'; '.join(what[p] for p in policies)}; "
        "where the result leaves the range of images, GLEMAugment keeps the original",
        breaks,
    )


def samples(model: GLEM, seed: int, each: int = 3) -> Section:
    """Samples of every class (at most 20): temperatures, from the class Gaussian and from the RFCM."""
    k = min(model.num_classes, MAX_CLASSES)
    sources = ["gaussian"] + ["rfcm"] * (model.modes is not None)
    y = torch.arange(k, device=model.device).repeat_interleave(each)
    columns, parts = [], []
    for source in sources:
        for temperature in TEMPERATURES:
            # The same noise at every temperature, so that a row shows what temperature alone does.
            x = model.sample(y, temperature, torch.Generator().manual_seed(seed), source)
            parts.append(_unit(x).unflatten(0, (k, each)))
            columns.append((each, f"{source.upper() if source == 'rfcm' else 'Gaussian'}, T = {temperature:.1f}"))
    note = "drawn from the class's Gaussian"
    if model.modes is not None:
        note += "; RFCM: mean and covariance re-estimated from real latents"
    if model.num_classes > k:
        note += f"; the first {k} of {model.num_classes} classes"
    breaks = [each * i for i in range(1, len(columns))]
    return Section("Samples of each class", torch.cat(parts, 1), columns, model.classes[:k], note, breaks)


def interpolations(model: GLEM, data: ImageData, seed: int, lines: int = 4, steps: int = 8) -> list[Section]:
    """Straight lines in latent space: ``lines`` within a class and, in a second section, as many between two."""
    first, second = _pairs(data, lines, seed + 1)
    pairs = [("within a class", first, second, [model.classes[i] for i in data.targets[first]])]
    present = np.unique(data.targets)
    if len(present) > 1:
        rng = np.random.default_rng([seed, 2])
        order = rng.permutation(present)
        # Neighbours in a random circle of the classes: always two different ones.
        ends = [(order[2 * i % len(order)], order[(2 * i + 1) % len(order)]) for i in range(lines)]
        first, second = (
            np.array([rng.choice(np.flatnonzero(data.targets == index)) for index in side])
            for side in zip(*ends, strict=True)
        )
        names = [f"{_short(model.classes[i], 12)} - {_short(model.classes[j], 12)}" for i, j in ends]
        pairs.append(("between two classes", first, second, names))
    sections = []
    for what, starts, stops, names in pairs:
        x1, x2 = (_stack(data, indices, model.device)[0] for indices in (starts, stops))
        cells = _unit(model.interpolate(x1, x2, steps).flatten(0, 1)).unflatten(0, (len(names), steps))
        columns = [(1, "real"), *[(1, f"{i / (steps - 1):.2f}") for i in range(1, steps - 1)], (1, "real")]
        note = "straight lines in latent space between two real images"
        sections.append(Section(f"Interpolations {what}", cells, columns, names, note))
    return sections


def contact_sheet(
    images: Tensor, targets: Sequence[int], classes: Sequence[str], title: str, note: str = "", columns: int = 20
) -> Image.Image:
    """Images by class, one row for each class (the first 20 that have any), ``columns`` images at most.

    Args:
        images: [N,C,H,W], uint8 or float in [0,1]; targets: N class indices; classes: K names.
    """
    labels = np.asarray(targets)
    kept = [c for c in range(len(classes)) if (labels == c).any()][:MAX_CLASSES]
    if not kept:
        raise DataError("there are no images to draw")
    _, channels, height, width = images.shape
    cells = torch.ones(len(kept), columns, channels, height, width)
    for row, index in enumerate(kept):
        members = np.flatnonzero(labels == index)[:columns]
        cells[row, : len(members)] = _unit(images[torch.from_numpy(members)])
    return compose(title, note, [Section("", cells, (), [classes[c] for c in kept])])


# ---- drawing -----------------------------------------------------------------------------------------------------


def compose(title: str, note: str, sections: Sequence[Section | list[Section]]) -> Image.Image:
    """The sections below one another, under a title; those in a list side by side."""
    pictures = [_beside(section) if isinstance(section, list) else _draw(section) for section in sections]
    head = _MARGIN + _TITLE + 8 + (_NOTE + 8 if note else 0) + 6
    width = max([p.width for p in pictures] + [_width(title, _TITLE + 4), _width(note, _NOTE)]) + 2 * _MARGIN
    height = head + sum(p.height for p in pictures) + _GAP * (len(pictures) - 1) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 4), title, _INK, _font(_TITLE + 4))
    draw.text((_MARGIN, _MARGIN + _TITLE + 10), note, _GREY, _font(_NOTE))
    top = head
    for picture in pictures:
        sheet.paste(picture, (_MARGIN, top))
        top += picture.height + _GAP
    return sheet


def _beside(sections: list[Section]) -> Image.Image:
    pictures = [_draw(section) for section in sections]
    width = sum(p.width for p in pictures) + _GAP * (len(pictures) - 1)
    sheet, left = Image.new("RGB", (width, max(p.height for p in pictures)), _PAPER), 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + _GAP
    return sheet


def _draw(section: Section) -> Image.Image:
    rows, count = section.cells.shape[:2]
    cells = _cell_size(section.cells.flatten(0, 1))
    cell_h, cell_w = cells.shape[-2:]
    cells = cells.unflatten(0, (rows, count))
    edges = [0, *sorted(set(section.breaks)), count]
    blocks = []
    for first, last in zip(edges, edges[1:], strict=False):
        block = cells[:, first:last].flatten(0, 1)
        if len(block) == 1:  # make_grid leaves a single image without padding
            grid = torch.nn.functional.pad(block[0], (_PADDING,) * 4, value=1.0)
        else:
            grid = make_grid(block, nrow=last - first, padding=_PADDING, pad_value=1.0)
        blocks.append(grid)
        if last != count:
            blocks.append(torch.ones(grid.shape[0], grid.shape[1], 8))
    picture = to_pil_image(torch.cat(blocks, 2))
    labels = [_short(text) for text in section.rows]
    left = max([_width(text, _LABEL) for text in labels], default=0)
    left += 10 if left else 0
    head = (_TITLE + 8 if section.title else 0) + (_NOTE + 8 if section.note else 0)
    above = head + (_LABEL + 8 if section.columns else 0)
    width = max(left + picture.width, _width(section.title, _TITLE), _width(section.note, _NOTE))
    sheet = Image.new("RGB", (width, above + picture.height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), section.title, _INK, _font(_TITLE))
    if section.note:
        draw.text((0, _TITLE + 6 if section.title else 0), section.note, _GREY, _font(_NOTE))
    sheet.paste(picture, (left, above))
    for row, text in enumerate(labels):
        middle = above + _PADDING + row * (cell_h + _PADDING) + cell_h / 2
        draw.text((left - 8, middle), text, _INK, _font(_LABEL), anchor="rm")
    column = 0
    for span, text in section.columns:
        shift = left + 8 * sum(1 for b in set(section.breaks) if b <= column)
        x = shift + _PADDING + column * (cell_w + _PADDING) + (span * (cell_w + _PADDING) - _PADDING) / 2
        # Breaks add padding on both of their sides.
        x += _PADDING * sum(1 for b in set(section.breaks) if b <= column)
        draw.text((x, above - 4), text, _INK, _font(_LABEL), anchor="ms")
        column += span
    return sheet


def _cell_size(images: Tensor) -> Tensor:
    """Cells of a size that people can see: [N,3,h,w] float in [0,1]."""
    images = _unit(images)
    images = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    height, width = images.shape[-2:]
    if max(height, width) < SMALLEST:
        factor = -(-SMALLEST // max(height, width))
        return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if max(height, width) > LARGEST:
        scale = LARGEST / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    return images


def _unit(images: Tensor) -> Tensor:
    """float32 in [0,1] on the CPU; what is not finite becomes grey."""
    images = images.detach().cpu()
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return images.nan_to_num(0.5, 1.0, 0.0).clamp(0, 1)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):  # before Pillow 10.1, or without FreeType: one small size
        return ImageFont.load_default()


def _width(text: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(text))) if text else 0


def _short(text: str, longest: int = 22) -> str:
    # Pillow's own font knows ASCII alone; accents are left out rather than drawn as boxes.
    text = unicodedata.normalize("NFKD", text.replace("\u00df", "ss"))
    text = "".join(c if c.isascii() else "?" for c in text if not unicodedata.combining(c))
    return text if len(text) <= longest else text[: longest - 3] + "..."


# ---- choosing images ---------------------------------------------------------------------------------------------


def _pairs(data: ImageData, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` images spread over the classes, and another image of the same class for each: int64 indices.

    Where a class has one image alone, its partner is itself.
    """
    rng = np.random.default_rng([seed, 1])
    present = np.unique(data.targets)
    # Spread over the classes in their order, so that 6 rows of 10 classes are not the first six.
    few = count <= len(present)
    classes = present[np.arange(count) * len(present) // count if few else np.sort(np.arange(count) % len(present))]
    first, second = [], []
    for index in classes:
        members = np.flatnonzero(data.targets == index)
        drawn = rng.choice(members, size=min(2, len(members)), replace=False)
        first.append(drawn[0])
        second.append(drawn[-1])
    return np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)


def _stack(data: ImageData, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = next(iter(data.batches(indices, len(indices))))
    return x.to(device), y.to(device)
