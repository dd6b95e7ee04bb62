"""GLEMAugment: move real images along the principal modes of their class, in the latent space of a flow.

A batch is encoded, its latents are moved within the span of the top modes, and decoded:

    mixup:  z' = z_i + (1 - l) P (z_j - z_i),   l ~ Beta(alpha, alpha) folded to [1/2, 1]
    noise:  z' = z + strength * sum_m s_m e_m v_m,   e_m ~ N(0, 1)
    adversarial: the same with coefficients that raise a classifier's loss (see `_adversarial`)

v_m and s_m are the modes and their standard deviations, P = V^T V the projection on them. Drawing the random
parameters (`draw`) is separate from using them (`apply`), so a call can be replayed.

Source: Enescu & Sahbi, ACCV 2024 (principal-mode mixup).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.augment.adversarial import Adversary, CallerSettings, check_attached
from glem_augment.augment.checks import check_batch, check_labels
from glem_augment.augment.held import Holdings
from glem_augment.augment.labels import data_class, is_pure, label_kind, moved_labels, soft_labels
from glem_augment.augment.lookup import ClassTables, FlowOnDevice
from glem_augment.augment.moves import along_modes, project, rescaling, rows_to_encode, with_draws
from glem_augment.augment.params import FROM_BATCH, AugmentParams, chosen_rows
from glem_augment.augment.partners import draw_mixup
from glem_augment.augment.plugin import PlugIn
from glem_augment.augment.resize import PixelAdapter, SmallImages
from glem_augment.augment.v2 import augment_sample, is_structure
from glem_augment.checks import check_choice, check_number, check_whole
from glem_augment.counts import MoveCounts
from glem_augment.data.classes import check_class_map
from glem_augment.data.pixels import in_range, in_range_
from glem_augment.devices import evaluating, move
from glem_augment.flows.precision import full_precision
from glem_augment.model.glem import GLEM, as_model
from glem_augment.random_state import RandomState

__all__ = ["AugmentParams", "GLEMAugment"]

POLICIES = ("mixup", "noise")  # that need nothing but images and labels; "adversarial" needs a classifier too
BASES = ("class", "near", "shared")
PARTNERS = ("same", "near", "any", "gaussian")
LABELS = ("auto", "hard", "mix", "posterior")
DETAILS = ("keep", "mix", "none")
_FIXED = ("policy", "modes", "basis", "partner", "detail", "rescale", "bank", "class_map", "num_classes")
_RANGES = {"p": (1.0, False), "alpha": (math.inf, True), "strength": (math.inf, False), "margin": (math.inf, False)}


class GLEMAugment(PlugIn, nn.Module):
    """A batch transform on images and labels through a GLEM. It has no parameters: the flow is not
    registered. `p`, `alpha`, `strength`, `margin` and `labels` may be set anew between calls.

    Args:
        model: a GLEM with fitted modes (`model.fit_modes(data)`), or its name (see `GLEM.from_pretrained`).
        p: probability of changing an image. Of a batch, p * B are changed, rounded up or down at random; p = 0 gives
            back the same images.
        policy: "mixup" (with a partner, along the modes), "noise" (Gaussian along the modes) or "adversarial" (noise
            and a step up the loss of a classifier, which `attach` names).
        alpha: parameter of the Beta law of "mixup".
        strength: standard deviations t of "noise" and of the start of "adversarial", whose step is
            t sqrt(k) / 2 long, in standard deviations of the modes, k those that the class has, at most `modes`.
        modes: number of top modes, at most `model.modes.rank`; None: 64, or all where the model has fewer. A class of
            few images has fewer, and moves along these.
        basis: whose modes: "class" (of the image's class), "near" (pooled with its 3 closest classes by KLD),
            "shared".
        partner: of "mixup": "same" (another row of its data class, else a draw from the RFCM), "near" (a row of,
            else a draw from, one of the 3 closest classes), "any" (any other row), "gaussian" (a draw from
            the class's Gaussian). Rows that are changed themselves come first, and the others only where there
            is none: they are encoded anyway, so a batch costs little more than its changed rows (on CUDA, where
            counting the others would mean to wait, up to as many again are encoded). Rows are selected
            independently of what they show, so every allowed row is still equally likely to be a given row's
            partner; only the partners of two rows of one batch are a little less independent.
        labels: "hard" (unchanged), "mix" (soft, by the share of the move that P keeps), "posterior" (of the
            flow, at z'), or "auto": unchanged where the class can't change (noise and adversarial; partner "same" or
            "gaussian" with hard labels), "mix" otherwise.
        mean, std: of a normalised input, a number or one per channel; None: the input is in [0, 1] or uint8.
        num_classes: K', width of soft labels; by default the length of `class_map` (of a dict, its largest key and
            one more), else the flow's K.
        class_map: flow class of every data class, a sequence or a dict; None, -1 or a missing key below
            `num_classes`: not in the flow, such images are passed through and counted.
        detail: where the images are larger than the flow's: "keep" adds the upsampled change to them, "mix"
            also mixes in the fine detail of a partner from the batch with the same l, "none" gives the
            decoded image, resized.
        seed: of the transform's own random state; None takes one from torch's global generator.
        margin: a decoded image that leaves [0, 1] by more is not plausible: the original is kept, and
            counted. Noise at strength 0.5 takes single pixels of good images 0.25 out of range and more, an
            inverse that explodes far beyond 1.
        rescale: of "mixup": undo that a mixture of two latents has only l^2 + (1 - l)^2 of their variance along the
            modes, by moving it away from the mixed class means.
        bank: of "mixup": keep this many latents of earlier images per class (K' * bank * d floats) and take partners
            from them, rather than from the RFCM, where the batch has none of the class; see also `fill_bank`.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it and what is allowed.
    """

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        p: float = 0.5,
        policy: str = "mixup",
        alpha: float = 1.0,
        strength: float = 0.5,
        modes: int | None = None,
        basis: str = "class",
        partner: str = "same",
        labels: str = "auto",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        num_classes: int | None = None,
        class_map: Mapping[int, int | None] | Sequence[int | None] | None = None,
        detail: str = "keep",
        seed: int | None = None,
        margin: float = 1.0,
        rescale: bool = False,
        bank: int = 0,
    ) -> None:
        super().__init__()
        check_choice("policy", policy, (*POLICIES, "adversarial"))
        check_choice("basis", basis, BASES)
        check_choice("partner", partner, PARTNERS)
        check_choice("detail", detail, DETAILS)
        self.p, self.alpha, self.strength, self.margin = p, alpha, strength, margin
        if detail == "mix" and policy != "mixup":
            raise ValueError(f"detail='mix' needs a partner, which policy {policy!r} has not: use policy='mixup'")
        name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        model = as_model(model)
        self._name = model.origin or name  # for `to_config`
        self.policy, self.basis, self.partner, self.labels, self.detail = (
            policy,
            basis,
            partner,
            labels,
            detail,
        )
        if not isinstance(rescale, bool):
            raise TypeError(f"rescale must be True or False, got {rescale!r}")
        bank = check_whole("bank", bank, 0)
        if policy != "mixup" and (rescale or bank):
            raise ValueError(f"rescale and bank are for policy='mixup', which has partners; got policy={policy!r}")
        if bank and partner == "gaussian":
            raise ValueError("bank is for partners from the batch, partner='gaussian' draws them all: leave it out")
        self.rescale, self.bank = rescale, bank
        self.modes = model.checked_modes(modes)
        if policy == "mixup" and partner == "near" and model.num_classes == 1:
            raise ValueError("partner='near' needs a flow with at least 2 classes, this one has 1: use partner='same'")
        self.pixels = PixelAdapter(model.image_shape, mean=mean, std=std, detail=detail)
        self.class_map = check_class_map(class_map, num_classes, model.num_classes)
        self.num_classes = model.num_classes if self.class_map is None else len(self.class_map)
        self._random = RandomState(seed)
        self._adversary: Adversary | None = None
        near = policy == "mixup" and partner == "near"
        # No nn.Module, so the flow is not registered: its weights are not the transform's.
        self._held = Holdings(model, basis, self.modes, self.class_map, near, self.num_classes, bank)
        self._counts = MoveCounts()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"{name} can't be changed, since what it stands for has been made ready: make another transform, "
                f"GLEMAugment.from_config({{**aug.to_config(), {name!r}: {value!r}}}, aug.model)"
            )
        if name in _RANGES:
            value = check_number(name, value, 0.0, *_RANGES[name])
        elif name == "labels":
            check_choice(name, value, LABELS)
        super().__setattr__(name, value)

    @property
    def model(self) -> GLEM:
        """The GLEM in use (not a submodule)."""
        return self._held.model

    @property
    def seed(self) -> int:
        """Of the transform's own random state."""
        return self._random.seed

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start; reading them waits for the device.

        Calls in DataLoader workers are counted as well. `selected`: rows chosen to be changed; `replaced`: of these,
        kept as they were because the decoded image was not finite or out of range; `unmapped`: of these, kept because
        their class is not in the flow; `invalid`: labels out of range met on an accelerator (elsewhere they are an
        error).
        """
        return self._counts.stats()

    @torch.compiler.disable  # of a user's compiled step: what there is to compile is the flow (`compile_steps`)
    def forward(self, x: Any, y: Any = None, *others: Any) -> Any:
        """Augment a batch.

        Args:
            x: [B, C, H, W] uint8, or float in [0, 1], or normalised float if mean and std were given. Any
                size; grey or RGB. Never changed in place. Also the first item of torchvision's v2 structures
                (tv_tensors, dicts, tuples; see `as_transform`), then given back as they came.
            y: int64 [B] data classes, or soft labels [B, K']. An image that shows several classes at once (multi-hot
                labels) is for noise and adversarial: it moves along the modes of the strongest one, the first of
                equals, and "mixup" would mix its label like that of a mixture.
            others: of a v2 structure of more than two items.

        Returns:
            (x', y') with x' of x's dtype, device and memory format; rows that were not selected are bit for
            bit those of x. y' is y itself, or float [B, K'].

        Raises:
            ValueError, TypeError: for a wrong shape, dtype, value range or label. The range is looked at in the first
                batch of each dtype and device.
        """
        if others or is_structure(x, y):
            return augment_sample(self, (x, y, *others) if others or y is not None else x)
        self._check(x, y)
        if self.p == 0:
            return x, self.target(y)
        self._counts.tell()
        result = self.apply(x, y, self.draw(x, y))
        self._counts.tell()
        if x.device.type == "cpu":
            self._counts.warn_where_most_are_lost()
        return result

    @torch.no_grad()
    def draw(self, x: Tensor | Sequence[int], y: Tensor, generator: torch.Generator | None = None) -> AugmentParams:
        """Draw the random parameters of one call.

        Args:
            x: the batch, or its shape (the first entry is B).
            y: int64 [B] or soft [B, K'].
            generator: a CPU generator, in place of the transform's own.

        Returns:
            AugmentParams on the device of y.
        """
        batch = int(x.shape[0] if isinstance(x, Tensor) else x[0])
        self._check_labels(y, batch)
        g = self._random.generator() if generator is None else generator
        tables = self._held.tables(y.device)
        chosen = chosen_rows(batch, self.p, g)
        cls_all = self._flow_class(y, tables)
        if self.policy != "mixup" or len(chosen) == 0:
            rows = move(chosen, y.device)
            drawn = torch.randn(len(rows), self.modes, generator=g, dtype=torch.float32, device="cpu")
            eps, none = move(drawn, y.device), rows.new_empty(0)
            return AugmentParams(rows, cls_all[rows], none, none, none, eps.new_empty(0), eps)
        return draw_mixup(
            self.partner,
            self.alpha,
            tables,
            chosen,
            cls_all,
            data_class(y),
            self.model.dim,
            self._held.fitted_modes().rank,
            g,
            self._held.latents,
        )

    @torch.no_grad()
    def apply(self, x: Any, y: Any = None, params: AugmentParams | None = None) -> Any:
        """Augment with given parameters, deterministically; arguments and results are those of `forward`.

        With a `bank`, the latents are put there every time.
        """
        if y is None and callable(x):
            # nn.Module.apply(fn), which a parent module calls on its children.
            return super().apply(x)
        if params is None:
            raise TypeError("apply needs the parameters of the call: params = aug.draw(x, y)")
        self._check(x, y)
        if self.p == 0:
            return x, self.target(y)
        if self.policy == "adversarial":
            check_attached(self._adversary, x.device)
        kind = self._labels_for(y)
        selected = len(params.rows)
        self._counts.here[0] += selected
        if params.rows.device.type == "cpu" and self.class_map is not None:
            params = params.where(params.cls >= 0)
            self._counts.here[2] += selected - len(params.rows)
        if len(params.rows) == 0:
            return x, y if kind == "hard" else soft_labels(y, self.num_classes)
        flow, caller = self._held.flow(x.device), CallerSettings.now(x.device.type)
        with full_precision(x.device.type), evaluating(flow.model):
            changed, keep, z, share = self._change(flow, x, y, params, caller)
            rows = move(params.rows, x.device)
            # On an accelerator it would have to be waited for that there is nothing to replace.
            if x.device.type != "cpu" or not bool(keep.all()):
                changed = torch.where(keep[:, None, None, None], changed, x.index_select(0, rows))
            out = x.clone().index_copy_(0, rows, changed)  # clone keeps the memory format
            labels = y
            if kind != "hard":
                labels = soft_labels(y, self.num_classes)
            if kind in ("mix", "posterior"):
                labels = moved_labels(
                    kind,
                    labels,
                    self._held.tables(y.device),
                    params.to(y.device),
                    move(keep, y.device),
                    share,
                    lambda: flow.model.posterior_from_latents(z),
                )
        return out, labels

    # ---- the move in the latent space ----------------------------------------------------------------------

    def _change(
        self, flow: FlowOnDevice, x: Tensor, y: Tensor, host: AugmentParams, caller: CallerSettings
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Changed rows [n, C, H, W] in x's dtype, which to use [n], z' [n, d], share of the move kept [n].

        `host` are the parameters where they were drawn: on the CPU, they can be looked at without waiting.
        """
        index, other = (move(rows, x.device) for rows in rows_to_encode(host, len(x)))
        params = host.to(x.device)
        images = self.pixels.to_unit(x.index_select(0, index))
        small = self.pixels.to_flow(images)
        encoded = self._encode(flow.model, small.flow, index)
        z = encoded[: len(params.rows)]
        known = params.cls >= 0
        cls = params.cls.clamp(min=0)
        detail = None
        if self.policy != "mixup":
            share = z.new_ones(len(z))
            coefficients = self.strength * params.eps
            if self._adversary is not None and self.policy == "adversarial":

                def render(c: Tensor) -> Tensor:
                    decoded = flow.model.decode(z + along_modes(flow, cls, c), clamp=False)
                    return self._as_images(images, small, decoded, x)

                labels = move(y, x.device).index_select(0, params.rows)
                if labels.ndim == 1:  # rows whose label is out of range are not used, but must not stop the device
                    labels = labels.long().clamp(0, self.num_classes - 1)
                counts = flow.counts if flow.counts.ndim == 0 else flow.counts[cls]
                coefficients = self._adversary.coefficients(
                    coefficients, self.strength, counts, render, labels, caller, flow.model
                )
            z = z + along_modes(flow, cls, coefficients)
        else:
            partner = with_draws(flow, encoded[other], host, params)
            away = 1.0 - params.l
            if self.bank:
                self._held.bank(x.device).add(z, move(self._bank_class(y, host.cls, host.rows), x.device))
            moved, share = project(flow, cls, partner - z)
            moved = away[:, None] * moved
            if self.rescale:
                moved = moved + project(flow, cls, rescaling(flow, params, z, partner))[0]
            z = z + moved
            detail = (other, torch.where(params.source == FROM_BATCH, away, 0.0))
        decoded = flow.model.decode(z, clamp=False)
        # NaN compares false, so these two reductions also find what is not finite.
        low, high = decoded.flatten(1).amin(dim=1), decoded.flatten(1).amax(dim=1)
        plausible = (low >= -self.margin) & (high <= 1.0 + self.margin)
        self._counts.on(x.device)[:2] += torch.stack([(known & ~plausible).sum(), (~known).sum()])
        decoded = in_range_(decoded)
        changed = self.pixels.from_flow(images, small, decoded, detail)
        return self.pixels.from_unit(changed, x.dtype), known & plausible, z, share

    def _encode(self, model: GLEM, images: Tensor, index: Tensor) -> Tensor:
        """Latents of some rows of a batch. ValueError, with its place in the batch, for one that is not a number."""
        try:
            return model.encode(images)[0]
        except ValueError:
            bad = index[images.flatten(1).isnan().any(dim=1)].tolist()
            if not bad:
                raise
            raise ValueError(f"images must be numbers, but image {bad[0]} of the batch has NaN pixels") from None

    def _as_images(self, images: Tensor, small: SmallImages, decoded: Tensor, x: Tensor) -> Tensor:
        """Decoded images as the classifier will get them, differentiable; float32 in [0, 1] if x is uint8."""
        changed = self.pixels.from_flow(images, small, in_range(decoded))
        changed = self.pixels.from_unit(changed, torch.float32 if x.dtype == torch.uint8 else x.dtype)
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            changed = changed.contiguous(memory_format=torch.channels_last)
        return changed

    def _labels_for(self, y: Tensor) -> str:
        return label_kind(self.labels, self.policy == "mixup", self.partner in ("same", "gaussian"), y.ndim == 2)

    # ---- classes of a batch --------------------------------------------------------------------------------

    def _bank_class(self, y: Tensor, cls: Tensor, rows: Tensor) -> Tensor:
        """The data class under which the latents of some rows are kept, int64 [n] on the device of y; -1 for those that
        are mixtures, and for rows whose flow class cls [n] is none (both on that device)."""
        not_kept = ~is_pure(y) | (data_class(y) >= self.num_classes)
        return data_class(y).masked_fill(not_kept, -1)[rows].masked_fill(cls < 0, -1)

    def _flow_class(self, y: Tensor, tables: ClassTables) -> Tensor:
        """Flow class of every row, -1 where it has none; labels out of range on an accelerator are counted."""
        data_cls = data_class(y)
        invalid = (data_cls < 0) | (data_cls >= self.num_classes)
        if y.ndim == 2:
            invalid = y.amax(dim=1) <= 0  # of no class: what becomes of an integer label that is out of range
        if y.device.type != "cpu":
            self._counts.on(y.device)[2] += invalid.sum()
        return tables.to_flow[data_cls.clamp(0, self.num_classes - 1)].masked_fill(invalid, -1)

    def moved_rows(self, y: Tensor) -> Tensor:
        """Rows of a batch whose class the flow has, so that they can be changed; int64 [n], waits for the device of y.

        Args:
            y: int64 [B] or soft [B, K'].
        """
        return (self._flow_class(y, self._held.tables(y.device)) >= 0).nonzero()[:, 0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_adversary": None}  # the classifier is not the transform's to send

    # ---- checks --------------------------------------------------------------------------------------------

    def _check(self, x: Tensor, y: Tensor) -> None:
        check_batch(x)
        self.pixels.check(x)
        self._check_labels(y, x.shape[0])

    def _check_labels(self, y: Tensor, batch: int) -> None:
        # On an accelerator labels are looked at in the first batch only; later ones that are out of range are counted
        # by draw, and their rows passed through.
        look = not isinstance(y, Tensor) or y.device.type == "cpu" or not self._held.has_tables(y.device)
        check_labels(y, batch, self.num_classes, look, "num_classes" if self.class_map else "class_map")

    def extra_repr(self) -> str:
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in self.to_config().items() if k != "model"}
        settings = [f"{name}={value!r}" for name, value in found.items()]
        return ", ".join([*settings, f"image_shape={self.pixels.shape}"])
