"""Shared by the examples: bundled images as folders, short trainings of small networks, and intervals."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from glem_augment import open_data

BUNDLED = "bundled:fashion-mnist"
MEAN, STD = 0.5, 0.25  # by which `normalised` images are normalised


def bundled_folders(root: Path, per_class: int = 100) -> Path:
    """The bundled Fashion-MNIST images (100 per class and split) as root/{train,val}/<class>/*.png."""
    for split, folder in (("train", "train"), ("test", "val")):
        data = open_data(BUNDLED, split)
        seen: dict[int, int] = {}
        for image, label in data:
            seen[label] = seen.get(label, 0) + 1
            if seen[label] > per_class:
                continue
            place = root / folder / data.classes[label].replace("/", "-")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{seen[label]:04d}.png")
    return root


def check_classes(where: str | Path, tested: Iterable[str], trained: Iterable[str]) -> None:
    """Stop if test images have a class without training images: the network has no output for the class."""
    others = sorted(set(tested) - set(trained))
    if others:
        raise SystemExit(
            f"{where} has test images of classes without training images: {', '.join(others[:10])}"
            f"{', ...' if len(others) > 10 else ''}; remove these folders, or add training images of the same name"
        )


def check_splits(data: str) -> None:
    """Stop if the data has no splits: `open_data` would give the same images for training and test."""
    if Path(data).is_dir() and not (Path(data) / "train").is_dir():
        raise SystemExit(f"--data {data} needs folders train/ and test/ (or val/), with a folder per class in each")


def tensors(image: Image.Image) -> Tensor:
    """A PIL image as float [C, H, W] in [0, 1]."""
    return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)


def batches(data: Dataset, batch_size: int, seed: int) -> DataLoader:
    """Shuffled batches; the seed determines the order."""
    batch_size = min(batch_size, len(data))  # type: ignore[arg-type]
    return DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))


def train(
    loader: DataLoader, classes: int, channels: int, epochs: int, seed: int, name: str = "resnet10t"
) -> nn.Module:
    """A small timm network from scratch: SGD with a one-cycle schedule, flips in the loop."""
    torch.manual_seed(seed)
    net = timm.create_model(name, num_classes=classes, in_chans=channels)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    flip = v2.RandomHorizontalFlip()
    began = time.monotonic()
    for _ in range(epochs):
        net.train()
        for x, y in loader:
            loss = F.cross_entropy(net(flip(x)), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    print(f"  {epochs} epochs, last loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return net.eval()


@torch.no_grad()
def predictions(net: nn.Module, x: Tensor, batch_size: int = 250) -> Tensor:
    """Predicted classes, int64 [N]."""
    return torch.cat([net(part).argmax(1) for part in x.split(batch_size)])


# ---- networks on images uint8 ----------------------------------------------------------------------------------------


def normalised(x: Tensor) -> Tensor:
    """Images uint8, normalised: float."""
    return (x.float() / 255 - MEAN) / STD


def new_network(name: str, channels: int, classes: int, seed: int = 0, pretrained: bool = False) -> nn.Module:
    """A network of timm; the seed is of its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained, num_classes=classes, in_chans=channels)


def fit(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int, rate: float = 1e-2) -> nn.Module:
    """Train a network on `steps` batches of images float [B, C, H, W] and labels, hard or soft, in eval mode then.

    AdamW with a one-cycle schedule, whose highest learning rate is `rate`.
    """
    network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    for _, (x, y) in zip(range(steps), batches, strict=False):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def percent(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the images uint8 that a network in eval mode recognises; they are normalised for it."""
    with torch.inference_mode():
        right = [
            network(normalised(part)).argmax(1) == y[i * 256 : (i + 1) * 256] for i, part in enumerate(x.split(256))
        ]
    return 100 * float(torch.cat(right).double().mean())


# Two-sided 97.5 % points of Student's t for 1 to 9 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of 2 to 10 values."""
    return STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def arguments(description: str) -> argparse.ArgumentParser:
    """The common options of the small examples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a quick run on a few of the bundled images")
    parser.add_argument("--data", default=BUNDLED, help="images, training and test: see glem_augment.open_data")
    parser.add_argument("--flow", default=BUNDLED, help="a folder, a bundled model, or org/name on the Hub")
    parser.add_argument("--adapt", action="store_true", help="adapt the model to the classes of the training images")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser
