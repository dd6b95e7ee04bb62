"""Moves in the latent space along the modes of a basis, and which rows of a batch they need encoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from glem_augment._drawing import AugmentParams
from glem_augment._lookup import FlowOnDevice
from glem_augment.modes import row_chunks


def along_modes(flow: FlowOnDevice, cls: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_m s_m c_m v_m`` for the basis of each row's class.

    Args:
        cls: int64 [n]; coefficients: [n, k] in units of the modes' standard deviations.

    Returns:
        [n, d].
    """
    if flow.directions.ndim == 2:  # shared
        return (coefficients * flow.scales) @ flow.directions
    coefficients = coefficients * flow.scales[cls]
    out = coefficients.new_empty(len(cls), flow.directions.shape[-1])
    for part in row_chunks(len(cls), flow.directions[0].numel()):
        out[part] = torch.bmm(coefficients[part, None], flow.directions[cls[part]])[:, 0]
    return out


def project(flow: FlowOnDevice, cls: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """P delta [n, d], and |P delta|^2 / |delta|^2 [n] (0 where delta is 0: nothing moves)."""
    if flow.directions.ndim == 2:  # shared
        moved = (delta @ flow.directions.mT) @ flow.directions
    else:
        moved = torch.empty_like(delta)
        for part in row_chunks(len(cls), flow.directions[0].numel()):
            v = flow.directions[cls[part]]
            moved[part] = torch.bmm((v @ delta[part, :, None]).mT, v)[:, 0]
    total = delta.square().sum(dim=1)
    share = moved.square().sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return moved, share.clamp(max=1.0)


def drawn_partners(flow: FlowOnDevice, params: AugmentParams) -> Tensor:
    """Partners made from eps, [n, d]; not used where the partner is a row of the batch."""
    cls = params.partner_cls.clamp(min=0)
    # A call draws all its partners from Gaussians or none: then eps has d columns, not k + d.
    if params.eps.shape[1] == flow.model.dim:
        gaussians = flow.model.gaussians
        return gaussians.mu[cls] + gaussians.variance()[cls].sqrt() * params.eps
    return flow.fitted.sample_from_noise(cls, params.eps)


def rows_to_encode(params: AugmentParams, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Batch rows to encode, and where in them the selected rows [n] and their partners [n] are.

    Partners that are draws stand for themselves (the result is not used).
    """
    rows = params.rows
    n = len(rows)
    if params.partner.numel() == 0 or (rows.device.type == "cpu" and bool((params.partner < 0).all())):
        own = torch.arange(n, device=rows.device)
        return rows, own, own
    partner = torch.where(params.partner < 0, rows, params.partner)
    if rows.device.type == "cpu":
        index, place = torch.unique(torch.cat([rows, partner]), return_inverse=True)
        return index, place[:n], place[n:]
    # On an accelerator the number of different rows is not known without waiting: take the smaller fixed set.
    if 2 * n >= batch:
        return torch.arange(batch, device=rows.device), rows, partner
    place = torch.arange(2 * n, device=rows.device)
    return torch.cat([rows, partner]), place[:n], place[n:]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and back in train mode afterwards if that is where it was."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
