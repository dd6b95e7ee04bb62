"""Makes the table of glem_augment/privacy/expectation.py: how much accuracy a private fit keeps, by its size.

    python benchmarks/recipes/expectation.py        # needs GLEM_DATA with imagenette128

The classes are Imagenette's ten at 64 pixels, less any that the public prior has seen (`--tiny`, Tiny ImageNet's
folders, names them). PER_CLASS training images of each class are fitted with and without a promise, and judged on the
validation images. It prints, for each size (images of a class times mu, for 512 numbers of a latent), the share of the
accuracy above chance of the fit without a promise that the private fit has: the mean of the draws, made monotone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser
from benchmarks.proof.few_images import fitted, latents
from glem_augment import Privacy
from glem_augment.classes.classes import Classes
from glem_augment.codec.published import prior_file
from glem_augment.flows.public import PublicFlow
from glem_augment.privacy import epsilon_of
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.fit import private_classes

SETTING, PER_CLASS, DRAWS, DELTA = "imagenette-64", 300, 2, 1e-6
SIZES = 1, 3, 10, 30, 100, 300, 1000
FOLDERS = "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257".split()


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--work", type=Path, help="folder in which latents are kept for the next run")
    arguments.add_argument("--tiny", type=Path, required=True, help="Tiny ImageNet's training images, a folder a class")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    seen = {path.name for path in args.tiny.iterdir()}
    kept = [k for k, name in enumerate(FOLDERS) if name not in seen]
    print(f"{len(kept)} classes that the prior has not seen")
    h, y, _ = latents(SETTING, "train", args.work)
    test, truth, _ = latents(SETTING, "val", args.work)
    test, truth = test[torch.isin(truth, torch.tensor(kept))], truth[torch.isin(truth, torch.tensor(kept))]
    truth = torch.tensor([kept.index(k) for k in truth.tolist()])
    path, shape = prior_file("taef2"), (h.shape[1], h.shape[2], h.shape[3])
    assert path is not None

    def above_chance(classes: Classes) -> float:
        found = torch.cat([classes.log_prob(part.flatten(1)).argmax(1) for part in test.split(500)])
        return float((found == truth).double().mean()) - 1 / len(kept)

    shares = torch.zeros(DRAWS, len(SIZES), dtype=torch.float64)
    for draw in range(DRAWS):
        g = torch.Generator().manual_seed(draw)
        own = [(y == k).nonzero()[:, 0] for k in kept]
        rows = [each[torch.randperm(len(each), generator=g)[:PER_CLASS]] for each in own]
        most = above_chance(fitted(h, rows, PublicFlow.from_file(path, shape, False, torch.ones(shape[0]))))
        coordinates = ReleaseCoordinates(path, shape, False)
        u = torch.cat([coordinates(h[each]) for each in rows])
        labels = torch.arange(len(kept)).repeat_interleave(PER_CLASS)
        for place, size in enumerate(SIZES):
            privacy = Privacy(epsilon_of(size / PER_CLASS, DELTA), DELTA)
            found = private_classes(u, labels, len(kept), coordinates, privacy).classes
            shares[draw, place] = above_chance(found) / most
            print(draw, size, f"{most:.3f}", f"{shares[draw, place]:.3f}", flush=True)
    sizes = [size * 512 / h[0].numel() for size in SIZES]
    print(dict(zip(sizes, [round(share, 2) for share in shares.mean(0).cummax(0).values.tolist()], strict=True)))


if __name__ == "__main__":
    main()
