"""Labels of batches: their checks, their classes in the model, and the labels of moved images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from glem_augment.augment.random import AugmentParams
from glem_augment.tensors import send

Labels = Literal["auto", "hard", "mix", "posterior"]
MOST_SMOOTHING = 0.3  # more label smoothing than this is taken for a mixture


class FlowClasses:
    """The flow class of every data class, with K' data and K flow classes; -1 stands for none. All on the CPU.

    Attributes:
        to_flow: int64 [K'], the flow class of each data class.
        to_data: int64 [K], the first data class of each flow class.
        mapped: int64, the data classes that the flow has.
    """

    def __init__(self, to_flow: Sequence[int], flow_classes: int) -> None:
        self.to_flow = torch.tensor(to_flow, dtype=torch.int64, device="cpu")
        self.mapped = (self.to_flow >= 0).nonzero()[:, 0]
        self.to_data = torch.full((flow_classes,), -1, device="cpu")
        for data_class in reversed(self.mapped.tolist()):  # backwards, so that the first of several stays
            self.to_data[self.to_flow[data_class]] = data_class

    def flow_class(self, data_cls: Tensor) -> Tensor:
        """The flow classes of the data classes data_cls, int64 [B]; -1 for none."""
        return self.to_flow[data_cls.clamp(min=0)].masked_fill(data_cls < 0, -1)

    def data_probability(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of data classes [n, K'] from probabilities p of flow classes [n, K].

        Data classes with one flow class share its probability equally. The second result, bool [n], is False where only
        classes that the data lacks have a probability.
        """
        several = torch.bincount(self.to_flow[self.mapped], minlength=len(self.to_data))
        index = self.to_flow.clamp(min=0)
        weight = (self.to_flow >= 0).to(p.dtype) / several[index].clamp(min=1)
        q = p[:, send(index, p.device)] * send(weight, p.device)
        total = q.sum(dim=1, keepdim=True)
        return q / total.clamp(min=torch.finfo(total.dtype).tiny), total[:, 0] > 0


def check_labels(y: object, batch: int, num_classes: int) -> Tensor:
    """The class of each row of a batch's labels, integers [batch] or floats [batch, K']: int64 [batch].

    The class of a soft label is the strongest one, or -1 for a row of zeros. TypeError, ValueError: other labels.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of labels, got {type(y).__name__}")
    if y.shape not in ((batch,), (batch, num_classes)):
        fix = ""
        if y.ndim == 2 and len(y) == batch:
            fix = (
                ": give y[:, 0]" if y.shape[1] == 1 else ": give class_map if the data has other classes than the flow"
            )
        wanted = f"integers [{batch}] or soft labels [{batch}, {num_classes}]"
        raise ValueError(f"y must be {wanted}, got {tuple(y.shape)}{fix}")
    if y.is_floating_point() != (y.ndim == 2) or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"labels [B] must be integers, and soft labels [B, K'] floating point; got {y.dtype}")
    if y.ndim == 2:
        strongest = y.detach().max(dim=1)
        return strongest.indices.masked_fill(strongest.values <= 0, -1)
    classes = y.long().cpu()
    if batch:
        low, high = (int(v) for v in torch.aminmax(classes))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"label {low if low < 0 else high} is out of range: this transform has classes 0 to "
                f"{num_classes - 1}; give num_classes and class_map if the data has other classes than the flow"
            )
    return classes


def label_kind(labels: str, policy: str, partner: str, soft_in: bool) -> str:
    """How a call changes labels: "hard" (not at all), "soft" (made soft), "mix" or "posterior"."""
    if labels == "auto":
        return "mix" if policy == "mixup" and (partner == "any" or soft_in) else "hard"
    if labels == "mix" and policy != "mixup":
        return "soft"
    return labels


def soft_labels(y: Tensor, num_classes: int) -> Tensor:
    """y itself if it is soft, else one-hot float32 [B, K']."""
    return y if y.ndim == 2 else torch.nn.functional.one_hot(y.long(), num_classes).to(torch.float32)


def mixed_labels(
    soft: Tensor, data_cls: Tensor, params: AugmentParams, classes: FlowClasses, share: Tensor, keep: Tensor
) -> Tensor:
    """Labels [B, K'] after principal-mode mixup: w y_i + (1 - w) y_j with the weight w = 1 - (1 - l) share.

    `soft` [B, K'] are the labels before it, and data_cls, int64 [B] on the CPU, their classes. share [n] is the part of
    |z_j - z_i|^2 that the projection kept. keep, bool [n], marks the rows that were moved and not put back.
    """
    device = soft.device
    own = soft.index_select(0, send(params.rows, device))
    # Label smoothing gives every class the same share, the least entry of the batch. (A row may mix all classes.)
    num_classes, least = soft.shape[1], soft.amin().clamp(min=0.0)
    floor = torch.where(least * num_classes > MOST_SMOOTHING, 0.0, least)
    # The label of a drawn partner is its class: the row's data class, or the first data class of another flow class.
    own_cls, other_cls = data_cls[params.rows], classes.to_data[params.partner_cls]
    drawn_cls = torch.where(params.partner_cls == params.cls, own_cls, other_cls).clamp(min=0)
    pure = soft_labels(send(drawn_cls, device), num_classes).to(soft.dtype)
    drawn = floor + (1.0 - num_classes * floor) * pure
    partner = send(params.partner, device)
    other = torch.where((partner < 0)[:, None], drawn, soft.index_select(0, partner.clamp(min=0)))
    away = ((1.0 - send(params.l, device)) * share.to(device))[:, None].to(soft.dtype)
    return _with_rows(soft, params, own + away * (other - own), keep)


def posterior_labels(soft: Tensor, params: AugmentParams, classes: FlowClasses, p: Tensor, keep: Tensor) -> Tensor:
    """Labels [B, K'] with the flow's posterior p [n, K] at the moved latents; see `mixed_labels`."""
    q, usable = classes.data_probability(p)
    return _with_rows(soft, params, q.to(soft.device), keep & usable)


def _with_rows(soft: Tensor, params: AugmentParams, new: Tensor, keep: Tensor) -> Tensor:
    rows = send(params.rows, soft.device)
    own = soft.index_select(0, rows)
    return soft.index_copy(0, rows, torch.where(keep.to(soft.device)[:, None], new.to(soft.dtype), own))
