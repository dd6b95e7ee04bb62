"""The multi-scale flow: levels of a squeeze and steps, with half of the channels leaving after each level.

A step is ActNorm, 1x1 mixing and coupling. Inside a level the state is *channel-major*, [C, B, H, W]. Then a 1x1 mixing
is one matrix product [C, C] x [C, B*H*W]. A half of the channels is one contiguous block. The squeeze's permutation
copies anyway, so it changes the order for free. Only the networks inside couplings see images, channels last.

ActNorm and mixing do not depend on the image. Their exponentials are computed once per pass, for all steps of a level
together, and kept while the weights are frozen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glem_augment.flows.coupling import Coupling
from glem_augment.flows.flow import Flow
from glem_augment.flows.layers import ActNorm, Mixing1x1
from glem_augment.precision import full_precision

Step = tuple[ActNorm, Mixing1x1, Coupling]


def squeeze(x: Tensor, side: int = 2) -> Tensor:
    """[C, B, H, W] -> [side^2 C, B, H/side, W/side]: each block of pixels becomes channels (Dinh et al. 2017).

    The side is 2 as published, or 4 as in the patches of Jet (Kolesnikov et al. 2024).
    """
    c, b, h, w = x.shape
    tall, wide = h // side, w // side
    return x.view(c, b, tall, side, wide, side).permute(0, 3, 5, 1, 2, 4).reshape(side * side * c, b, tall, wide)


def unsqueeze(x: Tensor, side: int = 2) -> Tensor:
    """The inverse of `squeeze`."""
    c, b, h, w = x.shape
    c //= side * side
    return x.view(c, side, side, b, h, w).permute(0, 3, 4, 1, 5, 2).reshape(c, b, side * h, side * w)


class Mixing(NamedTuple):
    """ActNorm and 1x1 mixing of a step: `y = matrix (x * scale + shift)`; inverse: `x = (matrix y) * scale + shift`."""

    scale: Tensor  # [C, 1, H, W], or ones for H and W
    shift: Tensor
    matrix: Tensor  # [C, C]

    def forward(self, x: Tensor) -> Tensor:
        """[C, B, H, W] -> [C, B, H, W]."""
        return (self.matrix @ torch.addcmul(self.shift, x, self.scale).flatten(1)).view(x.shape)

    def inverse(self, y: Tensor) -> Tensor:
        """Undoes `forward`; for a mixing that `Level.mixings` made for the inverse."""
        return torch.addcmul(self.shift, (self.matrix @ y.flatten(1)).view(y.shape), self.scale)


class Level(nn.Module):
    """A squeeze of pixel blocks of side `side`, and its steps on tensors of `shape` (C, H, W)."""

    def __init__(self, steps: list[Step], shape: tuple[int, int, int], side: int) -> None:
        super().__init__()
        # The names of saved weights count from 1.
        self.layers = nn.ModuleList([nn.Identity(), *(layer for step in steps for layer in step)])
        self.shape, self.side = shape, side
        # Tuples, because the modules are registered above.
        self.norms, self.mixing_layers, self.couplings = zip(*steps, strict=True)
        self.pixels = shape[1] * shape[2]
        self._cache: dict = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def mixings(self, inverse: bool) -> tuple[list[Mixing], Tensor]:
        """ActNorm and mixing of every step, and their log|det| in nats, which all images share. Differentiable."""
        weights = [w for layer in (*self.norms, *self.mixing_layers) for w in layer.parameters()]
        # Fused optimizers change a weight without raising its version, and one made under inference_mode has none.
        if any(w.requires_grad or w.is_inference() for w in weights):
            self._cache = {}
            return self._mixings(inverse)
        state = [(w._version, w.data_ptr(), w.device, w.dtype) for w in weights]
        cache = self._cache  # Another thread may put a new one in its place at any time.
        if cache.get("state") != state:
            cache = self._cache = {"state": state}
        if inverse not in cache:
            # A tensor made under inference_mode could never again take part in a graph (a gradient through decode).
            with torch.inference_mode(False), torch.no_grad():
                cache[inverse] = self._mixings(inverse)
        return cache[inverse]

    def _mixings(self, inverse: bool) -> tuple[list[Mixing], Tensor]:
        bias = torch.stack([norm.bias for norm in self.norms]).unsqueeze(2)  # [S, C, 1, H, W], or 1 for H and W
        log_scale = torch.stack([norm.log_scale for norm in self.norms]).unsqueeze(2)
        generators = torch.stack([mixing.weight for mixing in self.mixing_layers])
        logdet = log_scale.sum() * self.norms[0].pixels + generators.diagonal(dim1=1, dim2=2).sum() * self.pixels
        sign = -1.0 if inverse else 1.0
        # In float64 and rounded once, because it enters the round trip.
        matrix = torch.matrix_exp(sign * generators.double()).to(generators.dtype)
        scale = (sign * log_scale).exp()
        shift = -bias if inverse else bias * scale
        return [Mixing(*each) for each in zip(scale, shift, matrix, strict=True)], sign * logdet

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise every new ActNorm from the batch x [C, B, H, W] as it reaches it; returns the level's output."""
        x = squeeze(x, self.side)
        for index, (norm, coupling) in enumerate(zip(self.norms, self.couplings, strict=True)):
            if not norm.initialised:
                norm.initialise(x.transpose(0, 1))
            x, _ = coupling.couple(self._mixings(inverse=False)[0][index].forward(x))
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[C, B, H, W] -> [4C, B, H/2, W/2] (for `side` = 2), and log|det| [B] in nats."""
        x = squeeze(x, self.side)
        mixings, shared = self.mixings(inverse=False)
        logdet = x.new_zeros(x.shape[1])
        for mixing, coupling in zip(mixings, self.couplings, strict=True):
            x, change = coupling.couple(mixing.forward(x))
            logdet = logdet + change
        return x, logdet + shared

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes `forward`, with the log-determinant of this direction."""
        mixings, logdet = self.mixings(inverse=True)
        for mixing, coupling in zip(reversed(mixings), reversed(self.couplings), strict=True):
            y, change = coupling.couple(y, inverse=True)
            y = mixing.inverse(y)
            logdet = logdet + change
        return unsqueeze(y, self.side), logdet


class MultiscaleFlow(Flow):
    """x [B,C,H,W] -> z [B, C*H*W]: per level a squeeze and its steps, then half of the channels are factored out.

    All parts are concatenated, first level first, into one flat latent. There is no learned split prior, because the
    class Gaussians cover every dimension (Dinh et al. 2017, Sec. 3.6).
    """

    levels: list[Level]

    def __init__(self, image_shape: tuple[int, int, int], levels: list[Level]) -> None:
        super().__init__(image_shape)
        self.levels = nn.ModuleList(levels)  # type: ignore[assignment]  # which torch does not type by its items
        shapes = [level.shape for level in levels]
        self.part_shapes = [(c // 2, h, w) for c, h, w in shapes[:-1]] + shapes[-1:]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x.device.type):
            parts, logdet = [], x.new_zeros(len(x))
            h = x.transpose(0, 1)
            for index, level in enumerate(self.levels):
                h, change = level(h)
                logdet = logdet + change
                if index < len(self.levels) - 1:
                    h, out = h.chunk(2)
                    parts.append(out)
            return torch.cat([part.transpose(0, 1).flatten(1) for part in (*parts, h)], 1), logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            sizes = [c * h * w for c, h, w in self.part_shapes]
            parts = [
                part.unflatten(1, shape).transpose(0, 1)
                for part, shape in zip(z.split(sizes, 1), self.part_shapes, strict=True)
            ]
            h, logdet = self.levels[-1].inverse(parts.pop().contiguous())
            for level, part in zip(reversed(self.levels[:-1]), reversed(parts), strict=True):
                h, change = level.inverse(torch.cat([h, part]))
                logdet = logdet + change
            return h.transpose(0, 1).contiguous(), logdet

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every ActNorm that is not yet initialised, by the batch `x` [B,C,H,W] as it arrives there."""
        with full_precision(x.device.type):
            h = x.transpose(0, 1)
            for level in self.levels:
                h = level.initialise(h)
                h = h[: len(h) // 2]
