"""The multi-scale flow: levels of steps, with half of the channels leaving after each level."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows.bijection import Bijection
from glem_augment.flows.compiled import compile_step
from glem_augment.flows.coupling import Coupling
from glem_augment.flows.host_memory import keep_freed_memory
from glem_augment.flows.layers import ActNorm
from glem_augment.flows.layout import rows
from glem_augment.flows.level import Level, step_forward, step_inverse
from glem_augment.flows.precision import full_precision

MEMORY = ("stored", "reversible")

# On import: workers that unpickle a flow make none themselves.
keep_freed_memory()


def _total(logdets: list[Tensor], shared: Tensor | float) -> Tensor:
    """Of parts [B] and what all images share."""
    total = logdets[0] if len(logdets) == 1 else torch.stack(logdets).sum(0)
    return total + shared if isinstance(shared, Tensor) else total


class MultiscaleFlow(Bijection):
    """x [B,C,H,W] -> z [B, C*H*W]: per level a squeeze and its steps, then half of the channels are factored out.

    All parts are concatenated, first level first, into one flat latent; there is no learned split prior, since the
    class Gaussians cover every dimension (Dinh et al. 2017, Sec. 3.6).

    Args:
        image_shape: (C, H, W).
        levels: one list of steps (bijections on [B, 4C', H', W']) per level.
        patch: side of the pixel blocks that the first level's squeeze makes channels; later levels: 2.
    """

    def __init__(self, image_shape: tuple[int, int, int], levels: list[list[Bijection]], patch: int = 2) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.levels = torch.nn.ModuleList()
        channels, height, width = image_shape
        self.autocast: torch.dtype | None = None
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
            parts, shared, logdets = [], 0.0, []
            h = x.transpose(0, 1)
            for index, level in enumerate(self.levels):
                last = index == len(self.levels) - 1
                h, constant, own = level(h, last)
                shared = shared + constant
                logdets += own
                if last:
                    parts.append(h)
                else:
                    h, out = h.chunk(2)
                    parts.append(rows(out))
            return torch.cat(parts, 1) if len(parts) > 1 else parts[0], _total(logdets, shared)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            sizes = [c * h * w for c, h, w in self.part_shapes]
            parts = [
                part.unflatten(1, shape).transpose(0, 1)
                for part, shape in zip(z.split(sizes, 1), self.part_shapes, strict=True)
            ]
            h, shared, logdets = parts[-1], 0.0, []
            for index in reversed(range(len(self.levels))):
                if index < len(self.levels) - 1:
                    h = torch.cat([h, parts[index]])
                h, constant, own = self.levels[index].inverse(h)
                shared = shared + constant
                logdets += own
            return h.transpose(0, 1).contiguous(), _total(logdets, shared)

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

    def set_memory(self, memory: str) -> None:
        """How a backward pass gets the activations.

        Args:
            memory: "stored" (the default: the fastest), or "reversible": rebuilt from the outputs of each level through
                the exact inverse, so that activation memory does not grow with depth, for about a third more time.

        Raises:
            ValueError: another word.
        """
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {MEMORY}, got {memory!r}")
        for level in self.levels:
            level.memory = memory

    def compile_steps(self, on: bool = True, backend: str = "inductor") -> None:
        """Compile the steps with ``torch.compile``, for training, encoding and decoding; needs a C++ compiler.

        The first passes take up to a minute per direction; any batch size is then served without another one (but for
        a batch of one image). Results agree with the ordinary ones within rounding. Copies of the flow and models that
        are loaded start uncompiled.

        Args:
            on: False goes back to ordinary code.
            backend: of ``torch.compile``.
        """
        levels = len(self.levels)
        forward = compile_step(step_forward, levels, backend) if on else None
        inverse = compile_step(step_inverse, levels, backend) if on else None
        for level in self.levels:
            level.use_compiled(forward, inverse)

    def set_autocast(self, dtype: torch.dtype | None) -> None:
        """Run the subnets in ``dtype`` (float16 or bfloat16) or, with None, in float32. See ``ResidualSubnet``."""
        self.autocast = dtype
        for module in self.modules():
            if isinstance(module, Coupling):
                module.net.autocast = dtype
