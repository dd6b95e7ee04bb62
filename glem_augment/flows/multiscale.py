"""The multi-scale flow: levels of a squeeze and steps, with half of the channels leaving after each level.

A step is ActNorm, 1x1 mixing and coupling. Inside a level the state is *channel-major*, [C, B, H, W]. Then a 1x1 mixing
is one matrix product [C, C] x [C, B*H*W]. A half of the channels is one contiguous block. The squeeze's permutation
copies anyway, so it changes the order for free. Only the networks inside couplings see images, channels last.

ActNorm and mixing do not depend on the image. Their exponentials are computed once per pass, for all steps of a level
together, and kept while the weights are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    """A squeeze of pixel blocks of side `side`, and its steps on tensors of height x width."""

    def __init__(self, steps: list[Step], height: int, width: int, side: int = 2) -> None:
        super().__init__()
        # The names of saved weights count from 1.
        self.layers = nn.ModuleList([nn.Identity(), *(layer for step in steps for layer in step)])
        self.side = side
        # Tuples, because the modules are registered above.
        self.norms, self.mixing_layers, self.couplings = zip(*steps, strict=True)
        self.pixels = height * width
        self._cache: dict = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def mixing_weights(self) -> list[nn.Parameter]:
        """The weights behind `mixings`."""
        pairs = zip(self.norms, self.mixing_layers, strict=True)
        return [w for norm, mixing in pairs for w in (norm.bias, norm.log_scale, mixing.weight)]

    def mixings(self, inverse: bool) -> tuple[list[Mixing], Tensor]:
        """ActNorm and mixing of every step, and their log|det| in nats, which all images share. Differentiable."""
        weights = self.mixing_weights()
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
        return self.run_steps(squeeze(x, self.side))

    def run_steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The steps alone, on squeezed x."""
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
    class Gaussians cover every dimension (Dinh et al. 2017, Sec. 3.6). The first level's squeeze makes pixel blocks
    of side `patch` channels; later levels have side 2.
    """

    rebuilds = True
    levels: list[Level]

    def __init__(self, image_shape: tuple[int, int, int], levels: list[list[Step]], patch: int = 2) -> None:
        super().__init__(image_shape)
        self.levels = nn.ModuleList()  # type: ignore[assignment]  # which torch does not type by its items
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
            h = x.transpose(0, 1)
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
        """Initialise every ActNorm that is not yet initialised, by the batch `x` [B,C,H,W] as it arrives there."""
        with full_precision(x.device.type):
            h = x.transpose(0, 1)
            for level in self.levels:
                h = level.initialise(h)
                h = h[: len(h) // 2]


# ---- training without stored activations -----------------------------------------------------------------------------


def reversible(steps: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`steps.run_steps(x)` of a `Level`, with activation memory that does not grow with the steps.

    The backward pass rebuilds the activations from the output. It evaluates a coupling's network once, on the half that
    passes unchanged. The result serves to undo the coupling and to differentiate it. So a step costs one more forward
    pass of its network. Results can be differentiated once; gradients equal the ordinary ones up to the rounding of the
    rebuilt activations. Source: Gomez et al., "The Reversible Residual Network", NeurIPS 2017, for the idea.
    """
    return _ReversibleSteps.apply(steps, x, *steps.parameters())


class _ReversibleSteps(torch.autograd.Function):
    """Saves only the result. The weights are inputs so that autograd computes their gradients."""

    @staticmethod
    def forward(ctx: Any, steps: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = steps.run_steps(x)
        ctx.steps, ctx.versions = steps, _versions(weights)
        ctx.save_for_backward(y)
        return y, logdet

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_logdet: Tensor) -> tuple[Tensor | None, ...]:
        steps = ctx.steps
        if _versions(steps.parameters()) != ctx.versions:
            raise RuntimeError("a weight of the flow was changed between the forward and the backward pass")
        (y,) = ctx.saved_tensors
        grads: dict[Tensor, Tensor | None] = {}
        with full_precision(y.device.type):
            undo, _ = steps.mixings(inverse=True)
            with torch.enable_grad():
                mixings, shared = steps.mixings(inverse=False)
            # The exponentials behind the mixings are differentiated once, after all steps.
            outputs, upstream = [shared], [g_logdet.sum()]
            for index, coupling in reversed(list(enumerate(steps.couplings))):
                y, g, found = _coupling_backward(coupling, y, g, g_logdet)
                grads.update(zip(coupling.parameters(), found, strict=True))
                y, g, found = _mixing_backward(mixings[index], undo[index], y, g)
                for tensor, grad in zip(mixings[index], found, strict=True):
                    if grad is not None:
                        outputs.append(tensor)
                        upstream.append(grad)
            if shared.requires_grad:
                rest = steps.mixing_weights()
                grads.update(zip(rest, _gradients(outputs, upstream, rest), strict=True))
        return None, g, *(grads.get(w) for w in steps.parameters())


def _versions(weights: Any) -> list[int]:
    return [0 if w.is_inference() else w._version for w in weights]


def _gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Any]:
    """Gradients of some outputs, one per input; None for an input that needs none."""
    wanted = [t for t in inputs if t.requires_grad]
    # The log-determinant of a coupling may be a constant.
    outputs, upstream = zip(*((t, g) for t, g in zip(outputs, upstream, strict=True) if t.requires_grad), strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def _coupling_backward(
    coupling: Coupling, y: Tensor, g: Tensor, g_logdet: Tensor
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """From a coupling's output and its gradient to the input, the input's gradient, and the weights' gradients."""
    y1, y2 = coupling.split(y)
    g1, g2 = coupling.split(g)
    with torch.enable_grad():
        x1 = y1.detach().requires_grad_()
        params = coupling.params(x1)
        with torch.no_grad():
            x2, _ = coupling.transform(y2, params, inverse=True)
        x2.requires_grad_()
        inputs = [x1, x2, *coupling.parameters()]
        g_x1, g_x2, *found = _gradients(coupling.transform(x2, params), [g2, g_logdet], inputs)
    return coupling.merge(y1, x2.detach()), coupling.merge(g1 + g_x1, g_x2), found


def _mixing_backward(mixing: Any, undo: Any, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The same for a `Mixing`; `undo` is the mixing made for the inverse."""
    x = undo.inverse(y).requires_grad_()
    with torch.enable_grad():
        used = mixing._make(t.detach().requires_grad_(t.requires_grad) for t in mixing)
        g_x, *found = _gradients([used.forward(x)], [g], [x, *used])
    return x.detach(), g_x, found
