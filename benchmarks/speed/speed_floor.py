"""The floor of ``speed.py``: the subnets of a flow alone, in whichever form is fastest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.speed.speed_measure import race

OPERATIONS = ("train", "forward")
PLAIN = ("as built", "contiguous", "channels_last")
COMPILED = ("compiled contiguous", "compiled channels_last")
# Forms within this factor of the fastest, on one network of every shape, take part in the rounds; as built, always: one
# large network alone spends more of its time on new memory than all in a row.
_CLOSE = 1.1
# Compiling a backward takes long; it is tried where the compiled forward comes within this factor of the fastest.
_HOPEFUL = 1.25


class _Bare(nn.Module):
    """A subnet without its conversions of memory format."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.tail(self.net.last(self.net.body(x)))


def bare(net: nn.Module, x: Tensor) -> nn.Module:
    """``net`` without its conversions of memory format if that is how it is built, otherwise as it is.

    Args:
        net: a subnet; ``x``: an input of it.
    """
    if not all(hasattr(net, name) for name in ("body", "last", "tail")):
        return net
    with torch.no_grad():
        same = torch.allclose(_Bare(net)(x), net(x), rtol=1e-3, atol=1e-4)
    return _Bare(net) if same else net


class Floor:
    """The subnets alone, in one form.

    Args:
        form: one of ``PLAIN`` or ``COMPILED``.
        nets: the networks; copied.
        inputs, gradients: what each receives, and the gradient of its output.
        operations: which of ``OPERATIONS`` to time.
    """

    def __init__(
        self,
        form: str,
        nets: list[nn.Module],
        inputs: list[Tensor],
        gradients: list[Tensor],
        operations: Iterable[str] = OPERATIONS,
    ) -> None:
        self.name, self.operations = f"floor: {form}", tuple(operations)
        layout = torch.channels_last if "channels_last" in form else torch.contiguous_format
        self.modules: list[nn.Module] = []
        self.nets: list[Callable[[Tensor], Tensor]] = []
        self.frozen: list[Callable[[Tensor], Tensor]] = []
        for net, x in zip(nets, inputs, strict=True):
            made = copy.deepcopy(net).train()
            if form != "as built":
                made = bare(made, x).to(memory_format=layout)
            # In use the networks that only run forward are frozen, and may keep what follows from their weights.
            frozen = copy.deepcopy(made).eval().requires_grad_(False)
            self.modules.append(made)
            self.nets.append(torch.compile(made, dynamic=False) if "compiled" in form else made)
            self.frozen.append(torch.compile(frozen, dynamic=False) if "compiled" in form else frozen)
        self.inputs = [x.contiguous(memory_format=layout).detach().clone().requires_grad_() for x in inputs]
        self.gradients = [g.contiguous(memory_format=layout) for g in gradients]

    def train(self) -> None:
        """All forwards, then all backwards, as in a flow."""
        outputs = [net(x) for net, x in zip(self.nets, self.inputs, strict=True)]
        torch.autograd.backward(outputs, self.gradients)
        for module, x in zip(self.modules, self.inputs, strict=True):
            x.grad = None
            for p in module.parameters():
                p.grad = None

    @torch.no_grad()
    def forward(self) -> None:
        for net, x in zip(self.frozen, self.inputs, strict=True):
            net(x)

    def tasks(self) -> dict[tuple[str, str], Callable[[], None]]:
        """What to time; encoding and decoding have the same floor."""
        return {(self.name, operation): getattr(self, operation) for operation in self.operations}


def _met(flow: nn.Module, nets: list[nn.Module], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Random tensors of the shapes that go into and come out of ``nets`` when the flow encodes ``x``."""
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}
    hooks = [
        net.register_forward_hook(lambda module, args, out: shapes.update({module: (args[0].shape, out.shape)}))
        for net in nets
    ]
    with torch.no_grad():
        flow(x)
    for hook in hooks:
        hook.remove()
    if len(shapes) != len(nets):
        raise RuntimeError(
            f"the flow ran {len(shapes)} of its {len(nets)} subnets; there is no floor to measure against"
        )
    inputs = [torch.randn(shapes[net][0], device=x.device) for net in nets]
    return inputs, [torch.randn(shapes[net][1], device=x.device) for net in nets]


def _costs(
    nets: list[nn.Module], inputs: list[Tensor], gradients: list[Tensor], compiled: bool, device: torch.device
) -> dict[str, dict[str, float]]:
    """Seconds of every form by operation, from one network of every shape and how often that shape comes."""
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for index, (x, g) in enumerate(zip(inputs, gradients, strict=True)):
        groups.setdefault((x.shape, g.shape), []).append(index)

    def cost(forms: Iterable[str], operation: str, warm: int = 1) -> dict[str, float]:
        total = dict.fromkeys(forms, 0.0)
        for members in groups.values():
            one = [[values[members[0]]] for values in (nets, inputs, gradients)]
            taken = race({form: getattr(Floor(form, *one), operation) for form in total}, device, warm)
            for form in total:
                total[form] += len(members) * taken[form]
        return total

    costs = {operation: cost(PLAIN, operation) for operation in OPERATIONS}
    for form in COMPILED if compiled else ():
        best = min(costs["forward"].values())
        costs["forward"] |= cost([form], "forward", warm=2)
        if costs["forward"][form] <= _HOPEFUL * best:
            costs["train"] |= cost([form], "train", warm=2)
    return costs


def floors(
    flow: nn.Module, nets: list[nn.Module], x: Tensor, compiled: bool
) -> tuple[list[Floor], dict[str, dict[str, float]]]:
    """The floors of ``flow``: its networks on the shapes that they meet when it encodes ``x``.

    Args:
        flow: on the device of ``x``; ``nets``: its networks.
        x: a batch.
        compiled: try compiled forms too.

    Returns:
        The forms that come into question for the fastest, and the seconds by operation and form that say so: of one
        network of every shape, times how often it comes.
    """
    inputs, gradients = _met(flow, nets, x)
    costs = _costs(nets, inputs, gradients, compiled, x.device)
    kept: dict[str, list[str]] = {}
    for operation, by_form in costs.items():
        limit = _CLOSE * min(by_form.values())
        for form, cost in by_form.items():
            if cost <= limit or form == PLAIN[0]:
                kept.setdefault(form, []).append(operation)
    return [Floor(form, nets, inputs, gradients, operations) for form, operations in kept.items()], costs
