"""Jet: a flow of couplings on patches of the image, with vision transformers as their networks.

Source: Kolesnikov et al., "Jet: A Modern Transformer-Based Normalizing Flow", 2024, arXiv:2412.15129, Sec. 3. An image
is cut into patches, one token each. There are no ActNorms, no learned mixings and no levels. Some couplings split the
channels of every token, in a fixed random order. Others split the tokens, as a checkerboard or as stripes. The free
half becomes `(x2 + b(x1)) * 2 sigmoid(a(x1))`, which is the identity at the start.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.flows.coupling import Coupling, Subnet, SubnetFactory
from glem_augment.flows.layers import Flow
from glem_augment.flows.multiscale import reversible
from glem_augment.precision import full_precision

# Four couplings of channels, then one of tokens, and so on. The couplings of tokens take the next of these patterns,
# and checkerboards when they have all been used.
KINDS = ("channels", "channels", "channels", "channels", "tokens")
PATTERNS = ("checkerboard", "checkerboard-inv", "columns", "columns-inv", "rows", "rows-inv")
# For pixel level v and noise u in [0, 1), Jet's input is 2 (v + u) / 255 - 1. The input of a `Flow` is
# (v + u) / 256 - 1/2.
_SCALE, _SHIFT = 512 / 255, 1 / 255


class JetCoupling(Coupling):
    """`y2 = (x2 + b(x1)) * 2 sigmoid(a(x1))` on tokens [B, T, c]; log|det| = sum of log(2 sigmoid(a)).

    Args:
        subnet: factory of the network c/2 -> c, which sees T tokens as a column of pixels.
        order: int64 [c] or [T], the channels or tokens in the order in which they are halved.
        over: "channels" or "tokens". Half of the tokens become T tokens of c/2 channels: each is cut in two.
    """

    order: Tensor

    def __init__(self, channels: int, subnet: SubnetFactory, order: Tensor, over: str) -> None:
        super().__init__(channels)
        self.over = over
        self.register_buffer("order", order)
        self.net = subnet(self.n, channels)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, c] -> two of [B, T, c/2]."""
        if self.over == "channels":
            first, second = x[..., self.order].chunk(2, -1)
            return first, second
        first, second = x[:, self.order].chunk(2, 1)
        return first.reshape(len(x), -1, self.n), second.reshape(len(x), -1, self.n)

    def merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Undoes `split`."""
        back = self.order.argsort()
        if self.over == "channels":
            return torch.cat([x1, x2], -1)[..., back]
        return torch.cat([x.reshape(len(x), -1, 2 * self.n) for x in (x1, x2)], 1)[:, back]

    def params(self, x1: Tensor) -> Tensor:
        """[B, T, c/2] -> b and a, [B, T, c]."""
        return self.net(x1.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        shift, raw = params.chunk(2, -1)
        # log(2 sigmoid(a)) is 0 where a is.
        log_scale = nn.functional.logsigmoid(raw) + math.log(2)
        logdet = log_scale.sum((1, 2))
        if inverse:
            return x2 * (-log_scale).exp() - shift, -logdet
        return (x2 + shift) * log_scale.exp(), logdet


class JetFlow(Flow):
    """x [B,C,H,W] -> z [B, C*H*W], token after token, rows first.

    There are `depth` couplings. Width, blocks and heads belong to their transformers; `patch` is the side of a patch.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], depth: int, width: int, blocks: int, heads: int, patch: int
    ) -> None:
        super().__init__(image_shape)
        self.patch = patch
        self.grid = rows, columns = image_shape[1] // patch, image_shape[2] // patch
        size = image_shape[0] * patch * patch
        subnet = partial(Subnet, "transformer", width=width, blocks=blocks, size=(rows * columns, 1), heads=heads)
        generator = torch.Generator("cpu").manual_seed(0)
        patterns = iter(PATTERNS)
        self.couplings: Any = nn.ModuleList()  # of JetCouplings
        for index in range(depth):
            over = KINDS[index % len(KINDS)]
            if over == "channels":
                order = torch.randperm(size, generator=generator, device="cpu")
            else:
                order = order_of_tokens(rows, columns, next(patterns, "checkerboard"))
            self.couplings.append(JetCoupling(size, subnet, order, over))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x.device.type):
            h = self._tokens(x * _SCALE + _SHIFT)
            rebuild = self.memory == "reversible" and torch.is_grad_enabled()
            h, logdet = reversible(self, h) if rebuild else self.run_steps(h)
            return h.flatten(1), logdet + h[0].numel() * math.log(_SCALE)

    def run_steps(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The couplings alone, on tokens [B, T, c]."""
        logdet = h.new_zeros(len(h))
        for coupling in self.couplings:
            h, change = coupling.couple(h)
            logdet = logdet + change
        return h, logdet

    def mixings(self, inverse: bool) -> tuple[list[Any], Tensor]:
        """There are none between the couplings; see `reversible`."""
        return [], torch.zeros(())

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            h = z.unflatten(1, (self.grid[0] * self.grid[1], -1))
            logdet = z.new_full((len(z),), -z.shape[1] * math.log(_SCALE))
            for coupling in reversed(self.couplings):
                h, change = coupling.couple(h, inverse=True)
                logdet = logdet + change
            return (self._image(h) - _SHIFT) / _SCALE, logdet

    def compile_steps(self, backend: str = "inductor") -> None:
        config = torch._dynamo.config  # All couplings share a compilation.
        config.cache_size_limit = max(config.cache_size_limit, 32)
        for coupling in self.couplings:
            coupling.net.compile(backend=backend)

    def _tokens(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, c], the channels of a token in the order row, column, colour."""
        rows, columns = self.grid
        x = x.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))  # [B, C, rows, p, columns, p]
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _image(self, h: Tensor) -> Tensor:
        """Undoes `_tokens`."""
        h = h.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, self.grid)  # [B, rows, columns, p, p, C]
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, *self.image_shape)


def order_of_tokens(rows: int, columns: int, pattern: str) -> Tensor:
    """The tokens of a grid, int64 [rows * columns]: first the half that passes unchanged.

    As in the published code, "columns" takes every second token of the sequence, whatever the number of columns.
    """
    index = torch.arange(rows * columns, device="cpu")
    kind, _, inverted = pattern.partition("-")
    value = {"columns": index, "rows": index // columns, "checkerboard": index + index // columns}[kind]
    return ((value + bool(inverted)) % 2).argsort(stable=True)
