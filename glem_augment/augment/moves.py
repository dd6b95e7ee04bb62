"""Moves in the latent space, along the top modes of an image's class.

With the modes v_m (orthonormal), their standard deviations s_m and the projection P = V^T V on them:

    principal-mode mixup:  z' = z_i + (1 - l) P (z_j - z_i),       l ~ Beta(alpha, alpha), folded to [1/2, 1]
    noise:                 z' = z + t * sum_m s_m e_m v_m,         e_m ~ N(0, 1)

The partner z_j is another row of the batch, or a draw from the RFCM of its class (re-estimated full covariance).

Source: Enescu & Sahbi, ACCV 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from glem_augment.augment.labels import ClassMap
from glem_augment.augment.params import AugmentParams, draw_shares, normal
from glem_augment.flows.precision import full_precision
from glem_augment.latent.modes import combine_modes, project_on_modes
from glem_augment.model.glem import GLEM

Partner = Literal["same", "any"]
Modes = Literal["class", "shared"]
# What strength "auto" tries, the share of moves that it lets be put back, and how many moves it makes at least.
LADDER = (0.5, 0.25, 0.125, 0.0625)
MOST_PUT_BACK, TRIALS = 0.05, 128
MARGIN = 1.0  # images that leave [0, 1] by more are not plausible


class Basis(NamedTuple):
    """The modes of each of n rows: those of its class among C sets of modes.

    directions [C, k, d]; scales [C, k], standard deviations, 0 where a class has fewer than k modes; cls int64 [n].
    """

    directions: Tensor
    scales: Tensor
    cls: Tensor


def basis_of(model: GLEM, kind: str, k: int, cls: Tensor) -> Basis:
    """The top k modes for rows of the classes cls, int64 [n]: "class" (each class has its own) or "shared" by all."""
    model.checked_modes(k)  # they may have been fitted again since the transform was made
    modes = model.modes
    assert modes is not None
    if kind == "shared":
        return Basis(modes.shared_directions[None, :k], modes.shared_scales[None, :k], torch.zeros_like(cls))
    return Basis(modes.directions[:, :k], modes.scales[:, :k], cls)


def along_modes(basis: Basis, coefficients: Tensor) -> Tensor:
    """sum_m s_m c_m v_m, [n, d], for coefficients [n, k] in units of the modes' standard deviations."""
    with full_precision(coefficients.device.type):
        return combine_modes(coefficients * basis.scales[basis.cls], basis.cls, basis.directions)


def mix(basis: Basis, z: Tensor, partner: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Principal-mode mixup z' = z + (1 - l) P (partner - z) of latents [n, d], with l [n] in [1/2, 1].

    The second result, [n], is the share of |partner - z|^2 that P keeps (0 for no difference).
    """
    delta = partner - z
    with full_precision(z.device.type):
        projected = project_on_modes(delta, basis.cls, basis.directions)
    total = delta.square().sum(dim=1)
    share = projected.square().sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return z + (1.0 - l)[:, None] * projected, share.clamp(max=1.0)


# ---- which moves are good --------------------------------------------------------------------------------------


def plausible(decoded: Tensor, margin: float) -> Tensor:
    """Which of the images [n, C, H, W] are finite and leave [0, 1] by `margin` at most: bool [n]."""
    low, high = decoded.flatten(1).aminmax(dim=1)
    return (low >= -margin) & (high <= 1.0 + margin)  # NaN compares false


def comes_back(decoded: Tensor, images: Tensor) -> Tensor:
    """Which images [n, C, H, W] in [0, 1] their decoded latents show again, within half a uint8 step: bool [n]."""
    return (decoded - images).abs().flatten(1).amax(dim=1) < 0.5 / 255  # NaN compares false


def shares_put_back(model: GLEM, z: Tensor, basis: Basis, margin: float) -> Iterator[tuple[float, float]]:
    """Each strength of LADDER, and the share of the latents z [n, d] whose images noise of it makes implausible.

    Of few latents each is moved several times. The noise is the same in every call.
    """
    times = -(-TRIALS // len(z))
    z, basis = z.repeat(times, 1), basis._replace(cls=basis.cls.repeat(times))
    eps = normal(len(z), basis.directions.shape[1], torch.Generator("cpu").manual_seed(0)).to(z.device)
    for strength in LADDER:
        decoded = model.decode(z + along_modes(basis, strength * eps), clamp=False)
        yield strength, 1.0 - float(plausible(decoded, margin).float().mean())


def strongest_plausible(shares: Iterable[tuple[float, float]]) -> float:
    """The strength that "auto" stands for, from `shares_put_back`."""
    return next((strength for strength, share in shares if share <= MOST_PUT_BACK), LADDER[-1])


# ---- partners ------------------------------------------------------------------------------------------------


def draw_mixup(
    partner: str,
    alpha: float,
    rows: Tensor,
    data_cls: Tensor,
    class_map: ClassMap,
    model: GLEM,
    generator: torch.Generator,
) -> AugmentParams:
    """Draw partners and shares for the chosen rows int64 [n] of a batch of data classes int64 [B], -1 for none."""
    assert model.modes is not None
    n, batch = len(rows), len(data_cls)
    flow_cls = class_map.flow_class(data_cls)
    cls = flow_cls[rows]
    l = draw_shares(alpha, n, generator)  # noqa: E741
    if partner == "same":
        allowed = data_cls == data_cls[rows][:, None]
        drawn_cls = cls
    else:
        allowed = torch.ones(n, batch, dtype=torch.bool, device="cpu")
        mapped = class_map.mapped
        drawn_cls = class_map.to_flow[mapped[torch.randint(len(mapped), (n,), generator=generator, device="cpu")]]
    allowed[torch.arange(n, device="cpu"), rows] = False  # a row is not its own partner
    # The partner is the allowed row with the largest random key. Chosen rows come before the others, since they are
    # encoded anyway. They are chosen at random too, so every allowed row is still equally likely.
    keys = torch.rand(n, batch, generator=generator, dtype=torch.float32, device="cpu")
    keys[:, rows] += 1.0
    best, other = keys.masked_fill(~allowed, -1.0).max(dim=1)
    eps = normal(n, model.modes.rank + model.dim, generator)
    found = best >= 0
    partner_cls = torch.where(found, flow_cls[other], drawn_cls)
    return AugmentParams(rows, cls, eps, torch.where(found, other, -1), partner_cls, l)


def rows_to_encode(params: AugmentParams, batch: int) -> tuple[Tensor, Tensor]:
    """The batch rows to encode, the n selected ones first, and the place of each partner among them, int64 [n].

    A partner that is drawn has the place of the row itself, which is not used.
    """
    partner = torch.where(params.partner < 0, params.rows, params.partner) if len(params.partner) else params.rows
    others = partner[~torch.isin(partner, params.rows)].unique()
    index = torch.cat([params.rows, others])
    place = torch.zeros(batch, dtype=torch.int64, device="cpu")
    place[index] = torch.arange(len(index), device="cpu")
    return index, place[partner]


def partner_latents(model: GLEM, in_batch: Tensor, params: AugmentParams) -> Tensor:
    """The partners' latents [n, d]: `in_batch` [n, d] where the partner is a row of the batch, RFCM draws elsewhere."""
    drawn = params.partner < 0
    if not drawn.any():
        return in_batch
    assert model.modes is not None
    device = in_batch.device
    with full_precision(device.type):
        draws = model.modes.sample_from_noise(params.partner_cls[drawn].to(device), params.eps[drawn].to(device))
    return in_batch.index_copy(0, drawn.nonzero()[:, 0].to(device), draws.to(in_batch.dtype))
