"""Fine-tune any timm model with GLEMAugment: a short loop on timm's public API.

    python examples/finetune_timm.py --smoke
    python examples/finetune_timm.py --data photos/ --flow runs/photos --model resnet50.a1_in1k --img-size 224
    torchrun --nproc_per_node 8 examples/finetune_timm.py --config examples/eva02_imagenet.yaml --data imagenet/ ...

The data are an ImageFolder with train/ and val/. A config file holds the same options (with _ for -). The option
`augment` holds the settings of GLEMAugment. Lines marked (*) are the main additions to an ordinary loop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from _common import BUNDLED, bundled_folders, check_classes
from PIL import Image, ImageOps
from timm import utils
from timm.data import (
    ImageDataset,
    RealLabelsImagenet,
    auto_augment,
    create_dataset,
    create_loader,
    resolve_model_data_config,
)
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from glem_augment import GLEM, GLEMAugment
from glem_augment.images import match_classes


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's RandAugment asks for 0 bits at its highest level, which recent versions of Pillow refuse."""
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize

# Each option with its default and help text. Values on the command line are read as YAML.
OPTIONS: dict[str, tuple[Any, str]] = {
    "model": ("resnet18.a1_in1k", "timm's name of the model"),
    "pretrained": (True, "start from the published weights: true or false"),
    "num_classes": (None, "of the classifier; null: as many as train/ has"),
    "drop_path": (None, "rate of stochastic depth; null: the model's default"),
    "img_size": (None, "pixels; null: the model's default"),
    "mean": (None, "of the normalisation, YAML: [r, g, b]; null: the model's default"),
    "std": (None, "of the normalisation, YAML: [r, g, b]; null: the model's default"),
    "crop_mode": (None, "of validation: center, squash or border; null: the model's default"),
    "crop_pct": (None, "share of a validation image's side that is kept; null: the model's default"),
    "interpolation": (None, "bilinear, bicubic, ...; null: the model's default"),
    "scale": (None, "share of a training image's area that is kept, YAML: [least, most]; null: timm's [0.08, 1]"),
    "aa": ("rand-m9-mstd0.5-inc1", "timm's AutoAugment or RandAugment; null: off"),
    "color_jitter": (0.4, "strength, used without aa or with 3-Augment (aa 3a); null: off"),
    "reprob": (0.0, "probability of random erasing; 0: off"),
    "opt": ("adamw", "timm's name of the optimiser"),
    "lr": (5e-4, "highest learning rate"),
    "layer_decay": (None, "factor of the learning rate from each layer to the one below; null: off"),
    "weight_decay": (0.05, "of the optimiser; 0: off"),
    "betas": (None, "of the optimiser, YAML: [0.9, 0.999]; null: the optimiser's default"),
    "clip_grad": (None, "largest norm of the gradient; null: off"),
    "epochs": (15, "warm-up included"),
    "warmup_epochs": (2, "with a rising learning rate; 0: off"),
    "warmup_lr": (1e-6, "learning rate at the start of the warm-up"),
    "min_lr": (1e-6, "learning rate at the end"),
    "smoothing": (0.1, "of the labels; 0: off"),
    "ema_decay": (None, "decay of the moving average of the weights, which is scored too; null: off"),
    "batch_size": (64, "per GPU"),
    "accumulate": (1, "batches per update of the weights"),
    "amp": ("bfloat16", "precision of the classifier: bfloat16, float16 or null: float32"),
    "grad_checkpointing": (False, "needs less memory and more time: true or false"),
    "workers": (4, "processes that load images; 0: none"),
    "seed": (42, "of everything random"),
    "off_epoch": (None, "first epoch without the augmentation, counted from 0; null: never off"),
    "augment": (
        {"policy": {"name": "noise", "strength": 0.5}, "p": 0.5},
        "all settings of GLEMAugment (replaces the default), YAML: {policy: mixup, p: 0.3}",
    ),
}
DEFAULTS = {name: default for name, (default, _) in OPTIONS.items()}
SMOKE: dict[str, Any] = {
    "model": "resnet10t",
    "pretrained": False,
    "img_size": 64,
    "scale": [0.5, 1.0],
    "aa": None,
    "epochs": 2,
    "warmup_epochs": 1,
    "layer_decay": 0.8,
    "ema_decay": 0.9,
    "lr": 2e-3,
    "amp": None,
    "workers": 0,
    "augment": {"policy": {"name": "adversarial", "strength": 0.25}, "p": 0.5},
}


def options() -> argparse.Namespace:
    """Defaults, then the config file, then the command line."""
    places = {
        "data": (None, "folder with train/ and val/, required without --smoke"),
        "flow": (BUNDLED, "a folder, a bundled model, or org/name on the Hub"),
        "out": (None, "folder for checkpoints; a run resumes from a checkpoint in it"),
        "device": ("cuda" if torch.cuda.is_available() else "cpu", "of the training"),
    }
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Values are read as YAML; null (or none) means off where an option says so. --smoke has other defaults.",
    )
    parser.add_argument("--config", type=Path, help="YAML of these options")
    parser.add_argument("--smoke", action="store_true", help="a quick run on the bundled images")
    for name, (default, text) in places.items():
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    for name, (default, text) in OPTIONS.items():
        kind = value if name != "model" else str
        shown = default if isinstance(default, str) else json.dumps(default)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar="{bfloat16,float16,null}" if name == "amp" else None,
            help=f"{text} (default: {shown})",
        )
    given = vars(parser.parse_args())
    config = (yaml.safe_load(given["config"].read_text()) or {}) if given["config"] else {}
    config = {name: plain(v) if name in DEFAULTS else v for name, v in config.items()}
    unknown = set(config) - set(DEFAULTS) - set(places)
    if unknown:
        parser.error(f"{given['config']} has unknown options: {', '.join(sorted(unknown))}")
    defaults = {**{name: default for name, (default, _) in places.items()}, **DEFAULTS}
    merged = {**defaults, **(SMOKE if given["smoke"] else {}), **config, **given}
    if merged["data"] is None and not given["smoke"]:
        parser.error("give --data FOLDER, or --smoke")
    # argparse cannot check values from the config file.
    if merged["amp"] not in (None, "bfloat16", "float16"):
        parser.error(f"--amp must be bfloat16, float16 or null, got {merged['amp']}")
    for name in ("epochs", "batch_size", "accumulate"):
        if not isinstance(merged[name], int) or merged[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be a whole number of at least 1, got {merged[name]}")
    for name in ("data", "out"):
        merged[name] = None if merged[name] is None else Path(merged[name])
    return argparse.Namespace(**merged)


def value(text: str) -> Any:
    """The YAML value of an option's text."""
    return plain(yaml.safe_load(text))


def plain(found: Any) -> Any:
    """A YAML value, with "none" read as null; inside `augment`, "none" stays a string."""
    return None if isinstance(found, str) and found.lower() == "none" else numbers(found)


def numbers(found: Any) -> Any:
    """Convert strings such as 5e-4 to numbers: YAML reads a number without a point as text."""
    if isinstance(found, dict):
        return {key: numbers(item) for key, item in found.items()}
    if isinstance(found, list):
        return [numbers(item) for item in found]
    try:
        return float(found) if isinstance(found, str) else found
    except ValueError:
        return found


def datasets(root: Path) -> tuple[ImageDataset, ImageDataset]:
    """The images of root/train and root/val, labelled alike: by the classes of root/train."""
    if not ((root / "train").is_dir() and (root / "val").is_dir()):
        raise SystemExit(f"--data {root} needs folders train/ and val/, with a folder per class in each")
    # No search for splits, because a class may be called "train" or "val".
    train, val = (create_dataset("", root=str(root / split), search_split=False) for split in ("train", "val"))
    labels = train.reader.class_to_idx
    # timm would leave out images of other classes silently.
    check_classes(root / "val", val.reader.class_to_idx, labels)
    # Without class_map, timm numbers the classes in val/. If val/ lacks a class, these numbers differ from train/.
    return train, create_dataset("", root=str(root / "val"), search_split=False, class_map=labels)


def main() -> None:
    args = options()
    with tempfile.TemporaryDirectory() as folder:
        run(args, args.data or bundled_folders(Path(folder), per_class=40))


def run(args: argparse.Namespace, root: Path) -> None:
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    primary = utils.is_primary(args)

    # Data
    train, val = datasets(root)
    names = sorted(train.reader.class_to_idx, key=train.reader.class_to_idx.__getitem__)
    cfg = get_pretrained_cfg(args.model)
    fixed = cfg is not None and cfg.fixed_input_size  # transformers; convolutions take any size
    settings = {"img_size": args.img_size} if args.img_size and fixed else {}
    settings |= {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    net = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=args.num_classes or len(names), **settings
    ).to(device)
    if args.grad_checkpointing:
        net.set_grad_checkpointing()
    config = resolve_model_data_config(net, vars(args))
    common = {
        "input_size": config["input_size"],
        "batch_size": args.batch_size,
        "mean": config["mean"],
        "std": config["std"],
        "interpolation": config["interpolation"],
        "num_workers": args.workers,
        "device": device,
        "persistent_workers": args.workers > 0,
    }
    train_loader = create_loader(
        train,
        is_training=True,
        scale=args.scale,
        auto_augment=args.aa,
        color_jitter=args.color_jitter,
        re_prob=args.reprob,
        distributed=args.distributed,
        **common,
    )
    val_loader = create_loader(val, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"], **common)

    # Augmentation (*)
    flow = GLEM.from_pretrained(args.flow, device=device)
    class_map = match_classes(flow, names, partial=True).tolist()
    augment = {**args.augment, "mean": config["mean"], "std": config["std"], "seed": args.seed}
    # The classifier may have more classes than the data, for example 1000 for a few classes of ImageNet.
    class_map += [-1] * (net.num_classes - len(class_map))
    aug = GLEMAugment(flow, class_map=class_map, **augment)
    train_loader = aug.wrap(train_loader, off_epoch=args.off_epoch)
    soft = aug.target(torch.zeros(1, dtype=torch.int64)).ndim == 2
    if primary:
        print(aug)

    # Optimisation
    optimizer = create_optimizer_v2(
        net,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        **({} if args.betas is None else {"betas": tuple(args.betas)}),
    )
    updates = len(train_loader) // args.accumulate
    if updates == 0:
        raise SystemExit(
            f"{len(train)} training images make no {args.accumulate} whole batches of {args.batch_size}: lower "
            "--batch-size or --accumulate"
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    ema = None if args.ema_decay is None else utils.ModelEmaV3(net, decay=args.ema_decay)
    loss_fn = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(args.smoothing)
    model = net
    if args.distributed:
        model = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    dtype = None if args.amp is None else getattr(torch, args.amp)
    if aug.policy.wants_classifier:
        aug.attach(model, autocast=dtype)  # (*)
    scaler = None
    if dtype == torch.float16:  # small gradients would be zero in float16
        # Only newer versions of timm take a device; CUDA is the default in all versions.
        scaler = utils.NativeScaler(**({} if device.type == "cuda" else {"device": device.type}))

    state: dict[str, Any] = {"net": net, "ema": ema, "optimizer": optimizer, "scaler": scaler, "aug": aug}
    state = {name: part for name, part in state.items() if part is not None}
    start = resume(args.out, state, device)
    final: dict[str, Any] = {}
    train_loader.epoch = start
    for epoch in range(start, args.epochs):
        if args.distributed:
            train_loader.sampler.set_epoch(epoch)
        began, seen = time.monotonic(), utils.AverageMeter()
        model.train()
        scheduler.step_update(epoch * updates)
        for step, (x, y) in enumerate(train_loader):
            if step >= updates * args.accumulate:
                break
            last = (step + 1) % args.accumulate == 0
            if soft:
                y = y * (1 - args.smoothing) + args.smoothing / y.shape[1]
            with contextlib.nullcontext() if last or not args.distributed else model.no_sync():
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    loss = loss_fn(model(x), y) / args.accumulate
                if scaler is None:
                    loss.backward()
                else:  # with the update
                    scaler(loss, optimizer, args.clip_grad or None, parameters=net.parameters(), need_update=last)
            seen.update(loss.detach() * args.accumulate, len(x))
            if not last:
                continue
            if scaler is None:
                if args.clip_grad:
                    utils.dispatch_clip_grad(net.parameters(), args.clip_grad)
                optimizer.step()
            optimizer.zero_grad()
            done = epoch * updates + (step + 1) // args.accumulate
            if ema is not None:
                ema.update(net, step=done)
            scheduler.step_update(done)
        if args.distributed:  # average BatchNorm's statistics, which differ between processes
            utils.distribute_bn(model, args.world_size, reduce=True)
        if primary:
            scores = final = evaluate(net, val_loader, val, device, dtype)
            if ema is not None:
                # At first the average contains much of the initial weights, and scores far below the current weights.
                final = evaluate(ema.module, val_loader, val, device, dtype)
                scores = {**scores, **{f"{name}_ema": score for name, score in final.items()}}
            row = {"epoch": epoch, "loss": round(float(seen.avg), 4), **scores, "seconds": time.monotonic() - began}
            print(json.dumps(row), flush=True)
            save(args.out, state, epoch + 1)
    if primary:
        if final:
            listed = ", ".join(f"{name} {score} %" for name, score in final.items())
            print(f"{'weights' if ema is None else 'EMA of the weights'} after epoch {epoch}: {listed}")
        print(f"augmented: {aug.stats}")


@torch.inference_mode()
def evaluate(net: nn.Module, loader: Any, data: Any, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Top-1 and top-5 in percent, and both with ImageNet-ReaL labels if all 50,000 validation images are there."""
    net.eval()
    files = [os.path.basename(name) for name in data.filenames(basename=True)]
    # ReaL finds the labels of an image by its original name.
    real = None
    if len(files) == 50_000 and all(name.startswith("ILSVRC2012_val_") for name in files):
        real = RealLabelsImagenet(files)
    top1, top5 = utils.AverageMeter(), utils.AverageMeter()
    for x, y in loader:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = net(x).float()
        one, five = utils.accuracy(output, y, topk=(1, min(5, output.shape[1])))
        top1.update(one.item(), len(x))
        top5.update(five.item(), len(x))
        if real is not None:
            real.add_result(output)
    scores = {"top1": round(top1.avg, 3), "top5": round(top5.avg, 3)}
    if real is not None:
        scores |= {f"real{k}": round(real.get_accuracy(k=k), 3) for k in (1, 5)}
    return scores


def save(folder: Path | None, state: dict[str, Any], epoch: int) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".last.{os.getpid()}.tmp"
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in state.items()}}, temporary)
    os.replace(temporary, folder / "last.pt")


def resume(folder: Path | None, state: dict[str, Any], device: torch.device) -> int:
    """The next epoch."""
    if folder is None or not (folder / "last.pt").exists():
        return 0
    kept = torch.load(folder / "last.pt", map_location=device, weights_only=True)
    parts = [name for name in kept if name != "epoch"]
    if set(parts) != set(state):
        raise SystemExit(
            f"{folder / 'last.pt'} holds {', '.join(parts)}, this run has {', '.join(state)}: set --ema-decay and "
            "--amp as they were, or give another --out"
        )
    for name, part in state.items():
        part.load_state_dict(kept[name])
    return kept["epoch"]


if __name__ == "__main__":
    main()
