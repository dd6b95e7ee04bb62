"""Checks of batches, labels and class maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glem_augment.checks import check_whole


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
