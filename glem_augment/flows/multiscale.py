"""The multi-scale flow: levels of steps, with half of the channels leaving after each level."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows.layers import Flow
from glem_augment.flows.level import Level, Step, squeeze, step_forward, step_inverse
from glem_augment.flows.precision import full_precision
from glem_augment.flows.reversible import reversible

# How often torch.compile may compile a step for each level: with and without gradients, in training and eval mode, in
# reduced precision, for a batch of another size, and the first step, whose input needs no gradient.
_COMPILATIONS_PER_LEVEL = 32


class MultiscaleFlow(Flow):
    """x [B,C,H,W] -> z [B, C*H*W]: per level a squeeze and its steps, then half of the channels are factored out.

    All parts are concatenated, first level first, into one flat latent. There is no learned split prior, because the
    class Gaussians cover every dimension (Dinh et al. 2017, Sec. 3.6).

    Args:
        image_shape: (C, H, W).
        levels: one list of steps per level.
        patch: side of the pixel blocks that the first level's squeeze makes channels; later levels: 2.
    """

    levels: list[Level]

    def __init__(self, image_shape: tuple[int, int, int], levels: list[list[Step]], patch: int = 2) -> None:
        super().__init__(image_shape)
        self.levels = torch.nn.ModuleList()  # type: ignore[assignment]  # which torch does not type by its items
        channels, height, width = image_shape
        self.part_shapes: list[tuple[int, int, int]] = []
        for index, steps in enumerate(levels):
            side = 2 if index else patch
            channels, height, width = side * side * channels, height // side, width // side
            self.levels.append(Level(steps, height, width, side))
            if index < len(levels) - 1:
                channels //= 2
            self.part_shapes.append((channels, height, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x.device.type):
            parts, logdet = [], x.new_zeros(len(x))
            h = x.transpose(0, 1)  # Channel-major, see `level`.
            rebuild = self.memory == "reversible" and torch.is_grad_enabled()
            for index, level in enumerate(self.levels):
                h, change = reversible(level, squeeze(h, level.side)) if rebuild else level(h)
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
        """Initialise every ActNorm from the batch `x` [B,C,H,W] as it reaches it. Those that were are left alone."""
        with full_precision(x.device.type):
            h = x.transpose(0, 1)
            for level in self.levels:
                h = level.initialise(h)
                h = h[: len(h) // 2]

    def compile_steps(self, backend: str = "inductor") -> None:
        config = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, _COMPILATIONS_PER_LEVEL * len(self.levels))
        for level in self.levels:
            level.step_forward = torch.compile(step_forward, backend=backend)
            level.step_inverse = torch.compile(step_inverse, backend=backend)
