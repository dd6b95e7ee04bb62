"""The multi-scale flow: levels of steps, with half of the channels leaving after each level."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows.bijection import Bijection, Sequence, full_precision
from glem_augment.flows.coupling import Coupling
from glem_augment.flows.layers import ActNorm, Squeeze


class MultiscaleFlow(Bijection):
    """x [B,C,H,W] -> z [B, C*H*W]: per level a squeeze and its steps, then half of the channels are factored out.

    All parts are concatenated, first level first, into one flat latent; there is no learned split prior, since the
    class Gaussians cover every dimension (Dinh et al. 2017, Sec. 3.6; DESIGN of this library).

    Args:
        image_shape: (C, H, W).
        levels: one list of steps (bijections on [B, 4C', H', W']) per level.
    """

    def __init__(self, image_shape: tuple[int, int, int], levels: list[list[Bijection]]) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.levels = torch.nn.ModuleList(Sequence([Squeeze(), *steps]) for steps in levels)
        channels, height, width = image_shape
        self.autocast: torch.dtype | None = None
        self.part_shapes: list[tuple[int, int, int]] = []
        for level in range(len(levels)):
            channels, height, width = 4 * channels, height // 2, width // 2
            if level < len(levels) - 1:
                channels //= 2
            self.part_shapes.append((channels, height, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x.device.type):
            parts, total = [], x.new_zeros(x.shape[0])
            for index, level in enumerate(self.levels):
                x, logdet = level(x)
                total = total + logdet
                if index < len(self.levels) - 1:
                    x, out = x.chunk(2, dim=1)
                    parts.append(out.flatten(1))
            parts.append(x.flatten(1))
            return torch.cat(parts, 1), total

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            sizes = [c * h * w for c, h, w in self.part_shapes]
            parts = [
                part.reshape(len(part), *shape) for part, shape in zip(z.split(sizes, 1), self.part_shapes, strict=True)
            ]
            x, total = parts[-1], z.new_zeros(z.shape[0])
            for index in reversed(range(len(self.levels))):
                if index < len(self.levels) - 1:
                    x = torch.cat([x, parts[index]], 1)
                x, logdet = self.levels[index].inverse(x)
                total = total + logdet
            return x, total

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every ActNorm from the batch ``x`` [B,C,H,W] as it reaches it. Does nothing to done ones."""
        with full_precision(x.device.type):
            for index, level in enumerate(self.levels):
                for layer in level.layers:
                    if isinstance(layer, ActNorm) and not layer.initialised:
                        layer.initialise(x)
                    x, _ = layer(x)
                if index < len(self.levels) - 1:
                    x = x.chunk(2, dim=1)[0]

    def set_autocast(self, dtype: torch.dtype | None) -> None:
        """Run the subnets in ``dtype`` (float16 or bfloat16) or, with None, in float32. See ``ResidualSubnet``."""
        self.autocast = dtype
        for module in self.modules():
            if isinstance(module, Coupling):
                module.net.autocast = dtype
