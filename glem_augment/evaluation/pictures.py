"""Labelled pictures: a column of titled sections, each a grid of equal cells with labels."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from glem_augment.codec.pixel_range import UINT8, PixelRange

SMALLEST, LARGEST = 56, 224  # pixels: smaller cells are enlarged by a whole factor, larger ones shrunk
_PADDING, _MARGIN, _GAP = 2, 18, 26
_TITLE, _LABEL = 20, 14
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


@dataclass
class Section:
    """One grid of cells.

    Attributes:
        cells: images [R, N, C, H, W], uint8 or float in [0, 1]: R rows of N columns.
        columns: a label above each column, "" for none. rows: a label beside each row.
    """

    title: str
    cells: Tensor
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()


def compose(title: str, sections: Sequence[Section]) -> Image.Image:
    """The sections below one another, under a title."""
    return ImageOps.expand(_stack([*_heading(title, _TITLE + 4), *map(_draw, sections)], _GAP), _MARGIN, _PAPER)


def _draw(section: Section) -> Image.Image:
    cells, font = visible(section.cells.flatten(0, 1)), ImageFont.load_default(_LABEL)
    labels = [short(text) for text in section.rows]
    left, top = max([_width(text, _LABEL) + 10 for text in labels], default=0), _LABEL + 8 if section.columns else 0
    picture = to_pil_image(make_grid(cells, section.cells.shape[1], _PADDING, pad_value=1.0))
    height, width = (side + _PADDING for side in cells.shape[-2:])
    grid = Image.new("RGB", (left + picture.width, top + picture.height), _PAPER)
    grid.paste(picture, (left, top))
    draw = ImageDraw.Draw(grid)
    for row, text in enumerate(labels):
        draw.text((left - 8, top + row * height + height / 2), text, _INK, font, anchor="rm")
    for column, text in enumerate(section.columns):
        draw.text((left + _PADDING + column * width, top - 4), text, _INK, font, anchor="ls")
    return _stack([*_heading(section.title, _TITLE), grid])


def _heading(text: str, size: int) -> list[Image.Image]:
    """One picture of the text, none of an empty text."""
    if not text:
        return []
    line = Image.new("RGB", (_width(text, size), size + 4), _PAPER)
    ImageDraw.Draw(line).text((0, 0), text, _INK, ImageFont.load_default(size))
    return [line]


def _stack(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures below one another."""
    height = sum(picture.height + gap for picture in pictures) - gap
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), height), _PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def visible(images: Tensor) -> Tensor:
    """RGB cells of a size that people can see: float [N,3,h,w] in [0, 1].

    Of other images than grey and RGB the first three channels are shown, or the first alone of two.
    """
    images = unit(images)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    longest = max(images.shape[-2:])
    if longest < SMALLEST:
        return F.interpolate(images, scale_factor=-(-SMALLEST // longest), mode="nearest")
    if longest > LARGEST:
        size = [max(1, round(side * LARGEST / longest)) for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    return images


def unit(images: Tensor, pixel_range: PixelRange = UINT8) -> Tensor:
    """float32 in [0, 1] on the CPU; values that are not finite become grey."""
    low, high = pixel_range.limits
    return (pixel_range.clamp(pixel_range.to_floats(images.detach().cpu(), torch.float32)) - low) / (high - low)


def _width(text: str, size: int) -> int:
    return math.ceil(ImageFont.load_default(size).getlength(text))


def short(text: str, longest: int = 22) -> str:
    """The text in ASCII, since Pillow's font has no other letters, cut to a length."""
    text = unicodedata.normalize("NFKD", text.replace("\u00df", "ss"))
    text = "".join(c if c.isascii() else "?" for c in text if not unicodedata.combining(c))
    return text if len(text) <= longest else text[: longest - 3] + "..."
