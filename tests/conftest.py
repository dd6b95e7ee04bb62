from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from glem_augment.images.dataset import ImageData, open_data
from glem_augment.privacy import mechanism

# Small tensors gain nothing from a second thread, and beside other busy processes two threads wait for each other. The
# processes that tests start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True, scope="session")
def _noise_with_a_seed() -> None:
    """The noise of private fits follows `random.seed`, or a test would fail once in a hundred runs."""
    mechanism.os = SimpleNamespace(urandom=random.randbytes)  # type: ignore[assignment]


@pytest.fixture(scope="session")
def bundled_train() -> ImageData:
    """1000 real Fashion-MNIST training images, 1x28x28."""
    return open_data("bundled:fashion-mnist", "train")


@pytest.fixture(scope="session")
def bundled_test() -> ImageData:
    """1000 real Fashion-MNIST test images, 1x28x28."""
    return open_data("bundled:fashion-mnist", "test")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An ImageFolder of 3 classes x 4 RGB PNGs of 8x8, noise around a colour of the class."""
    generator = np.random.default_rng(0)
    for index, name in enumerate(("bird", "cat", "dog")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 80, (8, 8, 3))
            pixels[..., index] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"
