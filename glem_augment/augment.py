"""GLEMAugment: move real images along the principal modes of their class, in the latent space of a flow.

A batch is encoded, its latents are moved within the span of the top modes, and decoded:

    mixup:  z' = z_i + (1 - l) P (z_j - z_i),   l ~ Beta(alpha, alpha) folded to [1/2, 1]
    noise:  z' = z + strength * sum_m s_m e_m v_m,   e_m ~ N(0, 1)

v_m and s_m are the modes and their standard deviations, P = V^T V the projection on them. Drawing the random
parameters (`draw`) is separate from using them (`apply`), so a call can be replayed.

Source: Enescu & Sahbi, ACCV 2024 (principal-mode mixup).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment._arguments import check_choice, check_class_map, check_modes, check_number
from glem_augment._drawing import (
    FROM_BATCH,
    FROM_GAUSSIAN,
    FROM_RFCM,
    AugmentParams,
    folded_beta,
    move,
    swapped,
)
from glem_augment._lookup import ClassTables, FlowOnDevice, class_tables, flow_on_device
from glem_augment._moves import along_modes, evaluating, project, rows_to_encode, with_draws
from glem_augment._transfer import PixelAdapter
from glem_augment.flows.bijection import full_precision
from glem_augment.model import GLEM
from glem_augment.modes import ClassModes

__all__ = ["AugmentParams", "GLEMAugment"]

POLICIES = ("mixup", "noise")
BASES = ("class", "near", "shared")
PARTNERS = ("same", "near", "any", "gaussian")
LABELS = ("auto", "hard", "mix", "posterior")
DETAILS = ("keep", "mix", "none")
NEIGHBOURS = 3  # classes that count as "near"


class GLEMAugment(nn.Module):
    """A batch transform on images and labels through a GLEM. It has no parameters: the flow is not
    registered.

    Args:
        model: a GLEM with fitted modes (`model.fit_modes(data)`).
        p: probability of changing an image, for each one separately; p = 0 gives back the same tensors.
        policy: "mixup" (with a partner, along the modes) or "noise" (Gaussian along the modes).
        alpha: parameter of the Beta law of "mixup".
        strength: standard deviations of "noise".
        modes: number of top modes, at most `model.modes.rank`.
        basis: whose modes: "class" (of the image's class), "near" (pooled with its 3 closest classes by KLD),
            "shared".
        partner: of "mixup": "same" (another row of the class, else a draw from its RFCM), "near" (a row of,
            else a draw from, one of the 3 closest classes), "any" (any other row), "gaussian" (a draw from
            the class's Gaussian). Rows that are changed themselves come first, and the others only where there
            is none: they are encoded anyway, so a batch costs little more than its changed rows. Rows are
            selected independently of what they show, so every allowed row is still equally likely to be a
            given row's partner; only the partners of two rows of one batch are a little less independent.
        labels: "hard" (unchanged), "mix" (soft, by the share of the move that P keeps), "posterior" (of the
            flow, at z'), or "auto": unchanged where the class can't change (noise; partner "same" or
            "gaussian" with hard labels), "mix" otherwise.
        mean, std: of a normalised input, a number or one per channel; None: the input is in [0, 1] or uint8.
        num_classes: K', width of soft labels; by default the length of `class_map`, else the flow's K.
        class_map: flow class of every data class, a sequence or a dict; None, -1 or a missing key: not in the
            flow, such images are passed through and counted.
        detail: where the images are larger than the flow's: "keep" adds the upsampled change to them, "mix"
            also mixes in the fine detail of a partner from the batch with the same l, "none" gives the
            decoded image, resized.
        seed: of the transform's own random state; None takes one from torch's global generator.
        margin: a decoded image that leaves [0, 1] by more is not plausible: the original is kept, and
            counted. Noise at strength 0.5 takes single pixels of good images 0.25 out of range and more, an
            inverse that explodes far beyond 1.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it and what is allowed.
    """

    def __init__(
        self,
        model: GLEM,
        p: float = 0.5,
        policy: str = "mixup",
        alpha: float = 1.0,
        strength: float = 0.5,
        modes: int = 64,
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
    ) -> None:
        super().__init__()
        if policy == "adversarial":
            raise ValueError("policy 'adversarial' is not available in this version; choose 'mixup' or 'noise'")
        check_choice("policy", policy, POLICIES)
        check_choice("basis", basis, BASES)
        check_choice("partner", partner, PARTNERS)
        check_choice("labels", labels, LABELS)
        check_choice("detail", detail, DETAILS)
        self.p = check_number("p", p, 0.0, 1.0)
        self.alpha = check_number("alpha", alpha, 0.0, math.inf, open_low=True)
        self.strength = check_number("strength", strength, 0.0, math.inf)
        self.margin = check_number("margin", margin, 0.0, math.inf)
        if detail == "mix" and policy != "mixup":
            raise ValueError(f"detail='mix' needs a partner, which policy {policy!r} has not: use policy='mixup'")
        if not isinstance(model, GLEM):
            raise TypeError(f"model must be a GLEM, got {type(model).__name__}: load one with GLEM.from_pretrained")
        self.policy, self.basis, self.partner, self.labels, self.detail = (
            policy,
            basis,
            partner,
            labels,
            detail,
        )
        self.modes = modes
        check_modes(model, modes)
        if policy == "mixup" and partner == "near" and model.num_classes == 1:
            raise ValueError("partner='near' needs a flow with at least 2 classes, this one has 1: use partner='same'")
        self.pixels = PixelAdapter(model.image_shape, mean=mean, std=std, detail=detail)
        self.class_map = check_class_map(class_map, num_classes, model.num_classes)
        self.num_classes = model.num_classes if self.class_map is None else len(self.class_map)
        # In a tuple, so that nn.Module does not register the flow: its weights are not the transform's.
        self._holder = (model,)
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64).random_().item())
        elif isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int or None, got {seed!r}")
        self.seed = seed
        # On the CPU whatever the batch: draws are then the same for every device, and need no sync.
        self._generator = torch.Generator().manual_seed(seed)
        self._worker_seed: int | None = None
        self._flows: dict[torch.device, FlowOnDevice] = {}
        self._tables: dict[torch.device, ClassTables] = {}
        self._selected = 0
        self._carried = [0, 0, 0]  # counts of replaced, unmapped, invalid that no device holds

    @property
    def model(self) -> GLEM:
        """The GLEM in use (not a submodule)."""
        return self._holder[0]

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start; reading them waits for the device.

        `selected`: rows chosen to be changed; `replaced`: of these, kept as they were because the decoded
        image was not finite or out of range; `unmapped`: of these, kept because their class is not in the
        flow; `invalid`: labels out of range met on an accelerator (elsewhere they are an error).
        """
        replaced, unmapped, invalid = self._counters()
        return {"selected": self._selected, "replaced": replaced, "unmapped": unmapped, "invalid": invalid}

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            x: [B, C, H, W] uint8, or float in [0, 1], or normalised float if mean and std were given. Any
                size; grey or RGB. Never changed in place.
            y: int64 [B] data classes, or soft labels [B, K'].

        Returns:
            (x', y') with x' of x's dtype, device and memory format; rows that were not selected are bit for
            bit those of x. y' is y itself, or float [B, K'].

        Raises:
            ValueError, TypeError: for a wrong shape, dtype, value range or label.
        """
        self._check(x, y)
        return (x, y) if self.p == 0 else self.apply(x, y, self.draw(x, y))

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
        g = self._own_generator() if generator is None else generator
        tables = self._tables_on(y.device)
        chosen = (torch.rand(batch, generator=g) < self.p).nonzero()[:, 0]
        n, rows = len(chosen), move(chosen, y.device)
        data_cls = self._data_class(y)
        invalid = (data_cls < 0) | (data_cls >= self.num_classes)
        if y.device.type != "cpu":
            tables.counters[2] += invalid.sum()
        cls_all = tables.to_flow[data_cls.clamp(0, self.num_classes - 1)].masked_fill(invalid, -1)
        cls = cls_all[rows]
        none = rows.new_empty(0)
        if self.policy == "noise" or n == 0:
            eps = move(torch.randn(n, self.modes, generator=g), y.device)
            return AugmentParams(rows, cls, none, none, none, eps.new_empty(0), eps)
        lam = move(folded_beta(self.alpha, n, g), y.device)
        if self.partner == "gaussian":
            eps = move(torch.randn(n, self.model.dim, generator=g), y.device)
            source, partner = torch.full_like(rows, FROM_GAUSSIAN), torch.full_like(rows, -1)
            return AugmentParams(rows, cls, partner, cls, source, lam, eps)
        # The partner is the allowed row with the largest random key: uniform, without a loop over rows or
        # classes. Selected rows (also random, and encoded anyway) come before the others.
        keys = torch.rand(n, batch, generator=g)
        keys[:, chosen] += 1.0
        keys = move(keys, y.device)
        pick = move(torch.rand(n, generator=g), y.device)
        allowed, partner_cls = self._partners(tables, cls, cls_all, pick)
        own = rows[:, None] == torch.arange(batch, device=y.device)
        best, partner = keys.masked_fill(~allowed | own, -1.0).max(dim=1)
        found = best >= 0
        source = torch.where(found, FROM_BATCH, FROM_RFCM)
        # Drawn for every row: which ones find a partner is known only on the device, and asking it would
        # wait.
        eps = move(torch.randn(n, self._fitted_modes().rank + self.model.dim, generator=g), y.device)
        return AugmentParams(rows, cls, partner.masked_fill(~found, -1), partner_cls, source, lam, eps)

    @torch.no_grad()
    def apply(self, x: Any, y: Any = None, params: AugmentParams | None = None) -> Any:
        """Augment with given parameters, deterministically; arguments and results are those of `forward`."""
        if y is None and callable(x):
            # nn.Module.apply(fn), which a parent module calls on its children.
            return super().apply(x)
        if params is None:
            raise TypeError("apply needs the parameters of the call: params = aug.draw(x, y)")
        self._check(x, y)
        if self.p == 0:
            return x, y
        kind = self._labels_for(y)
        selected = len(params.rows)
        self._selected += selected
        if params.rows.device.type == "cpu" and self.class_map is not None:
            params = params.where(params.cls >= 0)
            self._carried[1] += selected - len(params.rows)
        if len(params.rows) == 0:
            return x, y if kind == "hard" else self._soft(y)
        flow = self._flow_on(x.device)
        with full_precision(x.device.type), evaluating(flow.model):
            changed, keep, z, share = self._change(flow, x, params)
            rows = move(params.rows, x.device)
            # On an accelerator it would have to be waited for that there is nothing to replace.
            if x.device.type != "cpu" or not bool(keep.all()):
                changed = torch.where(keep[:, None, None, None], changed, x.index_select(0, rows))
            out = x.clone().index_copy_(0, rows, changed)  # clone keeps the memory format
            labels = y
            if kind != "hard":
                labels = self._new_labels(kind, flow, y, params.to(y.device), move(keep, y.device), z, share)
        return out, labels

    # ---- the move in the latent space ----------------------------------------------------------------------

    def _change(self, flow: FlowOnDevice, x: Tensor, host: AugmentParams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Changed rows [n, C, H, W] in x's dtype, which to use [n], z' [n, d], share of the move kept [n].

        `host` are the parameters where they were drawn: on the CPU, they can be looked at without waiting.
        """
        index, other = (move(rows, x.device) for rows in rows_to_encode(host, len(x)))
        params = host.to(x.device)
        images = self.pixels.to_unit(x.index_select(0, index))
        small = self.pixels.to_flow(images)
        encoded = flow.model.encode(small.flow)[0]
        z = encoded[: len(params.rows)]
        known = params.cls >= 0
        cls = params.cls.clamp(min=0)
        detail = None
        if self.policy == "noise":
            share = torch.ones(len(z), device=z.device)
            z = z + along_modes(flow, cls, self.strength * params.eps)
        else:
            partner = with_draws(flow, encoded[other], host, params)
            away = 1.0 - params.l
            moved, share = project(flow, cls, partner - z)
            z = z + away[:, None] * moved
            detail = (other, torch.where(params.source == FROM_BATCH, away, 0.0))
        decoded = flow.model.decode(z, clamp=False)
        # NaN compares false, so these two reductions also find what is not finite.
        low, high = decoded.flatten(1).amin(dim=1), decoded.flatten(1).amax(dim=1)
        plausible = (low >= -self.margin) & (high <= 1.0 + self.margin)
        self._tables_on(x.device).counters[:2] += torch.stack([(known & ~plausible).sum(), (~known).sum()])
        decoded = decoded.nan_to_num_(nan=0.5, posinf=1.0, neginf=0.0).clamp_(0.0, 1.0)
        changed = self.pixels.from_flow(images, small, decoded, detail)
        return self.pixels.from_unit(changed, x.dtype), known & plausible, z, share

    def _partners(self, tables: ClassTables, cls: Tensor, cls_all: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        """Which batch rows may be partners, bool [n, B], and the class to draw from where none is, [n]."""
        if self.partner == "same":
            return cls_all == cls[:, None], cls
        if self.partner == "near":
            near = tables.neighbours[cls.clamp(min=0)]
            choice = (pick * near.shape[1]).long().clamp(max=near.shape[1] - 1)
            return (near[:, :, None] == cls_all).any(dim=1), near.gather(1, choice[:, None])[:, 0]
        # A batch of one has no other row: its partner is then a draw from any class of the data.
        choice = (pick * len(tables.mapped)).long().clamp(max=len(tables.mapped) - 1)
        allowed = torch.ones(len(cls), len(cls_all), dtype=torch.bool, device=cls.device)
        return allowed, tables.to_flow[tables.mapped[choice]]

    # ---- labels --------------------------------------------------------------------------------------------

    def _labels_for(self, y: Tensor) -> str:
        """What to do with labels: "hard" (nothing), "soft" (make them [B, K']), "mix" or "posterior"."""
        no_partner = self.policy == "noise" or self.partner == "gaussian"
        if self.labels == "auto":
            same_class = no_partner or (self.partner == "same" and y.ndim == 1)
            return "hard" if same_class else "mix"
        if self.labels == "mix" and no_partner:
            return "soft"
        return self.labels

    def _soft(self, y: Tensor) -> Tensor:
        if y.ndim == 2:
            return y
        # Compared rather than scattered: a label out of range gives zeros instead of a device assertion.
        return (y[:, None] == torch.arange(self.num_classes, device=y.device)).to(torch.float32)

    def _new_labels(
        self,
        kind: str,
        flow: FlowOnDevice,
        y: Tensor,
        params: AugmentParams,
        keep: Tensor,
        z: Tensor,
        share: Tensor,
    ) -> Tensor:
        """Soft labels [B, K'] on the device of y, params and keep; z, share are on that of the images."""
        soft = self._soft(y)
        if kind == "soft":
            return soft
        tables = self._tables_on(y.device)
        own = soft.index_select(0, params.rows)
        if kind == "posterior":
            probability = move(flow.model.posterior_from_latents(z), y.device)
            new, usable = tables.data_probability(probability)
            keep = keep & usable
        else:
            own_cls = self._data_class(own)
            drawn_cls = torch.where(
                params.partner_cls == params.cls, own_cls, tables.to_data[params.partner_cls.clamp(min=0)]
            )
            from_batch = (params.source == FROM_BATCH)[:, None]
            other = torch.where(from_batch, soft[params.partner.clamp(min=0)], swapped(own, own_cls, drawn_cls))
            weight = (1.0 - params.l) * move(share, y.device)
            new = own + weight[:, None].to(own.dtype) * (other - own)
        return soft.index_copy(0, params.rows, torch.where(keep[:, None], new.to(soft.dtype), own))

    @staticmethod
    def _data_class(y: Tensor) -> Tensor:
        return y.argmax(dim=1) if y.ndim == 2 else y.long()

    # ---- what each device holds ----------------------------------------------------------------------------

    def _fitted_modes(self) -> ClassModes:
        return check_modes(self.model, self.modes)

    def _flow_on(self, device: torch.device) -> FlowOnDevice:
        """The model and its basis on a device, made at the first batch there, again after a new fit."""
        fitted = self._fitted_modes()
        found = self._flows.get(device)
        if found is not None and found.is_current(fitted, device):
            return found
        self._flows[device] = flow_on_device(self.model, device, self.basis, self.modes, NEIGHBOURS)
        return self._flows[device]

    def _tables_on(self, device: torch.device) -> ClassTables:
        """Class lookups and counters on a device, made at the first batch there."""
        if device not in self._tables:
            # For a lookup of neighbours the flow must know which classes are close.
            near = NEIGHBOURS if self.policy == "mixup" and self.partner == "near" else 0
            self._tables[device] = class_tables(self.model, self.class_map, near).to(device)
        return self._tables[device]

    def _counters(self) -> list[int]:
        totals = torch.tensor(self._carried)
        for tables in self._tables.values():
            totals = totals + tables.counters.cpu()
        return totals.tolist()

    def _own_generator(self) -> torch.Generator:
        """The transform's generator; in a DataLoader worker, one that differs from the other workers'."""
        info = torch.utils.data.get_worker_info()
        if info is not None and self._worker_seed != info.seed:
            # Every worker holds a copy of one random state, and would draw the same as the others without
            # this.
            self._worker_seed = info.seed
            self._generator = torch.Generator().manual_seed((self.seed * 1_000_003 + info.seed) % 2**63)
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # Copies on accelerators are made again where they are needed; older torch can't pickle a Generator.
        state.update(_carried=self._counters(), _flows={}, _tables={}, _generator=self._generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])

    # ---- checks --------------------------------------------------------------------------------------------

    def _check(self, x: Tensor, y: Tensor) -> None:
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a batch of images [B, C, H, W], got {got}")
        self.pixels.check(x)
        self._check_labels(y, x.shape[0])

    def _check_labels(self, y: Tensor, batch: int) -> None:
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a tensor of labels, got {type(y).__name__}")
        if y.ndim not in (1, 2) or y.shape[0] != batch:
            raise ValueError(f"y must be int64 [{batch}] or soft [{batch}, {self.num_classes}], got {tuple(y.shape)}")
        if y.ndim == 2:
            if not y.is_floating_point():
                raise TypeError(f"soft labels must be floating point, got {y.dtype}")
            if y.shape[1] != self.num_classes:
                raise ValueError(f"soft labels have {y.shape[1]} classes, not {self.num_classes}: give class_map")
            return
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"labels must be integers (int64), got {y.dtype}")
        # Looking at labels on an accelerator waits for it: done for the first batch there; later ones are
        # counted by apply, and their rows passed through.
        if batch and (y.device.type == "cpu" or y.device not in self._tables):
            low, high = (int(v) for v in torch.aminmax(y))
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"label {low if low < 0 else high} is out of range: this transform knows classes 0 to "
                    f"{self.num_classes - 1}; give class_map if the data has other classes than the flow"
                )

    def extra_repr(self) -> str:
        names = "p policy alpha strength modes basis partner labels num_classes class_map detail seed margin"
        settings = [f"{name}={getattr(self, name)!r}" for name in names.split()]
        settings += [f"mean={self.pixels.mean}", f"std={self.pixels.std}", f"image_shape={self.pixels.shape}"]
        return ", ".join(settings)
