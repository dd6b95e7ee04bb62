"""Shared by the examples: bundled images as folders, and a short training run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from glem_augment import open_data
from glem_augment.images.sources import without_splits

BUNDLED = "bundled:fashion-mnist"


def bundled_folders(root: Path, per_class: int = 100) -> Path:
    """The bundled Fashion-MNIST images (100 per class and split) as root/{train,val}/<class>/*.png."""
    for split, folder in (("train", "train"), ("test", "val")):
        data = open_data(BUNDLED, split, progress=False)
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
    if without_splits(data):
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
