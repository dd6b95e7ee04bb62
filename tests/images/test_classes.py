"""Matching the classes of a data set with a model's."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glem_augment.errors import ClassMismatchError
from glem_augment.images.matching import check_class_map, match_classes, named_classes


def side(ids: list[str], names: list[str]) -> SimpleNamespace:
    return SimpleNamespace(class_ids=ids, classes=names)


def test_match_by_id_name_and_form() -> None:
    model = side(["n01", "n02", "n03"], ["tench", "Golden Retriever", "T-shirt/top"])
    for data in (["n03", "n01"], ["T-shirt/top", "tench"], ["T-SHIRT/TOP", "Tench"]):
        assert match_classes(model, data).tolist() == [2, 0]
    assert match_classes(model, side(["0", "1"], ["golden retriever", "TENCH"])).tolist() == [1, 0]
    result = match_classes(model, model)
    assert result.dtype == np.int64 and result.tolist() == [0, 1, 2]
    # Names of torchvision's ImageNet.
    real = SimpleNamespace(classes=[("tench", "Tinca"), ("crane",), ("crane", "bird")], wnids=["n1", "n2", "n3"])
    assert named_classes(real) == (["n1", "n2", "n3"], ["tench", "crane (n2)", "crane (n3)"])


def test_numbers_identify_only_without_names() -> None:
    digits = ["0", "1", "2"]
    model = side(digits, ["Shirt", "Bag", "Coat"])
    assert match_classes(model, digits).tolist() == [0, 1, 2]
    assert match_classes(model, side(digits, ["coat", "shirt", "bag"])).tolist() == [2, 0, 1]
    with pytest.raises(ClassMismatchError, match="'cat' .id 0.*'Shirt'"):
        match_classes(model, side(digits, ["cat", "dog", "eel"]))
    # Numbered ids are left out where ids and names are compared across.
    numbers = ["0", "1"]
    model, named = side(numbers, ["cat", "dog"]), side(["cat", "dog"], ["Katze", "Hund"])
    assert match_classes(model, side(["dog", "cat"], ["Hund", "Katze"])).tolist() == [1, 0]
    assert match_classes(named, side(numbers, ["dog", "cat"])).tolist() == [1, 0]
    with pytest.raises(ClassMismatchError):  # a name may be a number too: "0" is no index here
        match_classes(model, side(["a", "b"], numbers))


def test_class_map() -> None:
    model, data = ["a", "b", "c"], ["x", "b"]
    assert match_classes(model, data, {"x": "c"}).tolist() == [2, 1]
    assert match_classes(model, ["x", "y", "z"], "order").tolist() == [0, 1, 2]
    for class_map, message in (
        ({"q": "a"}, "'q'.*the data.*'x', 'b'"),
        ({"x": "q"}, "'q'.*the model.*'a', 'b', 'c'"),
        ({"x": "b"}, "one class of the model, 'b'"),
        ("order", "2.*3"),
    ):
        with pytest.raises(ClassMismatchError, match=message):
            match_classes(model, data, class_map)
    with pytest.raises(TypeError, match="alphabet"):
        match_classes(model, data, "alphabet")


def test_names_in_any_script_and_spelling() -> None:
    for ours, theirs in ((["की", "ख"], ["का"]), (["C++", "x"], ["C"]), (["が"], ["か"])):
        with pytest.raises(ClassMismatchError):
            match_classes(ours, theirs)
    apart = [unicodedata.normalize("NFD", name) for name in ("café", "が")]
    assert apart[0] != "café"
    assert match_classes(["が", "café"], apart).tolist() == [1, 0]
    assert match_classes(["Café au lait"], side([apart[0] + " Au Lait"], ["x"])).tolist() == [0]


def test_mismatch_and_partial_match() -> None:
    with pytest.raises(ClassMismatchError, match="'zebra'.*'c0'"):
        match_classes([f"c{i}" for i in range(30)], ["c3", "zebra"])
    # A partial match leaves out what the model lacks.
    model, data = ["cat", "dog", "bird"], ["dog", "wolf", "bird"]
    assert match_classes(model, data, partial=True).tolist() == [1, -1, 2]
    with pytest.raises(ClassMismatchError):
        match_classes(model, ["wolf"], partial=True)


def test_ambiguous_forms_do_not_match() -> None:
    with pytest.raises(ClassMismatchError, match="'c'"):
        match_classes(["C++", "C#"], ["c"])
    assert match_classes(["C++", "C#"], ["C#"]).tolist() == [1]
    with pytest.raises(ClassMismatchError, match="'Cat'"):
        match_classes(["cat", "dog"], ["cat", "Cat"])
    letters = ["a", "A", "b"]
    assert match_classes(letters, letters[::-1]).tolist() == [2, 1, 0]
    twice = ["Shirt", "SHIRT", "Dog"]  # either may be the model's
    assert match_classes(["shirt", "dog"], twice, partial=True).tolist() == [-1, -1, 1]


def test_class_maps_by_index() -> None:
    for same in ([2, -1, 0], (2, None, 0), torch.tensor([2, -1, 0])):
        assert check_class_map(same, 3) == (2, -1, 0)
    assert check_class_map(None, 3) is None and check_class_map([0, 0, None], 1) == (0, 0, -1)
    for class_map in ([], [3], [-1, None], [-2]):
        with pytest.raises(ValueError, match="class_map"):
            check_class_map(class_map, 3)
    for wrong in ("abc", 3, [0.5], {0: 2}):
        with pytest.raises(TypeError, match="class_map"):
            check_class_map(wrong, 3)
