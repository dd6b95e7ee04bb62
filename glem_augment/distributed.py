"""Work on several ranks of torchrun. In a single process the functions do nothing.

torch.distributed does the work: gloo between CPUs, nccl between GPUs. All ranks must call `add_up`, `gather` and `wait`
in the same order.
"""

from __future__ import annotations

import atexit
import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm.auto import tqdm

from glem_augment.errors import GLEMError

_T = TypeVar("_T")


class Share(NamedTuple):
    """One rank's part of `total` items: from `start` up to, not including, `stop`."""

    start: int
    stop: int
    total: int

    @property
    def rows(self) -> slice:
        """The slice that selects this part."""
        return slice(self.start, self.stop)


# ---- rank and share --------------------------------------------------------------------------------------------------


def start(device: str) -> torch.device:
    """Join the processes that torchrun or SLURM started, if any. Returns this rank's device of the kind `device`."""
    if not {"WORLD_SIZE", "SLURM_NTASKS"} & os.environ.keys():
        return torch.device(device)
    from timm.utils import init_distributed_device, is_distributed_env  # takes a second

    if not is_distributed_env() or dist.is_initialized():
        return torch.device(device)
    joined = init_distributed_device(Namespace(device=device))
    atexit.register(dist.destroy_process_group)
    return joined


def world_size() -> int:
    """The number of processes; 1 if nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 if nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_primary() -> bool:
    """Whether this process is rank 0, which writes the files and the messages."""
    return rank() == 0


def share(total: int) -> Share:
    """This rank's part of `total` items. If the ranks do not divide it, the first parts have one more."""
    each, more = divmod(total, world_size())
    begin = rank() * each + min(rank(), more)
    return Share(begin, begin + each + (rank() < more), total)


def progress_bar(
    title: str, items: Iterable[Any] | None = None, total: int | None = None, unit: str = "image", begun: int = 0
) -> tqdm:
    """A bar over `items`, or one that is updated, for work of more than two seconds.

    It is on rank 0's stderr, if that is a terminal, or in a notebook.
    """
    hidden = None if is_primary() else True  # None hides it where stderr is no terminal
    looks: dict[str, Any] = {"delay": 2, "leave": False, "dynamic_ncols": True, "disable": hidden}
    return tqdm(items, desc=title, total=total, unit=unit, initial=begun, **looks)


# ---- all ranks together ----------------------------------------------------------------------------------------------


def _together(call: Callable[[], _T]) -> _T:
    try:
        return call()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rpartition("] ")[2]  # without gloo's source line
        raise GLEMError(
            f"rank {rank()} has lost the other processes ({reason}): one was killed, or has printed its error. Written "
            "files are complete. Run the same command again, with --resume for a training run"
        ) from error


def add_up(*tensors: Tensor) -> None:
    """Replace tensors of one dtype and device by their sums over all ranks, in place and in one reduction.

    The bits are the same on all ranks, and in all runs with equally many ranks.
    """
    if world_size() == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    moved = flat.cuda() if dist.get_backend() == "nccl" else flat
    _together(lambda: dist.all_reduce(moved))
    for tensor, part in zip(tensors, moved.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def gather(thing: _T, group: dist.ProcessGroup | None = None) -> list[_T]:
    """The objects of all ranks in rank order, of any sizes; tensors must be on the CPU."""
    if world_size() == 1:
        return [thing]
    found: list[Any] = [None] * world_size()
    _together(lambda: dist.all_gather_object(found, thing, group))
    return found


def wait() -> None:
    """Wait for all ranks."""
    gather(None)
