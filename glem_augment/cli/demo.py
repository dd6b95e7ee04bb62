"""``glem demo``: a flow measured, looked at and put to use on the bundled Fashion-MNIST images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from tqdm import tqdm

from glem_augment.augment.transform import GLEMAugment
from glem_augment.cli.demo_report import arms_text, markdown, measured_text
from glem_augment.data.dataset import ImageData, match_classes, open_data
from glem_augment.errors import DataError
from glem_augment.evaluation.metrics import evaluate
from glem_augment.evaluation.preview import contact_sheet, preview
from glem_augment.io import atomic_write, save_png, write_json
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.dataset import SyntheticDataset

__all__ = ["DemoSettings", "run_demo"]

DATA = "bundled:fashion-mnist"
# A timm network of 0.2 million weights that learns from 1000 images in seconds on a CPU. Network and learning rate were
# chosen for the arm without augmentation, on a held-out quarter of the training images.
NETWORK = "test_byobnet"
NOT_LIKE_FOR_LIKE = (
    "Not like for like: the classifier sees {images} real images in every arm, but the flow and its modes were fitted "
    "on other images too ({flow_images} in all), so what they add is knowledge that the {images} do not hold. The "
    "identity arm has no such help: the same transform, along the modes of the {images} images' own pixels."
)


@dataclass
class DemoSettings:
    """Sizes of the demo; the defaults take a few minutes on 2 cores.

    Attributes:
        seeds: training runs per arm; epochs, batch_size, lr: of each.
        views: augmented copies of every training image; p: how often one takes the place of the original.
        per_class: synthetic images to write.
        images: real images to use of the bundled 1000 per split, evenly over the classes.
    """

    seeds: int = 3
    epochs: int = 40
    batch_size: int = 50
    lr: float = 1e-2
    views: int = 6
    p: float = 0.5
    per_class: int = 20
    images: int = 1000

    @classmethod
    def quick(cls) -> DemoSettings:
        """A smoke test."""
        return cls(seeds=1, epochs=2, views=1, per_class=2, images=100)


def run_demo(
    out: str | Path,
    model: str = DATA,
    seeds: int | None = None,
    epochs: int | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Run the demo; prints the report, and writes report.json, report.md, preview.png, synthetic/ and synthetic.png.

    Args:
        out: folder for the results; those of an earlier demo are replaced.
        model: a flow for 1x28x28 images of Fashion-MNIST's classes, with modes.
        seeds, epochs: in place of the defaults of ``DemoSettings``.
        quick: ``DemoSettings.quick()``.

    Returns:
        The report.

    Raises:
        GLEMError, OSError: the model can't be read or does not fit the data; ``out`` can't be written.
    """
    began, out = time.monotonic(), Path(out)
    settings = DemoSettings.quick() if quick else DemoSettings()
    settings.seeds, settings.epochs = seeds or settings.seeds, epochs or settings.epochs
    flow = GLEM.from_pretrained(model)
    train, test = (_images(flow, split, settings.images) for split in ("train", "test"))
    if flow.modes is None:
        raise DataError(f"{model} has no class modes; train it with --modes-rank above 0")
    out.mkdir(parents=True, exist_ok=True)

    print(f"1. The flow on {len(test)} bundled test images\n   {flow!r}", flush=True)
    measured = evaluate(flow, test)
    print(measured_text(measured), flush=True)

    print("2. Pictures and a synthetic data set", flush=True)
    save_png(preview(flow, test), out / "preview.png")
    synthetic = SyntheticDataset(flow, per_class=settings.per_class, temperature=0.8, seed=0)
    synthetic.export(out / "synthetic", overwrite=True)
    sheet = contact_sheet(
        synthetic.images(range(len(synthetic))),
        synthetic.targets,
        synthetic.classes,
        "Synthetic images",
        f"{settings.per_class} of each class from {model}, temperature 0.8, seed 0",
    )
    save_png(sheet, out / "synthetic.png")
    print(f"   {out / 'preview.png'}, {out / 'synthetic.png'}, {len(synthetic)} images in {out / 'synthetic'}")

    print(f"3. A {NETWORK} trained on {len(train)} images, {settings.seeds} seed(s) per arm", flush=True)
    arms = _arms(flow, train, test, settings)
    trained_on = flow.config.training.get("images", "an unknown number")
    report = {
        "model": model,
        "data": DATA,
        "flow": {key: value for key, value in measured.items() if key not in ("device", "threads")},
        "classifier": {
            "network": NETWORK,
            "train_images": len(train),
            "test_images": len(test),
            "steps": settings.epochs * (len(train) // min(settings.batch_size, len(train))),
            "settings": vars(settings),
            "arms": arms,
            "caution": NOT_LIKE_FOR_LIKE.format(images=len(train), flow_images=trained_on),
        },
        "quick": quick,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(out / "report.json", report)
    text = markdown(report)
    with atomic_write(out / "report.md", "w") as file:
        file.write(text)
    print(arms_text(report))
    print(f"Done in {report['seconds']:.0f} s; the report is in {out / 'report.md'}", flush=True)
    return report


# ---- data ----------------------------------------------------------------------------------------------------------


def _images(flow: GLEM, split: str, count: int) -> ImageData:
    """Bundled images, labelled by the flow's class indices."""
    data = open_data(DATA, split, progress=False)
    if tuple(data.image_shape) != flow.image_shape:
        raise DataError(f"the demo's images are {data.image_shape}, the flow takes {flow.image_shape}")
    match = match_classes(flow.class_ids, flow.classes, data.class_ids, data.classes)
    data = data.with_targets(match[data.targets], flow.classes, flow.class_ids)
    per_class = max(2, count // len(flow.classes))
    rows = [np.flatnonzero(data.targets == index)[:per_class] for index in np.unique(data.targets)]
    return data.subset(np.sort(np.concatenate(rows)))


def augmented_views(aug: GLEMAugment, data: ImageData, views: int, seed: int, desc: str) -> Tensor:
    """Augmented copies of all images: uint8 [views, N, C, H, W]. Batches are shuffled, so partners vary.

    Made once and used for all seeds: on a CPU the flow costs more than the small network.
    """
    out = torch.empty(views, len(data), *data.image_shape, dtype=torch.uint8)
    bar = tqdm(total=views * len(data), unit="image", desc=f"   {desc}", dynamic_ncols=True)
    for view in range(views):
        order = np.random.default_rng([seed, view]).permutation(len(data))
        start = 0
        for x, y in data.batches(order, 250):
            out[view, torch.from_numpy(order[start : start + len(y)])] = aug(x, y)[0]
            start += len(y)
            bar.update(len(y))
    bar.close()
    return out


# ---- the classifier ------------------------------------------------------------------------------------------------


def _arms(flow: GLEM, train: ImageData, test: ImageData, settings: DemoSettings) -> dict[str, Any]:
    """Accuracies of every arm. All arms share network, steps, batches and the seeds of both."""
    identity = GLEM.create("identity", flow.image_shape, flow.classes, flow.class_ids, bits=flow.bits)
    smallest = int(np.bincount(train.targets)[np.unique(train.targets)].min())
    rank = min(flow.modes.rank if flow.modes is not None else 1, smallest - 1)
    identity.fit_modes(train, rank=rank)
    pools: dict[str, Tensor | None] = {"no augmentation": None}
    for name, source in (("GLEMAugment", flow), ("identity control", identity)):
        aug = GLEMAugment(source.eval(), p=1.0, modes=rank, seed=0)
        pools[name] = augmented_views(aug, train, settings.views, 0, f"{name}: augmenting")
    total = len(pools) * settings.seeds
    arms: dict[str, Any] = {name: {"accuracies": []} for name in pools}
    with tqdm(total=total * settings.epochs, unit="epoch", desc="   training", dynamic_ncols=True) as bar:
        # Seeds outside: a run that is stopped early has the same number of runs in every arm.
        for seed in range(settings.seeds):
            for name, pool in pools.items():
                arms[name]["accuracies"].append(train_classifier(train, test, pool, seed, settings, bar))
    for arm in arms.values():
        arm["mean"] = float(np.mean(arm["accuracies"]))
        arm["std"] = float(np.std(arm["accuracies"], ddof=1)) if settings.seeds > 1 else None
    return arms


def train_classifier(
    train: ImageData, test: ImageData, pool: Tensor | None, seed: int, settings: DemoSettings, bar: Any = None
) -> float:
    """Train one network from scratch, and return its accuracy on ``test`` after the last step.

    Args:
        pool: uint8 [views, N, C, H, W], augmented copies of the training images; None trains on the originals alone.
            No other augmentation is used, in any arm.
    """
    torch.manual_seed(seed)
    network = create_model(NETWORK, num_classes=len(train.classes), in_chans=train.image_shape[0])
    x, y = _normalised(train.tensor()), torch.from_numpy(train.targets)
    views = None if pool is None else _normalised(pool)
    batch = min(settings.batch_size, len(train))
    steps = settings.epochs * (len(train) // batch)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=settings.lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=settings.lr / 100, t_in_epochs=False
    )
    network.train()
    step = 0
    for rows, chosen in _batches(len(train), batch, seed, settings, 0 if views is None else len(views)):
        images = x[rows]
        if views is not None:
            use = chosen >= 0
            images = torch.where(use[:, None, None, None], views[chosen.clamp_min(0), rows], images)
        loss = F.cross_entropy(network(images), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        scheduler.step_update(step)
        if bar is not None and step % (len(train) // batch) == 0:
            bar.update(1)
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(part).argmax(1) for part in _normalised(test.tensor()).split(250)])
    return float((predicted == torch.from_numpy(test.targets)).float().mean())


def _batches(count: int, batch: int, seed: int, settings: DemoSettings, views: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, view of each row or -1 for the original): the rows depend on the seed alone, not on the arm."""
    for epoch in range(settings.epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(count)
        use = rng.random(count) < settings.p
        view = np.where(use, rng.integers(0, max(1, views), count), -1)
        for start in range(0, count - batch + 1, batch):
            yield torch.from_numpy(order[start : start + batch]), torch.from_numpy(view[start : start + batch])


def _normalised(x: Tensor | None) -> Tensor:
    assert x is not None
    return (x.float() / 255 - 0.286) / 0.353
