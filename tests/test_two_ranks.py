"""torchrun with two ranks: the example for timm, `glem generate`, GLEMAugment around DistributedDataParallel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
