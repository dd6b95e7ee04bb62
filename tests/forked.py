"""Several ranks of one gloo group as forked processes: torch is not imported again, but backward passes don't run."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


def on_ranks(ranks: int, work: Callable[[], Any]) -> list[Any]:
    """What `work()` gives on every rank; the error where it raises one, None where the process is killed."""
    fork = multiprocessing.get_context("fork")

    def process(rank: int, result: Connection, store: Path) -> None:
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
        try:
            result.send(work())
        except Exception as error:
            result.send(error)

    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(ranks)]
        started = [
            fork.Process(target=process, args=(rank, send, Path(folder) / "store"))
            for rank, (_, send) in enumerate(pipes)
        ]
        for one in started:
            one.start()
        found = []
        for one, (receive, send) in zip(started, pipes, strict=True):
            send.close()
            try:
                found.append(receive.recv())
            except EOFError:
                found.append(None)
            one.join()
    return found
