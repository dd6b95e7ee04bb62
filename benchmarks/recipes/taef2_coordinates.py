"""Makes the public coordinates of TAEF2's latents from the photographs in the package (CC0).

    python benchmarks/recipes/taef2_coordinates.py

Private sets measure their latents in coordinates that no private image has touched: `flows.stationary`, 1,120 numbers
for a grid of any size. Grey images, which use TAEF2's channels differently, have other numbers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment.codec.autoencoder import StandardisedAutoencoder
from glem_augment.codec.codec import LUMA
from glem_augment.codec.published import load_taesd
from glem_augment.flows.stationary import StationaryFlow
from glem_augment.io import atomic_write
from glem_augment.model.private_fit import clip_ratio

BUNDLED = Path(__file__).parents[2] / "glem_augment" / "bundled"
FOLDER = BUNDLED / "autoencoders" / "taef2"
OUT = FOLDER / "coordinates.safetensors"
SIDE, CROPS = 32, {32: 200, 48: 200, 64: 200, 96: 200, 128: 200, 192: 40, 256: 40}  # sides of crops, and how many


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
def model_of(x: Tensor) -> dict[str, Tensor]:
    """The buffers of `StationaryFlow` for the latents of images x, and the public norm to clip to."""
    codec = StandardisedAutoencoder(load_taesd(FOLDER / "model.safetensors"), (x.shape[1], SIDE, SIDE))
    h = torch.cat([codec.encode(part) for part in x.split(500)])
    flow = StationaryFlow(codec.shape)
    flow.fit(h)
    return {**flow.state_dict(), "clip_ratio": torch.tensor(clip_ratio(flow, h))}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    x = crops()
    grey = (x * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    found = {
        f"{kind}.{name}": value.float().contiguous()
        for kind, images in (("colour", x), ("grey", grey))
        for name, value in model_of(images).items()
    }
    with atomic_write(OUT) as file:
        file.write(save(found))


if __name__ == "__main__":
    main()
