"""Labelled pictures of real images, augmentations, samples and interpolations.

A picture is a column of sections. A section is a grid of equal cells with a title, labels above its columns and labels
beside its rows.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from glem_augment.augment.policies import AugmentParams, Mixup, Noise, Policy
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import POLICIES, PolicyName
from glem_augment.codec.plausible import in_range
from glem_augment.codec.resize import PixelAdapter
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5)
NOISE_STRENGTHS = (0.25, 0.5, 1.0, 1.5)
TEMPERATURES = (0.5, 0.8, 1.0)
MAX_CLASSES = 20
# Smaller cells are enlarged by a whole factor, larger ones shrunk.
SMALLEST, LARGEST = 56, 224
_PAGE, _ENLARGED = 1600, 128  # pixels of a page's width, and of a cell that is enlarged to fill it
_ROWS = 16  # that are moved at once
_PADDING, _MARGIN, _GAP = 2, 18, 26
_TITLE, _LABEL, _NOTE = 20, 14, 13
_INK, _GREY, _PAPER, _RED = (20, 20, 20), (105, 105, 105), (255, 255, 255), (215, 0, 0)


@dataclass
class Section:
    """One grid of cells.

    Attributes:
        cells: images [R, N, C, H, W], uint8 or float in [0, 1]: R rows of N columns.
        columns: a label above each column, "" for none. rows: a label beside each row.
        note: a line of small text below the title.
        marked: bool [R, N], cells that get a red frame.
    """

    title: str
    cells: Tensor
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    note: str = ""
    marked: Tensor | None = None


class FlowClassifier(nn.Module):
    """The flow as a classifier, for adversarial moves: from images of any size to logits [B, K] of the posterior.

    The posterior's temperature keeps a gradient: without it, log-densities are hundreds of nats apart, and their
    softmax is 0 or 1 in float32.
    """

    def __init__(self, model: GLEM) -> None:
        super().__init__()
        self.model, self.pixels = model, PixelAdapter(model.image_shape)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model.class_scores(self.model.encode(self.pixels.to_flow(x))[0])
        return scores / self.model.latent_classes.temperature


@torch.no_grad()
def preview(
    model: GLEM,
    data: ImageData,
    rows: int = 6,
    policies: Sequence[PolicyName] = POLICIES,
    modes: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Image.Image:
    """Augmentations at rising strength, samples and interpolations in one picture.

    Args:
        model: without stored class modes, augmentations and RFCM samples are left out.
        data: real images of any size, labelled by the flow's class indices.
        rows: real images to augment, of as many classes as possible.
        modes: principal modes to move along, by default all stored modes.
        seed: the same call gives the same picture.
        progress: show a bar on stderr when it takes longer than two seconds.

    Raises:
        DataError: no images. ValueError: images of other channels, or more modes than the model has.
    """
    if not len(data):
        raise DataError(f"{data.name} holds no images")
    sections = []
    if model.modes is not None:
        used = model.modes.rank if modes is None else modes
        sections += [_augmentations(model, data, rows, policy, used, seed, progress) for policy in policies]
    sections += [class_samples(model, seed), *_interpolations(model, data, seed)]
    c, h, w = model.image_shape
    missing = "" if model.modes is not None else " No class modes are stored: no augmentations, no RFCM samples."
    title = f"{model.config.flow.get('preset', 'custom')} flow, {c}x{h}x{w}, {model.num_classes} classes"
    return compose(title, f"real images from {data.name}.{missing}", sections)


# ---- the sections ------------------------------------------------------------------------------------------------


def _augmentations(
    model: GLEM, data: ImageData, rows: int, policy: PolicyName, modes: int, seed: int, progress: bool = False
) -> Section:
    """Real images and their moves by GLEMAugment at rising strength, with one draw per row.

    Adversarial moves attack the model's posterior. Images are floats, so that only an image whose move was rejected
    equals its original bit for bit.
    """
    aug = GLEMAugment(model, policy, p=1.0, modes=modes, seed=seed)
    if aug.policy.wants_classifier:
        aug.attach(FlowClassifier(model))
    noise = "noise of s standard deviations is added along them"
    what = {
        "mixup": "a part, keep, of the image stays along them",
        "noise": noise,
        "adversarial": f"{noise}, and a step that lowers the model's posterior of the class",
    }[policy]
    pairs = np.stack(_pairs(data, rows, seed), 1)
    found: list[tuple[Tensor, Tensor]] = []
    names: list[str] = []
    with tqdm(total=rows, unit="row", desc=policy, delay=2, disable=not progress) as bar:
        for part in np.array_split(pairs, -(-rows // _ROWS)):
            columns, cells, marked = _moved(aug, data, *part.T)
            found.append((cells, marked))
            names += [model.classes[i] for i in data.targets[part[:, 0]].tolist()]
            bar.update(len(part))
    cells, marked = map(torch.cat, zip(*found, strict=True))
    assert model.modes is not None
    used = model.modes.in_words(modes)
    note = f"{used} principal modes of the class; {what}; red frame: rejected as not plausible, so the original is kept"
    return Section(f"Augmentations of real images: {policy}", cells, columns, names, note, marked)


def _moved(
    aug: GLEMAugment, data: ImageData, chosen: np.ndarray, partners: np.ndarray
) -> tuple[list[str], Tensor, Tensor]:
    """Labels of the columns, the cells [n, N, C, H, W], and whether each move was rejected, bool [n, N]."""
    x, y = _load(data, np.concatenate([chosen, partners]), aug.model.device)
    x, n = _unit(x).to(aug.model.device), len(chosen)
    drawn = aug.draw(x, y)
    moves: list[tuple[str, Policy, AugmentParams]]
    if isinstance(aug.policy, Mixup):
        # The last column shows the partner. For an image alone in its class it shows the image; the partner is drawn.
        alone = torch.from_numpy(np.concatenate([chosen == partners] * 2))
        partner = torch.where(alone, -1, torch.arange(2 * n).roll(n))
        drawn = drawn.having(partner=partner, partner_cls=drawn.cls)
        moves = [(f"keep = {keep:g}", aug.policy, drawn.having(keep=torch.full((2 * n,), keep))) for keep in KEPT]
    else:
        assert isinstance(aug.policy, Noise)  # or Adversarial
        kind = type(aug.policy)
        moves = [(f"s = {strength:g}", kind(strength), drawn) for strength in NOISE_STRENGTHS]
    columns = {"real": x[:n]}
    for label, aug.policy, params in moves:
        columns[label] = aug.replay(x, y, params)[0][:n]
    marked = torch.stack([(images == x[:n]).flatten(1).all(1) for images in columns.values()], 1).cpu()
    marked[:, 0] = False
    if isinstance(aug.policy, Mixup):
        columns["partner"] = x[n:]
        marked = F.pad(marked, (0, 1))
    return list(columns), torch.stack([_unit(images) for images in columns.values()], 1), marked


def class_samples(model: GLEM, seed: int, each: int = 3) -> Section:
    """Samples of the first 20 classes at several temperatures, from the class Gaussian and from the RFCM."""
    k = min(model.num_classes, MAX_CLASSES)
    y = torch.arange(k, device=model.device).repeat_interleave(each)
    note = "drawn from the class's Gaussian"
    sources = {"Gaussian": "gaussian"}
    if model.modes is not None:
        note += ", or from its RFCM: mean and covariance re-estimated from real latents"
        sources["RFCM"] = "rfcm"
    columns, parts = [], []
    for name, source in sources.items():
        for temperature in TEMPERATURES:
            # All temperatures share their noise, so that a row shows the effect of temperature alone.
            x = model.sample(y, temperature, torch.Generator().manual_seed(seed), source)
            parts.append(_unit(x).unflatten(0, (k, each)))
            columns += [f"{name}, T = {temperature:.1f}", *[""] * (each - 1)]
    if model.num_classes > k:
        note += f"; the first {k} of {model.num_classes} classes"
    return Section("Samples of each class", torch.cat(parts, 1), columns, model.classes[:k], note)


def _interpolations(model: GLEM, data: ImageData, seed: int, lines: int = 4, steps: int = 8) -> list[Section]:
    """Straight lines in latent space between two real images: within a class, and between two classes."""
    ends = [("within a class", *_pairs(data, lines, seed + 1))]
    if len(np.unique(data.targets)) > 1:
        # Twice as many images, spread over the classes in order: images half of the list apart differ in class.
        spread = _pairs(data, 2 * lines, seed + 2)[0]
        ends.append(("between two classes", spread[:lines], spread[lines:]))
    columns = ["real", *(f"{i / (steps - 1):.2f}" for i in range(1, steps - 1)), "real"]
    note = "straight lines in latent space between two real images"
    sections, pixels = [], PixelAdapter(model.image_shape)
    for what, starts, stops in ends:
        real = (_load(data, indices, model.device)[0] for indices in (starts, stops))
        x1, x2 = (pixels.to_flow(pixels.to_unit(x)) for x in real)
        cells = _unit(model.interpolate(x1, x2, steps))
        names = [[_short(model.classes[data.targets[i]], 12) for i in pair] for pair in zip(starts, stops, strict=True)]
        rows = [" - ".join(dict.fromkeys(pair)) for pair in names]
        sections.append(Section(f"Interpolations {what}", cells, columns, rows, note))
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


# ---- drawing -----------------------------------------------------------------------------------------------------


def compose(title: str, note: str, sections: Sequence[Section]) -> Image.Image:
    """The sections below one another, under a title; cells of narrow sections are enlarged to fill the page."""
    head = _heading((title, _TITLE + 4, _INK), (note, _NOTE, _GREY))
    # The widest grid, without the text.
    page = max(_draw(Section("", section.cells[:1], rows=section.rows)).width for section in sections)
    return ImageOps.expand(_stack([*head, *(_draw(section, page) for section in sections)], _GAP), _MARGIN, _PAPER)


def _draw(section: Section, page: int = 0) -> Image.Image:
    """One section, at most about `_PAGE` pixels wide. Cells grow by whole factors to fill `page` pixels."""
    labels = [_short(text) for text in section.rows]
    left = max([_width(text, _LABEL) + 10 for text in labels], default=0)
    columns, longest = section.cells.shape[1], max(section.cells.shape[-2:])
    wanted = (page - left - _PADDING) // columns - _PADDING
    whole = min(wanted // section.cells.shape[-1], _ENLARGED // longest)
    largest = min(LARGEST, max(SMALLEST, (_PAGE - left) // columns - _PADDING))
    cells = visible(section.cells.flatten(0, 1), max(SMALLEST, whole * longest), largest)
    picture = to_pil_image(make_grid(cells, section.cells.shape[1], _PADDING, pad_value=1.0))
    height, width = (side + _PADDING for side in cells.shape[-2:])
    top = _LABEL + 8 if section.columns else 0
    grid = Image.new("RGB", (left + picture.width, top + picture.height), _PAPER)
    grid.paste(picture, (left, top))
    draw = ImageDraw.Draw(grid)
    for row, text in enumerate(labels):
        draw.text((left - 8, top + row * height + height / 2), text, _INK, ImageFont.load_default(_LABEL), anchor="rm")
    for column, text in enumerate(section.columns):
        draw.text((left + _PADDING + column * width, top - 4), text, _INK, ImageFont.load_default(_LABEL), anchor="ls")
    for row, column in [] if section.marked is None else section.marked.nonzero().tolist():
        x, y = left + column * width, top + row * height
        draw.rectangle((x, y, x + width + 1, y + height + 1), outline=_RED, width=4)
    return _stack([*_heading((section.title, _TITLE, _INK), (section.note, _NOTE, _GREY)), grid])


def _heading(*lines: tuple[str, int, tuple[int, int, int]]) -> list[Image.Image]:
    """One picture for each line (text, size, colour) that is not empty."""
    pictures = []
    for text, size, colour in lines:
        if text:
            pictures.append(Image.new("RGB", (_width(text, size), size + 4), _PAPER))
            ImageDraw.Draw(pictures[-1]).text((0, 0), text, colour, ImageFont.load_default(size))
    return pictures


def _stack(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures below one another."""
    height = sum(picture.height + gap for picture in pictures) - gap
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), height), _PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def visible(images: Tensor, smallest: int = SMALLEST, largest: int = LARGEST) -> Tensor:
    """RGB cells of a size that people can see: float [N,3,h,w] in [0, 1]."""
    images = _unit(images)
    images = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    longest = max(images.shape[-2:])
    if longest < smallest:
        return F.interpolate(images, scale_factor=-(-smallest // longest), mode="nearest")
    if longest > largest:
        size = [max(1, round(side * largest / longest)) for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    return images


def _unit(images: Tensor) -> Tensor:
    """float32 in [0, 1] on the CPU; values that are not finite become grey."""
    images = images.detach().cpu()
    return in_range(images.float() / 255 if images.dtype == torch.uint8 else images.float())


def _width(text: str, size: int) -> int:
    return math.ceil(ImageFont.load_default(size).getlength(text))


def _short(text: str, longest: int = 22) -> str:
    """The text in ASCII, since Pillow's font has no other letters, cut to a length."""
    text = unicodedata.normalize("NFKD", text.replace("\u00df", "ss"))
    text = "".join(c if c.isascii() else "?" for c in text if not unicodedata.combining(c))
    return text if len(text) <= longest else text[: longest - 3] + "..."
