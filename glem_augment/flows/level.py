"""One level of the flow, run as a whole: everything that does not depend on the image is made once per pass.

Inside a level the state is *channel-major*, [C, B, H, W]: a 1x1 mixing is then one matrix product [C,C] x [C, B*H*W],
a half of the channels is one contiguous block, and the squeeze's permutation, which copies anyway, also does the
change of order. Only the networks inside couplings see images, channels last.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from glem_augment.flows import affine_joint_native, affine_level, network_node
from glem_augment.flows.affine_joint import joint
from glem_augment.flows.bijection import Bijection
from glem_augment.flows.compiled import Step
from glem_augment.flows.coupling import AffineCoupling, Coupling
from glem_augment.flows.layers import ActNorm, Mixing1x1, Squeeze, frozen_state
from glem_augment.flows.layout import rows, squeeze, unsqueeze
from glem_augment.flows.level_node import gradients_from_result, run_as_node
from glem_augment.flows.network_parts import Parts
from glem_augment.flows.ordinary import is_ordinary
from glem_augment.flows.prepared import Prepared, Weights, prepare
from glem_augment.flows.reversible import reversible_steps
from glem_augment.flows.subnets import Subnet


def mix(x: Tensor, scale: Tensor | None, shift: Tensor, matrix: Tensor) -> Tensor:
    """ActNorm and mixing of one step: [C, B, H, W] -> [C, B, H, W]."""
    if scale is None:
        return torch.addmm(shift, matrix, x.flatten(1)).view(x.shape)
    return (matrix @ torch.addcmul(shift, x, scale).flatten(1)).view(x.shape)


def unmix(y: Tensor, scale: Tensor | None, shift: Tensor, matrix: Tensor) -> Tensor:
    """Undoes ``mix``, with what ``Level.prepare(inverse=True)`` made."""
    if scale is None:
        return torch.addmm(shift, matrix, y.flatten(1)).view(y.shape)
    return torch.addcmul(shift, (matrix @ y.flatten(1)).view(y.shape), scale)


def step_forward(
    x: Tensor, scale: Tensor | None, shift: Tensor, matrix: Tensor, coupling: Coupling
) -> tuple[Tensor, Tensor]:
    """One step on the channel-major x: ([C, B, H, W], the coupling's log|det| [B])."""
    return coupling.couple(mix(x, scale, shift, matrix))


def step_inverse(
    y: Tensor, scale: Tensor | None, shift: Tensor, matrix: Tensor, coupling: Coupling
) -> tuple[Tensor, Tensor]:
    """Undoes ``step_forward``."""
    u, logdet = coupling.couple(y, inverse=True)
    return unmix(u, scale, shift, matrix), logdet


class Level(nn.Module):
    """A squeeze and its steps, each ActNorm, 1x1 mixing and coupling, in this order.

    Args:
        steps: the layers of all steps, three per step.
        height, width: of the level's tensors after the squeeze.
        side: of the pixel blocks that the squeeze makes channels.
    """

    def __init__(self, steps: list[Bijection], height: int, width: int, side: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Squeeze(side), *steps])
        self.side = side
        # Plain lists: the modules are registered above.
        self.norms: list[ActNorm] = steps[0::3]  # type: ignore[assignment]
        self.mixings: list[Mixing1x1] = steps[1::3]  # type: ignore[assignment]
        self.couplings: list[Coupling] = steps[2::3]  # type: ignore[assignment]
        kinds = zip(self.norms, self.mixings, self.couplings, strict=True)
        if not all(
            isinstance(a, ActNorm) and isinstance(m, Mixing1x1) and isinstance(c, Coupling) for a, m, c in kinds
        ):
            raise TypeError("the steps of a level are ActNorm, Mixing1x1 and a Coupling, in this order")
        self.pixels = height * width
        self.memory = "stored"
        self._compiled_forward: Step | None = None
        self._compiled_inverse: Step | None = None
        self._cache: dict = {}

    def __getstate__(self) -> dict:
        # Copies and pickles start uncompiled: compiled code belongs to the process.
        return {**self.__dict__, "_cache": {}, "_compiled_forward": None, "_compiled_inverse": None}

    def use_compiled(self, forward: Step | None, inverse: Step | None) -> None:
        """Run these in place of ``step_forward`` and ``step_inverse`` where they are faster; None: themselves."""
        self._compiled_forward, self._compiled_inverse = forward, inverse

    def prepare(self, inverse: bool) -> Prepared:
        """What does not depend on the image, differentiable; cached while the weights are frozen."""
        weights = self._weights()
        state = None if torch.compiler.is_compiling() else frozen_state(*weights.all())
        if state is None:
            self._cache = {}
            return self._prepare(weights, inverse)
        cache = self._cache  # another thread may put a new one in its place at any time
        if cache.get("state") != state:
            cache = self._cache = {"state": state}
        if inverse not in cache:
            # A tensor made under inference_mode could never again take part in a graph (a gradient through decode).
            with torch.inference_mode(False), torch.no_grad():
                cache[inverse] = self._prepare(weights, inverse)
        return cache[inverse]

    def _weights(self) -> Weights:
        return Weights(
            [a.bias for a in self.norms], [a.log_scale for a in self.norms], [m.weight for m in self.mixings]
        )

    def _prepare(self, weights: Weights, inverse: bool) -> Prepared:
        norm = self.norms[0]
        return prepare(weights, (norm.pixels, self.pixels), norm.per == "channel", inverse)

    @staticmethod
    def _fastest(compiled: Step | None, plain: Step, coupling: Coupling, x: Tensor) -> Step:
        """A compiled step, where there is one that is not slower than the plain one."""
        if compiled is None or coupling.is_faster_uncompiled(x):
            return plain
        return compiled

    def step_parameters(self) -> list[nn.Parameter]:
        """Every weight of the level, in a fixed order."""
        return list(self.parameters())

    def run_steps(self, x: Tensor, side: int = 1, in_rows: bool = False) -> tuple[Tensor, Tensor | float, list[Tensor]]:
        """The steps alone, on the squeeze by ``side`` of x (1: on x itself, [C, B, H, W]); returns as ``forward``."""
        made = self._run_as_node(x, side, in_rows)
        if made is not None:
            return made[0], 0.0, [made[1]]
        y, shared, logdets = self._run_in_turn(x, side)
        return rows(y) if in_rows else y, shared, logdets

    def _run_in_turn(self, x: Tensor, side: int) -> tuple[Tensor, Tensor | float, list[Tensor]]:
        """As ``run_steps``, where they are no node."""
        prepared, logdets = self.prepare(inverse=False), []
        if self._has_joints(x, side, prepared, self._compiled_forward):
            if not torch.is_grad_enabled():
                return self._run_at_once(x, side, prepared)
            return self._run_joined(squeeze(x, side), prepared)
        x = squeeze(x, side)
        for index, coupling in enumerate(self.couplings):
            run = self._fastest(self._compiled_forward, step_forward, coupling, x)
            scale = None if prepared.scale is None else prepared.scale[index]
            x, logdet = run(x, scale, prepared.shift[index], prepared.matrix[index], coupling)
            logdets.append(logdet)
        return x, prepared.logdet, logdets

    def _run_as_node(self, x: Tensor, side: int, in_rows: bool) -> tuple[Tensor, Tensor] | None:
        """All as one operation, to be differentiated, where that can be had: faster than compiled steps, too."""
        networks = self._networks(x)
        if networks is None:
            return None
        pixels = self.norms[0].pixels, self.pixels
        return run_as_node(x, side, self._weights(), pixels, self._bounds(), networks, in_rows)

    def gradients_from_result(
        self, y: Tensor, g: Tensor, g_logdet: Tensor, needs_x: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor | None]]] | None:
        """See ``level_node``."""
        networks = self._networks(y)
        if networks is None:
            return None
        back, pixels = partial(self.prepare, inverse=True), (self.norms[0].pixels, self.pixels)
        return gradients_from_result(y, back, self._weights(), pixels, self._bounds(), networks, needs_x, g, g_logdet)

    def _networks(self, x: Tensor) -> list[Parts] | None:
        """Those of the couplings, where the steps may be one operation on an ``x`` like this."""
        if not (
            self.norms[0].per == "channel"
            and network_node.may_run(x)
            and all(
                type(coupling) is AffineCoupling and isinstance(coupling.net, Subnet) for coupling in self.couplings
            )
        ):
            return None
        networks = [coupling.net.as_node() for coupling in self.couplings]
        return None if None in networks else networks

    def _bounds(self) -> list[float]:
        return [coupling.bound for coupling in self.couplings]

    def _run_at_once(
        self, x: Tensor, side: int, prepared: Prepared, inverse: bool = False
    ) -> tuple[Tensor, float, list[Tensor]]:
        """Without a graph, where ``_has_joints`` says yes; for the inverse with the squeeze undone, too."""
        matrices, shifts = ([t.contiguous() for t in each] for each in (prepared.matrix, prepared.shift))
        mixings = [(m.data_ptr(), s.data_ptr()) for m, s in zip(matrices, shifts, strict=True)]
        logdet = x.new_full(x.shape[1:2], float(prepared.logdet))
        networks = [coupling.net for coupling in self.couplings]
        y, _ = affine_level.run_steps(x, side, mixings, self._bounds(), networks, logdet, inverse)
        return y, 0.0, [logdet]

    def _has_joints(self, x: Tensor, side: int, prepared: Prepared, compiled: Step | None) -> bool:
        """Whether all that lies between two networks is one operation, and compiled steps are not faster."""
        return (
            prepared.scale is None
            and all(type(coupling) is AffineCoupling for coupling in self.couplings)
            and is_ordinary(x)
            and affine_joint_native.has_kernel(len(x) * side**2 // 2)
            and (compiled is None or all(coupling.is_faster_uncompiled(x) for coupling in self.couplings))
        )

    def _run_joined(self, x: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As ``run_steps``, where ``_has_joints`` says yes."""
        (u, images, _), logdets = joint(x, None, prepared.matrix[0], prepared.shift[0], self.couplings[0].bound), []
        # After the last coupling there is no mixing.
        following = [*zip(prepared.matrix[1:], prepared.shift[1:], strict=True), (None, None)]
        for coupling, (matrix, shift) in zip(self.couplings, following, strict=True):
            u, images, logdet = joint(u, coupling.net(images), matrix, shift, coupling.bound)
            logdets.append(logdet)
        return u, prepared.logdet, logdets

    def _undo_joined(self, y: Tensor, prepared: Prepared) -> tuple[Tensor, list[Tensor]]:
        """The steps of ``inverse``, likewise."""
        images, logdets = y.chunk(2)[0].transpose(0, 1), []
        steps = zip(self.couplings, prepared.matrix, prepared.shift, strict=True)
        for coupling, matrix, shift in reversed(list(steps)):
            y, images, logdet = joint(y, coupling.net(images), matrix, shift, coupling.bound, inverse=True)
            logdets.append(logdet)
        return y, logdets

    def forward(self, x: Tensor, in_rows: bool = False) -> tuple[Tensor, Tensor | float, list[Tensor]]:
        """The squeeze and the steps, channel-major (``side`` = 2: [C, B, 2H, 2W] -> [4C, B, H, W]).

        Args:
            in_rows: the output as it lies in a latent, [B, 4C * H * W].

        Returns the output, log|det| that all images share (scalar), and the rest of it in parts [B].
        """
        if self.memory == "reversible" and torch.is_grad_enabled():
            y, logdet = reversible_steps(self, squeeze(x, self.side))
            return rows(y) if in_rows else y, 0.0, [logdet]
        return self.run_steps(x, self.side, in_rows)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor | float, list[Tensor]]:
        """Undoes ``forward``: [4C, B, H, W] -> [C, B, 2H, 2W], with the log-determinants of this direction."""
        prepared, logdets = self.prepare(inverse=True), []
        joined = self._has_joints(y, 1, prepared, self._compiled_inverse)
        if joined and not torch.is_grad_enabled():
            return self._run_at_once(y, self.side, prepared, inverse=True)
        y = y.contiguous()
        if joined:
            y, logdets = self._undo_joined(y, prepared)
            return unsqueeze(y, self.side), prepared.logdet, logdets
        for index in reversed(range(len(self.couplings))):
            coupling = self.couplings[index]
            run = self._fastest(self._compiled_inverse, step_inverse, coupling, y)
            scale = None if prepared.scale is None else prepared.scale[index]
            y, logdet = run(y, scale, prepared.shift[index], prepared.matrix[index], coupling)
            logdets.append(logdet)
        return unsqueeze(y, self.side), prepared.logdet, logdets
