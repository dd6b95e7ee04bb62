"""Two processes: which images each goes through, with torch alone, accelerate and Lightning."""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from augment_cases import images, labels, make_model
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from glem_augment import GLEMAugment

IMAGES = 12
DATA = TensorDataset(images(IMAGES) / 255, labels(IMAGES), torch.arange(IMAGES))
Found = dict[str, tuple[list[int], int]]


def report(batches: Callable[[], Iterable[Any]]) -> tuple[list[int], int]:
    """The numbers of the images that this process sees, all of them moved, and how many warnings came."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = []
        for x, _, number in batches():
            assert (x != DATA.tensors[0][number]).flatten(1).any(1).all()
            seen += number.tolist()
    return seen, sum("goes through all" in str(w.message) for w in caught)


def plain(aug: GLEMAugment) -> Found:
    torch.distributed.init_process_group("gloo")
    sharded = DataLoader(DATA, 3, sampler=DistributedSampler(DATA))
    return {"wrong": report(lambda: aug.wrap(DataLoader(DATA, 3))), "sampler": report(lambda: aug.wrap(sharded))}


def accelerate(aug: GLEMAugment) -> Found:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    collate = DataLoader(DATA, 3, collate_fn=aug.collate_fn())
    return {
        "wrong": report(lambda: accelerator.prepare(aug.wrap(DataLoader(DATA, 3)))),
        "wrap": report(lambda: aug.wrap(accelerator.prepare(DataLoader(DATA, 3, shuffle=True)))),
        "collate_fn": report(lambda: accelerator.prepare(collate)),
    }


def lightning(aug: GLEMAugment) -> Found:
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        automatic_optimization = False  # a forked process can't run backward passes

        def __init__(self, moves: bool) -> None:
            super().__init__()
            self.layer, self.moves, self.batches = torch.nn.Linear(4, 4), moves, []

        def on_after_batch_transfer(self, batch: Any, _: int) -> Any:
            return [*aug(*batch[:2]), batch[2]] if self.moves else batch

        def training_step(self, batch: Any, _: int) -> None:
            self.batches.append(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def fitted(loader: Any, moves: bool = False) -> list[Any]:
        module = Module(moves)
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **dict.fromkeys(off, False))
        trainer.fit(module, loader)
        return module.batches

    return {
        "wrong": report(lambda: fitted(aug.wrap(DataLoader(DATA, 3)))),
        "on_after_batch_transfer": report(lambda: fitted(DataLoader(DATA, 3, shuffle=True), moves=True)),
        "collate_fn": report(lambda: fitted(DataLoader(DATA, 3, collate_fn=aug.collate_fn()))),
    }


def process(case: Callable[[GLEMAugment], Found], rank: int, port: int, results: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({name: str(value) for name, value in place.items()})
    results.put(case(GLEMAugment(make_model(), p=1.0, seed=0)))


@pytest.mark.parametrize("case", [plain, accelerate, lightning])
def test_each_process_goes_through_its_share(case: Callable[[GLEMAugment], Found]) -> None:
    if case is not plain:
        pytest.importorskip(case.__name__)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # torch need not be imported again
    results = fork.Queue()
    both = [fork.Process(target=process, args=(case, rank, port, results), daemon=True) for rank in range(2)]
    for one in both:
        one.start()
    first, second = (results.get(timeout=300) for _ in both)
    for one in both:
        one.join()
    for found in (first, second):  # each process goes through all images, and says so
        seen, told = found.pop("wrong")
        assert sorted(seen) == list(range(IMAGES)) and told == 1
    for way, (seen, told) in first.items():
        others, told_too = second[way]
        assert sorted(seen + others) == list(range(IMAGES)) and told == told_too == 0, way
