"""Other implementations of flows, as opponents for `speed.py`. The caller provides the subnets.

The libraries are used as in their documentation of image flows, on a squeezed tensor. All have ActNorm or its
equivalent, a 1x1 mixing and one affine coupling per step (`pip install FrEIA normflows nflows`).

The matrix-exponential flow is the code that its authors published (Xiao & Liu, "Generative Flows with Matrix
Exponential", ICML 2020), from a copy of https://github.com/changyi7231/MEF.

All opponents have one contract: `forward(x) -> (z, logdet)` and `inverse(z) -> x`. The first forward initialises.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Peer(nn.Module):
    """A library's flow, and the calls that encode and decode."""

    def __init__(self, flow: nn.Module, encode: Callable[..., Any], decode: Callable[..., Tensor]) -> None:
        super().__init__()
        self.flow, self.encode, self.decode = flow, encode, decode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(self.flow, x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.decode(self.flow, z)


class _ImageOnly(nn.Module):
    """A subnet that ignores further arguments, such as a context."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.net(x)


def freia(c: int, h: int, w: int, nets: list[nn.Module]) -> Peer:
    """FrEIA, whose mixing is a fixed random rotation. (GLOWCouplingBlock would run two subnets per step.)"""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    flow = SequenceINN(c, h, w)
    for net in nets:
        flow.append(AllInOneBlock, subnet_constructor=lambda n_in, n_out, net=net: net, permute_soft=True)
    return Peer(flow, lambda flow, x: flow(x), lambda flow, z: flow(z, rev=True)[0])


def normflows(c: int, h: int, w: int, nets: list[nn.Module]) -> Peer:
    """normflows with the scale map "exp", cheaper than the default. `inverse` encodes and `forward` decodes."""
    from normflows.flows import GlowBlock

    def encode(blocks: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for block in blocks:
            x, logdet = block.inverse(x)
            total = total + logdet
        return x, total

    def decode(blocks: nn.ModuleList, z: Tensor) -> Tensor:
        for block in reversed(blocks):
            z, _ = block(z)
        return z

    blocks = nn.ModuleList(GlowBlock(c, hidden_channels=1, scale_map="exp") for _ in nets)
    for block, net in zip(blocks, nets, strict=True):
        block.flows[0].flows[1].param_map = net  # the coupling block is a split, the coupling and a merge
    return Peer(blocks, encode, decode)


def nflows(c: int, h: int, w: int, nets: list[nn.Module]) -> Peer:
    """nflows, with the cache of the inverted matrix in eval mode."""
    warnings.filterwarnings("ignore", message=r"torch\.(lu|triangular_solve) is deprecated", category=UserWarning)
    from nflows import transforms
    from nflows.utils.torchutils import create_mid_split_binary_mask

    steps = []
    for net in nets:
        coupling = transforms.AffineCouplingTransform(
            create_mid_split_binary_mask(c), lambda n_in, n_out, net=net: _ImageOnly(net)
        )
        steps += [transforms.ActNorm(c), transforms.OneByOneConvolution(c, using_cache=True), coupling]
    flow = transforms.CompositeTransform(steps)
    return Peer(flow, lambda flow, x: flow(x), lambda flow, z: flow.inverse(z)[0])


LIBRARIES = {"FrEIA": freia, "normflows": normflows, "nflows": nflows}


def published(folder: Path, image_shape: tuple[int, int, int], depth: list[int], nets: list[nn.Module]) -> Peer:
    """The published matrix-exponential flow on square images, from the folder that contains `models`."""
    sys.path.insert(0, str(folder))
    from models.nets import Model

    channels, side, _ = image_shape
    flow = Model(len(depth), depth, "matrixexp", "matrixexp", 0, 1, side, channels)
    nets = list(nets)
    for name, module in list(flow.named_modules()):
        if name.endswith("couplinglayer"):
            module.net = _ImageOnly(nets.pop(0))
    with torch.no_grad():
        # ActNorm divides by the spread of this batch, and the mixings become rotations.
        flow(torch.rand(64, *image_shape) - 0.5, init=True)
    return Peer(flow, lambda flow, x: flow(x), lambda flow, z: flow(z, reverse=True)[0])
