"""Ending a run between two steps rather than inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """``requested`` turns true when the user asked the run to end."""

    requested: bool = False


@contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request, so that a checkpoint never holds half an optimizer step.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python allows no signal handlers,
    this does nothing.
    """
    request = StopRequest()
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
