"""The layers of a step that have no network inside: ActNorm and 1x1 mixing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# An element's spread in a few images is mostly noise. Dividing by too small a spread would blow up other images, once
# more in every step. So the channel's spread is added with the weight of so many images, and there is a floor.
_PRIOR, _MIN_STD = 30, 1e-3


class ActNorm(nn.Module):
    """`z = (x + bias) * exp(log_scale)`, initialised so that z has mean 0 and a variance of about 1 on the first batch.

    The buffer `initialised` is saved, so loading a model never repeats the initialisation.

    Args:
        per: "element" for one pair of parameters per channel and pixel (MEF), "channel" for one per channel (Glow,
            Kingma & Dhariwal 2018, Sec. 3.1).
    """

    initialised: Tensor

    def __init__(self, channels: int, height: int, width: int, per: str = "element") -> None:
        super().__init__()
        shape = (channels, height, width) if per == "element" else (channels, 1, 1)
        self.per = per
        self.pixels = 1 if per == "element" else height * width  # how many each log_scale stands for
        self.bias = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set bias and scale from the batch `x` [B,C,H,W], in float64, with dead channels guarded."""
        dims = (0,) if self.per == "element" else (0, 2, 3)
        x = x.double()
        own, channel = (x.var(over, unbiased=False, keepdim=True)[0] for over in (dims, (0, 2, 3)))
        std = torch.lerp(own, channel, _PRIOR / (_PRIOR + len(x))).sqrt().clamp_min(_MIN_STD)
        self.bias.copy_(-x.mean(dims, keepdim=True)[0])
        self.log_scale.copy_(-std.log())
        self.initialised.fill_(True)


class Mixing1x1(nn.Module):
    """Invertible 1x1 convolution `z = W x` with `W = exp(A)`: log|det| is trace(A) times the pixels.

    Any A gives an invertible W whose inverse is exp(-A), so nothing is ever inverted numerically. The start is a
    random rotation (A skew-symmetric), as in Glow.

    Source: Xiao & Liu 2020, Sec. 4.1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        noise = torch.randn(channels, channels)
        self.weight = nn.Parameter((noise - noise.T) * (1.5 / channels**0.5))
