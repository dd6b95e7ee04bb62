"""What a GLEM is, apart from its weights: the contents of ``config.json``."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from glem_augment.errors import ModelFileError
from glem_augment.flows.presets import check_spec

FORMAT_VERSION = 1
# Far above any real use; they keep a hostile config from asking for absurd amounts of memory.
MAX_CLASSES = 200_000
MAX_MODES = 4096


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
        if self.format_version != FORMAT_VERSION:
            raise ModelFileError(
                f"model format {self.format_version!r} is not supported; this version reads format {FORMAT_VERSION}"
            )
        if not isinstance(self.flow, dict):
            raise ModelFileError(f"flow must be a table of numbers, got {type(self.flow).__name__}")
        try:
            check_spec(self.flow)
        except ValueError as error:
            raise ModelFileError(f"the flow's description is not valid: {error}") from None
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ModelFileError(f"bits must be a whole number from 1 to 8, got {self.bits!r}")
        for name in ("class_ids", "class_names"):
            value = getattr(self, name)
            if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
                raise ModelFileError(f"{name} must be a non-empty list of names, got {str(value)[:80]}")
            if len(set(value)) != len(value):
                twice = sorted(v for v, times in Counter(value).items() if times > 1)
                raise ModelFileError(f"{name} must be unique, but these appear twice: {twice[:5]}")
        if len(self.class_ids) != len(self.class_names) or len(self.class_ids) > MAX_CLASSES:
            raise ModelFileError(
                f"class_ids and class_names must have equal length up to {MAX_CLASSES}, "
                f"got {len(self.class_ids)} and {len(self.class_names)}"
            )
        if self.psi is not None:
            good = isinstance(self.psi, list | tuple) and len(self.psi) == 3
            if not (good and all(isinstance(v, int | float) and 0 < v < 1e6 for v in self.psi)):
                raise ModelFileError(f"psi must be three positive numbers or null, got {self.psi!r}")
            self.psi = tuple(float(v) for v in self.psi)
        if self.modes_rank is not None and not (type(self.modes_rank) is int and 1 <= self.modes_rank <= MAX_MODES):
            raise ModelFileError(f"modes_rank must be from 1 to {MAX_MODES} or null, got {self.modes_rank!r}")
        if not isinstance(self.training, dict):
            raise ModelFileError(f"training must be a table, got {type(self.training).__name__}")

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
        unknown = sorted(set(values) - known)
        missing = sorted({"flow", "bits", "psi", "class_ids", "class_names", "format_version"} - set(values))
        if unknown or missing:
            raise ModelFileError(f"config.json has unknown fields {unknown} and lacks {missing}")
        return cls(**values)
