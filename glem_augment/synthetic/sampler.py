"""How a requested set is drawn: every image follows from the seed, its class and its place in the class.

A latent is a function of seed, class, place in the class and number of the attempt. It never depends on other items.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glem_augment.checks import SOURCES, DrawSource, check_choice, check_number, check_whole
from glem_augment.classes.modes import mix_along_modes
from glem_augment.images.dataset import ImageData, LabelledImages, as_image_data
from glem_augment.images.matching import ClassMap, check_targets, composed, match_classes
from glem_augment.images.readers import Source
from glem_augment.images.sources import open_source
from glem_augment.model.glem import GLEM
from glem_augment.precision import full_precision
from glem_augment.tensors import evaluating

NOISE_BLOCK = 16  # items of a class that share a generator; another number would change the draws
TEMPERATURE, PRIVATE_TEMPERATURE = 0.9, 1.0  # by default; less than 1 was worse for sets of private models
MAX_ATTEMPTS = 5  # draws of an item at most; the last draw is kept
REAL_IMAGES = "real_images_sha256"  # the key in an export's settings that identifies the real images of a mixup
PerClass = int | Literal["balance"] | Sequence[int] | Mapping[Any, int]

_ADAPT = (
    "A model makes images of its classes only: adapt it to the data (model.adapt(data), or glem fit), or leave all "
    "further classes out of the data."
)


class Real(NamedTuple):
    """Real images, with the model's class of each image (`targets`, int64 [N]) and of each real class (`classes`)."""

    data: Source | ImageData
    targets: np.ndarray
    classes: np.ndarray


def open_real(model: GLEM, data: LabelledImages, class_map: ClassMap = None) -> Real:
    """Open real images; only labels are read now. Labels of data without class names are the model's indices."""
    source = data if isinstance(data, ImageData) else open_source(data)
    if source.named or class_map is not None:
        index = match_classes(model, source, class_map, fix=_ADAPT)
        return Real(source, index[source.targets], index)
    targets = check_targets(source.targets, len(source), model.num_classes)
    return Real(source, targets, np.arange(model.num_classes))


@dataclass(frozen=True)
class Plan:
    """The images of a set.

    Attributes:
        counts: images of each of the model's K classes.
        order: the classes of an export, in the order of their labels.
        block: images of one class that are decoded together.
        settings: the other settings that decide the images, as JSON can hold them.
        real_name: the name of the real images of a mixup.
    """

    model: GLEM
    counts: list[int]
    order: list[int]
    block: int
    settings: dict[str, Any]
    real_name: str | None = None

    def need_8_bits(self) -> None:
        """DataError: readers of shards would not decode the images."""
        self.model.pixel_range.need_8_bits("the format webdataset", self.model.image_shape[0])


def label_order(counts: Sequence[int], real: Real | None) -> list[int]:
    """The model's classes in the order of the real data's labels, then further classes that get images."""
    named = list(range(len(counts))) if real is None else list(dict.fromkeys(real.classes.tolist()))
    return [*named, *(cls for cls, count in enumerate(counts) if count and cls not in named)]


def class_counts(model: GLEM, per_class: PerClass, real: Real | None) -> list[int]:
    """The number of images of each of the model's K classes; see `per_class` of `SyntheticDataset`."""
    k = model.num_classes
    if isinstance(per_class, str):
        if per_class != "balance":
            raise ValueError(f"per_class must be a number, K numbers, a mapping or 'balance', got {per_class!r}")
        if real is None:
            raise ValueError("per_class='balance' fills up a real data set: give real=")
        present = np.bincount(real.targets, minlength=k)
        counts = np.where(np.isin(np.arange(k), real.classes), present.max() - present, 0).tolist()
        if not any(counts):
            raise ValueError(f"per_class='balance': all classes have {present.max()} images already")
    elif isinstance(per_class, (Mapping, Sequence, np.ndarray, Tensor)):
        given = class_values(model, per_class)
        counts = [check_whole(f"per_class for {name!r}", n, 0) for name, n in zip(model.classes, given, strict=True)]
    else:
        counts = [check_whole("per_class", per_class, 1)] * k
    if not any(counts):
        raise ValueError("per_class is 0 for all classes: give at least one image")
    return counts


def class_values(model: GLEM, values: Any) -> list[Any]:
    """K values of `per_class`, one per class of the model. Classes that a mapping leaves out get 0."""
    if not isinstance(values, Mapping):
        given = values.tolist() if isinstance(values, Tensor) else np.asarray(values).tolist()
        if not isinstance(given, list) or len(given) != model.num_classes:
            raise ValueError(f"per_class must be {model.num_classes} values, one for each class; got {given!r}")
        return given
    known = (range(model.num_classes), map(composed, model.class_ids), map(composed, model.classes))
    index = {key: i for keys in known for i, key in enumerate(keys)}  # a name comes before an id
    values = {composed(key) if isinstance(key, str) else key: value for key, value in values.items()}
    unknown = [key for key in values if key not in index]
    if unknown:
        raise ValueError(f"per_class names {unknown[0]!r}; the model has {', '.join(model.classes[:20])}")
    found = {index[key]: value for key, value in values.items()}
    if len(found) < len(values):
        raise ValueError(f"per_class has a class twice, under two of its names: {list(values)[:20]}")
    return [found.get(i, 0) for i in range(model.num_classes)]


# ---- latents and images --------------------------------------------------------------------------------------------


class RealLatents:
    """Latents `z` of real images, float32 [N, d] on the CPU, class after class; `starts`, `counts`: int64 [K].

    `sha256` is the hash of pixels and counts, because the last bits of latents differ between machines.

    Raises:
        ValueError: a class that will be drawn (`wanted`, bool [K]) has no real image.
    """

    def __init__(self, model: GLEM, real: Real, wanted: np.ndarray) -> None:
        self.counts = np.bincount(real.targets, minlength=model.num_classes)
        self.starts = np.cumsum(self.counts) - self.counts
        empty, single = ([model.classes[i] for i in np.flatnonzero(wanted & (self.counts == n))] for n in (0, 1))
        if empty:
            raise ValueError(
                f"source='mixup' has no real image of {', '.join(empty[:10])}: leave these classes out (per_class as a "
                "mapping), or take another source"
            )
        if single:
            warnings.warn(
                f"source='mixup' has one real image of {', '.join(single[:10])}, and all synthetic images of the class "
                "will be copies of it: give more, or take another source",
                stacklevel=4,
            )
        images = as_image_data(real.data, model.image_shape, pixel_range=model.pixel_range)
        self.name, pixels, parts = images.name, hashlib.sha256(self.counts.tobytes()), []
        with torch.no_grad(), evaluating(model):
            for x, _ in images.batches(np.argsort(real.targets, kind="stable"), 256):
                pixels.update(x.numpy().tobytes())
                parts.append(model.encode(x)[0].cpu())
        self.z, self.sha256 = torch.cat(parts), pixels.hexdigest()


class Drawn(NamedTuple):
    """Latents [n, d] on the model's device; images [n, C, H, W] on the CPU; which are out of range, bool [n]."""

    latents: Tensor
    images: Tensor
    out_of_range: np.ndarray


class Sampler:
    """Draws latents and images of a model's classes.

    - "gaussian": z = mu_y + T sigma_y eps, from the class's diagonal Gaussian.
    - "rfcm": the mean and full covariance of the class's real latents, as stored in `model.modes`.
    - "mixup": z = z_i + (1 - l) P (z_j - z_i). z_i and z_j are real latents of the class, P projects on its top modes,
      and l ~ Beta(alpha, alpha) is folded to [1/2, 1].

    Args:
        real: the real images of "mixup".
        wanted: bool [K], which classes will be drawn.
        source, seed, temperature, modes, alpha: see `SyntheticDataset`.
    """

    def __init__(
        self,
        model: GLEM,
        real: Real | None,
        wanted: np.ndarray,
        source: DrawSource | None,
        seed: int,
        temperature: float | None,
        modes: int | None,
        alpha: float | None,
    ) -> None:
        source = source or ("gaussian" if model.modes is None else "rfcm")
        check_choice("source", source, SOURCES)
        unused = {"temperature": temperature} if source == "mixup" else {"modes": modes, "alpha": alpha}
        if given := [name for name, value in unused.items() if value is not None]:
            raise ValueError(f"source={source!r} takes no {' and no '.join(given)}: leave out what has no effect")
        self.model, self.source, self.seed = model, source, check_whole("seed", seed, 0)
        if temperature is None:
            temperature = TEMPERATURE if model.config.privacy is None else PRIVATE_TEMPERATURE
        self.temperature = check_number("temperature", temperature, 0.0, math.inf)
        self.alpha = check_number("alpha", 1.0 if alpha is None else alpha, 0.0, math.inf, open_low=True)
        self.real: RealLatents | None = None
        if source != "gaussian" and model.modes is None:
            raise ValueError(f"source={source!r} needs model.modes: fit them first with model.fit_modes(data)")
        if source == "mixup":
            if real is None:
                raise ValueError("source='mixup' mixes real images: give real=")
            self.modes = model.checked_modes(modes)
            self.real = RealLatents(model, real, wanted)

    def settings(self) -> dict[str, Any]:
        """The settings that decide the images, for the manifest of an export."""
        found = dict(temperature=self.temperature, seed=self.seed, source=self.source, attempts=MAX_ATTEMPTS)
        mixup = {} if self.real is None else {"modes": self.modes, "alpha": self.alpha, REAL_IMAGES: self.real.sha256}
        return found | mixup

    @torch.no_grad()
    def draw(self, cls: np.ndarray, within: np.ndarray) -> Drawn:
        """Draw the items of the classes cls at the places within, int64 [n], up to MAX_ATTEMPTS times."""
        model = self.model
        with evaluating(model):
            z = self.latents(cls, within)
            x = model.decode(z, clamp=False)
            bad = ~model.pixel_range.near(x)
            for attempt in range(1, MAX_ATTEMPTS):
                rows = bad.nonzero()[:, 0]
                if not len(rows):
                    break
                again = rows.cpu().numpy()
                z[rows] = self.latents(cls[again], within[again], attempt)
                x[rows] = model.decode(z[rows], clamp=False)
                bad[rows] = ~model.pixel_range.near(x[rows])
        return Drawn(z, model.pixel_range.from_floats(x).cpu(), bad.cpu().numpy())

    def latents(self, cls: np.ndarray, within: np.ndarray, attempt: int = 0) -> Tensor:
        """Latents float32 [n, d] of one attempt, on the model's device."""
        model = self.model
        if self.source == "mixup":
            return self._mix(cls, within, attempt)
        part = model.latent_classes.sampler(self.source)
        noise = np.empty((len(cls), part.noise_size), dtype=np.float32)
        for generator, _, rows, places in self._generators(cls, within, attempt):
            noise[rows] = generator.standard_normal((NOISE_BLOCK, noise.shape[1]), dtype=np.float32)[places]
        eps = torch.from_numpy(noise).to(model.device, model.dtype)
        with full_precision(model.device.type):
            return part.sample_from_noise(torch.from_numpy(cls), eps, self.temperature)

    def _mix(self, cls: np.ndarray, within: np.ndarray, attempt: int) -> Tensor:
        real, fitted, device = self.real, self.model.modes, self.model.device
        assert real is not None and fitted is not None
        first, second = np.empty((2, len(cls)), dtype=np.int64)
        away = np.empty(len(cls), dtype=np.float32)  # 1 - keep
        for generator, c, rows, places in self._generators(cls, within, attempt):
            count = int(real.counts[c])
            i = generator.integers(count, size=NOISE_BLOCK)
            # Any other image of the class; a class of one image is mixed with itself.
            j = (i + generator.integers(1, max(2, count), size=NOISE_BLOCK)) % count
            mix = generator.beta(self.alpha, self.alpha, size=NOISE_BLOCK)
            first[rows], second[rows] = real.starts[c] + i[places], real.starts[c] + j[places]
            away[rows] = np.minimum(mix, 1 - mix)[places]
        z, other = (real.z[rows].to(device) for rows in (first, second))
        y = torch.from_numpy(cls)
        part = fitted.on_host(y, fitted.covariance_rows(fitted.rows_of(y.to(device), z)))
        keep, directions = 1 - torch.from_numpy(away).to(device), fitted.directions[:, : self.modes]
        with full_precision(device.type):
            return mix_along_modes(z, other, keep, part, directions, alone=True)[0]

    def _generators(
        self, cls: np.ndarray, within: np.ndarray, attempt: int
    ) -> Iterator[tuple[np.random.Generator, int, list[int], np.ndarray]]:
        """For each class and group of NOISE_BLOCK places: generator, class, rows, and their places in the group."""
        for (c, number), rows in rows_by_block(cls, within, NOISE_BLOCK).items():
            # SeedSequence makes neighbouring seeds, classes and groups unrelated.
            sequence = np.random.SeedSequence([self.seed, c, number, attempt])
            yield np.random.Generator(np.random.PCG64(sequence)), c, rows, within[rows] - number * NOISE_BLOCK


def rows_by_block(cls: np.ndarray, within: np.ndarray, size: int) -> dict[tuple[int, int], list[int]]:
    """The rows that lie in each block, given by class and number; a block has `size` places of one class."""
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, block in enumerate(zip(cls.tolist(), (within // size).tolist(), strict=True)):
        rows[block].append(row)
    return rows
