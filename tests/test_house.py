"""The layout of the package: rooms as folders, imports that run downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import glem_augment

PACKAGE = Path(__file__).parents[1] / "glem_augment"
# Imports run downwards in this order. The single files at the top of the package lie below all rooms.
ROOMS = (
    "cli",
    "hub",
    "training",
    "evaluation",
    "synthetic",
    "augment",
    "model",
    "privacy",
    "classes",
    "images",
    "codec",
    "flows",
)
# Imports inside functions: downloads of GLEM.from_pretrained, GLEM.push_to_hub, and aug.wrap with its siblings.
AUG_WRAP = {("augment.transform", f"augment.{name}") for name in ("loops", "structures")}
LOOK_UPS = {("model.files", "hub.client"), ("model.glem", "hub.client"), *AUG_WRAP}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without "glem_augment."; a room by its folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> tuple[set[str], set[str]]:
    """The package's modules that a file imports at its top (type-only imports too), and inside functions."""
    known = modules()
    top: set[str] = set()
    inner: set[str] = set()

    def visit(node: ast.AST, depth: int) -> None:
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path}: imports are absolute"
                if (child.module or "").split(".")[0] == "glem_augment":
                    base = (child.module or "").removeprefix("glem_augment").strip(".")
                    for alias in child.names:
                        full = f"{base}.{alias.name}".strip(".")
                        names.append(full if full in known else base)
            elif isinstance(child, ast.Import):
                names = [
                    a.name.removeprefix("glem_augment.") for a in child.names if a.name.startswith("glem_augment.")
                ]
            (inner if depth else top).update(names)
            visit(child, depth + isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), 0)
    return top - {""}, inner - {""}


def floor(name: str) -> int:
    """The floor that a module stands on; 0 is the roof."""
    room = name.split(".")[0]
    if name in ("", "__main__"):
        return -1
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def upward(inside_functions: bool) -> list[tuple[str, str]]:
    """Imports of a higher room, at the top of files or inside functions."""
    found = [(name, other) for name, path in modules().items() if name for other in imports(path)[inside_functions]]
    return [(name, other) for name, other in found if floor(other) < floor(name)]


def test_imports_run_downwards_but_for_three_methods() -> None:
    assert {name.split(".")[0] for name in modules() if "." in name} == set(ROOMS)
    assert not upward(inside_functions=False)
    assert set(upward(inside_functions=True)) <= LOOK_UPS


def test_imports_make_no_circle() -> None:
    """Imports inside functions count too, but for the methods that look upwards."""
    found = {name: set.union(*imports(path)) - {name} for name, path in modules().items() if name}
    TopologicalSorter({a: {b for b in others if (a, b) not in LOOK_UPS} for a, others in found.items()}).prepare()


def test_examples_import_public_names_only() -> None:
    """Public names are in `__all__` of the package or of a room."""
    for path in (PACKAGE.parent / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "glem_augment":
                module = node.module or ""
                hidden = [alias.name for alias in node.names if alias.name not in import_module(module).__all__]
                assert module.count(".") <= 1 and not hidden, f"{path.name} imports {hidden} of {module}"


def test_public_names_are_imported_when_first_used_and_light(tmp_path: Path) -> None:
    assert all(getattr(glem_augment, name) is not None for name in glem_augment.__all__)
    assert set(glem_augment.__all__) <= set(dir(glem_augment))
    with pytest.raises(AttributeError, match="nothing"):
        glem_augment.nothing  # noqa: B018
    script = f"""
import sys, glem_augment
from glem_augment.cli import main
glem_augment.errors.DataError
try:
    main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
assert main("generate bundled:fashion-mnist --per-class Bag=1 --out".split() + [{str(tmp_path / "out")!r}]) == 0
heavy = {{"timm", "torchmetrics", "matplotlib", "scipy", "glem_augment.evaluation", "glem_augment.training"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
