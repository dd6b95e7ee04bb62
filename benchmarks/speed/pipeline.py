"""What the way around the flow costs: SyntheticDataset in a DataLoader and exported, GLEMAugment on a batch.

    python benchmarks/speed/pipeline.py [--models MODEL ...] [--rounds N] [--threads N] [--quick]

Each row is compared with the flow's own work, timed next to it in every round of one process; medians of the rounds.
``random:PRESET`` is a GLEM of that size for 3x32x32 images with random weights, whose images are noise: the largest
that a PNG can be.

- loader: a new SyntheticDataset through a DataLoader (batches of 64, or of 32, to which half a block of images
  belongs; ToTensor, default collate), start of the workers included (50 to 80 ms: with ``--per-class 64`` little else
  is seen of them); against raw decode, that is ``model.decode`` of the same latents, drawn before, in the same blocks
  of 64, to uint8 on the CPU. Ratio of images/s. "again" is a second epoch, from the cache, and is not judged.
- export: the same images as PNG files into a new folder, likewise.
- augment: a call of GLEMAugment(p=0.5) on 64 images, against encode + decode of as many rows as that call selected
  (half of the batch on average). Ratio of times.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, seconds, write_results
from glem_augment import GLEM, GLEMAugment, SyntheticDataset, open_data

BATCH = 64
# At least (loader, export) or at most (augment) this ratio is wanted.
WANTED = {"loader": 0.9, "export": 0.7, "augment": 1.15}
LOADERS: list[dict[str, Any]] = [
    {"workers": workers, "batch": batch, "shuffle": shuffle, "again": again}
    for workers in (0, 2)
    for batch, shuffle, again in (
        (BATCH, False, False),
        (BATCH, True, False),
        (BATCH // 2, False, False),
        (BATCH, False, True),
    )
]
AUGMENTS: list[dict[str, Any]] = [
    {"policy": "mixup", "partner": "same"},
    {"policy": "mixup", "partner": "same", "labels": "mix"},
    {"policy": "mixup", "partner": "any"},
    {"policy": "mixup", "partner": "any", "labels": "posterior"},
    {"policy": "mixup", "partner": "same", "basis": "shared"},
    {"policy": "noise"},
    {"policy": "noise", "labels": "posterior"},
]


def random_model(preset: str, per_class: int = 72, **overrides: Any) -> tuple[GLEM, Tensor, Tensor]:
    """A GLEM of ten classes with random weights, with modes, and images of noise for it.

    Args:
        preset: flow size.
        per_class: images made of each class; more than the 64 modes that are fitted.
        overrides: of the preset's numbers.

    Returns:
        The model, frozen; uint8 images [10 per_class, 3, 32, 32]; int64 labels.
    """
    torch.manual_seed(0)
    model = GLEM.create(preset, (3, 32, 32), [f"class {i}" for i in range(10)], **overrides)
    images = torch.randint(0, 256, (10 * per_class, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(10).repeat(per_class)
    model.initialise(images[:BATCH])
    for p in model.flow.parameters():
        # The last convolution of a subnet starts at zero, and then every coupling is the identity.
        if p.ndim == 4 and not p.any():
            nn.init.normal_(p, std=0.005)
    model.gaussians.randomise(0.5)
    model.eval().requires_grad_(False)
    model.fit_modes((images, labels), rank=min(64, per_class - 1))
    return model, images, labels


def open_model(name: str) -> tuple[GLEM, Tensor, Tensor]:
    """The model called ``name``, and a batch for it: images in [0, 1] [B, C, H, W], labels int64 [B]."""
    if name.startswith("random:"):
        model, images, labels = random_model(name.removeprefix("random:"))
        return model, images[:BATCH].float() / 255, labels[:BATCH]
    model, data = GLEM.from_pretrained(name), open_data(name, "train", progress=False)
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:BATCH].numpy()
    x, y = next(data.batches(index, BATCH))
    return model, x.float() / 255, torch.as_tensor(np.asarray(y), dtype=torch.int64)


def raw_decode(model: GLEM, latents: list[Tensor]) -> None:
    """Blocks of latents to uint8 images on the CPU, and nothing else."""
    with torch.no_grad():
        for z in latents:
            model.decode(z).mul_(255).round_().to(torch.uint8).cpu()


def epoch(data: SyntheticDataset, workers: int, batch: int, shuffle: bool) -> None:
    count = sum(len(y) for _, y in DataLoader(data, batch, shuffle=shuffle, num_workers=workers))
    assert count == len(data)


def name_of(loader: dict[str, Any]) -> str:
    small = f", batches of {loader['batch']}" if loader["batch"] != BATCH else ""
    return f"{loader['workers']} workers{small}" + ", shuffled" * loader["shuffle"] + ", again" * loader["again"]


def measure_synthetic(model: GLEM, per_class: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of the loaders and of the export."""

    def new() -> SyntheticDataset:
        return SyntheticDataset(model, per_class=per_class, transform=ToTensor())

    data = new()
    starts = range(0, len(data), per_class)
    latents = [
        data.latents(range(start + first, start + min(first + BATCH, per_class)))
        for start in starts
        for first in range(0, per_class, BATCH)
    ]
    raw_decode(model, latents[:2])
    names = [name_of(loader) for loader in LOADERS]
    taken: dict[str, list[float]] = {name: [] for name in ["raw", *names, "PNG"]}
    for number in tqdm(range(rounds), desc="data set", unit="round", leave=False):
        before = seconds(lambda: raw_decode(model, latents))
        for name, loader in zip(names, LOADERS, strict=True):
            # A new data set has an empty cache; "again" reads the one that its row above has filled.
            data = data if loader["again"] else new()
            settings = loader["workers"], loader["batch"], loader["shuffle"]
            taken[name].append(seconds(lambda s=settings, d=data: epoch(d, *s)))
        target, fresh = folder / f"export-{number}", new()
        # Left there until the end: for a minute after many files are deleted, ext4 is slow to make new ones.
        taken["PNG"].append(seconds(lambda t=target, d=fresh: d.export(t, progress=False)))
        # At both ends of the round: what the machine does besides may change meanwhile.
        taken["raw"].append((before + seconds(lambda: raw_decode(model, latents))) / 2)
    rows = []
    for name, times in taken.items():
        part = "export" if name == "PNG" else "loader"
        ratio = statistics.median(raw / own for raw, own in zip(taken["raw"], times, strict=True))
        wanted = None if name == "raw" or "again" in name else WANTED[part]
        rows.append(
            {
                "part": "raw decode" if name == "raw" else part,
                "setting": "" if name == "raw" else name,
                "median ms": 1e3 * statistics.median(times),
                "images/s": len(new()) / statistics.median(times),
                "ratio": ratio,
                "wanted": None if wanted is None else f">= {wanted}",
                "met": None if wanted is None else ratio >= wanted,
            }
        )
    return rows


def measure_augment(model: GLEM, x: Tensor, y: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Rows of GLEMAugment(p=0.5), one for each setting."""
    modes = min(64, model.modes.rank)
    augments = [GLEMAugment(model, p=0.5, seed=0, modes=modes, **settings) for settings in AUGMENTS]
    times: list[list[float]] = [[] for _ in augments]
    ratios: list[list[float]] = [[] for _ in augments]

    @torch.no_grad()
    def flow_alone(rows: int) -> None:
        model.decode(model.encode(x[:rows])[0])

    flow_alone(len(x) // 2)
    for aug in augments:  # tables are made at the first batch
        aug(x, y)
    for _ in tqdm(range(rounds), desc="augment", unit="round", leave=False):
        for aug, own, ratio in zip(augments, times, ratios, strict=True):
            before = aug.stats["selected"]
            own.append(seconds(lambda a=aug: a(x, y)))
            selected = aug.stats["selected"] - before
            ratio.append(own[-1] / seconds(lambda n=selected: flow_alone(n)))
    rows = []
    for settings, aug, own, ratio in zip(AUGMENTS, augments, times, ratios, strict=True):
        middle = statistics.median(ratio)
        rows.append(
            {
                "part": "augment",
                "setting": ", ".join(settings.values()),
                "median ms": 1e3 * statistics.median(own),
                "images/s": len(x) / statistics.median(own),
                "ratio": middle,
                "wanted": f"<= {WANTED['augment']}",
                "met": middle <= WANTED["augment"],
                "rows selected": aug.stats["selected"] / (rounds + 1),
            }
        )
    return rows


def main() -> None:
    args = parser(__doc__)
    args.add_argument(
        "--models",
        nargs="+",
        default=["bundled:fashion-mnist", "random:mef_small"],
        help="saved models with modes, whose name open_data knows too, or random:PRESET (%(default)s)",
    )
    args.add_argument("--per-class", type=int, default=256, help="synthetic images of each class (%(default)s)")
    args.add_argument("--rounds", type=int, default=4, help="of the data set; three times as many calls of augment")
    args.add_argument("--quick", action="store_true", help="2 rounds of 40 images per class: to see that it runs")
    args = args.parse_args()
    if args.quick:
        args.rounds, args.per_class = 2, 40
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model, x, y = open_model(name)
        with tempfile.TemporaryDirectory(prefix="glem-") as folder:
            found = measure_synthetic(model, args.per_class, args.rounds, Path(folder))
        rows += [{"model": name, **row} for row in found + measure_augment(model, x, y, 3 * args.rounds)]
    columns = list(rows[-1])
    write_results(
        args.out,
        "pipeline",
        "SyntheticDataset and GLEMAugment against the flow's own work",
        [{column: row.get(column) for column in columns} for row in rows],
        rounds=f"{args.rounds} rounds of {args.per_class} images of each class, {3 * args.rounds} batches of {BATCH}",
    )


if __name__ == "__main__":
    main()
