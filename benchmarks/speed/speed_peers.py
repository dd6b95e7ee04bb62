"""Other libraries on the work of one level: the same number of steps, the same subnets, affine couplings.

Each is used the way its documentation builds image flows, on a tensor that is already squeezed (this library's own
squeeze counts against it). All have ActNorm or its equivalent, a 1x1 mixing and one affine coupling per step:

- FrEIA: `SequenceINN` of `AllInOneBlock(permute_soft=True)`. Its mixing is a fixed random rotation, which costs it
  nothing to learn; its `GLOWCouplingBlock` would run two subnets per step.
- normflows: `GlowBlock` (coupling, LU-parametrised 1x1 convolution, ActNorm) with its network replaced and with the
  scale map "exp", cheaper than its default "sigmoid". Densities are its `inverse`, samples its `forward`.
- nflows: `ActNorm`, `OneByOneConvolution` and `AffineCouplingTransform` in a `CompositeTransform`, with its
  cache of the inverted matrix in eval mode.

`pip install FrEIA normflows nflows` installs all three.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.metadata import version

import torch
from torch import Tensor, nn


class Peer(nn.Module):
    """One contract for all: `forward(x) -> (z, logdet)` and `inverse(z) -> (x, logdet)`, z shaped like x.

    Args:
        channels, height, width: of the squeezed tensor.
        nets: one per step, [B, c/2, H, W] -> [B, c, H, W]; they become the library's subnets.
    """

    module = ""  # what to import

    def initialise(self, x: Tensor) -> None:
        """Data-dependent start, where the library has one: one pass in training mode."""
        with torch.no_grad():
            self.train()(x)


class Freia(Peer):
    module = "FrEIA"

    def __init__(self, channels: int, height: int, width: int, nets: list[nn.Module], device: torch.device) -> None:
        super().__init__()
        from FrEIA.framework import SequenceINN
        from FrEIA.modules import AllInOneBlock

        self.flow = SequenceINN(channels, height, width)
        for net in nets:
            self.flow.append(AllInOneBlock, subnet_constructor=lambda n_in, n_out, net=net: net, permute_soft=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow(z, rev=True)


class Normflows(Peer):
    module = "normflows"

    def __init__(self, channels: int, height: int, width: int, nets: list[nn.Module], device: torch.device) -> None:
        super().__init__()
        from normflows.flows import GlowBlock

        self.flows = nn.ModuleList()
        for net in nets:
            block = GlowBlock(channels, hidden_channels=1, scale_map="exp")
            # The coupling block is a split, the coupling and a merge.
            block.flows[0].flows[1].param_map = net
            self.flows.append(block)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for flow in self.flows:
            x, logdet = flow.inverse(x)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for flow in reversed(self.flows):
            z, logdet = flow(z)
            total = total + logdet
        return z, total


class _IgnoresContext(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return self.net(x)


class Nflows(Peer):
    module = "nflows"

    def __init__(self, channels: int, height: int, width: int, nets: list[nn.Module], device: torch.device) -> None:
        super().__init__()
        # It calls what torch has deprecated; torch says so once per process, and it costs nothing.
        warnings.filterwarnings("ignore", message=r"torch\.(lu|triangular_solve) is deprecated", category=UserWarning)
        from nflows import transforms
        from nflows.utils.torchutils import create_mid_split_binary_mask

        steps = []
        for net in nets:
            coupling = transforms.AffineCouplingTransform(
                # 1 marks what is transformed: the first half, from the second.
                mask=create_mid_split_binary_mask(channels),
                transform_net_create_fn=lambda n_in, n_out, net=net: _IgnoresContext(net),
            )
            # Its cache is made on the CPU whatever the device, so elsewhere it has to do without.
            mixing = transforms.OneByOneConvolution(channels, using_cache=device.type == "cpu")
            steps += [transforms.ActNorm(channels), mixing, coupling]
        self.flow = transforms.CompositeTransform(steps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(z)


PEERS = (Freia, Normflows, Nflows)


def available() -> list[type[Peer]]:
    """The peers that are installed; the others are named on stderr."""
    missing = [peer.module for peer in PEERS if importlib.util.find_spec(peer.module) is None]
    if missing:
        print(f"left out: {', '.join(missing)}; pip install FrEIA normflows nflows", file=sys.stderr)
    return [peer for peer in PEERS if peer.module not in missing]


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    return {peer.module: version(peer.module) for peer in available()}
