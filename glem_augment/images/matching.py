"""Which class of a model each class of a data set is."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from glem_augment.checks import check_whole
from glem_augment.errors import ClassMismatchError, DataError

ONE_CLASS = "image"  # the name of the only class where images have no classes
_FIX = (
    "Give class_map (--class-map) a table from data names to model names, or 'order' if both list the same classes in "
    "the same order; or fit the model to the data (glem fit DATA --flow MODEL)."
)
ClassMap: TypeAlias = Literal["order"] | Mapping[str, str] | None
Integers: TypeAlias = Sequence[int] | np.ndarray | torch.Tensor  # labels, or indices of images


def match_classes(
    model: Any, data: Any, class_map: ClassMap = None, partial: bool = False, fix: str | None = None
) -> np.ndarray:
    """Match the classes of a data set with classes of a model, one to one.

    Two classes match if they share an id or a name that no other class has. Equal names are matched first, then names
    that differ in case alone. Ids that are numbers on both
    sides do not count if both sides have names: class 3 of CIFAR-10 is not class 3 of Fashion-MNIST. A model whose only
    class is "image" takes all classes of the data.

    Args:
        model, data: see `named_classes`.
        class_map: None; `"order"`: class i is class i (both sides must have equally many); or a mapping from data names
            (or ids) to model names (or ids). Classes that it leaves out are matched as usual.
        partial: allow classes of the data that the model does not have, but not all of them.
        fix: last sentence of an error about classes that do not match, for callers who take no `class_map`.

    Returns:
        int64 [K_data], for `GLEMAugment(class_map=...)`: the model's class for each class of the data. With `partial`,
        -1 if the model does not have it.

    Raises:
        ClassMismatchError: a class has no counterpart or shares it, `class_map` names an unknown class, or a side has
            no names. The error lists both sides and the fix. TypeError: another `class_map`.
    """
    model, data = _Side("model", model), _Side("data", data)
    if isinstance(class_map, str) and class_map == "order":
        if len(model.ids) != len(data.ids):
            raise ClassMismatchError(
                f"class_map='order' needs equally many classes. {data.listing()} {model.listing()}"
            )
        return np.arange(len(data.ids), dtype=np.int64)
    if class_map is not None and not isinstance(class_map, Mapping):
        raise TypeError(f"class_map must be None, 'order' or a mapping of names, got {class_map!r}")
    if model.ids == [ONE_CLASS] and not class_map:
        return np.zeros(len(data.ids), dtype=np.int64)
    found = {data.find(str(theirs)): model.find(str(ours)) for theirs, ours in (class_map or {}).items()}
    for form in _FORMS:
        ours, theirs = _unique(model.columns(data), form), _unique(data.columns(model), form)
        found = {i: ours[name] for name, i in theirs.items() if name in ours} | found
    _check_match(model, data, found, partial, fix)
    return np.asarray([found.get(i, -1) for i in range(len(data.ids))], dtype=np.int64)


def _check_match(model: _Side, data: _Side, found: dict[int, int], partial: bool, fix: str | None) -> None:
    """ClassMismatchError: a class of the data is not `found`, unless this may be `partial`, or two are the same."""
    missing = [data.label(i) for i in range(len(data.ids)) if i not in found]
    if missing and (not partial or not found):
        raise ClassMismatchError(
            f"{len(missing)} of the {len(data.ids)} classes of the data have no counterpart in the model: "
            f"{_listed(missing)}. {model.listing()} {fix or _FIX}"
        )
    if twice := [j for j, count in Counter(found.values()).items() if count > 1]:
        same = " and ".join(data.label(i) for i in sorted(found) if found[i] == twice[0])
        raise ClassMismatchError(
            f"{same} of the data are one class of the model, {model.label(twice[0])}. "
            f"{fix or 'Give class_map with a different model class for each.'}"
        )


def check_class_map(class_map: Any, model_classes: int) -> tuple[int, ...] | None:
    """`GLEMAugment`'s class_map as a tuple, -1 for classes that the model lacks; or None."""
    if class_map is None:
        return None
    given = class_map.tolist() if hasattr(class_map, "tolist") else class_map  # an array, as match_classes gives it
    if not isinstance(given, Sequence):
        raise TypeError(f"class_map must be a sequence of the model's classes, got {type(given).__name__}")
    found = [-1 if value is None else check_whole("a class in class_map", value, -1) for value in given]
    if not 0 <= max(found, default=-1) < model_classes:
        raise ValueError(
            f"class_map must hold classes of the model, 0 to {model_classes - 1}, beside None and -1; got {given[:20]}"
        )
    return tuple(found)


def named_classes(data: Any) -> tuple[list[str], list[str]] | None:
    """The ids and the unique names of the classes of a model or a data set, in index order; None if it names none.

    `data` is a GLEM, an ImageData, a data set of torchvision, timm or Hugging Face, a Subset or ConcatDataset of such
    sets, or a list of names. ClassMismatchError: a ConcatDataset whose parts number their classes differently.
    """
    if isinstance(data, Subset):
        return named_classes(data.dataset)
    if isinstance(data, ConcatDataset):
        found = [named for named in map(named_classes, data.datasets) if named is not None]
        if any(named != found[0] for named in found):
            raise ClassMismatchError(
                "the parts of the ConcatDataset number their classes differently: "
                + " and ".join(_listed(named[1]) for named in found)
            )
        return found[0] if found else None
    names = _stated_names(data)
    if not isinstance(names, list | tuple) or not names:
        return None
    names = [str(name[0] if isinstance(name, tuple) else name) for name in names]  # torchvision's ImageNet has synonyms
    ids = [str(i) for i in getattr(data, "class_ids", getattr(data, "wnids", names))]
    return ids, unique_names(names, ids)


def _stated_names(data: Any) -> Any:
    """What `data` states as the names of its classes, by the conventions of lists and libraries; or None."""
    if isinstance(data, list):
        return data if all(isinstance(name, str) for name in data) else None
    if of_hugging_face(data):
        return getattr(data.features[feature_column(data.features, "ClassLabel")], "names", None)
    if (names := getattr(data, "classes", None)) is not None:
        return names
    reader = getattr(data, "reader", None)  # of timm's ImageDataset
    lookup = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(lookup, key=lookup.__getitem__) if lookup else None


def readable_names(class_ids: list[str]) -> list[str]:
    """Readable names: first words of the descriptions for ids of ImageNet-1k, otherwise the ids themselves."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_ids):
        return class_ids
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    if not set(info.label_names()).issuperset(class_ids):
        return class_ids
    return unique_names([info.label_name_to_description(name).split(",")[0] for name in class_ids], class_ids)


def unique_names(names: list[str], ids: list[str]) -> list[str]:
    """Names with the id where two are the same: "crane" and "maillot" each name two classes of ImageNet-1k."""
    counts = Counter(names)
    return [f"{name} ({i})" if counts[name] > 1 else name for name, i in zip(names, ids, strict=True)]


def of_hugging_face(data: Any) -> bool:
    """Whether this is a data set of the library `datasets`, which need not be installed."""
    return isinstance(getattr(data, "features", None), Mapping) and hasattr(data, "with_format")


def feature_column(features: Mapping[str, Any], kind: Literal["ClassLabel", "Image"]) -> str:
    """The column of images or of class labels of a Hugging Face data set. DataError: none, or several."""
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if kind == "ClassLabel" and not found:
        found = [name for name in ("label", "labels") if name in features]
    if len(found) != 1:
        raise DataError(
            f"a Hugging Face data set needs one {kind} column; this one has {' and '.join(found) or 'none'} among "
            f"{', '.join(features)}: keep one with select_columns, or make one (class_encode_column)"
        )
    return found[0]


class _Side:
    """The classes of the model or of the data."""

    def __init__(self, word: str, side: Any) -> None:
        named = named_classes(side)
        if named is None:
            raise ClassMismatchError(f"the {word} names no classes ({type(side).__name__}): give a list of their names")
        self.word, (self.ids, self.names) = word, named
        self.numbered = all(i.isdecimal() for i in self.ids)
        self.named = not all(n.isdecimal() for n in self.names)

    def find(self, name: str) -> int:
        """The index of the class that a class_map calls `name`."""
        for form, column in itertools.product(_FORMS, (self.names, self.ids)):
            if (index := _unique([column], form).get(form(name))) is not None:
                return index
        raise ClassMismatchError(f"class_map names {name!r}, not a class of the {self.word}. {self.listing()}")

    def label(self, index: int) -> str:
        name, identity = self.names[index], self.ids[index]
        return repr(name) if name == identity else f"{name!r} (id {identity})"

    def listing(self) -> str:
        return f"The {self.word} has {len(self.ids)} classes: {_listed([self.label(i) for i in range(len(self.ids))])}."

    def columns(self, other: _Side) -> list[list[str]]:
        """The names, and the ids unless they are numbers without a meaning for the other side."""
        numbers = self.numbered and (not other.numbered or (self.named and other.named))
        return [self.names] if numbers else [self.ids, self.names]


composed = functools.partial(unicodedata.normalize, "NFC")  # macOS writes an accent as a separate character


def _folded(name: str) -> str:
    return composed(name).casefold()


_FORMS: tuple[Callable[[str], str], ...] = (composed, _folded)  # the surest comparison first


def _unique(columns: Sequence[Sequence[str]], form: Callable[[str], str]) -> dict[str, int]:
    """Index by form, without the empty form and without forms that two classes share ("cat" and "Cat")."""
    found: dict[str, set[int]] = defaultdict(set)
    for column in columns:
        for i, name in enumerate(column):
            found[form(name)].add(i)
    return {key: next(iter(classes)) for key, classes in found.items() if key and len(classes) == 1}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names) - 20} more)" if len(names) > 20 else "")


def check_names(classes: Sequence[str], class_ids: Sequence[str]) -> None:
    """DataError unless there is one id for each name, and no name or id twice."""
    if len(class_ids) != len(classes):
        raise DataError(f"there are {len(classes)} class names but {len(class_ids)} class ids")
    for names in (classes, class_ids):
        if len(set(names)) != len(names):
            raise DataError(f"class names and ids must be unique, got {list(names)[:12]}")


def check_targets(y: Integers, count: int, num_classes: int | None = None) -> np.ndarray:
    """Labels as int64 [count], in 0..num_classes - 1. TypeError: no integers. DataError: anything else."""
    targets = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    if targets.shape != (count,):
        raise DataError(f"there must be one label for each of the {count} images, got shape {targets.shape}")
    if count and not np.issubdtype(targets.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {targets.dtype}")
    low, high = (int(targets.min()), int(targets.max())) if count else (0, -1)
    limit = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= limit:
        raise DataError(f"labels must lie in 0..{limit - 1}, got {low}..{high}")
    return np.ascontiguousarray(targets, dtype=np.int64)
