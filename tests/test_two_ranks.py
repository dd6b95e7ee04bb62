"""torchrun with two ranks: the example for timm, `glem generate`, GLEMAugment around DistributedDataParallel, kills."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import two_ranks
from PIL import Image


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    for folder in ("train/Bag", "train/Coat", "val/Bag", "val/Coat"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (28, 28), 40 * i).save(tmp_path / "data" / folder / f"{i}.png")
    command = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    files = [two_ranks.__file__, str(tmp_path), str(tmp_path / "data")]
    done = subprocess.run([sys.executable, *command, *files], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    # Rank 0 alone speaks.
    for text in ('"top1"', '"format": "imagefolder"', '"format": "webdataset"'):
        assert done.stdout.count(text) == 1
    two_ranks.generate(tmp_path / "alone")
    for form in ("imagefolder", "webdataset"):
        found, alone = (
            {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            for root in (tmp_path / form, tmp_path / "alone" / form)
        )
        assert found == alone and len(found) > 2


def torchrun(ranks: int, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, *"-m torch.distributed.run --standalone".split(), f"--nproc_per_node={ranks}"]
    pipes: dict[str, Any] = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *map(str, arguments)], **pipes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_ranks_are_killed(tmp_path: Path) -> None:
    """Ten times a rank of two or three is killed after a random step; the rest end, and the run can be resumed."""
    chance = random.Random(0)
    for i in range(47):  # shared out to no two or three ranks evenly
        path = tmp_path / "data" / "ab"[i % 5 == 0] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("L", (8, 8), chance.randbytes(64)).save(path)
    small = "--preset glow_tiny --flow depth=[1,1] --flow width=[8,8] --modes-rank 4 --sample-every 0 --device cpu"
    run = f"-m glem_augment train {tmp_path / 'data'} {small} --batch-size 15 --epochs 20 --augment crop --out"
    wanted = []
    for ranks in (2, 3):
        assert torchrun(ranks, *run.split(), tmp_path / str(ranks)).wait(200) == 0
        wanted.append((tmp_path / str(ranks) / "model.safetensors").read_bytes())
    for kill in range(10):
        ranks, out, step = 2 + kill % 2, tmp_path / f"kill{kill}", 1 + chance.randrange(19)
        job = torchrun(ranks, *run.split(), out)
        log = out / "metrics.jsonl"
        while not log.is_file() or len(log.read_text().splitlines()) < step:
            assert job.poll() is None
            time.sleep(0.01)
        victims = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(chance.choice(victims)), signal.SIGKILL)
        killed = time.monotonic()
        errors = job.communicate(timeout=60)[1]
        print(f"kill {kill}: {ranks} ranks, epoch {step}, ended after {time.monotonic() - killed:.1f} s", flush=True)
        assert job.returncode != 0 and "Signal 9 (SIGKILL)" in errors
        assert torchrun(ranks, *run.split(), out, "--resume").wait(200) == 0
        assert (out / "model.safetensors").read_bytes() == wanted[ranks - 2]
