"""Published autoencoders by their names: bundled ones, and the TAESD family on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from glem_augment.errors import ModelFileError
from glem_augment.io import file_sha256, load_weights, open_tensors

HUB = "hub:"
_BUNDLED = Path(__file__).parents[1] / "bundled" / "autoencoders"
_WIDTH, _GROUPS, _HALVINGS, _BLOCKS = 64, 4, 3, 3

# From a name on the Hub to the weights file, beside its config.json if there is one, and `org/name@commit`.
Fetch: TypeAlias = Callable[[str], tuple[Path, str]]


def open_autoencoder(name: str, fetch: Fetch, sha256: str | None = None) -> tuple[nn.Module, dict[str, str]]:
    """A published autoencoder, in eval mode and frozen, and its entry in a model's config.

    Args:
        name: `taef2`; or `hub:org/name` or `hub:org/name@revision`: weights of the TAESD family (`madebyollin/taesd`,
            `taesdxl`, `taesd3`, `taef1`, `taef2`).
        fetch: downloads from the Hub.
        sha256: expected digest of the weights file; None: not checked.

    Returns:
        The module, and {"name", "sha256"}; the name is pinned to the commit that was found.

    Raises:
        ModelFileError: no such name, or a file that is damaged, foreign, or not the expected one. Its subclass
            `HubError`: it can't be had.
    """
    bundled = sorted(entry.name for entry in _BUNDLED.iterdir() if entry.is_dir())
    if name in bundled:
        path, pinned = _BUNDLED / name / "model.safetensors", name
    elif name.startswith(HUB):
        path, found = fetch(name.removeprefix(HUB))
        pinned = HUB + found
    else:
        known = ", ".join(bundled)
        raise ModelFileError(f"no autoencoder {name!r}: give {known} or {HUB}org/name, or import its module first")
    digest = file_sha256(path)
    if sha256 not in (None, digest):
        raise ModelFileError(f"the autoencoder {name} is not the one that the model was made with: {path} has changed")
    if not _is_taesd(_config(path.with_name("config.json"))):
        raise ModelFileError(f"{name} is not of the TAESD family: wrap it in a module, and give that as autoencoder=")
    return load_taesd(path), {"name": pinned, "sha256": digest}


def prior_file(name: str) -> Path | None:
    """What public photographs tell of a bundled autoencoder's latents (`flows.public`); None for any other."""
    path = _BUNDLED / name / "prior.safetensors"
    return path if path.is_file() else None


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{path} can't be read: {error}") from None


def _is_taesd(config: dict[str, Any]) -> bool:
    """Whether a config of diffusers, or {} for none, describes what `load_taesd` makes."""
    usual: dict[str, Any] = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "upsample_fn": "nearest"}
    usual |= dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), [_WIDTH] * (_HALVINGS + 1))
    usual["upsampling_scaling_factor"] = 2
    return all(config.get(name, value) == value for name, value in usual.items())


# ---- the TAESD family ------------------------------------------------------------------------------------------------
#
# Tiny autoencoders of photographs, convolutional, distilled from large image generators. Source: O. Boer Bohan, MIT, on
# the Hugging Face Hub: `madebyollin/taesd`, `taesdxl` (4 channels), `taesd3`, `taef1` (16 channels) and `taef2` (32
# channels). All have 64 features, three halvings of the image, and blocks of three convolutions. In taef2 the blocks at
# the lowest resolution have one more branch: a group norm over the whole image.


class TAESD(nn.Module):
    """An autoencoder of RGB images, see `Autoencoder`. With `pooled` it has the branch of taef2."""

    factor = 2**_HALVINGS

    def __init__(self, channels: int, pooled: bool) -> None:
        super().__init__()
        self.channels = channels
        encoder: list[nn.Module] = [_conv(3, _WIDTH), Block()]
        for level in range(_HALVINGS):
            blocks = [Block(pooled and level == _HALVINGS - 1) for _ in range(_BLOCKS)]
            encoder += [_conv(_WIDTH, _WIDTH, stride=2, bias=False), *blocks]
        decoder: list[nn.Module] = [_conv(channels, _WIDTH), nn.ReLU()]
        for level in range(_HALVINGS):
            blocks = [Block(pooled and level == 0) for _ in range(_BLOCKS)]
            decoder += [*blocks, nn.Upsample(scale_factor=2), _conv(_WIDTH, _WIDTH, bias=False)]
        # In the published files the layers are called encoder.layers.0 and so on.
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*encoder, _conv(_WIDTH, channels))})
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*decoder, Block(), _conv(_WIDTH, 3))})
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out

    def encode(self, x: Tensor) -> Tensor:
        """RGB images [B,3,H,W] in [0, 1] to latents [B,C,H/8,W/8]."""
        return self.encoder["layers"](x.contiguous(memory_format=torch.channels_last))

    def decode(self, h: Tensor) -> Tensor:
        """Latents [B,C,h,w] to RGB images [B,3,8h,8w], which may leave [0, 1] a little."""
        h = torch.tanh(h / 3) * 3  # as published: latents beyond 3 are brought back
        return self.decoder["layers"](h.contiguous(memory_format=torch.channels_last))


class Block(nn.Module):
    """`relu(x' + conv(relu(conv(relu(conv(x'))))))`, where x' is x, or x plus the branch with the group norm."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        first, second, third = (_conv(_WIDTH, _WIDTH) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third)
        wide = _GROUPS * _WIDTH
        down, up = nn.Conv2d(_WIDTH, wide, 1, bias=False), nn.Conv2d(wide, _WIDTH, 1, bias=False)
        branch = [down, nn.GroupNorm(_GROUPS, wide), nn.ReLU(inplace=True), up]
        self.pool = nn.Sequential(*branch) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def load_taesd(path: Path) -> TAESD:
    """The autoencoder in a safetensors file, float32 on the CPU; its kind follows from the names and shapes.

    ModelFileError: a truncated or foreign file, or values that are not finite.
    """
    with open_tensors(path) as file:
        last = f"encoder.layers.{1 + _HALVINGS * (_BLOCKS + 1) + 1}.weight"
        channels = file.get_slice(last).get_shape()[0]
        with torch.device("meta"):  # shapes without memory
            model = TAESD(channels, pooled=any(".pool." in name for name in file.keys()))
        load_weights(path, file, model)
    return model.eval().requires_grad_(False)
