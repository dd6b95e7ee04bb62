"""The contents of `config.json`: the description of a GLEM without its weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any

from glem_augment.classes.gaussians import ClassModel
from glem_augment.classes.statistics import can_be_whole
from glem_augment.codec.pixel_range import UINT8, PixelRange
from glem_augment.errors import GLEMError, ModelFileError
from glem_augment.flows.build import check_spec, is_whole
from glem_augment.images.sources import TIMM_PREFIXES
from glem_augment.names import HIGHEST_TEMPERATURE
from glem_augment.parts import check_options, find, kind_of, recorded
from glem_augment.privacy.record import promise, promised

FORMAT_VERSION = 1
# Far above any real use. The limits keep a hostile config from demanding absurd amounts of memory.
MAX_CLASSES, MAX_MODES, LARGEST_SIDE = 200_000, 4096, 2**14
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES = 8 * 2**20, 600_000  # the names of 200,000 classes fit
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
        modes_common: all classes have the same modes.
        covariance: "diagonal" (the class densities are the Gaussians'), or "full" (`ClassModes.log_prob`).
        classes: the class model that was fitted to images, `kind` and its options; None for any other. What
            `classes.fit` estimates has the kind "covariances", with the target and the strengths of the estimate.
        autoencoder: for a flow in an autoencoder's latents, `name`, `sha256` (see `open_autoencoder`; "custom" and ""
            for a module of the user's, the registered name and "" for a codec, with its `options`) and the
            `image_shape` [3, H, W]; None for a flow of pixels.
        privacy: for a model of private images, `privacy.record.describe`; None for any other.
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
    modes_common: bool = False
    covariance: str = "diagonal"
    classes: dict[str, Any] | None = None
    autoencoder: dict[str, Any] | None = None
    privacy: dict[str, Any] | None = None
    pixel_range: PixelRange = UINT8
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        try:
            check_spec(self.flow)
            if not isinstance(self.pixel_range, PixelRange):
                self.pixel_range = PixelRange(*(self.pixel_range[name] for name in ("dtype", "low", "high")))
            if self.privacy is not None:
                promised(self.privacy)
            if self.classes is not None:
                kind, given = find("class model", self.classes["kind"]), dict(self.classes)
                check_options(kind, "class model", {name: value for name, value in given.items() if name != "kind"})
        except (LookupError, TypeError, AttributeError, ValueError, GLEMError) as error:  # other types as well
            raise ModelFileError(f"the flow, pixel_range, privacy or classes is not valid: {error}") from None
        psi, rank, t, found = self.psi, self.modes_rank, self.posterior_temperature, self.autoencoder
        bits, hot, names = self.pixel_range.bits, HIGHEST_TEMPERATURE, "a list of different names, as many as class_ids"
        least = 1 if bits == 8 else bits
        for name, good, demand in (
            ("class_ids", _are_classes(self.class_ids), names),
            ("class_names", _are_classes(self.class_names, self.class_ids), names),
            ("bits", is_whole(self.bits, least, bits), f"a whole number from {least} to {bits}"),
            ("psi", psi is None or _are_numbers(psi, LOWEST_VARIANCE, HIGHEST_VARIANCE), "null or 3 numbers above 0"),
            ("modes_rank", rank is None or is_whole(rank, 1, MAX_MODES), f"null or from 1 to {MAX_MODES}"),
            ("posterior_temperature", _are_numbers([t] * 3, 1, hot), f"from 1 to {hot:g}"),
            ("modes_common", type(self.modes_common) is bool, "true or false"),
            ("covariance", self.covariance in ("diagonal", "full"), "'diagonal' or 'full'"),
            ("autoencoder", found is None or _is_autoencoder(found), "null, or have name, sha256 and image_shape"),
            ("pixel_range", found is None or bits == 8, "uint8 with an autoencoder"),
            ("privacy", isinstance((self.privacy or {"sha256": ""}).get("sha256"), str), "null or a promise"),
            ("training", isinstance(self.training, dict), "a table"),
        ):
            if not good:
                raise ModelFileError(f"{name} must be {demand}, got {_short(getattr(self, name))}")
        if self.covariance == "full" and (rank is None or not can_be_whole(len(self.class_ids), self.dim)):
            raise ModelFileError(f"full covariances need modes, and few dimensions, got {self.dim}")
        if psi is not None:
            self.psi = float(psi[0]), float(psi[1]), float(psi[2])
        self.posterior_temperature = float(t)

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

    @property
    def promise(self) -> str:
        """The promise of a private model in one sentence; "" for any other."""
        return "" if self.privacy is None else promise(self.privacy)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `config.json`. Optional fields are left out where they have their default."""
        optional = {f.name: f.default for f in fields(self) if f.name not in ("modes_rank", "format_version")}
        return {n: value for n, value in asdict(self).items() if getattr(self, n) != optional.get(n, MISSING)}

    def to_json(self) -> bytes:
        """The bytes of `config.json`. TypeError, ValueError: a training record that JSON can't hold."""
        data = (json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
        _check_size(data)
        return data

    @classmethod
    def from_json(cls, data: bytes) -> GLEMConfig:
        """Read the bytes of a `config.json`. ModelFileError: anything that does not describe a model."""
        _check_size(data)
        try:
            values = json.loads(data.decode(), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"it can't be read as JSON: {error}; download or save the model again") from None
        if not isinstance(values, dict) or "format_version" not in values:
            raise ModelFileError(f"it is no config of glem-augment: {_short(values)}")
        if values["format_version"] != FORMAT_VERSION:
            raise ModelFileError(
                f"it has format_version {_short(values['format_version'])}, this version reads {FORMAT_VERSION}: "
                "pip install -U glem-augment"
            )
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        missing = sorted({f.name for f in fields(cls)[:5]} - set(values))
        if unknown or missing:
            raise ModelFileError(f"it has unknown fields {_short(unknown[:5])} and lacks {missing}")
        return cls(**values)


def class_facts(fitted: ClassModel | None) -> dict[str, Any] | None:
    """What config.json says of a class model. ValueError: options that a config can't hold."""
    kind = kind_of("class model", fitted)
    return None if fitted is None or kind is None else {"kind": kind, **recorded(fitted)}


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
        text = text.partition("@")[0]
    return PurePath(text.replace("\\", "/")).name or "unknown data"


def data_names(training: Mapping[str, Any]) -> list[str]:
    """Public names of the data that the model was trained on, and of the data that it was then adapted to."""
    unnamed = "data that its record does not name"
    found = [record.get("data") for record in reversed(records(training)) if record]
    return [data_name(data) if data else unnamed for data in found or [None]]


def _are_classes(value: Any, same_number: Any = None) -> bool:
    good = isinstance(value, list) and 1 <= len(value) <= MAX_CLASSES and all(isinstance(v, str) and v for v in value)
    good = good and len(set(value)) == len(value)
    return good and (same_number is None or (_are_classes(same_number) and len(value) == len(same_number)))


def _are_numbers(value: Any, least: float, most: float) -> bool:
    """Whether `value` is three numbers from `least` to `most`."""
    good = isinstance(value, list | tuple) and len(value) == 3
    return good and all(type(v) in (int, float) and least <= v <= most for v in value)


def _is_autoencoder(value: Any) -> bool:
    good = isinstance(value, dict) and set(value) - {"options"} == {"name", "sha256", "image_shape"}
    good = good and isinstance(value["name"], str) and isinstance(value["sha256"], str)
    good = good and isinstance(value.get("options", {}), dict)
    shape = value["image_shape"] if good else None
    return isinstance(shape, list | tuple) and len(shape) == 3 and all(is_whole(v, 1, LARGEST_SIDE) for v in shape)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of these pairs. ValueError: a key is there twice, and readers would differ in which one counts."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"a key is there twice, among {_short(list(table)[:5])}")
    return table


def _short(value: Any) -> str:
    """`value` for an error message: at most 80 characters, all of them printable."""
    return ascii(value)[:80]


def _check_size(data: bytes) -> None:
    # A parsed value takes up to 30 times its text, so their number is bounded too.
    if len(data) > MAX_CONFIG_BYTES or sum(map(data.count, (b",", b":", b"[", b"{"))) > MAX_CONFIG_VALUES:
        raise ModelFileError("it is larger than a model's config can be")
