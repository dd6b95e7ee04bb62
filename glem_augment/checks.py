"""Checks of GLEMAugment's arguments: one clear error each, that names the value and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from glem_augment.latent.modes import ClassModes
    from glem_augment.model.glem import GLEM

DEFAULT_MODES = 64


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_number(name: str, value: object, low: float, high: float, open_low: bool = False) -> float:
    """`value` as a float; TypeError if it is no number, ValueError outside [low, high] (or (low, high])."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # NumPy's numbers too
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    inside = (low < value if open_low else low <= value) and value <= high and math.isfinite(value)
    if not inside:
        if high < math.inf:
            allowed = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
        raise ValueError(f"{name} must be finite and {'above' if open_low else 'at least'} {low:g}, got {value!r}")
    return value


def check_class_map(
    class_map: Mapping[int, int | None] | Sequence[int | None] | Tensor | None,
    num_classes: int | None,
    flow_classes: int,
) -> tuple[int, ...] | None:
    """Flow class of every data class, -1 = none; None where data and flow classes are the same.

    Raises:
        ValueError: for a flow or data class out of range, nothing mapped, or a num_classes that does not fit.
        TypeError: for what is not a mapping or sequence of integers.
    """
    if num_classes is not None:
        num_classes = check_whole("num_classes", num_classes, 1)
    if class_map is None:
        if num_classes not in (None, flow_classes):
            raise ValueError(
                f"num_classes={num_classes}, but the flow has {flow_classes} classes: give class_map, "
                "the flow class of every data class (-1 or None: not in the flow)"
            )
        return None
    if hasattr(class_map, "tolist"):  # a tensor, or an array as match_classes gives it
        class_map = class_map.tolist()
    if isinstance(class_map, Mapping):
        pairs = dict(class_map)
    elif isinstance(class_map, Sequence) and not isinstance(class_map, (str, bytes)):
        pairs = dict(enumerate(class_map))
    else:
        raise TypeError(f"class_map must be a dict or a sequence, got {type(class_map).__name__}")
    if not pairs:
        raise ValueError("class_map is empty: give the flow class of every data class")
    for key, value in pairs.items():
        if not _is_int(key) or not (value is None or _is_int(value)):
            raise TypeError(f"class_map must map ints to ints or None, got {key!r}: {value!r}")
    total = max(pairs) + 1 if num_classes is None else num_classes
    if not isinstance(class_map, Mapping) and len(pairs) != total:
        raise ValueError(f"class_map has {len(pairs)} entries, but num_classes={num_classes}")
    table = [-1] * total
    for key, value in pairs.items():
        if not 0 <= key < total:
            raise ValueError(f"class_map has data class {key}, allowed are 0 to {total - 1}")
        if value is not None and not -1 <= value < flow_classes:
            raise ValueError(
                f"class_map maps class {key} to flow class {value}; allowed are 0 to {flow_classes - 1}, -1 and None"
            )
        table[key] = -1 if value is None else int(value)
    if max(table) < 0:
        raise ValueError("class_map maps no class to the flow: no image could be augmented")
    return tuple(table)


def _is_int(value: object) -> bool:
    # numpy's integers have __index__ too.
    return hasattr(value, "__index__") and not isinstance(value, bool)


def check_whole(name: str, value: object, low: int) -> int:
    """The int, numpy's too; TypeError for anything else, ValueError below `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def check_modes(model: GLEM, modes: int) -> ClassModes:
    """The model's modes; ValueError if it has none, or fewer than `modes`."""
    fitted = model.modes
    if fitted is None:
        raise ValueError("model.modes is missing: fit the modes first with model.fit_modes(data)")
    if isinstance(modes, bool) or not isinstance(modes, numbers.Integral) or not 1 <= modes <= fitted.rank:
        raise ValueError(
            f"modes must be an int from 1 to {fitted.rank}, the modes stored with the model; got {modes!r} "
            "(for more: model.fit_modes(data, rank=...))"
        )
    return fitted


def default_modes(model: GLEM) -> int:
    """How many modes to use where the user does not say: 64, or as many as there are."""
    return DEFAULT_MODES if model.modes is None else min(DEFAULT_MODES, model.modes.rank)


def check_batch(x: object) -> None:
    """ValueError unless x is a batch of images."""
    if not isinstance(x, Tensor) or x.ndim != 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a batch of images [B, C, H, W], got {got}")


def check_labels(y: object, batch: int, num_classes: int, look: bool, advice: str = "class_map") -> None:
    """Labels of a batch: int64 [batch], or floating point [batch, num_classes].

    Args:
        look: check the values of integer labels too, for which an accelerator has to be waited for.
        advice: the argument to give for other classes.

    Raises:
        ValueError, TypeError: naming what was given and what is allowed.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of labels, got {type(y).__name__}")
    if y.ndim not in (1, 2) or y.shape[0] != batch:
        raise ValueError(f"y must be int64 [{batch}] or soft [{batch}, {num_classes}], got {tuple(y.shape)}")
    if y.ndim == 2:
        if not y.is_floating_point():
            raise TypeError(f"soft labels must be floating point, got {y.dtype}")
        if y.shape[1] != num_classes:
            raise ValueError(f"soft labels have {y.shape[1]} classes, not {num_classes}: give class_map")
        return
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"labels must be integers (int64), got {y.dtype}")
    if batch and look:
        low, high = (int(v) for v in torch.aminmax(y))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"label {low if low < 0 else high} is out of range: this transform knows classes 0 to "
                f"{num_classes - 1}; give {advice} if the data has {'more' if advice == 'num_classes' else 'other'} "
                "classes" + (" than the flow" if advice == "class_map" else "")
            )
