"""Ending a run between two steps rather than inside one."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from glem_augment.errors import GLEMError

# sysexits.h: EX_TEMPFAIL, "the user is invited to retry". What a command returns for TimeUpError.
EXIT_TIME_UP = 75


class TimeUpError(GLEMError):
    """The run stopped, with a checkpoint, because ``max_minutes`` were over. Nothing went wrong: resume it."""


@dataclass
class StopRequest:
    """Whether the run should end at the next step boundary.

    Attributes:
        requested: turns true when the user asked for it (Ctrl-C, SIGTERM).
        deadline: on the clock of ``time.monotonic``, seconds.
    """

    requested: bool = False
    deadline: float = math.inf

    def due(self) -> bool:
        return self.requested or time.monotonic() >= self.deadline


@contextmanager
def stop_between_steps(deadline: float = math.inf) -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request, so that a checkpoint never holds half an optimizer step.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python allows no signal handlers,
    only the deadline (see ``StopRequest``) is observed.
    """
    request = StopRequest(deadline=deadline)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: object) -> None:
        if request.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.requested = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
