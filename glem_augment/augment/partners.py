"""Drawing partners and weights for policy "mixup"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glem_augment.augment.bank import LatentBank
from glem_augment.augment.lookup import ClassTables
from glem_augment.augment.params import FROM_BANK, FROM_BATCH, FROM_GAUSSIAN, FROM_RFCM, AugmentParams, folded_beta
from glem_augment.devices import move

# Whatever torch's defaults are.
_HOST: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def draw_mixup(
    partner: str,
    alpha: float,
    tables: ClassTables,
    chosen: Tensor,
    cls_all: Tensor,
    data_all: Tensor,
    dim: int,
    rank: int,
    generator: torch.Generator,
    bank: LatentBank | None,
) -> AugmentParams:
    """The random parameters of one call.

    Args:
        partner, alpha: as given to GLEMAugment.
        tables: on the device of the labels, as the result.
        chosen: int64 [n] on the CPU, rows to change.
        cls_all, data_all: int64 [B], flow class (-1 = none) and data class of every row.
        dim: d; rank: modes fitted per class (all, not only those in use).
        generator: on the CPU.
        bank: latents of earlier images by data class, or None.
    """
    device, batch, n = cls_all.device, len(cls_all), len(chosen)
    rows = move(chosen, device)
    cls = cls_all[rows]
    lam = move(folded_beta(alpha, n, generator), device)
    if partner == "gaussian":
        eps = move(torch.randn(n, dim, generator=generator, **_HOST), device)
        source = torch.full_like(rows, FROM_GAUSSIAN)
        return AugmentParams(rows, cls, torch.full_like(rows, -1), cls, source, lam, eps)
    # The partner is the allowed row with the largest random key: uniform, without a loop over rows or
    # classes. Selected rows (also random, and encoded anyway) come before the others.
    keys = torch.rand(n, batch, generator=generator, **_HOST)
    keys[:, chosen] += 1.0
    keys = move(keys, device)
    pick = move(torch.rand(n, generator=generator, **_HOST), device)
    allowed, partner_cls = tables.partners(partner, rows, cls_all, data_all, pick)
    own = rows[:, None] == torch.arange(batch, device=device)
    best, other = keys.masked_fill(~allowed | own, -1.0).max(dim=1)
    found = best >= 0
    source = torch.where(found, FROM_BATCH, FROM_RFCM)
    # Drawn for every row: which ones find a partner is known only on the device, and asking it would wait.
    eps = move(torch.randn(n, rank + dim, generator=generator, **_HOST), device)
    partner_cls = torch.where(found, cls_all[other], partner_cls)
    params = AugmentParams(rows, cls, other.masked_fill(~found, -1), partner_cls, source, lam, eps)
    if bank is not None:
        # Copied out of the bank now, so that the call can be replayed when the bank has moved on.
        uniform = torch.rand(n, generator=generator, **_HOST)
        wanted = tables.data_class(partner_cls, cls, data_all[rows])
        stored, there = bank.pick(move(wanted, bank.device), move(uniform, bank.device))
        params.stored = stored
        params.source = source.masked_fill(~found & move(there, device), FROM_BANK)
    return params
