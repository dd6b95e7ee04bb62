"""Public knowledge of an autoencoder's latents, as fixed linear coordinates: how photographs of one class vary.

Public classes tell two covariances of latents h [C, H, W]: within a class, T, and between the class means, B. Both are
taken to be stationary, so that the orthonormal cosines of the grid are uncorrelated: each frequency f has C x C blocks
T_f and B_f. The coordinates

    v_f  =  A_f  (cosines of h)_f,        A_f T_f A_f^T = I,        A_f B_f A_f^T = diag(e_f),

make T the identity and B diagonal. T_f is the mean of the measured block and of the channels' mean variances, which is
a covariance whose neighbours are half as correlated: few images of another kind are then described better.

The blocks were measured on square grids of a few sizes (benchmarks/recipes/public_prior.py). A grid of another size
takes the blocks of the nearest one, frequency by frequency: a cosine of the whole image has the same meaning in both,
and a variance that grows with the number of cells. Frequencies beyond the measured ones take the highest block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from glem_augment.flows.flow import Flow
from glem_augment.precision import full_precision


class PublicFlow(Flow):
    """h [B,C,H,W] <-> v [B, H*W*C], the coordinates above; fixed, without parameters.

    Buffers:
        maps: [H*W, C, C], the matrices A_f.
        between: [H*W*C], the variances e of class means along v.
    """

    maps: Tensor
    between: Tensor

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        channels, height, width = image_shape
        self.register_buffer("maps", torch.eye(channels).repeat(height * width, 1, 1))
        self.register_buffer("between", torch.zeros(channels * height * width))

    @classmethod
    def from_file(cls, path: Path, image_shape: tuple[int, int, int], grey: bool, std: Tensor) -> PublicFlow:
        """The coordinates of latents that a codec divided by `std` [C], for grey or colour images."""
        flow, (height, width) = cls(image_shape), image_shape[1:]
        stored = load_file(path)
        kind, side = nearest_side(stored, image_shape, grey)
        maps = stored[f"{kind}.{side}.maps"].double().unflatten(0, (side, side))
        between = stored[f"{kind}.{side}.between"].double().unflatten(0, (side, side))
        row, column = (torch.arange(n).clamp_max(side - 1) for n in (height, width))
        inside = (torch.arange(height) < side)[:, None] & (torch.arange(width) < side)
        more = torch.where(inside, height * width / side**2, 1.0)[..., None]
        flow.maps.copy_((maps[row][:, column] * std.double().cpu() * more[..., None].rsqrt()).flatten(0, 1))
        flow.between.copy_(between[row][:, column].flatten())
        return flow

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(h.device.type):
            x = self._cosines(h, 0) @ h @ self._cosines(h, 1).mT
            v = torch.einsum("fac,ncf->nfa", self.maps.to(h), x.flatten(2)).flatten(1)
        return v, self.logdet().to(h).expand(len(h))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        channels, height, width = self.image_shape
        back = torch.linalg.inv(self.maps.double()).to(z)
        with full_precision(z.device.type):
            x = torch.einsum("fca,nfa->ncf", back, z.unflatten(1, (height * width, channels)))
            h = self._cosines(z, 0).mT @ x.unflatten(2, (height, width)) @ self._cosines(z, 1)
        return h, -self.logdet().to(z).expand(len(z))

    def variances(self) -> Tensor:
        """The variances [C*H*W] of h where v is white, the diagonal of T."""
        height, width = self.image_shape[1:]
        of_cosines = torch.linalg.inv(self.maps.double()).square().sum(2).unflatten(0, (height, width))
        rows, columns = (self._cosines(of_cosines, axis).square() for axis in (0, 1))
        return torch.einsum("uvc,uh,vw->chw", of_cosines, rows, columns).flatten().to(self.maps)

    def logdet(self) -> Tensor:
        """log|det dv/dh| in nats, the same for all h; float64."""
        return torch.linalg.slogdet(self.maps.double()).logabsdet.sum()

    def _cosines(self, like: Tensor, axis: int) -> Tensor:
        return cosines(self.image_shape[1 + axis]).to(like)


def nearest_side(stored: Iterable[str], shape: tuple[int, int, int], grey: bool) -> tuple[str, int]:
    """ "grey" or "colour", and the side of the nearest measured grid, among the names in the file."""
    kind = "grey" if grey else "colour"
    sizes = sorted(int(name.split(".")[1]) for name in stored if name.startswith(kind) and name.endswith("maps"))
    return kind, min(sizes, key=lambda size: abs(math.log(max(shape[1:]) / size)))


def cosines(n: int) -> Tensor:
    """The orthonormal cosine transform [n, n] float64 (DCT-II); row k is the k-th cosine."""
    place = torch.arange(n, dtype=torch.float64)
    found = torch.cos(math.pi * (place + 0.5) * place[:, None] / n) * math.sqrt(2 / n)
    found[0] /= math.sqrt(2)
    return found
