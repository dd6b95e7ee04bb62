"""The adversarial step: coefficients along the modes that raise a classifier's loss.

From a noise start c0 = t e, e ~ N(0, I_k), one step is taken up the classifier's loss L as a function of the k
coefficients alone,

    c = c0 + t sqrt(k) / 2 * g / |g|,     g = d L(classifier(image(c0)), y) / dc,

in units of the modes' standard deviations, where t is `strength`. The step is half as long as the noise is on average.
k counts the modes that the class has, which are fewer than asked for if it was fitted on a few images.

Source: one normalised gradient step as in Goodfellow et al. 2015, taken along class modes of a latent space instead of
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from glem_augment.augment.moves import Basis
from glem_augment.devices import evaluating

# float16 gradients of a loss of order 1 underflow. Only their direction matters here.
HALF_SCALE = 1024.0


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """The modules with frozen parameters for a while; those that learn do so again afterwards."""
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


class Adversary:
    """A classifier whose loss chooses coefficients; the arguments are those of `GLEMAugment.attach`.

    The classifier runs without the wrappers of DistributedDataParallel and torch.compile: DDP would prepare a reduction
    for a backward pass that never comes, and a compiled module would be compiled again for every batch size.
    """

    def __init__(
        self, classifier: nn.Module, loss: Callable[[Any, Tensor], Tensor] | None, autocast: torch.dtype | None
    ) -> None:
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be a torch.nn.Module, got {type(classifier).__name__}")
        from timm.utils import unwrap_model  # timm takes a second to import

        self.classifier: nn.Module = unwrap_model(classifier)
        self.loss, self.autocast = loss or _cross_entropy, autocast

    def coefficients(
        self,
        start: Tensor,
        strength: float,
        basis: Basis,
        render: Callable[[Tensor], Tensor],
        labels: Tensor,
        flow: nn.Module,
    ) -> Tensor:
        """`start` [n, k] and one step up the loss; rows whose gradient is zero or not finite stay at their start.

        Args:
            labels: int64 [n] or soft [n, K'].
            render: differentiable, from coefficients to images for the classifier.
            flow: the model that `render` decodes with; it is frozen meanwhile, like the classifier.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                "policy='adversarial' cannot run in a DataLoader worker, which has an old copy of the classifier at "
                "best: use it after the loader, with aug.wrap(loader)"
            )
        kind = start.device.type
        with torch.enable_grad(), evaluating(self.classifier), frozen(self.classifier, flow):
            c = start.detach().clone().requires_grad_(True)
            images = render(c)
            with nullcontext() if self.autocast is None else torch.autocast(kind, self.autocast):
                mixed = torch.is_autocast_enabled(kind)
                if not mixed:  # loops that keep weights in half precision cast their batches later than this
                    weight = next((p for p in self.classifier.parameters() if p.is_floating_point()), images)
                    images = images.to(weight.dtype)
                used = torch.get_autocast_dtype(kind) if mixed else images.dtype
                loss = self.loss(self.classifier(images), labels).sum()
            if not loss.requires_grad:
                raise RuntimeError("no gradient reaches the images: is there a detach, no_grad or inference_mode?")
            scale = HALF_SCALE if used == torch.float16 else 1.0
            with torch.autocast(kind, enabled=False):  # a backward pass under autocast would be in half precision
                (gradient,) = torch.autograd.grad(loss * scale, c)
        norm = gradient.norm(dim=1, keepdim=True)
        modes = (basis.scales[basis.cls] > 0).sum(dim=1, keepdim=True)
        length = 0.5 * strength * modes.to(norm.dtype).sqrt()
        step = length * gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return start + torch.where(norm.isfinite() & (norm > 0), step, 0.0)


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    logits = getattr(output, "logits", output).float()
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels.long(), reduction="sum")
    if logits.shape != labels.shape:
        raise ValueError(
            f"the classifier gives {tuple(logits.shape)}, the labels are {tuple(labels.shape)}: give the transform "
            "num_classes and class_map, or give attach a loss"
        )
    return F.cross_entropy(logits, labels.float(), reduction="sum")
