"""How many test images a private model recognises, by its own posterior (`GLEM.predict`), for sets of several sizes.

    python benchmarks/private_predict.py rows.csv cifar10 CIFAR10/train CIFAR10/test --per-class 100 300 --epsilon 1 10

It encodes the images once (--cache keeps the latents), takes the first images of each class in a random order with a
public seed, and fits with the mechanism's own noise: `privacy.fit.private_classes`, which `GLEM.fit` calls.
--held-out N takes N training images of each class in place of the test images, for choices. Rows are added to the file.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from glem_augment import Privacy, open_data
from glem_augment.codec.autoencoder import StandardisedAutoencoder
from glem_augment.codec.published import open_autoencoder, prior_file
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.fit import private_classes

COLUMNS = ("setting", "arm", "seed", "split", "metric", "value", "command")


@torch.no_grad()
def latents(data: str, split: str, channels: int, cache: Path | None) -> tuple[Tensor, Tensor]:
    """TAEF2's latents [n, 32, 4, 4] of images at 32 pixels, and labels [n]; from the file `cache` if it is there."""
    if cache is not None and cache.is_file():
        h, y = torch.load(cache)[:2]
        return h.float(), y
    images = open_data(data, split, image_size=32, channels=channels)
    codec = StandardisedAutoencoder(open_autoencoder("taef2")[0], images.image_shape)
    found = [
        (codec.encode(x.float() / 255).half(), y) for x, y in images.batches(torch.arange(len(images)).numpy(), 64)
    ]
    h, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    if cache is not None:
        torch.save((h, y), cache)
    return h.float(), y


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--per-class", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--cache", type=Path, nargs=2, default=[None, None], help="files of latents: train, test")
    args = parser.parse_args()
    torch.set_num_threads(1)
    h, y = latents(args.train, "train", args.channels, args.cache[0])
    order = torch.randperm(len(h), generator=torch.Generator().manual_seed(0))
    of_class = [order[y[order] == k] for k in range(int(y.max()) + 1)]
    if args.held_out:
        held = torch.cat([rows[: args.held_out] for rows in of_class])
        of_class, (x, labels) = [rows[args.held_out :] for rows in of_class], (h[held], y[held])
    else:
        x, labels = latents(args.test, "test", args.channels, args.cache[1])
    path = prior_file("taef2")
    assert path is not None
    coordinates = ReleaseCoordinates(path, (32, 4, 4), args.channels == 1)
    u = torch.cat([coordinates(part) for part in h.split(256)])
    for n in args.per_class:
        for epsilon in args.epsilon:
            for seed in range(args.seeds):  # of the images; the noise has none
                turned = [rows.roll(-seed * n) for rows in of_class]
                rows = torch.cat([part[:n] for part in turned])
                found = private_classes(
                    u[rows], y[rows], len(of_class), coordinates, Privacy(epsilon, 1e-5, images=10**5)
                )
                scores = torch.cat([found.classes.log_prob(part.flatten(1)) for part in x.split(1000)])
                value = 100 * float((scores.argmax(1) == labels).double().mean())
                row = (
                    f"{args.name} n={n} epsilon={epsilon:g} delta=1e-5", "posterior of the private model", seed,
                    "held-out train" if args.held_out else "test", "accuracy %", f"{value:.2f}",
                    f"python benchmarks/private_predict.py {' '.join(sys.argv[1:])}",
                )  # fmt: skip
                new = not args.out.exists()
                with args.out.open("a", newline="") as file:
                    writer = csv.writer(file)
                    writer.writerows([COLUMNS, row] if new else [row])
                print(*row[:6], flush=True)


if __name__ == "__main__":
    main()
