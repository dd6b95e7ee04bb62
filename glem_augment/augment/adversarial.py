"""The adversarial choice of the coefficients along the modes: the move that a classifier finds hardest.

From a noise start c0 = t e, e ~ N(0, I_k), one step up the classifier's loss L as a function of the k coefficients
alone,

    c = c0 + t sqrt(k) / 2 * g / |g|,     g = d L(classifier(image(c0)), y) / dc,

in units of the modes' standard deviations; t is `strength`. The step is half as long as the noise is on average: k
counts the modes that the class has, which are fewer than asked for where it was fitted on a few images.

Source: one normalised gradient step as in Goodfellow et al. 2015, taken along class modes of a latent space instead of
pixels.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import get_worker_info

from glem_augment.flows.precision import callers_precision

# float16 gradients of a loss of order 1 underflow; only their direction matters here.
HALF_SCALE = 1024.0


class CallerSettings(NamedTuple):
    """The precision that the caller has chosen, for the classifier's pass inside a transform that overrides it."""

    device_type: str
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> CallerSettings:
        """What holds at this moment."""
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
        )

    @contextlib.contextmanager
    def again(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """These settings, and those of the moment back afterwards; `dtype` turns autocast on, whatever it was."""
        with callers_precision():
            enabled = self.autocast or dtype is not None
            with torch.autocast(self.device_type, dtype=dtype or self.dtype, enabled=enabled):
                yield

    @contextlib.contextmanager
    def for_backward(self) -> Iterator[None]:
        """The same without autocast, under which a backward pass would put its own operations into half precision."""
        with callers_precision(), torch.autocast(self.device_type, enabled=False):
            yield


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile.

    A pass through the wrapper itself would prepare DDP's reduction for a backward pass that never comes, and start
    collectives that other ranks do not take part in; a compiled module would be compiled again for every batch size.
    """
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod
        else:
            return module


@contextlib.contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode with frozen parameters, and each sub-module and parameter as it was afterwards.

    The flags are set one by one: `train()` may be overridden to do more, and would also wake sub-modules that the
    user keeps in eval mode.
    """
    training = [m for module in modules for m in module.modules() if m.training]
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """A module whose parts that `module.compile()` compiled in place run as they are written: see `unwrapped`."""
    calls = [(m, m._compiled_call_impl) for m in module.modules() if m._compiled_call_impl is not None]
    try:
        for part, _ in calls:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in calls:
            part._compiled_call_impl = call


class Adversary:
    """A classifier whose loss chooses coefficients.

    Args:
        classifier: any module from images (as the transform gives them) to logits [n, K'].
        loss: takes the classifier's output and labels, gives one number or one per row; None: cross-entropy, for hard
            and soft labels.
        autocast: dtype of the classifier's pass; None: as autocast is set where the transform is called.

    Raises:
        TypeError: for a classifier that is no module, or a loss that can't be called.
    """

    def __init__(
        self,
        classifier: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be a torch.nn.Module, got {type(classifier).__name__}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must take (output, labels), got {type(loss).__name__}")
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"autocast must be torch.float16, torch.bfloat16 or None, got {autocast!r}")
        if next(unwrapped(classifier).parameters(), None) is None:
            warnings.warn(
                "the attached classifier has no parameters: if it calls a network that is not registered in it, that "
                "one is not kept in eval mode; attach the network itself",
                stacklevel=3,
            )
        self.classifier, self.loss, self.autocast = classifier, loss, autocast

    def coefficients(
        self,
        start: Tensor,
        strength: float,
        modes: Tensor,
        render: Callable[[Tensor], Tensor],
        labels: Tensor,
        caller: CallerSettings,
        flow: nn.Module,
    ) -> Tensor:
        """`start` [n, k] and one step up the loss.

        Args:
            start: coefficients in units of the modes' standard deviations; not written to.
            strength: t; modes: how many there are, int64 [n] or []; the step is t sqrt(modes) / 2 long.
            render: differentiable, from coefficients to images for the classifier.
            labels: int64 [n] or soft [n, K'], within the classifier's classes.
            caller: precision of the classifier's pass.
            flow: the model that `render` decodes with, frozen meanwhile like the classifier.

        Returns:
            [n, k], without a graph. Rows whose gradient is zero or not finite stay where they are.

        Raises:
            RuntimeError: under torch.inference_mode, or where no gradient reaches the images.
            ValueError: for an output that does not fit the labels.
        """
        if strength == 0 or len(start) == 0:
            return start
        if torch.is_inference_mode_enabled():
            raise RuntimeError("policy='adversarial' needs gradients, which torch.inference_mode() rules out")
        classifier = unwrapped(self.classifier)
        with torch.enable_grad(), untouched(classifier, flow), uncompiled(classifier):
            c = start.detach().clone().requires_grad_(True)
            pictures = self._as_weights(render(c), classifier, caller)
            with caller.again(self.autocast):
                total = self._total(classifier(pictures), labels)
                if not total.requires_grad:
                    raise RuntimeError(
                        "no gradient reaches the images: the classifier or the loss detaches them, or runs in no_grad"
                    )
            scale = HALF_SCALE if pictures.dtype == torch.float16 or self._half(caller) else 1.0
            with caller.for_backward():
                if self.loss is None and next(classifier.parameters(), None) is not None:
                    # All else in the graph is frozen. Not autograd.grad, which reentrant checkpointing refuses.
                    (total * scale).backward()
                    assert c.grad is not None
                    gradient = c.grad
                else:  # there may be weights elsewhere, whose gradients are not to be touched
                    (gradient,) = torch.autograd.grad(total * scale, c)
        norm = gradient.norm(dim=1, keepdim=True)
        usable = torch.isfinite(norm) & (norm > 0)
        length = 0.5 * strength * modes.to(norm.dtype).sqrt()
        step = length.reshape(-1, 1) * gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return start + torch.where(usable, step, 0.0)

    def _as_weights(self, pictures: Tensor, classifier: nn.Module, caller: CallerSettings) -> Tensor:
        """Without autocast, pictures in the dtype of the classifier's weights: a training loop that has these in half
        precision casts its batches after the loader."""
        weight = next((p for p in classifier.parameters() if p.is_floating_point()), None)
        if weight is None or caller.autocast or self.autocast is not None:
            return pictures
        return pictures.to(weight.dtype)

    def _half(self, caller: CallerSettings) -> bool:
        return (self.autocast or (caller.dtype if caller.autocast else None)) == torch.float16

    def _total(self, output: Any, labels: Tensor) -> Tensor:
        """The loss summed over rows; a mean serves as well, since only each row's direction is used."""
        if self.loss is not None:
            return self.loss(output, labels).sum()
        logits = getattr(output, "logits", output)
        if isinstance(output, (tuple, list)) and logits is output:
            found = [item for item in output if isinstance(item, Tensor) and item.ndim == 2]
            if len(found) != 1:
                raise ValueError(
                    f"the classifier gives {len(output)} things, {len(found)} of them matrices: which are the logits? "
                    "Give attach a loss, which takes (output, labels)"
                )
            logits = found[0]
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the classifier must give logits [{len(labels)}, classes], got {got}: give attach a loss")
        if labels.ndim == 2 and labels.shape[1] != logits.shape[1]:
            raise ValueError(
                f"soft labels have {labels.shape[1]} classes, the classifier {logits.shape[1]}: give num_classes and "
                "class_map, or attach a loss"
            )
        labels = labels if labels.ndim == 1 else labels.to(torch.float32)
        return F.cross_entropy(logits.to(torch.float32), labels, reduction="sum")


def check_attached(adversary: Adversary | None, device: torch.device) -> None:
    """Raise unless there is an adversary that can be used here.

    Raises:
        ValueError: no classifier, or one on another device. RuntimeError: in a DataLoader worker.
    """
    if get_worker_info() is not None:
        raise RuntimeError(
            "policy='adversarial' cannot run in a DataLoader worker, which has an old copy of the classifier at best: "
            "use it after the loader, with aug.wrap(loader)"
        )
    if adversary is None:
        raise ValueError("policy='adversarial' needs the classifier: call aug.attach(classifier) (on a copy, again)")
    first = next(unwrapped(adversary.classifier).parameters(), None)
    if first is not None and first.device.type != device.type:
        raise ValueError(f"the images are on {device}, the attached classifier on {first.device}: move one of them")
