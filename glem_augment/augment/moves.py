"""Moves in the latent space, along the top modes of an image's class.

With the modes v_m (orthonormal), their standard deviations s_m and the projection P = V^T V on them:

    principal-mode mixup:  z' = z_i + (1 - l) P (z_j - z_i),       l ~ Beta(alpha, alpha), folded to [1/2, 1]
    noise:                 z' = z + t * sum_m s_m e_m v_m,         e_m ~ N(0, 1)

The partner z_j is another row of the batch, or a draw from the RFCM of its class (re-estimated full covariance).

Source: Enescu & Sahbi, ACCV 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from glem_augment.augment.labels import FlowClasses
from glem_augment.augment.params import AugmentParams, draw_shares, normal
from glem_augment.devices import send, weights_key
from glem_augment.latent.modes import combine_modes
from glem_augment.model.glem import GLEM

Partner = Literal["same", "any"]
Modes = Literal["class", "shared"]
# What strength "auto" tries, the share of moves that it lets be put back, and how often it moves a few images in all.
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


def basis_of(model: GLEM, kind: str, k: int, cls: Tensor, z: Tensor) -> Basis:
    """The top k modes for latents z [n, d] of the classes cls, int64 [n]: "class" (each has its own) or "shared".

    Of a class with parts, the part with the nearest mean counts.
    """
    model.checked_modes(k)  # they may have been fitted again since the transform was made
    modes = model.modes
    assert modes is not None
    if kind == "shared":
        return Basis(modes.shared_directions[None, :k], modes.shared_scales[None, :k], torch.zeros_like(cls))
    return Basis(modes.directions[:, :k], modes.scales[:, :k], modes.rows_of(cls, z))


def along_modes(basis: Basis, coefficients: Tensor) -> Tensor:
    """sum_m s_m c_m v_m, [n, d], for coefficients [n, k] in units of the modes' standard deviations."""
    return combine_modes(coefficients * basis.scales[basis.cls], basis.cls, basis.directions)


class Rows(NamedTuple):
    """What a move of n rows starts from.

    z: latents [n, d]. images: at full size, float in [0, 1]. base: images at the flow's size, of which the moved ones
    are changes. labels: int64 [n] or soft [n, K'], on the device.
    """

    z: Tensor
    basis: Basis
    images: Tensor
    base: Tensor
    labels: Tensor

    def repeated(self, times: int) -> Rows:
        """The rows so many times, one after the other."""
        basis = self.basis._replace(cls=self.basis.cls.repeat(times))
        z, images, base, labels = (torch.cat([t] * times) for t in (self.z, self.images, self.base, self.labels))
        return Rows(z, basis, images, base, labels)


# ---- which moves are good --------------------------------------------------------------------------------------


def plausible(decoded: Tensor, margin: float) -> Tensor:
    """Which of the images [n, C, H, W] are finite and leave [0, 1] by `margin` at most: bool [n]."""
    low, high = decoded.flatten(1).aminmax(dim=1)
    return (low >= -margin) & (high <= 1.0 + margin)  # NaN compares false


def comes_back(model: GLEM, images: Tensor) -> Tensor:
    """Which images [n, C, H, W] the flow gives back, within half a uint8 step: bool [n].

    With an autoencoder the flow alone is judged, by as small a share of the deviation of a channel of its latents.
    """
    return model.flow_error(images) < 0.5 / 255


class InverseTest:
    """Which calls test whether the flow gives the images back.

    Every call does until FIRST in a row have lost no image, then one of EVERY, and all of them again when the flow's
    weights have changed.
    """

    FIRST, EVERY = 8, 32

    def __init__(self) -> None:
        self._key: object = None
        self._calls = self._good = 0

    def due(self, flow: nn.Module) -> bool:
        """Whether the call that begins now tests the inverse."""
        key = weights_key(flow)
        if key != self._key:
            self._key, self._good = key, 0
        self._calls += 1
        return self._good < self.FIRST or self._calls % self.EVERY == 0

    def saw(self, back: Tensor) -> None:
        """Take in what a test found, bool [n]; this waits for the device."""
        self._good = self._good + 1 if bool(back.all()) else 0


def strongest(shares: Iterable[tuple[float, float]]) -> float:
    """The strength that "auto" stands for, from strengths of LADDER and the shares of moves that each loses."""
    return next((strength for strength, share in shares if share <= MOST_PUT_BACK), LADDER[-1])


# ---- partners ------------------------------------------------------------------------------------------------


def draw_mixup(
    partner: str,
    alpha: float,
    rows: Tensor,
    data_cls: Tensor,
    class_map: FlowClasses,
    generator: torch.Generator,
) -> AugmentParams:
    """Draw partners and shares for the chosen rows int64 [n] of a batch of data classes int64 [B], -1 for none."""
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
    seeds = torch.randint(2**62, (n,), generator=generator, device="cpu")
    found = best >= 0
    partner_cls = torch.where(found, flow_cls[other], drawn_cls)
    return AugmentParams(rows, cls, l.new_empty(0), torch.where(found, other, -1), partner_cls, l, seeds)


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
    drawn = (params.partner < 0).nonzero()[:, 0]
    if not len(drawn):
        return in_batch
    assert model.modes is not None
    device = in_batch.device
    # Each row has a seed of its own, so that its partner does not depend on which other rows need one.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in params.seeds[drawn].tolist()]
    noise = torch.cat([normal(1, model.modes.noise_size, generator) for generator in generators])
    draws = model.modes.sample_from_noise(send(params.partner_cls[drawn], device), send(noise, device))
    return in_batch.index_copy(0, send(drawn, device), draws.to(in_batch.dtype))
