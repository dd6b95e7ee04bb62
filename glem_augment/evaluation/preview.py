"""A picture of a model at work on real images: augmentations, samples, interpolations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from glem_augment.augment.policies import AugmentParams, Mixup, Noise, Policy
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import POLICIES, PolicyName
from glem_augment.codec.resize import PixelAdapter
from glem_augment.distributed import progress_bar
from glem_augment.errors import DataError
from glem_augment.evaluation.pictures import Section, compose, short, unit
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5)
NOISE_STRENGTHS = (0.25, 0.5, 1.0, 1.5)
TEMPERATURES = (0.5, 0.8, 1.0)
LINES, STEPS = 4, 8  # interpolations of a kind, and images of each
MAX_CLASSES, EACH = 20, 3  # classes with samples, and samples of each at each temperature
MAX_SLOW = 6  # classes with samples of an autoencoder, which decodes large images slowly
_ROWS = 16  # that are moved at once


class ModelClassifier(nn.Module):
    """The model as a classifier, for adversarial moves: from images of any size to logits [B, K] of the posterior.

    The posterior's temperature keeps a gradient: without it, log-densities are hundreds of nats apart, and their
    softmax is 0 or 1 in float32.
    """

    def __init__(self, model: GLEM) -> None:
        super().__init__()
        self.model, self.pixels = model, PixelAdapter(model.image_shape, pixel_range=model.pixel_range)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model.latent_classes.log_prob(self.model.encode(self.pixels.to_model(x))[0])
        return scores / self.model.latent_classes.temperature


@torch.no_grad()
def preview(
    model: GLEM,
    data: ImageData,
    rows: int = 6,
    policies: Sequence[PolicyName] = POLICIES,
    modes: int | None = None,
    seed: int = 0,
    name: str = "",
    channels: Sequence[int] | None = None,
) -> Image.Image:
    """Augmentations at rising strength, samples and interpolations in one picture.

    Args:
        model: without stored class modes, augmentations and RFCM samples are left out.
        data: real images of any size, labelled by the model's class indices.
        rows: real images to augment, of as many classes as possible.
        modes: principal modes to move along, by default all stored modes.
        seed: the same call gives the same picture.
        name: of the model, for the title.
        channels: three channels to show as red, green and blue, or one. None: the first three, or the first of two.

    Raises:
        DataError: no images. ValueError: images of other channels, channels that they lack, or more modes than the
            model has.
    """
    if not len(data):
        raise DataError(f"{data.name} holds no images")
    shown = list(channels or range(model.image_shape[0]))
    if channels is not None and (len(shown) not in (1, 3) or not set(shown) <= set(range(model.image_shape[0]))):
        raise ValueError(f"channels must be one or three of 0 to {model.image_shape[0] - 1}, got {shown}")
    sections = []
    if model.modes is not None:
        used = model.modes.rank if modes is None else modes
        sections += [_augmentations(model, data, rows, policy, used, seed) for policy in policies]
    sections += [class_samples(model, seed), *_interpolations(model, data, seed)]
    for section in sections:
        section.cells = section.cells[:, :, shown]
    c, h, w = model.image_shape
    missing = "" if model.modes is not None else " No class modes are stored: no augmentations, no RFCM samples."
    title = f"{name or model.origin or 'Model'}: {c}x{h}x{w} {model.numbers_are}, {model.num_classes} classes"
    return compose(title, f"real images from {data.name}.{missing}", sections)


# ---- the sections ------------------------------------------------------------------------------------------------


def _augmentations(model: GLEM, data: ImageData, rows: int, policy: PolicyName, modes: int, seed: int) -> Section:
    """Real images and their moves by GLEMAugment at rising strength, with one draw per row.

    Adversarial moves attack the model's posterior. Images are floats, so that only an image whose move was rejected
    equals its original bit for bit.
    """
    aug = GLEMAugment(model, policy, p=1.0, modes=modes, seed=seed)
    if aug.policy.wants_classifier:
        aug.attach(ModelClassifier(model))
    noise = "noise of s standard deviations is added along them"
    what = {
        "mixup": "a part, keep, of the image stays along them",
        "noise": noise,
        "adversarial": f"{noise}, and a step that lowers the model's posterior of the class",
    }[policy]
    pairs = np.stack(_pairs(data, rows, seed), 1)
    found: list[tuple[Tensor, Tensor]] = []
    names: list[str] = []
    with progress_bar(policy) as bar:
        for part in np.array_split(pairs, -(-rows // _ROWS)):
            columns, cells, marked = _moved(aug, data, part[:, 0], part[:, 1], bar)
            found.append((cells, marked))
            names += [model.classes[i] for i in data.targets[part[:, 0]].tolist()]
    cells, marked = map(torch.cat, zip(*found, strict=True))
    assert model.modes is not None
    used = model.modes.in_words(modes)
    note = f"{used} principal modes of the class; {what}; red frame: the move is rejected, the original stays"
    return Section(f"Augmentations of real images: {policy}", cells, columns, names, note, marked)


def _moved(
    aug: GLEMAugment, data: ImageData, chosen: np.ndarray, partners: np.ndarray, bar: tqdm
) -> tuple[list[str], Tensor, Tensor]:
    """Labels of the columns, the cells [n, N, C, H, W], and whether each move was rejected, bool [n, N]."""
    slow = aug.model.autoencoder is not None
    x, y = _load(data, np.concatenate([chosen, partners]), aug.model.device)
    x, n = aug.pixels.to_floats(x), len(chosen)
    drawn = aug.draw(x, y)
    moves: list[tuple[str, Policy, AugmentParams]]
    if isinstance(aug.policy, Mixup):
        # The last column shows the partner. For an image alone in its class it shows the image; the partner is drawn.
        alone = torch.from_numpy(np.concatenate([chosen == partners] * 2))
        partner = torch.where(alone, -1, torch.arange(2 * n).roll(n))
        drawn = drawn.having(partner=partner, partner_cls=drawn.cls)
        kept = KEPT[::2] if slow else KEPT
        moves = [(f"keep = {keep:g}", aug.policy, drawn.having(keep=torch.full((2 * n,), keep))) for keep in kept]
    else:
        assert isinstance(aug.policy, Noise)  # or Adversarial
        kind, strengths = type(aug.policy), NOISE_STRENGTHS[1:3] if slow else NOISE_STRENGTHS
        moves = [(f"s = {strength:g}", kind(strength), drawn) for strength in strengths]
    columns = {"real": x[:n]}
    for label, aug.policy, params in moves:
        columns[label] = aug.replay(x, y, params.where(params.rows < n))[0][:n]  # partners are not moved
        bar.update(n)
    marked = torch.stack([(images == x[:n]).flatten(1).all(1) for images in columns.values()], 1).cpu()
    marked[:, 0] = False
    if isinstance(aug.policy, Mixup):
        columns["partner"] = x[n:]
        marked = F.pad(marked, (0, 1))
    return list(columns), torch.stack([unit(images, aug.model.pixel_range) for images in columns.values()], 1), marked


def class_samples(model: GLEM, seed: int) -> Section:
    """Samples of the first classes at several temperatures, from the class Gaussian and from the RFCM."""
    k = min(model.num_classes, MAX_CLASSES if model.autoencoder is None else MAX_SLOW)
    y = torch.arange(k, device=model.device).repeat_interleave(EACH)
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
            parts.append(unit(x, model.pixel_range).unflatten(0, (k, EACH)))
            columns += [f"{name}, T = {temperature:.1f}", *[""] * (EACH - 1)]
    if model.num_classes > k:
        note += f"; the first {k} of {model.num_classes} classes"
    return Section("Samples of each class", torch.cat(parts, 1), columns, model.classes[:k], note)


def _interpolations(model: GLEM, data: ImageData, seed: int) -> list[Section]:
    """Straight lines in latent space between two real images: within a class, and between two classes."""
    ends = [("within a class", *_pairs(data, LINES, seed + 1))]
    if len(np.unique(data.targets)) > 1:
        # Twice as many images, spread over the classes in order: images half of the list apart differ in class.
        spread = _pairs(data, 2 * LINES, seed + 2)[0]
        ends.append(("between two classes", spread[:LINES], spread[LINES:]))
    columns = ["real", *(f"{i / (STEPS - 1):.2f}" for i in range(1, STEPS - 1)), "real"]
    note = "straight lines in latent space between two real images"
    sections, pixels = [], PixelAdapter(model.image_shape, pixel_range=model.pixel_range)
    for what, starts, stops in ends:
        real = (_load(data, indices, model.device)[0] for indices in (starts, stops))
        x1, x2 = (pixels.to_model(pixels.to_floats(x)) for x in real)
        cells = unit(model.interpolate(x1, x2, STEPS), model.pixel_range)
        names = [[short(model.classes[data.targets[i]], 12) for i in pair] for pair in zip(starts, stops, strict=True)]
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
