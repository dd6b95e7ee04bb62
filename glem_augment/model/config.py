"""What a GLEM is, apart from its weights: the contents of ``config.json``."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from glem_augment.errors import ModelFileError
from glem_augment.flows.presets import check_spec

FORMAT_VERSION = 1
# Far above any real use; they keep a hostile config from asking for absurd amounts of memory.
MAX_CLASSES = 200_000
MAX_MODES = 4096
MAX_NAME, MAX_DEPTH = 1000, 20
_IDENTITY_KEYS = {"preset", "image_shape", "coupling"}


@dataclass
class GLEMConfig:
    """Everything needed to rebuild the model around its weights.

    Attributes:
        flow: the resolved numbers of the flow (``flows.presets``), with ``image_shape`` [C, H, W].
        bits: bits per channel that the flow models, 1 to 8.
        psi: (a, b, c) of the variances, or None.
        class_ids: folder names, WordNet ids or digits, in index order.
        class_names: names for people, in index order.
        modes_rank: k of the stored class modes, or None where none are stored.
        training: free-form record: data, objective, settings, results.
        format_version: of the file layout.
    """

    flow: dict[str, Any]
    bits: int
    psi: tuple[float, float, float] | None
    class_ids: list[str]
    class_names: list[str]
    modes_rank: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise ModelFileError(
                f"model format {str(self.format_version)[:80]!r} is not supported; this version reads format "
                f"{FORMAT_VERSION}"
            )
        self._check_flow()
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ModelFileError(f"bits must be a whole number from 1 to 8, got {str(self.bits)[:80]!r}")
        self._check_classes()
        if self.psi is not None:
            good = isinstance(self.psi, list | tuple) and len(self.psi) == 3
            if not (good and all(type(v) in (int, float) and 0 < v < 1e6 for v in self.psi)):
                raise ModelFileError(f"psi must be three positive numbers or null, got {str(self.psi)[:80]}")
            self.psi = tuple(float(v) for v in self.psi)
        if self.modes_rank is not None and not (type(self.modes_rank) is int and 1 <= self.modes_rank <= MAX_MODES):
            raise ModelFileError(f"modes_rank must be from 1 to {MAX_MODES} or null, got {str(self.modes_rank)[:80]!r}")
        if not isinstance(self.training, dict):
            raise ModelFileError(f"training must be a table, got {type(self.training).__name__}")

    def _check_flow(self) -> None:
        if not isinstance(self.flow, dict):
            raise ModelFileError(f"flow must be a table of numbers, got {type(self.flow).__name__}")
        preset = self.flow.get("preset", "flow")
        if not isinstance(preset, str) or not re.fullmatch(r"[\w.-]{1,60}", preset, re.ASCII):
            raise ModelFileError(f"the flow's preset must be a short name, got {ascii(preset)[:80]}")
        try:
            check_spec(self.flow)
        except (ValueError, TypeError) as error:  # TypeError: a list where a name belongs, looked up in a table
            raise ModelFileError(f"the flow's description is not valid: {error}") from None
        if self.flow["coupling"] == "identity" and (more := sorted(set(self.flow) - _IDENTITY_KEYS)):
            raise ModelFileError(f"the flow's description is not valid: the identity has no {more}")

    def _check_classes(self) -> None:
        for name in ("class_ids", "class_names"):
            value = getattr(self, name)
            if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
                raise ModelFileError(f"{name} must be a non-empty list of names, got {str(value)[:80]}")
            if bad := next((v for v in value if not _plain(v)), None):
                raise ModelFileError(
                    f"{name} must be printable and at most {MAX_NAME} characters long, got {ascii(bad)[:80]}"
                )
            if len(set(value)) != len(value):
                twice = sorted(v for v, times in Counter(value).items() if times > 1)
                raise ModelFileError(f"{name} must be unique, but these appear twice: {twice[:5]}")
        if len(self.class_ids) != len(self.class_names) or len(self.class_ids) > MAX_CLASSES:
            raise ModelFileError(
                f"class_ids and class_names must have equal length up to {MAX_CLASSES}, "
                f"got {len(self.class_ids)} and {len(self.class_names)}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.flow["image_shape"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> GLEMConfig:
        """Raises ModelFileError, naming the field, for anything that does not describe a model."""
        if not isinstance(values, dict):
            raise ModelFileError(f"config.json must hold a table, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(key)[:40] for key in set(values) - known)
        missing = sorted({"flow", "bits", "psi", "class_ids", "class_names", "format_version"} - set(values))
        if unknown or missing:
            raise ModelFileError(f"config.json has unknown fields {unknown[:5]} and lacks {missing}")
        _check_record(values.get("training"), "training")
        return cls(**values)


def _plain(text: str) -> bool:
    """Whether ``text`` can be printed and written anywhere: no control characters, which a terminal would obey, and no
    halves of surrogate pairs, which JSON can hold and UTF-8 can't."""
    return len(text) <= MAX_NAME and not _control(text)


def _control(text: str, allowed: str = "") -> bool:
    # The first question is a fast one, and enough for nearly all names.
    return not text.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in text if c not in allowed)


def _check_record(value: Any, where: str, depth: int = 0) -> None:
    """The free part of a config: anything that JSON carries, as long as it can be printed and saved again."""
    if depth > MAX_DEPTH:
        raise ModelFileError(f"{where[:80]} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        # Line breaks and tabs may be part of a note.
        if _control(value, allowed="\n\t"):
            raise ModelFileError(f"{where[:80]} holds characters that can't be printed: {ascii(value)[:80]}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ModelFileError(f"{where[:80]} is not finite")
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_record(str(key), f"a name in {where}", depth + 1)
            _check_record(part, f"{where}.{str(key)[:40]}", depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_record(part, where, depth + 1)
