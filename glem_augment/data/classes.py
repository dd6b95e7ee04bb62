"""Which class of a flow each class of a data set is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from glem_augment.checks import check_whole
from glem_augment.errors import ClassMismatchError

__all__ = ["match_classes"]


def match_classes(
    model_ids: Sequence[str],
    model_names: Sequence[str],
    data_ids: Sequence[str],
    data_names: Sequence[str],
    class_map: str | Mapping[str, str] | None = None,
    partial: bool = False,
    fix: str | None = None,
) -> np.ndarray:
    """Match the classes of a data set with a flow's, one to one; the flow may have more.

    Ids are compared first, then names: as written, then by their letters and digits alone in lower case, then
    without a number in front (``03_cat``). Ids that are plain numbers on both sides say nothing when both
    sides have names: class 3 of CIFAR-10 is not class 3 of Fashion-MNIST.

    Args:
        model_ids, model_names: the flow's K classes in index order.
        data_ids, data_names: the data's classes in index order.
        class_map: None; ``"order"``: class i is class i (both sides must have equally many); or a mapping
            from data names (or ids) to flow names (or ids), the classes that it leaves out being matched as
            usual.
        partial: the flow need not have all classes of the data, at least one.
        fix: the last sentence of an error about classes that do not match, for callers who take no ``class_map``; None:
            how to give one.

    Returns:
        int64 [K_data]: for each class of the data, the index of the flow's class; -1, only with ``partial``, where it
        has none, as `GLEMAugment(class_map=...)` takes it.

    Raises:
        ClassMismatchError: a class without a counterpart, or two with the same one; it lists both sides and
            the fix. Also for a ``class_map`` that names a class that is not there, or a string but "order".
        TypeError: another kind of ``class_map``.
    """
    flow = _Side(model_ids, model_names)
    data = _Side(data_ids, data_names)
    if isinstance(class_map, str):
        if class_map != "order":
            raise ClassMismatchError(f"class_map must be None, 'order' or a mapping of names, got {class_map!r}")
        if len(flow) != len(data):
            raise ClassMismatchError(
                f"class_map='order' needs equally many classes: the data has {len(data)}, the flow "
                f"{len(flow)}; give a mapping of names. {flow.listing('The flow')}"
            )
        return np.arange(len(data), dtype=np.int64)
    if class_map is not None and not isinstance(class_map, Mapping):
        raise TypeError(f"class_map must be None, 'order' or a mapping of names, got {type(class_map).__name__}")

    found: list[int | None] = [None] * len(data)
    for source, target in (class_map or {}).items():
        i, j = data.find(str(source)), flow.find(str(target))
        if i is None:
            raise ClassMismatchError(f"class_map names {source!r}, not a class of the data. {data.listing('The data')}")
        if j is None:
            raise ClassMismatchError(f"class_map names {target!r}, not a class of the flow. {flow.listing('The flow')}")
        if found[i] not in (None, j):
            raise ClassMismatchError(f"class_map maps the data's class {data.names[i]!r} twice")
        found[i] = j
    mapped = [i is not None for i in found]
    _match(data, flow, found)

    missing = [data.label(i) for i, j in enumerate(found) if j is None]
    if missing and (not partial or len(missing) == len(found)):
        raise ClassMismatchError(
            f"{len(missing)} of the {len(data)} classes of the data have no counterpart in the flow: "
            f"{_listed(missing)}. {flow.listing('The flow')} {fix or _FIX}"
        )
    owner: dict[int, int] = {}
    for i, j in enumerate(found):
        if j is None:
            continue
        if j in owner:
            how = "class_map maps" if mapped[i] or mapped[owner[j]] else "Two classes of the data match:"
            raise ClassMismatchError(
                f"{how} {data.label(owner[j])} and {data.label(i)} to the same class of the flow, "
                f"{flow.label(j)}{f'. {fix}' if fix else '; give class_map with a class of its own for each'}"
            )
        owner[j] = i
    return np.asarray([-1 if j is None else j for j in found], dtype=np.int64)


def check_class_map(
    class_map: Mapping[int, int | None] | Sequence[int | None] | Any | None,
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


def class_names(real: Any) -> list[str] | None:
    """Names of a torchvision or timm data set's classes in index order, or None where it has none."""
    names = getattr(real, "classes", None)
    lookup = getattr(getattr(real, "reader", None), "class_to_idx", None)
    if names is None and isinstance(lookup, Mapping):
        names = sorted(lookup, key=lookup.__getitem__)
    if not isinstance(names, (list, tuple)) or not names:
        return None
    return [str(name[0] if isinstance(name, tuple) and name else name) for name in names]  # tuples: synonyms


_FIX = (
    "Give class_map as a mapping from data names to flow names, or 'order' if both list the same classes in the same "
    "order; or use data of the flow's classes; or adapt the flow to the data (glem adapt)."
)


class _Side:
    """The classes of one side, looked up by what they are called."""

    def __init__(self, ids: Sequence[str], names: Sequence[str]):
        if len(ids) != len(names):
            raise ClassMismatchError(f"{len(ids)} class ids but {len(names)} class names")
        self.ids, self.names = [str(i) for i in ids], [str(n) for n in names]
        self.numbered = all(i.isdecimal() for i in self.ids)
        self.named = not all(n.isdecimal() for n in self.names)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, name: str) -> int | None:
        for form in _FORMS:
            for column in (self.names, self.ids):
                index = _unique(column, form).get(form(name))
                if index is not None:
                    return index
        return None

    def label(self, index: int) -> str:
        name, identity = self.names[index], self.ids[index]
        return repr(name) if name == identity else f"{name!r} (id {identity})"

    def listing(self, who: str) -> str:
        return f"{who} has {len(self)} classes: {_listed([self.label(i) for i in range(len(self))])}."


def _match(data: _Side, flow: _Side, found: list[int | None]) -> None:
    """Fill the gaps in ``found``; the surest comparison first."""
    pairs = [(data.ids, flow.ids), (data.names, flow.names)]
    if data.numbered and flow.numbered and data.named and flow.named:
        del pairs[0]
    # Last, across: a folder called "cat" is the flow's class of that name, whatever ids it has.
    across = [(data.names, flow.ids), (data.ids, flow.names)]
    if not (data.numbered or flow.numbered):
        pairs += across
    elif not data.numbered:
        pairs.append(across[1])
    elif not flow.numbered:
        pairs.append(across[0])
    for form in _FORMS:
        for column, targets in pairs:
            lookup, own = _unique(targets, form), _unique(column, form)
            for i, name in enumerate(column):
                key = form(name)
                if found[i] is None and key in own:
                    found[i] = lookup.get(key)


def _composed(name: str) -> str:
    """One spelling of accents, which macOS writes as characters of their own."""
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    # Marks are vowels in many scripts; C++ and C# are not C.
    composed = _composed(name.lower())
    return "".join(c for c in composed if c.isalnum() or c in "+#" or unicodedata.category(c)[0] == "M")


def _unnumbered(name: str) -> str:
    rest = _plain(re.sub(r"^\d+\s*[_-]\s*", "", name))
    return rest if rest[:1].isalpha() else _plain(name)  # 737-200 is no 747-200


_FORMS: tuple[Callable[[str], str], ...] = (_composed, _plain, _unnumbered)


def _unique(names: Sequence[str], form: Callable[[str], str]) -> dict[str, int]:
    """Index by form; without the empty form, and forms of two names (of "T-shirt" and "T shirt", both "tshirt")."""
    keys = [form(name) for name in names]
    seen: dict[str, int] = {}
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
    return {key: i for i, key in enumerate(keys) if key and seen[key] == 1}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names) - 20} more)" if len(names) > 20 else "")
