"""Makes the bundled autoencoder from TAEF2's published files.

    python benchmarks/recipes/taef2.py FOLDER   # with taef2_encoder.pth, taef2_decoder.pth and LICENSE

The published files are plain state dicts in float16. The decoder's first layer has no weights and is left out, so the
names match `madebyollin/taef2` on the Hugging Face Hub. No value changes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

from glem_augment.codec.published import load_taesd
from glem_augment.io import atomic_write

OUT = Path(__file__).parents[2] / "glem_augment" / "bundled" / "autoencoders" / "taef2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    state = {}
    for part, shift in (("encoder", 0), ("decoder", 1)):
        for name, tensor in torch.load(folder / f"taef2_{part}.pth", map_location="cpu", weights_only=True).items():
            index, rest = name.split(".", 1)
            state[f"{part}.layers.{int(index) - shift}.{rest}"] = tensor.contiguous()
    with atomic_write(OUT / "model.safetensors") as file:
        file.write(save(state, metadata={"format": "pt"}))
    shutil.copyfile(folder / "LICENSE", OUT / "LICENSE")
    load_taesd(OUT / "model.safetensors")


if __name__ == "__main__":
    main()
