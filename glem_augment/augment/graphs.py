"""A flow's passes on CUDA as graphs: hundreds of small launches become one.

Asked for by ``GLEMAugment(cuda_graphs=True)``. A graph is for one shape of its input and for the weights of its moment,
and must find all memory where it was: so it records a copy of the flow, of whose constants nobody else disposes. Only
frozen flows are recorded: what a fused optimizer does to weights in training goes unseen (`WeightsVersion`).
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from glem_augment.devices import WeightsVersion
from glem_augment.model.glem import GLEM

# A pass of the model on one tensor.
Pass = Callable[[Tensor], Tensor]

# A shape is recorded when it comes for the third time since the weights changed: a short last batch would not pay for
# it. Each graph keeps the memory of its pass.
_RECORDED_AT, _MOST = 3, 8
# Before the recording: constants are computed, kernels chosen and compiled.
_WARM = 3


def encode(model: GLEM, x: Tensor) -> Tensor:
    """Images as `GLEM.encode` takes them to latents [B, d]."""
    return model.encode(x)[0]


def decode(model: GLEM, z: Tensor) -> Tensor:
    """Latents to images, not clamped."""
    return model.decode(z, clamp=False)


@dataclass
class _Recorded:
    """What has been recorded on a device, and of which weights."""

    version: tuple[WeightsVersion, torch.dtype | None]
    graphs: dict[Hashable, Pass] = field(default_factory=dict)
    seen: Counter[Hashable] = field(default_factory=Counter)
    model: GLEM | None = None  # with the copy of the flow


class FlowGraphs:
    """The graphs of one GLEMAugment. Sending or copying it leaves them behind."""

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self._lock = threading.Lock()
        self._on: dict[torch.device, _Recorded] = {}
        self._given_up = False

    def __call__(self, function: Callable[[GLEM, Tensor], Tensor], model: GLEM, x: Tensor) -> Tensor:
        """``function(model, x)``, a new tensor.

        Args:
            function: `encode` or `decode`.
            model: in eval mode; x: on its device.
        """
        if not self._given_up and _can_be_recorded(x) and not any(p.requires_grad for p in model.flow.parameters()):
            with self._lock:
                graph = self._graph(function, model, x)
                if graph is not None:
                    return graph(x)
        return function(model, x)

    def _graph(self, function: Callable[[GLEM, Tensor], Tensor], model: GLEM, x: Tensor) -> Pass | None:
        version = WeightsVersion(model.flow), getattr(model.flow, "autocast", None)
        on = self._on.get(x.device)
        if on is None or on.version != version:
            on = self._on[x.device] = _Recorded(version)
        key = function, x.shape, x.dtype, _stream(x)
        if key in on.graphs:
            return on.graphs[key]
        on.seen[key] += 1
        if on.seen[key] < _RECORDED_AT or len(on.graphs) >= _MOST:
            return None
        # What is made under inference_mode could not be overwritten outside it.
        with _recording, torch.inference_mode(False), torch.no_grad():
            own = on.model = on.model or _with_own_flow(model)
            try:
                on.graphs[key] = _record(lambda given: function(own, given), x)
            except RuntimeError as error:
                self._on, self._given_up = {}, True
                warnings.warn(
                    f"the flow could not be recorded as a CUDA graph and goes on without ({error.__context__ or error})"
                    ": leave cuda_graphs out",
                    stacklevel=2,
                )
        return on.graphs.get(key)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._empty()


# A process can record one graph at a time.
_recording = threading.Lock()


def _can_be_recorded(x: Tensor) -> bool:
    """Not where the user records or compiles a step that this is a part of, nor where gradients are wanted."""
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and not is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def _stream(x: Tensor) -> Hashable:
    """Graphs of two streams may run at the same time, so they share no memory."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def _with_own_flow(model: GLEM) -> GLEM:
    """The same model with a copy of its flow."""
    own = copy.copy(model)
    own._modules = dict(model._modules)
    own.flow = copy.deepcopy(model.flow).eval()
    return own


def _record(function: Pass, x: Tensor) -> Pass:
    """``function`` as a graph, for tensors like ``x``.

    Raises:
        RuntimeError: it does what can't be recorded, such as waiting for the device.
    """
    given = x.clone()
    with torch.cuda.device(x.device):
        stream, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                function(given)
        stream.wait_stream(aside)
        graph, recorder = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        # cuBLAS keeps memory for every stream: that of the graph is to be its own, and nobody's afterwards.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # The outer one goes back to its stream even where the end of a recording fails. Other threads, such as that
            # which pins batches, may go on meanwhile.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=recorder, capture_error_mode="thread_local"),
            ):
                found = function(given)
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def run(x: Tensor) -> Tensor:
        given.copy_(x)
        graph.replay()
        return found.clone()  # which the next call overwrites

    return run
