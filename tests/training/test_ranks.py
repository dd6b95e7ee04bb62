"""Runs on several ranks: they end as a run on one does, whatever the shares, and a rank that dies ends all of them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import comparable, tiny_trainer, toy_data
from torch import Tensor

from glem_augment import GLEM
from glem_augment.distributed import share
from glem_augment.errors import GLEMError
from glem_augment.images.dataset import ImageData
from glem_augment.model.files import CHECKPOINT, CONFIG, WEIGHTS
from glem_augment.training.checkpoint import load_checkpoint
from glem_augment.training.trainer import Trainer

# Processes that are forked from a server that has imported torch start at once, and can run backward passes.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "glem_augment.training.trainer"])


def _process(work: Callable[..., Any], rank: int, ranks: int, folder: Path, args: tuple[Any, ...], pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        result = work(*args)
    except GLEMError as error:
        result = error
    # As bytes, because tensors that are sent as such live no longer than this process.
    pipe.send_bytes(pickle.dumps(result))


def on_ranks(ranks: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` gives on every rank, or its error; None for a rank that is killed."""
    folder.mkdir()
    pipes = [SERVER.Pipe(duplex=False) for _ in range(ranks)]
    started = [
        SERVER.Process(target=_process, args=(work, rank, ranks, folder, args, send))
        for rank, (_, send) in enumerate(pipes)
    ]
    for one, (_, send) in zip(started, pipes, strict=True):
        one.start()
        send.close()
    found = []
    for one, (receive, _) in zip(started, pipes, strict=True):
        try:
            found.append(pickle.loads(receive.recv_bytes()))
        except EOFError:
            found.append(None)
        one.join()
    return found


def test_shares_are_whole_and_fall_with_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks in (1, 2, 3, 7):
        monkeypatch.setattr("glem_augment.distributed.world_size", lambda ranks=ranks: ranks)
        sizes = []
        for total in range(20):
            parts = []
            for rank in range(ranks):
                monkeypatch.setattr("glem_augment.distributed.rank", lambda rank=rank: rank)
                parts.append(share(total))
            assert [i for part in parts for i in range(total)[part.rows]] == list(range(total))
            sizes.append([part.stop - part.start for part in parts])
        assert (np.diff(sizes, axis=0) >= 0).all()


# ---- training --------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    # 10 steps. Five images of a batch on several ranks.
    "glem": dict(batch_size=5, epochs=1, augment=("flip", "crop", "rotate", "jitter")),
    # A third rank never has an image.
    "hybrid": dict(batch_size=2, epochs=1, objective="hybrid", beta=0.2),
    "mle": dict(batch_size=50, epochs=2, objective="mle"),
}


def data(name: str) -> ImageData:
    return toy_data({"glem": 62, "hybrid": 12, "mle": 119}[name], k=2)


def noting(out: Path, name: str) -> tuple[Trainer, list[tuple[float, float]]]:
    """A run, and a list for the loss and the likelihood of every step."""
    trainer, losses = tiny_trainer(out, data(name), **RUNS[name]), list[tuple[float, float]]()
    take = trainer.e_step

    def noted(*batch: Any) -> tuple[float, float]:
        losses.append(take(*batch))
        return losses[-1]

    trainer.e_step = noted
    return trainer, losses


def runs(folder: Path) -> dict[str, Any]:
    found = {}
    for name in RUNS:
        trainer, losses = noting(folder / name, name)
        model = trainer.fit()
        found[name] = losses, {key: value.clone() for key, value in model.state_dict().items()}
    return found


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Whether two models are the same but for rounding; modes that are as long as each other may be mixed."""
    for key, value in wanted.items():
        if "directions" not in key:
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return runs(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_runs_on_several_ranks_are_those_on_one(tmp_path: Path, alone: dict[str, Any], ranks: int) -> None:
    first, *others = on_ranks(ranks, tmp_path / "ranks", runs, tmp_path)
    for name, (losses, state) in alone.items():
        np.testing.assert_allclose(first[name][0], losses, rtol=1e-4, atol=1e-5, err_msg=name)
        close(first[name][1], state, 2e-3)
        for other in others:  # to the last bit
            assert other[name][0] == first[name][0]
            assert all(torch.equal(value, first[name][1][key]) for key, value in other[name][1].items())
        written = comparable(tmp_path / name)
        assert len([row for row in written if row["kind"] == "epoch"]) == RUNS[name]["epochs"]
        saved = GLEM.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(saved[key], value) for key, value in first[name][1].items())
    assert len(alone["glem"][0]) == 10


# ---- deaths ----------------------------------------------------------------------------------------------------------


def run_until(out: Path, dies: int | None, step: int, resume: bool) -> Any:
    trainer = tiny_trainer(out, data("glem"), resume, every_step=True, batch_size=25)
    e_step = trainer.e_step

    def stepping(*batch: Any) -> tuple[float, float]:
        if (torch.distributed.get_rank(), trainer.step) == (dies, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return e_step(*batch)

    trainer.e_step = stepping
    trainer.fit()
    return trainer.step


# The state is whole for another number of ranks too; with as many as before, the end is that of an undisturbed run.
@pytest.mark.parametrize(("dies", "resumed"), [(1, (2,)), pytest.param(0, (1, 3, 2), marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path: Path, dies: int, resumed: tuple[int, ...]) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    ends = on_ranks(2, tmp_path / "dies", run_until, out, dies, 3, False)
    assert ends[dies] is None and f"rank {1 - dies} has lost the other processes" in str(ends[1 - dies])
    checkpoint = (out / CHECKPOINT).read_bytes()
    assert load_checkpoint(out)["step"] == 3
    on_ranks(2, tmp_path / "undisturbed", run_until, whole, None, 0, False)
    for ranks in resumed:
        shutil.rmtree(out)
        out.mkdir()
        (out / CHECKPOINT).write_bytes(checkpoint)
        assert on_ranks(ranks, tmp_path / f"again{ranks}", run_until, out, None, 0, True) == [6] * ranks
    for file in (WEIGHTS, CONFIG):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
