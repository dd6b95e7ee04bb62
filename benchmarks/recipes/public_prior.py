"""Makes the public prior of TAEF2's latents from Tiny ImageNet: 200 classes of ImageNet, 64 pixels.

    python benchmarks/recipes/public_prior.py TINY_IMAGENET/train

`flows.public` says what it is. Within-class and between-class covariances are measured on the latents of 32 and 64
pixels, of colour images and of their grey versions. `privacy.coordinates` says for what else. The images are under
ImageNet's research terms and are not in the package; the file holds statistics of them alone. It takes about twenty
minutes of one thread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment.codec.autoencoder import StandardisedAutoencoder
from glem_augment.codec.codec import LUMA
from glem_augment.codec.published import load_taesd
from glem_augment.flows.public import cosines
from glem_augment.images.dataset import open_data
from glem_augment.io import atomic_write
from glem_augment.privacy.coordinates import ReleaseCoordinates

FOLDER = Path(__file__).parents[2] / "glem_augment" / "bundled" / "autoencoders" / "taef2"
OUT = FOLDER / "prior.safetensors"
DIRECTIONS = 64  # of the covariance of class means
PER_CLASS = {32: 100, 64: 50}  # images of each class, by their side in pixels


def prior_of(h: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What the file holds of the latents h [N, C, H, W] of classes y.

    `maps` [H*W, C, C], `between` [H*W, C] and `centre` [C] describe blocks. `directions` [m, H*W*C] are the leading
    ones of the covariance of class means across all blocks, in the maps' coordinates, and `variances` [m] are theirs.
    """
    channels, side = h.shape[1], h.shape[2]
    basis = cosines(side)
    x = torch.einsum("uh,nchw,vw->nuvc", basis, h.double(), basis).flatten(1, 2)  # [N, H*W, C]
    means = torch.stack([x[y == k].mean(0) for k in range(int(y.max()) + 1)])
    rest = x - means[y]
    within = torch.einsum("nfa,nfb->fab", rest, rest) / (len(x) - len(means))
    away = means - means.mean(0)
    per_class = len(x) / len(means)
    between = torch.einsum("nfa,nfb->fab", away, away) / (len(means) - 1) - within / per_class
    target = (within + within.diagonal(dim1=1, dim2=2).mean(0).diag()) / 2
    white = torch.linalg.inv(torch.linalg.cholesky(target))
    values, vectors = torch.linalg.eigh(white @ between @ white.mT)
    found = {"maps": vectors.mT @ white, "between": values.clamp_min(0), "centre": h.double().mean((0, 2, 3))}
    assert found["maps"].shape == (side * side, channels, channels)
    v = torch.einsum("fac,nfc->nfa", found["maps"], rest).flatten(1).float()
    away = torch.einsum("fac,nfc->nfa", found["maps"], away).flatten(1)
    across = away.T @ away / (len(means) - 1) - (v.T @ v).double() / (len(x) - len(means)) / per_class
    values, vectors = torch.linalg.eigh(across)
    found |= {"directions": vectors.flip(1).T[:DIRECTIONS], "variances": values.flip(0)[:DIRECTIONS].clamp_min(0)}
    return {name: value.half().contiguous() for name, value in found.items()}


def write(found: dict[str, Tensor], latents: dict[tuple[str, int], Tensor]) -> None:
    """Write the file, with the median norm of weighted public latents as a share of the expected one (`norm`)."""
    for final in (False, True):
        for (kind, side), h in latents.items():
            norm = torch.ones(())
            if final:
                made = ReleaseCoordinates(OUT, tuple(h.shape[1:]), kind == "grey")
                lengths = torch.cat([(made(part.float()) * made.weights).norm(dim=1) for part in h.split(256)])
                norm = lengths.median() / made.norm
            found[f"{kind}.{side}.norm"] = norm.half()
        with atomic_write(OUT) as file:
            file.write(save(found))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder with a folder per class, of 64 pixels or more")
    data = open_data(parser.parse_args().data, image_size=64, channels=3)
    found: dict[str, Tensor] = {}
    every: dict[tuple[str, int], Tensor] = {}
    for side, per_class in PER_CLASS.items():
        rows = torch.cat([torch.from_numpy(rows) for rows in data.rows_of_classes(per_class)]).numpy()
        codec = StandardisedAutoencoder(load_taesd(FOLDER / "model.safetensors"), (3, side, side))
        latents: dict[str, list[Tensor]] = {"colour": [], "grey": []}
        labels = []
        for x, y in tqdm(data.batches(rows, 64), total=-(-len(rows) // 64), desc=f"{side} pixels"):
            x = F.interpolate(x.float() / 255, size=side, mode="bilinear", antialias=True).clamp(0, 1)
            grey = (x * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True).expand_as(x)
            latents["colour"].append(codec.encode(x))
            latents["grey"].append(codec.encode(grey))
            labels.append(y)
        for kind, parts in latents.items():
            every[kind, side // 8] = torch.cat(parts)
            for name, value in prior_of(every[kind, side // 8], torch.cat(labels)).items():
                found[f"{kind}.{side // 8}.{name}"] = value
    write(found, every)


if __name__ == "__main__":
    main()
