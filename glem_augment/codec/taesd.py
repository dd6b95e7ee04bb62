"""The TAESD family of tiny autoencoders of photographs.

They are convolutional and were distilled from large image generators. Source: O. Boer Bohan, MIT, on the Hugging Face
Hub: `madebyollin/taesd`, `taesdxl` (4 channels), `taesd3`, `taef1` (16 channels) and `taef2` (32 channels). All have 64
features, three halvings of the image, and blocks of three convolutions. In taef2 the blocks at the lowest resolution
have one more branch: a group norm over the whole image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from glem_augment.errors import ModelFileError
from glem_augment.tensor_file import load_weights, open_tensors

_WIDTH, _GROUPS, _HALVINGS, _BLOCKS = 64, 4, 3, 3
_MOST_CHANNELS, _MOST_HEADER = 256, 2**16


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
    with open_tensors(path, _MOST_HEADER) as file:
        names = set(file.keys())
        last = f"encoder.layers.{1 + _HALVINGS * (_BLOCKS + 1) + 1}.weight"
        channels = file.get_slice(last).get_shape()[0] if last in names else 0
        if not 1 <= channels <= _MOST_CHANNELS:
            raise ModelFileError(f"{path} holds no autoencoder of the TAESD family: {last} is missing or too large")
        with torch.device("meta"):  # shapes without memory
            model = TAESD(channels, pooled=any(".pool." in name for name in names))
        load_weights(path, file, model)
    return model.eval().requires_grad_(False)
