"""Which files of the package a call passes, and how often it goes from one to another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import glem_augment

PACKAGE = Path(glem_augment.__file__).parent


def files_passed(call: Callable[[], Any]) -> tuple[set[str], int]:
    """The files whose functions run, by their paths inside the package, and the number of moves between files."""
    passed: set[str] = set()
    moves, here = 0, ""

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal moves, here
        code = frame.f_code if event == "call" else frame.f_back and frame.f_back.f_code
        function = code and code.co_name != "<module>" and code.co_flags & 1  # a class body is no function
        if event in ("call", "return") and function and code.co_filename.startswith(str(PACKAGE)):
            file = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            if file != here:
                passed.add(file)
                moves, here = moves + 1, file

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return passed, moves
