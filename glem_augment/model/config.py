"""The contents of `config.json`: the description of a GLEM without its weights."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any

from glem_augment.checks import HIGHEST_TEMPERATURE, MAX_PARTS
from glem_augment.classes.privacy import promised
from glem_augment.classes.statistics import can_be_whole
from glem_augment.codec.pixel_range import UINT8, PixelRange
from glem_augment.errors import GLEMError, ModelFileError
from glem_augment.flows.build import check_spec, is_whole
from glem_augment.images.sources import TIMM_PREFIXES

FORMAT_VERSION = 1
# These limits are far above any real use. They keep a hostile config from demanding absurd amounts of memory.
MAX_CLASSES, MAX_MODES = 200_000, 4096
MAX_DEPTH, LARGEST_SIDE = 20, 2**14
# The names of 200,000 classes fit. A parsed value takes up to 30 times its text, so their number is bounded too.
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES = 8 * 2**20, 600_000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # but for line breaks and tabs
LOWEST_VARIANCE, HIGHEST_VARIANCE = 1e-30, 1e6  # float32 holds such numbers and their inverses


@dataclass
class GLEMConfig:
    """Everything needed to rebuild a model around its weights.

    Attributes:
        flow: the resolved numbers of the flow (see `flows.presets`), with `image_shape` [C, H, W].
        bits: bits per channel that the flow models, 1 to 8; all bits of the dtype if the images are not uint8.
        pixel_range: the dtype of the images and the range of their values, or its table; left out for uint8.
        psi: (a, b, c) of the variances, or None for plain variances.
        class_ids: folder names, WordNet ids or digits, in index order.
        class_names: names to show, in index order.
        modes_rank: k, the number of modes stored for every class, or None where no modes are stored.
        posterior_temperature: T >= 1 of the posterior, softmax of log p(x|y) / T; left out of the file where it is 1.
        modes_parts: parts of each class; every part has modes, or all parts of a class have the same (`modes_tied`).
        covariance: "diagonal" (the class densities are the Gaussians'), or "full" (`ClassModes.log_prob`).
        autoencoder: for a flow in an autoencoder's latents, `name`, `sha256` (see `open_autoencoder`; "custom" and ""
            for a module of the user's) and the `image_shape` [3, H, W]; None for a flow of pixels.
        privacy: for a model of private images, `classes.privacy.describe`; None for any other.
        training: a free-form record of the data, the objective, the settings and the results.
        format_version: version of the file layout.

    Raises:
        ModelFileError: values that describe no model; the message names the field.
    """

    flow: dict[str, Any]
    bits: int
    psi: tuple[float, float, float] | None
    class_ids: list[str]
    class_names: list[str]
    modes_rank: int | None = None
    posterior_temperature: float = 1.0
    modes_parts: int = 1
    modes_tied: bool = False
    covariance: str = "diagonal"
    autoencoder: dict[str, Any] | None = None
    privacy: dict[str, Any] | None = None
    pixel_range: PixelRange = UINT8
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self._check_flow()
        self._check_pixels()
        self._check_classes()
        if self.psi is not None:
            good = _is_list(self.psi, 3) and all(
                type(v) in (int, float) and LOWEST_VARIANCE < v < HIGHEST_VARIANCE for v in self.psi
            )
            _demand(good, "psi must be null or three positive numbers below 1e6", self.psi)
            a, b, c = self.psi
            self.psi = float(a), float(b), float(c)
        rank, parts, t = self.modes_rank, self.modes_parts, self.posterior_temperature
        _demand(rank is None or is_whole(rank, 1, MAX_MODES), f"modes_rank must be from 1 to {MAX_MODES} or null", rank)
        good = type(t) in (int, float) and 1 <= t <= HIGHEST_TEMPERATURE
        _demand(good, f"posterior_temperature must be from 1 to {HIGHEST_TEMPERATURE:g}", t)
        self.posterior_temperature = float(t)
        _demand(is_whole(parts, 1, MAX_PARTS), f"modes_parts must be from 1 to {MAX_PARTS}", parts)
        _demand(type(self.modes_tied) is bool, "modes_tied must be true or false", self.modes_tied)
        _demand(self.covariance in ("diagonal", "full"), "covariance must be 'diagonal' or 'full'", self.covariance)
        if self.covariance == "full":
            good = rank is not None and can_be_whole(len(self.class_ids), self.dim)
            _demand(good, "full covariances need modes, and few dimensions", self.dim)
        found: Any = self.autoencoder
        if found is not None:
            good = _is_table(found, {"name", "sha256", "image_shape"}) and _are_names([found["name"], found["sha256"]])
            _demand(good, "autoencoder must be null, or have name, sha256 and image_shape", found)
            shape = found["image_shape"]
            good = _is_list(shape, 3) and all(is_whole(side, 1, LARGEST_SIDE) for side in shape)
            _demand(good, "the autoencoder's image_shape must be three sizes", shape)
        if self.privacy is not None:
            self._check_privacy()
        _demand(isinstance(self.training, dict), "training must be a table", self.training)

    def _check_privacy(self) -> None:
        good = isinstance(self.privacy, dict) and isinstance(self.privacy.get("sha256"), str)
        _demand(good, "privacy must be null or a promise", self.privacy)
        try:
            promised(self.privacy or {})
        except GLEMError as error:
            raise ModelFileError(f"privacy: {error}") from None

    def _check_flow(self) -> None:
        _demand(isinstance(self.flow, dict), "flow must be a table of numbers", self.flow)
        preset = self.flow.get("preset", "flow")
        _demand(isinstance(preset, str), "the flow's preset must be a name", preset)
        try:
            check_spec(self.flow)
        except (ValueError, TypeError) as error:  # TypeError: a list where a name belongs
            raise ModelFileError(f"the flow's description is not valid: {error}") from None

    def _check_pixels(self) -> None:
        found: Any = self.pixel_range
        if not isinstance(found, PixelRange):
            good = _is_table(found, {"dtype", "low", "high"}) and _are_names([found["dtype"]])
            _demand(good, "pixel_range must have dtype, low and high", found)
            try:
                self.pixel_range = PixelRange(**found)
            except ValueError as error:
                raise ModelFileError(f"pixel_range: {error}") from None
        most = self.pixel_range.bits
        _demand(self.autoencoder is None or most == 8, "an autoencoder takes uint8 images", found)
        least = 1 if most == 8 else most
        _demand(is_whole(self.bits, least, most), f"bits must be a whole number from {least} to {most}", self.bits)

    def _check_classes(self) -> None:
        for name in ("class_ids", "class_names"):
            value = getattr(self, name)
            good = isinstance(value, list) and 1 <= len(value) <= MAX_CLASSES
            good = good and all(isinstance(v, str) and v for v in value)
            _demand(good, f"{name} must be a list of 1 to {MAX_CLASSES} names", value)
            if len(set(value)) != len(value):
                twice = Counter(value).most_common(1)[0][0]
                raise ModelFileError(f"{name} must be unique, but {_short(twice)} appears twice")
        counts = len(self.class_ids), len(self.class_names)
        _demand(counts[0] == counts[1], "class_ids and class_names must have equal length", counts)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        channels, height, width = (self.autoencoder or self.flow)["image_shape"]
        return channels, height, width

    @property
    def flow_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the numbers that the flow models: the images, or their latents in the autoencoder."""
        channels, height, width = self.flow["image_shape"]
        return channels, height, width

    @property
    def dim(self) -> int:
        """d, how many numbers the flow models."""
        return math.prod(self.flow_shape)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `config.json`. Optional fields are left out where they have their default."""
        optional = {f.name: f.default for f in fields(self) if f.name not in ("modes_rank", "format_version")}
        return {n: value for n, value in asdict(self).items() if getattr(self, n) != optional.get(n, MISSING)}

    def to_json(self) -> bytes:
        """The bytes of `config.json`. TypeError, ValueError: a training record that could not be read again."""
        values = self.to_dict()
        try:
            _check_readable(values)
            data = (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
            _check_size(data)
        except ModelFileError as error:
            raise ModelFileError(f"the model's config can't be saved: {error}") from None
        return data

    @classmethod
    def from_json(cls, data: bytes) -> GLEMConfig:
        """Read the bytes of a `config.json`. ModelFileError: anything that does not describe a model."""
        _check_size(data)
        try:
            values = json.loads(data.decode(), object_pairs_hook=_table)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"it can't be read as JSON: {error}; download or save the model again") from None
        if not isinstance(values, dict):
            raise ModelFileError(f"it must hold a table, got {type(values).__name__}")
        version = values.get("format_version")
        if type(version) is not int:
            raise ModelFileError(f"it is no config of glem-augment: it has {_short(sorted(values)[:5])}")
        if version != FORMAT_VERSION:
            raise ModelFileError(
                f"it has format_version {version}, this version reads {FORMAT_VERSION}: pip install -U glem-augment"
            )
        required = {"flow", "bits", "psi", "class_ids", "class_names", "format_version"}
        unknown, missing = sorted(set(values) - {f.name for f in fields(cls)}), sorted(required - set(values))
        if unknown or missing:
            raise ModelFileError(f"it has unknown fields {_short(unknown[:5])} and lacks {missing}")
        _check_readable(values)
        return cls(**values)


def licence_id(value: object) -> str | None:
    """The identifier of a licence, as the Hub writes it, in a stranger's record; None for anything else."""
    return value if isinstance(value, str) and re.fullmatch(r"[a-z0-9.-]{1,50}", value) else None


def records(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The record of a training, followed by the records of the models from which it was adapted."""
    found = [training]
    while isinstance(before := found[-1].get("adapted_from"), dict) and isinstance(before.get("training"), dict):
        found.append(before["training"])
    return found


def data_name(spec: object) -> str:
    """A public name for training data, without private folders.

    It is the last part of a path, the text after `bundled:`, or timm's name of a data set.
    """
    text = str(spec or "").strip().removeprefix("bundled:")
    if text.lower().startswith(TIMM_PREFIXES):
        text = text.partition("?")[0].partition("@")[0]
    return PurePath(text.replace("\\", "/")).name or "unknown data"


def data_names(training: Mapping[str, Any]) -> list[str]:
    """Public names of the data that the model was trained on, and of the data that it was then adapted to."""
    unnamed = "data that its record does not name"
    found = [record.get("data") for record in reversed(records(training)) if record]
    return [data_name(data) if data else unnamed for data in found or [None]]


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table. ValueError: it gives a name twice, which JSON readers resolve differently."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it gives {_short(twice)} twice")
    return table


def _demand(good: bool, demand: str, value: Any) -> None:
    if not good:
        raise ModelFileError(f"{demand}, got {_short(value)}")


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length


def _is_table(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and set(value) == keys


def _are_names(values: Iterable[Any]) -> bool:
    return all(isinstance(text, str) and len(text) <= 1000 for text in values)


def _short(value: Any) -> str:
    """`value` for an error message: at most 80 characters, all of them printable."""
    return ascii(value)[:80]


def _check_size(data: bytes) -> None:
    if len(data) > MAX_CONFIG_BYTES or sum(map(data.count, (b",", b":", b"[", b"{"))) > MAX_CONFIG_VALUES:
        raise ModelFileError("it is larger than a model's config can be")


def _check_readable(value: Any, depth: int = 0) -> None:
    """Check that the values of a config can be shown, saved and read again.

    They must be finite and not too deep. Control characters act on a terminal; UTF-8 can't encode lone surrogates.
    """
    if depth > MAX_DEPTH:
        raise ModelFileError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str) and _UNPRINTABLE.search(value):
        raise ModelFileError(f"it holds characters that can't be printed: {_short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ModelFileError("it holds a number that is not finite")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ModelFileError(f"it holds a table whose names are no text: {_short([*value])}")
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            _check_readable(part, depth + 1)
