"""What the way around the flow costs: SyntheticDataset in a DataLoader and exported, GLEMAugment on a batch.

    python benchmarks/speed/pipeline.py [--models MODEL ...] [--rounds N] [--threads N] [--quick]

Each row is compared with the flow's own work, timed next to it in every round of one process; medians of the rounds.
`random:PRESET` is a GLEM of that size for 3x32x32 images with random weights, whose images are noise: the largest that
a PNG can be.

- loader: a new SyntheticDataset through a DataLoader (batches of 64, ToTensor, default collate), the start of workers
  included, against raw decode: `model.decode` of the same latents, drawn before, in blocks of 64, to uint8 on the CPU.
  Ratio of images/s.
- export: the same images as PNG files in a new folder, against raw decode.
- augment: a call of GLEMAugment(p=0.5) on 64 images, against encode + decode of as many rows as that call selected
  (half of the batch on average). Ratio of times.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

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
LOADERS: dict[str, dict[str, Any]] = {
    "0 workers": {"num_workers": 0},
    "0 workers, shuffled": {"num_workers": 0, "shuffle": True},
    "2 workers": {"num_workers": 2},
    "2 workers, shuffled": {"num_workers": 2, "shuffle": True},
}
AUGMENTS: list[dict[str, Any]] = [
    {"policy": "mixup", "partner": "same"},
    {"policy": "mixup", "partner": "any"},
    {"policy": "mixup", "partner": "any", "labels": "posterior"},
    {"policy": "noise"},
]


def random_model(preset: str, **overrides: Any) -> tuple[GLEM, Tensor, Tensor]:
    """A frozen GLEM of ten classes with random weights and with modes, and images of noise for it, uint8."""
    torch.manual_seed(0)
    model = GLEM.create(preset, (3, 32, 32), [f"class {i}" for i in range(10)], **overrides)
    images, labels = torch.randint(0, 256, (720, 3, 32, 32), dtype=torch.uint8), torch.arange(720) % 10
    model.initialise(images[:BATCH])
    for p in model.flow.parameters():
        # The last convolution of a subnet starts at zero, and then every coupling is the identity.
        if p.ndim == 4 and not p.any():
            nn.init.normal_(p, std=0.005)
    model.gaussians.randomise(0.5)
    model.eval().requires_grad_(False)
    model.fit_modes((images, labels), rank=64)
    return model, images, labels


def open_model(name: str) -> tuple[GLEM, Tensor, Tensor]:
    """The model called `name`, and a batch for it: images in [0, 1] [B, C, H, W], labels int64 [B]."""
    if name.startswith("random:"):
        model, images, labels = random_model(name.removeprefix("random:"))
        return model, images[:BATCH].float() / 255, labels[:BATCH]
    model, data = GLEM.from_pretrained(name), open_data(name, "train", progress=False)
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:BATCH].numpy()
    x, y = next(data.batches(index, BATCH))
    return model, x.float() / 255, y


def measure_synthetic(model: GLEM, per_class: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of the loaders and of the export."""

    def new() -> SyntheticDataset:
        return SyntheticDataset(model, per_class=per_class, transform=ToTensor())

    @torch.no_grad()
    def raw_decode() -> None:
        for z in latents:
            model.decode(z).mul_(255).round_().to(torch.uint8).cpu()

    def epoch(settings: dict[str, Any]) -> None:
        for _ in DataLoader(new(), BATCH, **settings):
            pass

    count = len(new())
    latents = [new().latents(range(i, min(i + BATCH, count))) for i in range(0, count, BATCH)]
    taken: dict[str, list[float]] = {name: [] for name in ["raw", *LOADERS, "PNG"]}
    for number in tqdm(range(rounds), desc="data set", unit="round", leave=False):
        before = seconds(raw_decode)
        for name, settings in LOADERS.items():
            taken[name].append(seconds(lambda s=settings: epoch(s)))
        taken["PNG"].append(seconds(lambda n=number: new().export(folder / f"export-{n}", progress=False)))
        # At both ends of the round, since the load of the machine may change meanwhile.
        taken["raw"].append((before + seconds(raw_decode)) / 2)
    rows = []
    for name, times in taken.items():
        part = {"raw": "raw decode", "PNG": "export"}.get(name, "loader")
        ratio = statistics.median(raw / own for raw, own in zip(taken["raw"], times, strict=True))
        rows.append(_row(part, name, times, count, ratio))
    return rows


def measure_augment(model: GLEM, x: Tensor, y: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Rows of GLEMAugment(p=0.5), one for each setting."""

    @torch.no_grad()
    def flow_alone(rows: int) -> None:
        model.decode(model.encode(x[:rows])[0])

    rows = []
    for settings in AUGMENTS:
        aug = GLEMAugment(model, p=0.5, seed=0, **settings)
        aug(x, y)  # makes its tables
        times, ratios = [], []
        for _ in range(rounds):
            before = aug.stats["selected"]
            times.append(seconds(lambda a=aug: a(x, y)))
            ratios.append(times[-1] / seconds(lambda n=aug.stats["selected"] - before: flow_alone(n)))
        rows.append(_row("augment", ", ".join(settings.values()), times, len(x), statistics.median(ratios)))
    return rows


def _row(part: str, setting: str, times: list[float], images: int, ratio: float) -> dict[str, Any]:
    wanted = WANTED.get(part)
    median = statistics.median(times)
    met = None if wanted is None else (ratio <= wanted if part == "augment" else ratio >= wanted)
    return {
        "part": part, "setting": setting, "median ms": 1e3 * median, "images/s": images / median, "ratio": ratio,
        "wanted": wanted and f"{'<=' if part == 'augment' else '>='} {wanted}", "met": met,
    }  # fmt: skip


def main() -> None:
    args = parser(__doc__)
    models = ["bundled:fashion-mnist", "random:mef_small"]
    args.add_argument("--models", nargs="+", default=models, help="saved models with modes, or random:PRESET")
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
    rounds = f"{args.rounds} rounds of {args.per_class} images of each class, {3 * args.rounds} batches of {BATCH}"
    title = "SyntheticDataset and GLEMAugment against the flow's own work"
    write_results(args.out, "pipeline", title, rows, rounds=rounds)


if __name__ == "__main__":
    main()
