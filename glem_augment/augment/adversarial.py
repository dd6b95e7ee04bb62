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

# float16 gradients of a loss of order 1 underflow. Only their direction matters here.
HALF_SCALE = 1024.0


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Put modules in eval mode and freeze their parameters; afterwards everything is as it was.

    The flags are set one by one, since `train()` would wake sub-modules that the user keeps in eval mode.
    """
    training = [m for module in modules for m in module.modules() if m.training]
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for m in training:
            m.training = False
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for m in training:
            m.training = True
        for p in learning:
            p.requires_grad_(True)


class Adversary:
    """A classifier whose loss chooses coefficients.

    Args:
        classifier: a module from images (as the transform gives them) to logits [n, K']. It runs without the wrappers
            of DistributedDataParallel and torch.compile: DDP would prepare a reduction for a backward pass that never
            comes, and a compiled module would be compiled again for every batch size.
        loss: a function of the classifier's output and the labels, to one number or one per row; None: cross-entropy,
            for hard and soft labels.
        autocast: dtype of the classifier's pass; None: autocast stays as it is set around the transform.

    Raises:
        TypeError, ValueError: for a classifier that is no module, a loss that can't be called, or another dtype.
    """

    def __init__(
        self,
        classifier: nn.Module,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be a torch.nn.Module, got {type(classifier).__name__}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must take (output, labels), got {type(loss).__name__}")
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"autocast must be torch.float16, torch.bfloat16 or None, got {autocast!r}")
        from timm.utils import unwrap_model  # timm takes a second to import

        self.classifier: nn.Module = unwrap_model(classifier)
        self.loss, self.autocast = loss or _cross_entropy, autocast

    def _check(self, device: torch.device) -> None:
        """Raise unless the classifier can be used here, for images on `device`."""
        if get_worker_info() is not None:
            raise RuntimeError(
                "policy='adversarial' cannot run in a DataLoader worker, which has an old copy of the classifier at "
                "best: use it after the loader, with aug.wrap(loader)"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("policy='adversarial' needs gradients, which torch.inference_mode() rules out")
        weight = next(self.classifier.parameters(), None)
        if weight is not None and weight.device.type != device.type:
            raise ValueError(f"the images are on {device}, the attached classifier on {weight.device}: move one")

    def coefficients(
        self,
        start: Tensor,
        strength: float,
        basis: Basis,
        render: Callable[[Tensor], Tensor],
        labels: Tensor,
        flow: nn.Module,
    ) -> Tensor:
        """`start` and one step up the loss.

        Args:
            start: [n, k], coefficients in units of the modes' standard deviations.
            strength: t; basis: the modes of each row.
            render: differentiable, from coefficients to images for the classifier.
            labels: int64 [n] or soft [n, K'].
            flow: the model that `render` decodes with; it is frozen meanwhile, like the classifier.

        Returns:
            [n, k]. Rows whose gradient is zero or not finite stay at their start.

        Raises:
            RuntimeError: in a DataLoader worker, under inference_mode, or if no gradient reaches the images.
            ValueError: a classifier on another device, or whose output does not fit the labels.
        """
        self._check(start.device)
        if strength == 0:
            return start
        kind = start.device.type
        with torch.enable_grad(), untouched(self.classifier, flow):
            c = start.detach().clone().requires_grad_(True)
            images = render(c)
            with nullcontext() if self.autocast is None else torch.autocast(kind, self.autocast):
                half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
                loss = self.loss(self.classifier(self._cast(images)), labels).sum()
            if not loss.requires_grad:
                raise RuntimeError(
                    "no gradient reaches the images: the classifier or the loss detaches them, or runs in no_grad"
                )
            scale = HALF_SCALE if half or images.dtype == torch.float16 else 1.0
            with torch.autocast(kind, enabled=False):  # a backward pass under autocast would be in half precision
                (gradient,) = torch.autograd.grad(loss * scale, c)
        norm = gradient.norm(dim=1, keepdim=True)
        modes = (basis.scales[basis.cls] > 0).sum(dim=1, keepdim=True)
        length = 0.5 * strength * modes.to(norm.dtype).sqrt()
        step = length * gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return start + torch.where(norm.isfinite() & (norm > 0), step, 0.0)

    def _cast(self, images: Tensor) -> Tensor:
        """Images in the dtype of the classifier's weights, unless autocast takes care of that.

        A training loop that keeps its weights in half precision casts its batches after the loader.
        """
        weight = next((p for p in self.classifier.parameters() if p.is_floating_point()), None)
        return images if weight is None or torch.is_autocast_enabled(images.device.type) else images.to(weight.dtype)


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the classifier must give logits [{len(labels)}, classes], got {got}: give attach a loss, a function of "
            "its output and the labels"
        )
    if labels.ndim == 2 and labels.shape[1] != logits.shape[1]:
        raise ValueError(
            f"soft labels have {labels.shape[1]} classes, the classifier {logits.shape[1]}: give num_classes and "
            "class_map, or attach a loss"
        )
    return F.cross_entropy(logits.float(), labels.float() if labels.ndim == 2 else labels.long(), reduction="sum")
