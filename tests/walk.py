"""Which files of the package a call passes, and how often it goes back to an earlier one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import glem_augment

PACKAGE = Path(glem_augment.__file__).parent


def files_passed(call: Callable[[], Any], leave_out: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """The files that are entered by calls of their functions, one after another, and the number of all moves.

    A move goes from one file to another, by a call or by its return. Files are given by their paths inside the package;
    `leave_out` are the starts of the paths of files that are not counted.
    """
    entered: list[str] = []
    moves, here = 0, ""

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal moves, here
        code = frame.f_code if event == "call" else frame.f_back and frame.f_back.f_code
        function = code and code.co_name != "<module>" and code.co_flags & 1  # a class body is no function
        if event in ("call", "return") and function and code.co_filename.startswith(str(PACKAGE)):
            file = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            if file != here and not file.startswith(leave_out or "/"):
                moves, here = moves + 1, file
                if event == "call":
                    entered.append(file)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered, moves


def returns(entered: Sequence[str]) -> set[tuple[str, str]]:
    """The kinds of return: from which file to which file that was entered earlier."""
    first = {file: entered.index(file) for file in entered}
    return {(a, b) for a, b in zip(entered, entered[1:], strict=False) if first[b] < first[a]}
