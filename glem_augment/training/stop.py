"""Stops of a run between two steps, so that a checkpoint never holds half an optimizer step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from glem_augment.errors import GLEMError

# The exit status for TimeUpError; in sysexits.h EX_TEMPFAIL, "the user is invited to retry".
EXIT_TIME_UP = 75


class TimeUpError(GLEMError):
    """The run stopped, with a checkpoint, because `max_minutes` were over. Nothing went wrong: resume it."""


class Stoppable(Protocol):
    """A run that ends after the current step once `stop_requested` is set."""

    stop_requested: bool


@contextmanager
def stop_between_steps(run: Stoppable) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into requests. A second Ctrl-C ends the run at once."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        if run.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_requested = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
