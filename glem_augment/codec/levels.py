"""The codecs of pixels: integers become levels with dequantisation noise, floats stay as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glem_augment.codec.codec import Codec, Dequantisation
from glem_augment.codec.pixel_range import UINT8, PixelRange
from glem_augment.distributed import Share
from glem_augment.tensors import send

# The constants of SplitMix64, as int64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


class Levels(Codec):
    """Pixels as levels, `(level + u) / n - 1/2` with dequantisation noise u. Densities are over n levels.

    Args:
        image_shape: (C, H, W).
        bits: the top bits of each channel of uint8 images that are modelled, 1 to 8: n = 2^bits. For other integers
            all values of their range are levels.
        pixel_range: of the images.
    """

    levels = exact = True
    key, unit = "bits_per_dim", "bits/dim"

    def __init__(self, image_shape: tuple[int, int, int], bits: int = 8, pixel_range: PixelRange = UINT8) -> None:
        super().__init__(image_shape, image_shape, pixel_range)
        self.count = 2**bits if pixel_range == UINT8 else int(pixel_range.high - pixel_range.low) + 1

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        return to_levels(x, self.count, self.dtype, noise, self.pixel_range)

    def decode(self, h: Tensor) -> Tensor:
        """Levels without noise give floats with 0 and 1 at the lowest and the highest level."""
        return ((h + 0.5) * self.count - 0.5) / (self.count - 1)

    def target(self, x: Tensor) -> Tensor:
        """The images at their top bits."""
        return self.decode(self.encode(x))

    def logdet(self) -> float:
        return -math.prod(self.shape) * math.log2(self.count) * math.log(2)

    @property
    def divisor(self) -> float:
        """The number of dimensions times ln 2."""
        return math.prod(self.shape) * math.log(2)


class Values(Codec):
    """Pixels of float images, `(x - low) / (high - low) - 1/2`. Densities are over their values, without noise."""

    exact = True

    def __init__(self, image_shape: tuple[int, int, int], pixel_range: PixelRange) -> None:
        super().__init__(image_shape, image_shape, pixel_range)
        self.low, self.width = pixel_range.low, pixel_range.high - pixel_range.low

    def encode(self, x: Tensor, noise: Dequantisation = None) -> Tensor:
        return (x.to(self.dtype) - self.low) / self.width - 0.5

    def decode(self, h: Tensor) -> Tensor:
        return (h + 0.5) * self.width + self.low

    def logdet(self) -> float:
        return -math.prod(self.shape) * math.log(self.width)


def to_levels(
    x: Tensor, count: int, dtype: torch.dtype, noise: Dequantisation = None, pixel_range: PixelRange = UINT8
) -> Tensor:
    """`(level + u) / count - 1/2`, the flow's input; float images are scaled to levels unrounded.

    Noise is for images on levels. A float image is on levels if all its pixels are k / (count - 1), or all k / 255 for
    uint8 images, for whole k up to rounding. It is then treated as integers. Any other float image gets no noise,
    u = 1/2.

    Args:
        x: [B,C,H,W], integers, of which the top levels are kept, or float in [0,1].
        count: the number of levels: a power of two for uint8, all levels of the range for other integers.
        noise: the source of u in [0, 1). None: u = 1/2, the middle of the bin. A generator draws u on its device. With
            a seed, u is a function of the seed and the image. A tensor: u, from `draw_noise`.
    """
    is_float = x.is_floating_point()
    if is_float:
        levels = x.to(dtype) * (count - 1)
    elif pixel_range == UINT8:
        levels = (x >> (9 - count.bit_length())).to(dtype)
    else:
        levels = (x.to(dtype) - pixel_range.low).clamp_(0, count - 1)
    if noise is None:
        u: Tensor | float = 0.5
    elif is_float:
        others = {255} if pixel_range == UINT8 else set()
        levels, on_levels = _snapped(levels, x.detach().to(dtype), count, others, torch.finfo(x.dtype).eps)
        u = torch.where(on_levels, _dequantisation_noise(levels, noise, count), 0.5)
    else:
        u = _dequantisation_noise(levels, noise, count)
    return levels.add_(u).mul_(1.0 / count).sub_(0.5)


def _snapped(levels: Tensor, x: Tensor, count: int, others: set[int], eps: float) -> tuple[Tensor, Tensor]:
    """Float `levels`, rounded for images x whose pixels all lie on levels, and a mask of these images, bool [B,1,1,1].

    `others` are highest levels besides `count` - 1. `eps` is the precision of the images as given. Gradients pass
    through the rounding.
    """
    on_levels = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    for highest in {count - 1} | others:
        whole = (x * highest).round()
        tolerance = min(8 * max(eps, torch.finfo(x.dtype).eps) * highest, 0.25)
        on = ((x * highest - whole).abs() <= tolerance).flatten(1).all(1)[:, None, None, None]
        wanted = (whole * (count / (highest + 1))).floor()
        levels, on_levels = levels + torch.where(on, wanted - levels.detach(), 0.0), on_levels | on
    return levels, on_levels


def _dequantisation_noise(levels: Tensor, source: torch.Generator | int | Tensor, count: int) -> Tensor:
    """Uniform in [0, 1), in the shape of `levels`: multiples of 2^-16, the same for every dtype.

    Float32 holds such multiples exactly up to the highest level of 8 bits, so none rounds up to the next level. Noise
    of more levels has fewer bits: 2^-8 for levels of 16 bits.
    """
    if isinstance(source, Tensor):
        numbers = source
    elif isinstance(source, torch.Generator):
        numbers = draw_noise(levels, source)
    else:
        numbers = _words_of_images(levels.detach().flatten(1), int(source)).view(torch.int16)
        numbers = numbers[:, : levels.shape[1:].numel()]
    u = send(numbers, levels.device).to(levels).mul_(2.0**-16).add_(0.5).reshape(levels.shape)
    steps = 2.0 ** (24 - math.ceil(math.log2(count)))  # of a level, in the 24 bits of float32
    return u if count <= 256 else u.mul_(steps).floor_().div_(steps)


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
