"""Moves in the latent space, along the top modes of an image's class.

With the modes v_m (orthonormal), their standard deviations s_m and the projection P = V^T V on them:

    principal-mode mixup:  z' = z_i + (1 - l) P (z_j - z_i),       l ~ Beta(alpha, alpha), folded to [1/2, 1]
    noise:                 z' = z + sum_m s_m c_m v_m,             c = t e,  e_m ~ N(0, 1)
    adversarial:           as noise, with c = t e + t sqrt(k) / 2 * g / |g|,  g = dL/dc at t e

The partner z_j is another row of the batch, or a draw from the RFCM of its class (re-estimated full covariance). t is
`strength`, and L the loss of a classifier on the image. k is the number of modes of the class, which is small if the
class had few images. The step is half as long as the noise is on average.

Sources: Enescu & Sahbi, ACCV 2024 (mixup); one normalised gradient step as in Goodfellow et al. 2015, along class modes
instead of pixels (adversarial).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from glem_augment.augment.labels import FlowClasses
from glem_augment.augment.random import AugmentParams, draw_shares, normal
from glem_augment.classes.modes import combine_modes
from glem_augment.model.glem import GLEM
from glem_augment.tensors import evaluating, send

Partner = Literal["same", "any"]
BasisName = Literal["class", "shared"]
LADDER = (0.5, 0.25, 0.125, 0.0625)  # the strengths that "auto" tries
MOST_PUT_BACK, TRIALS = 0.05, 128  # the share of moves that "auto" may put back, and how many moves it tries
HALF_SCALE = 1024.0  # float16 gradients of a loss of order 1 underflow; only their direction matters


class Basis(NamedTuple):
    """C sets of modes, and the set of each of n rows.

    directions [C, k, d]; scales [C, k], standard deviations, 0 where a class has fewer than k modes; cls int64 [n].
    """

    directions: Tensor
    scales: Tensor
    cls: Tensor


def basis_of(model: GLEM, kind: str, k: int, cls: Tensor, z: Tensor) -> Basis:
    """The top k modes for latents z [n, d] of the classes cls, int64 [n]: of each "class" or its part, or "shared"."""
    model.checked_modes(k)  # they may have been fitted again since the transform was made
    modes = model.modes
    assert modes is not None
    if kind == "shared":
        return Basis(modes.shared_directions[None, :k], modes.shared_scales[None, :k], torch.zeros_like(cls))
    return Basis(modes.directions[:, :k], modes.scales[:, :k], modes.covariance_rows(modes.rows_of(cls, z)))


def along_modes(basis: Basis, coefficients: Tensor) -> Tensor:
    """sum_m s_m c_m v_m, [n, d], for coefficients [n, k] in units of the modes' standard deviations."""
    return combine_modes(coefficients * basis.scales[basis.cls], basis.cls, basis.directions)


class Rows(NamedTuple):
    """n rows before a move: latents z [n, d], images at full size in [0, 1], `base` images at the flow's size.

    Labels are int64 [n] or soft [n, K'].
    """

    z: Tensor
    basis: Basis
    images: Tensor
    base: Tensor
    labels: Tensor

    def repeated(self, times: int) -> Rows:
        """All rows `times` times, one after the other."""
        basis = self.basis._replace(cls=self.basis.cls.repeat(times))
        z, images, base, labels = (torch.cat([t] * times) for t in (self.z, self.images, self.base, self.labels))
        return Rows(z, basis, images, base, labels)


# ---- which moves are good --------------------------------------------------------------------------------------


def strongest(shares: Iterable[tuple[float, float]]) -> float:
    """The strength for "auto", from strengths of LADDER and the share of moves that each loses."""
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
    allowed[torch.arange(n, device="cpu"), rows] = False  # no row is the partner of itself
    # The partner is the allowed row with the largest random key. Chosen rows come first, since they are encoded anyway.
    # They are random too, so every allowed row stays equally likely.
    keys = torch.rand(n, batch, generator=generator, dtype=torch.float32, device="cpu")
    keys[:, rows] += 1.0
    best, other = keys.masked_fill(~allowed, -1.0).max(dim=1)
    seeds = torch.randint(2**62, (n,), generator=generator, device="cpu")
    found = best >= 0
    partner_cls = torch.where(found, flow_cls[other], drawn_cls)
    return AugmentParams(rows, cls, l.new_empty(0), torch.where(found, other, -1), partner_cls, l, seeds)


def rows_to_encode(params: AugmentParams, batch: int) -> tuple[Tensor, Tensor]:
    """The batch rows to encode, the n selected ones first, and the place of each partner among them, int64 [n].

    The place of a partner that is drawn is not used.
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
    # One seed per row: the draw must not depend on which other rows need a partner.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in params.seeds[drawn].tolist()]
    noise = torch.cat([normal(1, model.modes.noise_size, generator) for generator in generators])
    draws = model.modes.sample_from_noise(send(params.partner_cls[drawn], device), send(noise, device))
    return in_batch.index_copy(0, send(drawn, device), draws.to(in_batch.dtype))


# ---- the adversarial step --------------------------------------------------------------------------------------


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """The modules with frozen parameters for a while."""
    learning = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


class Adversary:
    """A classifier whose loss chooses coefficients; for the arguments see `GLEMAugment.attach`.

    The classifier runs without the wrappers of DistributedDataParallel and torch.compile. DDP would prepare a reduction
    for a backward pass that never comes. A compiled module would be compiled again for every batch size.
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

        `render` makes images for the classifier from coefficients, with the model `flow`. Both models are frozen
        meanwhile.
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
                if not mixed:  # loops with weights in half precision cast their batches later
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
