"""The codec of a flow on pixels: the levels of uint8 images, with uniform dequantisation noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glem_augment.codec.codec import Codec, Dequantisation
from glem_augment.distributed import Share
from glem_augment.tensors import send

# The constants of SplitMix64, as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


class Levels(Codec):
    """Pixels as levels, `(level + u) / 2^bits - 1/2` with dequantisation noise u. Densities are over levels.

    Args:
        image_shape: (C, H, W).
        bits: the top bits of each channel that are modelled, 1 to 8.
    """

    levels = exact = True
    key, unit = "bits_per_dim", "bits/dim"

    def __init__(self, image_shape: tuple[int, int, int], bits: int = 8) -> None:
        super().__init__(image_shape, image_shape)
        self.bits = bits

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        return to_levels(x, self.bits, self.dtype, noise)

    def decode(self, h: Tensor) -> Tensor:
        return from_levels(h, self.bits)

    def logdet(self) -> float:
        return -math.prod(self.shape) * self.bits * math.log(2)

    @property
    def divisor(self) -> float:
        """The number of dimensions times ln 2."""
        return math.prod(self.shape) * math.log(2)


def to_levels(x: Tensor, bits: int, dtype: torch.dtype, noise: Dequantisation = None) -> Tensor:
    """`(level + u) / 2^bits - 1/2`, the flow's input; float images are scaled to levels unrounded.

    Noise is for images on levels. A float image is on levels if all its pixels are k / 255, or all k / (2^bits - 1),
    for whole k up to rounding. It is then treated as uint8. Any other float image gets no noise, u = 1/2.

    Args:
        x: [B,C,H,W], uint8, of which the top `bits` bits are kept, or float in [0,1].
        noise: the source of u in [0, 1). None: u = 1/2, the middle of the bin. A generator draws u on its device. With
            a seed, u is a function of the seed and the image. A tensor: u, from `draw_noise`.
    """
    is_float = x.dtype != torch.uint8
    levels = x.to(dtype) * (2**bits - 1) if is_float else (x >> (8 - bits)).to(dtype)
    if noise is None:
        u: Tensor | float = 0.5
    elif is_float:
        levels, on_levels = _snapped(levels, x.detach().to(dtype), bits, torch.finfo(x.dtype).eps)
        u = torch.where(on_levels, _dequantisation_noise(levels, noise), 0.5)
    else:
        u = _dequantisation_noise(levels, noise)
    return levels.add_(u).mul_(2.0**-bits).sub_(0.5)


def _snapped(levels: Tensor, x: Tensor, bits: int, eps: float) -> tuple[Tensor, Tensor]:
    """Float `levels`, rounded for images x whose pixels all lie on levels, and a mask of these images, bool [B,1,1,1].

    `eps` is the precision of the images as given. Gradients pass through the rounding.
    """
    on_levels = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    for highest in {255, 2**bits - 1}:
        whole = (x * highest).round()
        tolerance = min(8 * max(eps, torch.finfo(x.dtype).eps) * highest, 0.25)
        on = ((x * highest - whole).abs() <= tolerance).flatten(1).all(1)[:, None, None, None]
        wanted = (whole * (2**bits / (highest + 1))).floor()
        levels, on_levels = levels + torch.where(on, wanted - levels.detach(), 0.0), on_levels | on
    return levels, on_levels


def _dequantisation_noise(levels: Tensor, source: torch.Generator | int | Tensor) -> Tensor:
    """Uniform in [0, 1), in the shape of `levels`: multiples of 2^-16, the same for every dtype.

    Float32 holds such multiples exactly up to the highest level of 8 bits, so none rounds up to the next level.
    """
    if isinstance(source, Tensor):
        numbers = source
    elif isinstance(source, torch.Generator):
        numbers = draw_noise(levels, source)
    else:
        numbers = _words_of_images(levels.detach().flatten(1), int(source)).view(torch.int16)
        numbers = numbers[:, : levels.shape[1:].numel()]
    return send(numbers, levels.device).to(levels).mul_(2.0**-16).add_(0.5).reshape(levels.shape)


def draw_noise(x: Tensor, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """The dequantisation noise of the images x [b,C,H,W], for `encode`: int16 in x's shape.

    x may be one rank's `share` of a batch. The noise of the whole batch is drawn, so an image has the same noise for
    any number of ranks. Drawing four numbers at once takes a sixth of the time of `torch.rand` on a CPU.
    """
    each = x.shape[1:].numel()
    first, last, total = share or (0, len(x), len(x))
    words = torch.empty((total * each + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return words.view(torch.int16)[first * each : last * each].reshape(x.shape)


def _words_of_images(levels: Tensor, seed: int) -> Tensor:
    """Pseudo-random int64 [B, ceil(d / 4)], a function of the seed and of each row of `levels` [B, d].

    SplitMix64 (Steele et al., OOPSLA 2014) draws them from a hash of the row, a sum of its levels with random weights.
    Sums of integers are the same on every device and in any order.
    """
    count = torch.arange(1, levels.shape[1] + 1, device=levels.device)
    hashed = (levels.round().to(torch.int64) * _splitmix(count * _GOLDEN + seed)).sum(1, keepdim=True)
    # The seed is added again, since the sum is 0 for a black image.
    return _splitmix(_splitmix(hashed + seed) + count[: (len(count) + 3) // 4] * _GOLDEN)


def _splitmix(x: Tensor) -> Tensor:
    """SplitMix64's mixing of its counter, int64."""
    for shift, factor in _SPLITMIX:
        x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor  # the mask makes the shift a logical one
    return x


def from_levels(h: Tensor, bits: int) -> Tensor:
    """Inverse of `to_levels` for bin middles: float with 0 and 1 at the lowest and highest level."""
    return ((h + 0.5) * 2.0**bits - 0.5) / (2**bits - 1)
