"""Moves in the latent space along the modes of a basis, and which rows of a batch they need encoded."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.augment.lookup import FlowOnDevice
from glem_augment.augment.params import FROM_BANK, FROM_BATCH, FROM_GAUSSIAN, AugmentParams
from glem_augment.devices import move
from glem_augment.latent.modes import per_class


def along_modes(flow: FlowOnDevice, cls: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_m s_m c_m v_m`` for the basis of each row's class.

    Args:
        cls: int64 [n]; coefficients: [n, k] in units of the modes' standard deviations.

    Returns:
        [n, d].
    """
    if flow.directions.ndim == 2:  # shared
        return (coefficients * flow.scales) @ flow.directions
    return per_class(torch.matmul, coefficients * flow.scales[cls], cls, flow.directions)


def project(flow: FlowOnDevice, cls: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """P delta [n, d], and |P delta|^2 / |delta|^2 [n] (0 where delta is 0: nothing moves)."""
    if flow.directions.ndim == 2:  # shared
        moved = _on_modes(delta, flow.directions)
    else:
        moved = per_class(_on_modes, delta, cls, flow.directions)
    total = delta.square().sum(dim=1)
    share = moved.square().sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return moved, share.clamp(max=1.0)


def _on_modes(delta: Tensor, modes: Tensor) -> Tensor:
    return (delta @ modes.mT) @ modes


def drawn_partners(flow: FlowOnDevice, params: AugmentParams) -> Tensor:
    """Partners made from eps, [n, d]; not used where the partner is a row of the batch."""
    cls = params.partner_cls.clamp(min=0)
    # A call draws all its partners from Gaussians or none: then eps has d columns, not k + d.
    if params.eps.shape[1] == flow.model.dim:
        gaussians = flow.model.gaussians
        return gaussians.mu[cls] + gaussians.variance()[cls].sqrt() * params.eps
    return flow.fitted.sample_from_noise(cls, params.eps)


def with_draws(flow: FlowOnDevice, partners: Tensor, host: AugmentParams, params: AugmentParams) -> Tensor:
    """`partners` [n, d], those that are rows of the batch, with drawn ones put in where `source` asks for them.

    Args:
        host: the parameters where they were drawn, of which the CPU tells how many draws there are without
            waiting; params: the same on the flow's device.
    """
    if params.stored.numel():
        partners = torch.where((params.source == FROM_BANK)[:, None], params.stored.to(partners.dtype), partners)
    if host.source.device.type != "cpu":
        there = (params.source == FROM_BATCH) | (params.source == FROM_BANK)
        return torch.where(there[:, None], partners, drawn_partners(flow, params))
    drawn = (host.source != FROM_BATCH) & (host.source != FROM_BANK)
    if bool(drawn.all()):
        return drawn_partners(flow, params)
    if not bool(drawn.any()):
        return partners
    return partners.index_copy(
        0, move(drawn.nonzero()[:, 0], partners.device), drawn_partners(flow, host.where(drawn).to(partners.device))
    )


def rescaling(flow: FlowOnDevice, params: AugmentParams, z: Tensor, partner: Tensor) -> Tensor:
    """What to add to a mixture of z and its partner [n, d], along the modes, so that it keeps the class's variance.

    l z_i + (1 - l) z_j of two independent latents has l^2 + (1 - l)^2 of their variance about the mixture of their
    means; the deviation is divided by the root of that.
    """
    l, cls = params.l[:, None], params.cls.clamp(min=0)  # noqa: E741
    other_cls = torch.where(params.partner_cls < 0, cls, params.partner_cls)
    mean = flow.fitted.mean
    gaussian = (params.source == FROM_GAUSSIAN)[:, None]
    other = torch.where(gaussian, flow.model.gaussians.mu.detach()[other_cls], mean[other_cls])
    deviation = l * (z - mean[cls]) + (1.0 - l) * (partner - other)
    return (1.0 / (l.square() + (1.0 - l).square()).sqrt() - 1.0) * deviation


def rows_to_encode(params: AugmentParams, batch: int) -> tuple[Tensor, Tensor]:
    """Batch rows to encode, the n selected ones first, and where among them the partners are, int64 [n].

    Partners that are draws stand for themselves (the result is not used).
    """
    rows = params.rows
    n = len(rows)
    if params.partner.numel() == 0:
        return rows, torch.arange(n, device=rows.device)
    partner = torch.where(params.partner < 0, rows, params.partner)
    if rows.device.type != "cpu":
        return _fixed_set(rows, partner, batch)
    selected = torch.zeros(batch, dtype=torch.bool, device="cpu").index_fill_(0, rows, True)
    return _placed(torch.cat([rows, partner[~selected[partner]].unique()]), partner, batch)


def _fixed_set(rows: Tensor, partner: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """`rows_to_encode` without waiting to learn how many different partners there are: as many rows as there
    can be."""
    n = len(rows)
    if 2 * n < batch:  # every partner, even one that is selected too
        return torch.cat([rows, partner]), torch.arange(n, 2 * n, device=rows.device)
    selected = torch.zeros(batch, dtype=torch.int32, device=rows.device).index_fill_(0, rows, 1)
    others = selected.argsort(stable=True)[: batch - n]
    return _placed(torch.cat([rows, others]), partner, batch)


def _placed(index: Tensor, partner: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    place = torch.zeros(batch, dtype=index.dtype, device=index.device)
    place[index] = torch.arange(len(index), device=index.device)
    return index, place[partner]
