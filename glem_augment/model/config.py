"""The contents of `config.json`: what a GLEM is, apart from its weights."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from glem_augment.checks import HIGHEST_TEMPERATURE
from glem_augment.errors import ModelFileError
from glem_augment.flows.presets import check_spec
from glem_augment.latent.adapt import can_be_full

FORMAT_VERSION = 1
# These limits are far above any real use. They keep a hostile config from asking for absurd amounts of memory.
MAX_CLASSES, MAX_MODES = 200_000, 4096
MAX_DEPTH, LARGEST_SIDE, MAX_PARTS = 20, 2**14, 256
# The names of 200,000 classes fit. A parsed value takes up to 30 times its text, so their number is bounded too.
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES = 8 * 2**20, 600_000
LOWEST_VARIANCE, HIGHEST_VARIANCE = 1e-30, 1e6  # float32 holds such numbers and their inverses


@dataclass
class GLEMConfig:
    """Everything needed to rebuild a model around its weights.

    Attributes:
        flow: the resolved numbers of the flow (see `flows.presets`), with `image_shape` [C, H, W].
        bits: bits per channel that the flow models, 1 to 8.
        psi: (a, b, c) of the variances, or None for plain variances.
        class_ids: folder names, WordNet ids or digits, in index order.
        class_names: names for people, in index order.
        modes_rank: k, the number of modes stored for every class, or None where no modes are stored.
        posterior_temperature: T >= 1 of the posterior, softmax of log p(x|y) / T; left out of the file where it is 1.
        modes_parts: parts of each class that have modes of their own.
        covariance: "diagonal" (the class densities are the Gaussians'), or "full" (`ClassModes.log_prob`).
        base: what `model.jet_file.reference` says of a flow that is stored elsewhere, or None.
        autoencoder: for a flow in an autoencoder's latents, `name`, `sha256` (see `open_autoencoder`; "custom" and ""
            for a module of the user's) and the `image_shape` [3, H, W]; None for a flow of pixels.
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
    covariance: str = "diagonal"
    base: dict[str, str] | None = None
    autoencoder: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self._check_flow()
        # `type(...) is int`, because True is an int too.
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ModelFileError(f"bits must be a whole number from 1 to 8, got {_short(self.bits)}")
        self._check_classes()
        if self.psi is not None:
            good = isinstance(self.psi, list | tuple) and len(self.psi) == 3
            if not (good and all(type(v) in (int, float) and LOWEST_VARIANCE < v < HIGHEST_VARIANCE for v in self.psi)):
                raise ModelFileError(f"psi must be null or three positive numbers below 1e6, got {_short(self.psi)}")
            a, b, c = self.psi
            self.psi = float(a), float(b), float(c)
        if self.modes_rank is not None and not (type(self.modes_rank) is int and 1 <= self.modes_rank <= MAX_MODES):
            raise ModelFileError(f"modes_rank must be from 1 to {MAX_MODES} or null, got {_short(self.modes_rank)}")
        t = self.posterior_temperature
        if type(t) not in (int, float) or not 1 <= t <= HIGHEST_TEMPERATURE:
            raise ModelFileError(f"posterior_temperature must be from 1 to {HIGHEST_TEMPERATURE:g}, got {_short(t)}")
        self.posterior_temperature = float(t)
        if self.covariance not in ("diagonal", "full"):
            raise ModelFileError(f"covariance must be 'diagonal' or 'full', got {_short(self.covariance)}")
        if type(self.modes_parts) is not int or not 1 <= self.modes_parts <= MAX_PARTS:
            raise ModelFileError(f"modes_parts must be from 1 to {MAX_PARTS}, got {_short(self.modes_parts)}")
        if self.covariance == "full" and (self.modes_rank is None or not can_be_full(len(self.class_ids), self.dim)):
            raise ModelFileError(f"full covariances need modes, and {self.dim} dimensions are too many for them")
        if self.base is not None:
            named = isinstance(self.base, dict) and set(self.base) == {"jet", "sha256"}
            if not (named and all(isinstance(text, str) and len(text) <= 1000 for text in self.base.values())):
                raise ModelFileError(f"base must be null, or have a jet and its sha256, got {_short(self.base)}")
        if self.autoencoder is not None:
            self._check_autoencoder()
        if not isinstance(self.training, dict):
            raise ModelFileError(f"training must be a table, got {type(self.training).__name__}")

    def _check_flow(self) -> None:
        if not isinstance(self.flow, dict):
            raise ModelFileError(f"flow must be a table of numbers, got {type(self.flow).__name__}")
        if not isinstance(self.flow.get("preset", "flow"), str):
            raise ModelFileError(f"the flow's preset must be a name, got {_short(self.flow['preset'])}")
        try:
            check_spec(self.flow)
        except (ValueError, TypeError) as error:  # TypeError: a list where a name belongs
            raise ModelFileError(f"the flow's description is not valid: {error}") from None

    def _check_autoencoder(self) -> None:
        found: Any = self.autoencoder
        good = isinstance(found, dict) and set(found) == {"name", "sha256", "image_shape"}
        if not (good and all(isinstance(found[key], str) and len(found[key]) <= 1000 for key in ("name", "sha256"))):
            raise ModelFileError(f"autoencoder must be null, or have name, sha256 and image_shape, got {_short(found)}")
        shape = found["image_shape"]
        good = isinstance(shape, list | tuple) and len(shape) == 3
        if not (good and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in shape)):
            raise ModelFileError(f"the autoencoder's image_shape must be three sizes, got {_short(shape)}")

    def _check_classes(self) -> None:
        for name in ("class_ids", "class_names"):
            value = getattr(self, name)
            good = isinstance(value, list) and 1 <= len(value) <= MAX_CLASSES
            if not (good and all(isinstance(v, str) and v for v in value)):
                raise ModelFileError(f"{name} must be a list of 1 to {MAX_CLASSES} names, got {_short(value)}")
            if len(set(value)) != len(value):
                twice = Counter(value).most_common(1)[0][0]
                raise ModelFileError(f"{name} must be unique, but {_short(twice)} appears twice")
        if len(self.class_ids) != len(self.class_names):
            raise ModelFileError(
                f"class_ids and class_names must have equal length: {len(self.class_ids)} and {len(self.class_names)}"
            )

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
        """The contents of `config.json`. Fields that have their default are left out where readers allow it."""
        newer = {
            "posterior_temperature": 1.0,
            "modes_parts": 1,
            "covariance": "diagonal",
            "base": None,
            "autoencoder": None,
        }
        return {name: value for name, value in asdict(self).items() if name not in newer or value != newer[name]}

    def to_json(self) -> bytes:
        """The bytes of `config.json`. TypeError, ValueError: a training record that could not be read again."""
        try:
            data = (json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
            self.from_json(data)
        except (UnicodeEncodeError, ModelFileError) as error:
            raise ModelFileError(f"the model's config can't be saved: {error}") from None
        return data

    @classmethod
    def from_json(cls, data: bytes) -> GLEMConfig:
        """Read the bytes of a `config.json` that may come from a stranger.

        Raises:
            ModelFileError: anything that does not describe a model.
        """
        if len(data) > MAX_CONFIG_BYTES or sum(map(data.count, (b",", b":", b"[", b"{"))) > MAX_CONFIG_VALUES:
            raise ModelFileError("it is larger than a model's config can be")
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


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a table that gives a name twice: readers differ in which of the two they believe."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it gives {_short(twice)} twice")
    return table


def _short(value: Any) -> str:
    """`value` for an error message: at most 80 characters, all of them printable."""
    return ascii(value)[:80]


def _check_readable(value: Any, depth: int = 0) -> None:
    """Check that a parsed config can be shown and saved again: it is finite, not too deep, and has neither control
    characters, which a terminal would obey, nor lone surrogates, which JSON can hold and UTF-8 can't."""
    if depth > MAX_DEPTH:
        raise ModelFileError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in value if c not in "\n\t"):
        raise ModelFileError(f"it holds characters that can't be printed: {_short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ModelFileError("it holds a number that is not finite")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for part in value:
            _check_readable(part, depth + 1)
