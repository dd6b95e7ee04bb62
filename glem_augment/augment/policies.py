"""Policies: how `GLEMAugment` moves latents along the top modes of an image's class.

With the modes v_m (orthonormal), their standard deviations s_m and the projection P = V^T V on them:

    Mixup:        z' = z_i + (1 - keep) P (z_j - z_i),   keep ~ Beta(alpha, alpha), folded to [1/2, 1]
    Noise:        z' = z + sum_m s_m c_m v_m,            c = t e,  e_m ~ N(0, 1)
    Adversarial:  as Noise, with c = t e + t sqrt(k) / 2 * g / |g|,  g = dL/dc at t e

The partner z_j is another row of the batch, or a draw from the RFCM of its class (re-estimated full covariance). t is
`strength`, and L the loss of a classifier on the image. k is the number of modes of the class, which is small if the
class had few images. The step is half as long as the noise is on average.

Sources: Enescu & Sahbi, ACCV 2024 (Mixup); one normalised gradient step as in Goodfellow et al. 2015, along class modes
instead of pixels (Adversarial).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from glem_augment.augment.labels import mixed_labels
from glem_augment.checks import check_choice, check_number
from glem_augment.classes.modes import combine_modes, project_on_modes
from glem_augment.model.glem import GLEM
from glem_augment.parts import find, kinds
from glem_augment.tensors import evaluating, frozen, send

Partner = Literal["same", "any"]
Function = Callable[[Tensor], Tensor]
HALF_SCALE = 1024.0  # float16 gradients of a loss of order 1 underflow; only their direction matters


# ---- a policy's inputs -----------------------------------------------------------------------------------------------


@dataclass
class AugmentParams:
    """The random parameters of one call, on the CPU, for n selected rows of a batch of B.

    Attributes:
        rows: int64 [n], the rows to change, rising.
        cls: int64 [n], the model's class of each row, whose modes are used; -1: the model does not have the class, and
            the row is passed through.
        drawn: what the policy has drawn, by name; tensors whose first dimension is n.
    """

    rows: Tensor
    cls: Tensor
    drawn: dict[str, Tensor]

    def where(self, mask: Tensor) -> AugmentParams:
        """The parameters of the selected rows for which `mask`, bool [n], holds."""
        if bool(mask.all()):
            return self
        drawn = {name: value[mask] for name, value in self.drawn.items()}
        return AugmentParams(self.rows[mask], self.cls[mask], drawn)

    def having(self, **drawn: Tensor) -> AugmentParams:
        """The same parameters with other values for some of `drawn`."""
        return replace(self, drawn={**self.drawn, **drawn})


class ClassIndex:
    """The model's class for every data class, with K' data classes and K of the model; -1: none. All on the CPU.

    Attributes:
        to_model: int64 [K'], the model's class for each data class.
        to_data: int64 [K], the first data class for each class of the model.
        mapped: int64, the data classes that the model has.
    """

    def __init__(self, to_model: Sequence[int], model_classes: int) -> None:
        self.to_model = torch.tensor(to_model, dtype=torch.int64, device="cpu")
        self.mapped = (self.to_model >= 0).nonzero()[:, 0]
        self.to_data = torch.full((model_classes,), -1, device="cpu")
        for data_class in reversed(self.mapped.tolist()):  # backwards, so that the first of several stays
            self.to_data[self.to_model[data_class]] = data_class

    def model_class(self, data_cls: Tensor) -> Tensor:
        """The model's classes for the data classes data_cls, int64 [B]; -1 for none."""
        return self.to_model[data_cls.clamp(min=0)].masked_fill(data_cls < 0, -1)


class Selected(NamedTuple):
    """The rows of a batch of B that are to be moved, on the CPU, for `Policy.draw`.

    Attributes:
        rows: int64 [n], rising.
        data_cls: int64 [B], the data class of every row of the batch; -1 for soft labels of zeros.
        classes: the model's class for every data class.
        modes: how many modes are used.
    """

    rows: Tensor
    data_cls: Tensor
    classes: ClassIndex
    modes: int


class Basis(NamedTuple):
    """The top modes of the class of each of n rows.

    Attributes:
        directions: [C, k, d], orthonormal: the modes of all classes.
        rows: int64 [n], the row of `directions` of each of the n rows.
        scales: [n, k], standard deviations along the modes, 0 where a class has fewer than k.
        mean: [n, d], the mean of the class.
    """

    directions: Tensor
    rows: Tensor
    scales: Tensor
    mean: Tensor

    def along(self, coefficients: Tensor) -> Tensor:
        """sum_m s_m c_m v_m, [n, d], for coefficients [n, k] in units of the modes' standard deviations."""
        return combine_modes(coefficients * self.scales, self.rows, self.directions)

    def project(self, delta: Tensor) -> Tensor:
        """P delta, the part of delta [n, d] that lies along the modes."""
        return project_on_modes(delta, self.rows, self.directions)


@dataclass
class Batch:
    """The n rows that a policy moves, on the model's device, for `Policy.move`.

    Attributes:
        model: the GLEM, in eval mode.
        z: latents [n, d].
        partner: latents [n, d] of the rows that `drawn["partner"]`, int64 [n], names; z itself without this name.
        soft: soft labels [B, K'] of the whole batch if `Policy.softens` says so, else None.
        selected, params: the arguments and results of the draw, on the CPU.
        loss_gradient: the gradient of the attached classifier's loss: a function of a function from coefficients to
            latents, and of the coefficients, which have n rows.
        cls, drawn: the model's classes, int64 [n], and what `Policy.draw` has drawn.
    """

    model: GLEM
    z: Tensor
    partner: Tensor
    soft: Tensor | None
    selected: Selected
    params: AugmentParams
    loss_gradient: Callable[[Function, Tensor], Tensor]

    @cached_property
    def cls(self) -> Tensor:
        return send(self.params.cls, self.z.device)

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        return {name: send(value, self.z.device) for name, value in self.params.drawn.items()}

    def basis(self) -> Basis:
        """The top modes of each row's class."""
        modes, k = self.model.modes, self.selected.modes
        assert modes is not None
        scales = modes.scales[modes.rows(self.cls), :k]
        return Basis(modes.directions[:, :k], modes.rows(self.params.cls), scales, modes.mean[self.cls])


# ---- policies --------------------------------------------------------------------------------------------------------


class Policy(ABC):
    """How images are moved. A subclass with `draw` and `move` is a policy of your own (docs/plugin.md).

    `name`, the class's name in lower case, may stand for a policy with its defaults. The attributes of a policy are its
    arguments, under the same names.
    """

    name: ClassVar[str]
    wants_classifier: ClassVar[bool] = False  # whether `move` needs the classifier from `GLEMAugment.attach`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = cls.__name__.lower()
        if (known := kinds("policy").get(cls.name, cls)).__module__ == __name__ != cls.__module__:
            raise ValueError(f"the library has a policy {known.__name__!r} already: give your class another name")
        kinds("policy")[cls.name] = cls  # a notebook defines a class again when its cell runs again

    @abstractmethod
    def draw(self, selected: Selected, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the random parameters of n rows, on the CPU: tensors by name, whose first dimension is n.

        `partner`, int64 [n], names rows of the batch whose latents `move` needs; -1 for none.
        """

    @abstractmethod
    def move(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """The moved latents [n, d]; with the rows' new soft labels [n, K'] if `batch.soft` is not None."""

    def softens(self, soft_in: bool) -> bool:
        """Whether a call makes labels soft, or changes soft ones; `soft_in` says whether its labels are soft."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def as_policy(policy: Policy | str | Mapping[str, Any]) -> Policy:
    """A policy itself, from its name, or from {"name": its name, **its arguments}.

    ValueError: an unknown name. TypeError: neither a name nor a policy, or arguments that the policy does not have.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, (str, Mapping)):
        raise TypeError(f"policy must be a Policy, as Noise(strength=0.5), or the name of one, got {policy!r}")
    arguments = {} if isinstance(policy, str) else {**policy}
    name = policy if isinstance(policy, str) else arguments.pop("name", None)
    return find("policy", name)(**arguments)


class Mixup(Policy):
    """Principal-mode mixup: moves towards a partner along the modes.

    Args:
        alpha: float, the parameter of the Beta distribution of `keep`, the image's share along the modes.
        partner: "same": another row of the same data class, or else a draw from the class's RFCM. "any": any other row.

    Where a label may change (partner "any", or soft labels) it is mixed, weighted by the fraction of the move that the
    modes keep.
    """

    def __init__(self, alpha: float = 1.0, partner: Partner = "same") -> None:
        check_choice("partner", partner, get_args(Partner))
        self.alpha = check_number("alpha", alpha, 0.0, math.inf, open_low=True)
        self.partner = partner

    def softens(self, soft_in: bool) -> bool:
        return self.partner == "any" or soft_in

    def draw(self, selected: Selected, generator: torch.Generator) -> dict[str, Tensor]:
        """`partner` int64, a row of the batch, or -1 for a draw from the RFCM of `partner_cls` int64, a class of the
        model; `keep` float32 in [1/2, 1]; `seeds` int64 of such draws; all [n]."""
        rows, data_cls, classes, _ = selected
        n, batch = len(rows), len(data_cls)
        model_cls = classes.model_class(data_cls)
        keep = _draw_keep(self.alpha, n, generator)
        if self.partner == "same":
            allowed = data_cls == data_cls[rows][:, None]
            drawn_cls = model_cls[rows]
        else:
            allowed = torch.ones(n, batch, dtype=torch.bool, device="cpu")
            mapped = classes.mapped
            drawn_cls = classes.to_model[mapped[torch.randint(len(mapped), (n,), generator=generator, device="cpu")]]
        allowed[torch.arange(n, device="cpu"), rows] = False  # no row is the partner of itself
        # The partner is the allowed row with the largest random key. Selected rows come first, since they are encoded
        # anyway. They are random too, so every allowed row stays equally likely.
        keys = torch.rand(n, batch, generator=generator, dtype=torch.float32, device="cpu")
        keys[:, rows] += 1.0
        best, other = keys.masked_fill(~allowed, -1.0).max(dim=1)
        seeds = torch.randint(2**62, (n,), generator=generator, device="cpu")
        found = best >= 0
        partner, partner_cls = torch.where(found, other, -1), torch.where(found, model_cls[other], drawn_cls)
        return {"partner": partner, "partner_cls": partner_cls, "keep": keep, "seeds": seeds}

    def move(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        basis, keep = batch.basis(), batch.drawn["keep"]
        delta = _partners(batch) - batch.z
        along = basis.project(delta)
        moved = batch.z + (1.0 - keep)[:, None] * along
        if batch.soft is None:
            return moved
        # How much of |z_j - z_i|^2 lies along the modes: 0 for no difference.
        total = delta.square().sum(dim=1)
        part = along.square().sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
        away = (1.0 - keep) * part.clamp(max=1.0)
        params, (_, data_cls, classes, _) = batch.params, batch.selected
        # The label of a drawn partner is its class: the row's data class, or the first data class of another class.
        cls = params.drawn["partner_cls"]
        drawn_cls = torch.where(cls == params.cls, data_cls[params.rows], classes.to_data[cls]).clamp(min=0)
        return moved, mixed_labels(batch.soft, params.rows, params.drawn["partner"], drawn_cls, away)


class Noise(Policy):
    """Gaussian noise along the modes. Noise(strength=0.5) is the setting to start with where no classifier is at hand.

    Args:
        strength: float, in standard deviations of the modes.
    """

    def __init__(self, strength: float = 0.5) -> None:
        self.strength = check_number("strength", strength, 0.0, math.inf)

    def draw(self, selected: Selected, generator: torch.Generator) -> dict[str, Tensor]:
        """`eps` float32 [n, k], standard normal: the coefficients of k modes."""
        return {"eps": _normal(len(selected.rows), selected.modes, generator)}

    def move(self, batch: Batch) -> Tensor:
        return batch.z + batch.basis().along(self.strength * batch.drawn["eps"])


class Adversarial(Noise):
    """Noise along the modes, and a step up the loss of the classifier from `GLEMAugment.attach`.

    It gained most in our measurements.

    Args:
        strength: float, in standard deviations of the modes.
    """

    wants_classifier = True

    def __init__(self, strength: float = 0.25) -> None:
        super().__init__(strength)

    def move(self, batch: Batch) -> Tensor:
        """Rows whose gradient is zero or not finite are moved by the noise alone."""
        basis, start = batch.basis(), self.strength * batch.drawn["eps"]
        gradient = batch.loss_gradient(lambda c: batch.z + basis.along(c), start)
        norm = gradient.norm(dim=1, keepdim=True)
        modes = (basis.scales > 0).sum(dim=1, keepdim=True)
        length = 0.5 * self.strength * modes.to(norm.dtype).sqrt()
        step = length * gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return batch.z + basis.along(start + torch.where(norm.isfinite() & (norm > 0), step, 0.0))


# ---- parts of the policies -------------------------------------------------------------------------------------------


def _draw_keep(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """max(l, 1 - l) for l ~ Beta(alpha, alpha): float32 [n] in [1/2, 1]."""
    # NumPy draws it, because torch.distributions takes no generator.
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    mix = np.random.default_rng(seed).beta(alpha, alpha, n)
    return torch.tensor(np.maximum(mix, 1.0 - mix), dtype=torch.float32, device="cpu")


def _normal(n: int, m: int, generator: torch.Generator) -> Tensor:
    """Standard normal float32 [n, m] on the CPU, for any defaults of torch."""
    return torch.randn(n, m, generator=generator, dtype=torch.float32, device="cpu")


def _partners(batch: Batch) -> Tensor:
    """Latents [n, d] of the partners: of rows of the batch, or RFCM draws where the batch has none."""
    drawn, device = batch.params.drawn, batch.z.device
    missing = (drawn["partner"] < 0).nonzero()[:, 0]
    if not len(missing):
        return batch.partner
    source = batch.model.latent_classes.sampler("rfcm")
    # One seed per row: the draw must not depend on which other rows need a partner.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in drawn["seeds"][missing].tolist()]
    noise = [send(_normal(1, source.noise_size, generator), device) for generator in generators]
    rows = zip(drawn["partner_cls"][missing].split(1), noise, strict=True)
    draws = torch.cat([source.sample_from_noise(y, row) for y, row in rows])  # one by one, to the last bit
    return batch.partner.index_copy(0, send(missing, device), draws.to(batch.partner.dtype))


class Classifier:
    """A classifier whose loss guides moves; for the arguments see `GLEMAugment.attach`.

    The classifier runs without the wrappers of DistributedDataParallel and torch.compile. DDP would prepare a reduction
    for a backward pass that never comes. A compiled module would be compiled again for every batch size.
    """

    def __init__(
        self, classifier: nn.Module, loss: Callable[[Any, Tensor], Tensor], autocast: torch.dtype | None
    ) -> None:
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be a torch.nn.Module, got {type(classifier).__name__}")
        from timm.utils import unwrap_model  # timm takes a second to import

        self.module: nn.Module = unwrap_model(classifier)
        self.loss, self.autocast = loss, autocast

    def gradient(self, images_at: Function, at: Tensor, labels: Tensor, model: nn.Module) -> Tensor:
        """The gradient of the loss, summed over rows, in the argument of `images_at`, at `at`; in the shape of `at`.

        `images_at` makes images with `model`. Parameters of both models are frozen meanwhile.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                "a policy with a classifier cannot run in a DataLoader worker, which has an old copy of the classifier "
                "at best: use it after the loader, with aug.wrap(loader)"
            )
        kind = at.device.type
        with torch.enable_grad(), evaluating(self.module), frozen(self.module, model):
            point = at.detach().clone().requires_grad_(True)
            images = images_at(point)
            with nullcontext() if self.autocast is None else torch.autocast(kind, self.autocast):
                mixed = torch.is_autocast_enabled(kind)
                shown = images
                if not mixed:  # loops with weights in half precision cast their batches later
                    weight = next((p for p in self.module.parameters() if p.is_floating_point()), images)
                    shown = images.to(weight.dtype)
                used = torch.get_autocast_dtype(kind) if mixed else shown.dtype
                loss = self.loss(self.module(shown), labels).sum()
            if not loss.requires_grad:
                raise RuntimeError("no gradient reaches the images: is there a detach, no_grad or inference_mode?")
            scale = HALF_SCALE if used == torch.float16 else 1.0
            with torch.autocast(kind, enabled=False):  # a backward pass under autocast would be in half precision
                (gradient,) = torch.autograd.grad(loss * scale, point)
        return gradient


def cross_entropy(classes: int) -> Callable[[Any, Tensor], Tensor]:
    """The cross-entropy of an output, or of its `logits` [B, K], with labels of so many classes, summed over rows."""
    return partial(_cross_entropy, classes)


def _cross_entropy(classes: int, output: Any, labels: Tensor) -> Tensor:
    logits = getattr(output, "logits", output).float()
    if logits.shape[1] < classes or (labels.ndim == 2 and logits.shape != labels.shape):
        raise ValueError(
            f"the classifier gives {list(logits.shape)}, and the transform has {classes} classes: give the transform "
            "the classes= of the classifier's data, or give attach a loss"
        )
    return F.cross_entropy(logits, labels.long() if labels.ndim == 1 else labels.float(), reduction="sum")
