"""Makes the public coordinates of TAEF2's latents from the photographs in the package (CC0).

    python benchmarks/recipes/taef2_coordinates.py

Private sets measure their latents in coordinates that no private image has touched. The model is stationary: channels
are rotated so that they are uncorrelated, and each then falls off with distance as `rho^|distance|`, along rows as along
columns. So `coordinates` gives them for a grid of any size from 1,120 numbers. Grey images, which use TAEF2's channels
differently, have numbers of their own.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment.autoencoders import TAESD, load_taesd
from glem_augment.io import atomic_write

BUNDLED = Path(__file__).parents[2] / "glem_augment" / "bundled"
FOLDER = BUNDLED / "autoencoders" / "taef2"
OUT = FOLDER / "coordinates.safetensors"
SIDE, CROPS = 32, {32: 200, 48: 200, 64: 200, 96: 200, 128: 200, 192: 40, 256: 40}  # sides of crops, and how many
POWER = 0.25  # coordinates are divided by variance^POWER; measured in findings.md
LUMINANCE = (0.299, 0.587, 0.114)


def crops(seed: int = 0) -> Tensor:
    """Square crops of all sizes from the bundled photographs, resized: float [N, 3, 32, 32] in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for path in sorted((BUNDLED / "data" / "photographs" / "image").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        for side, count in CROPS.items():
            for _ in range(count):
                top, left = (int(torch.randint(256 - side + 1, (1,), generator=g)) for _ in range(2))
                crop = image[:, :, top : top + side, left : left + side]
                crop = F.interpolate(crop, size=SIDE, mode="bilinear", antialias=True).clamp(0, 1)
                found.append(crop.flip(3) if torch.rand((), generator=g) < 0.5 else crop)
    return torch.cat(found)


@torch.no_grad()
def stationary_model(model: TAESD, x: Tensor) -> dict[str, Tensor]:
    """The numbers of the latents of images x: mean [C], rotation [C, C] (rows are channels), variance and rho [C]."""
    h = torch.cat([model.encode(part) for part in x.split(500)]).double()
    mean = h.mean((0, 2, 3))
    h = h - mean[:, None, None]
    covariance = torch.einsum("nchw,ndhw->cd", h, h) / (h.numel() / h.shape[1])
    rotation = torch.linalg.eigh(covariance)[1].mT.flip(0)
    h = torch.einsum("ac,nchw->nahw", rotation, h)
    variance = h.square().mean((0, 2, 3))
    rows = (h[:, :, 1:] * h[:, :, :-1]).mean((0, 2, 3))
    columns = (h[..., 1:] * h[..., :-1]).mean((0, 2, 3))
    return dict(mean=mean, rotation=rotation, variance=variance, rho=((rows + columns) / 2 / variance).clamp(0, 0.99))


def coordinates(model: dict[str, Tensor], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [d, d], c [d], prior [d]) of latents [C, height, width], flattened: u = A (latent - c) has variances `prior`
    in the model, uncorrelated. All float64."""
    mean, rotation, variance, rho = (model[key].double() for key in ("mean", "rotation", "variance", "rho"))
    channels, d = len(mean), len(mean) * height * width
    basis = torch.kron(_dct(height), _dct(width))
    variances = [v * torch.kron(_spectrum(r, height), _spectrum(r, width)) for v, r in zip(variance, rho, strict=True)]
    spectrum = torch.cat(variances)
    a = torch.einsum("ac,fp->afcp", rotation, basis).reshape(d, d) * spectrum[:, None] ** -POWER
    c = mean[:, None].expand(channels, height * width).reshape(d)
    return a, c, spectrum ** (1 - 2 * POWER)


def _dct(n: int) -> Tensor:
    """The orthonormal cosine transform [n, n]."""
    k = torch.arange(n, dtype=torch.float64)
    found = torch.cos(math.pi * (k + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    found[0] /= math.sqrt(2)
    return found


def _spectrum(rho: Tensor, n: int) -> Tensor:
    """Variances of the cosines of n numbers whose correlation is rho^|distance|."""
    place = torch.arange(n, dtype=torch.float64)
    return (_dct(n) @ rho ** (place[:, None] - place).abs() @ _dct(n).mT).diagonal()


def main() -> None:
    model, x = load_taesd(FOLDER / "model.safetensors"), crops()
    grey = (x * torch.tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True).expand_as(x)
    found = {
        f"{kind}.{name}": value.float().contiguous()
        for kind, images in (("colour", x), ("grey", grey))
        for name, value in stationary_model(model, images).items()
    }
    with atomic_write(OUT) as file:
        file.write(save(found))


if __name__ == "__main__":
    main()
