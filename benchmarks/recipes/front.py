"""Draws docs/front.png: for each bundled flow, real images of six classes, their moves, and drawn images.

    GLEM_DATA=... python benchmarks/recipes/front.py    # cifar10, imagenette128 and tiny-imagenet/val are folders there

The images are the first test images of their classes, and the draws have the seed 0: nothing is picked.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images
from glem_augment import GLEM, GLEMAugment, Mixup, Noise, SyntheticDataset, open_data
from glem_augment.evaluation.pictures import Section, compose, unit
from glem_augment.images.dataset import images_for
from glem_augment.io import save_png

OUT = Path(__file__).parents[2] / "docs" / "front.png"
# Model, folder of GLEM_DATA (None: in the package), the classes that are shown.
SHOWN: tuple[tuple[str, str | None, tuple[int, ...]], ...] = (
    ("cifar10", "cifar10", (0, 1, 4, 7, 8, 9)),
    ("fashion-mnist", None, (1, 2, 5, 7, 8, 9)),
    ("tiny-imagenet", "tiny-imagenet", (0, 30, 60, 102, 130, 160)),
)
MOVES = (Mixup(), Mixup(), Noise(0.5), Noise(0.5))
COLUMNS = ("real", "Mixup", "", "Noise(0.5)", "", "drawn", "", "", "")
DRAWN = 4


def section(name: str, folder: str | None, classes: tuple[int, ...]) -> Section:
    """Rows of classes; columns of a real image, its moves, and drawn images."""
    model = GLEM.from_pretrained(f"bundled:{name}")
    spec = f"bundled:{name}" if folder is None else find_images("front", folder, folder)
    data = images_for(model, open_data(spec, "test", image_size=model.image_shape[1]))
    of_class = [(torch.from_numpy(data.targets) == k).nonzero()[:DRAWN, 0] for k in classes]
    x, y = next(iter(data.batches(torch.cat(of_class).numpy(), DRAWN * len(classes))))
    columns: list[Tensor] = [x[::DRAWN]]
    for seed, policy in enumerate(MOVES):  # the other images of a class are partners of the first
        columns.append(
            GLEMAugment(model, policy, p=1.0, class_map=range(model.num_classes), seed=seed)(x, y)[0][::DRAWN]
        )
    counts = [DRAWN if k in classes else 0 for k in range(model.num_classes)]
    drawn = SyntheticDataset(model, counts)
    images = drawn.images(range(len(drawn))).unflatten(0, (len(classes), DRAWN))
    cells = torch.cat([torch.stack(columns, 1), images], 1)
    return Section(f"bundled:{name}", unit(cells, model.pixel_range), COLUMNS, [model.classes[k] for k in classes])


def main() -> None:
    torch.set_num_threads(1)
    save_png(compose("", [section(*each) for each in SHOWN]), OUT)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
