"""GLEMAugment: move real images along the principal modes of their class, in the latent space of a flow.

A batch is encoded, its latents are moved (`moves`), and the change is carried over to the images and labels
(`transfer`). Drawing the random parameters (`draw`) is separate from using them (`replay`), so a call can be repeated.

Source: Enescu & Sahbi, ACCV 2024 (principal-mode mixup).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from glem_augment.augment import moves
from glem_augment.augment.labels import (
    FlowClasses,
    Labels,
    check_labels,
    label_kind,
    mixed_labels,
    posterior_labels,
    soft_labels,
)
from glem_augment.augment.random import AugmentParams, RandomState, WorkerCounts, choose_rows, normal
from glem_augment.augment.rejection import InverseTest, MoveCounts
from glem_augment.checks import Policy, check_choice, check_number
from glem_augment.classes.modes import mix_along_modes
from glem_augment.codec.plausible import MARGIN, in_range, plausible
from glem_augment.codec.resize import PixelAdapter
from glem_augment.images.matching import check_class_map
from glem_augment.model.glem import GLEM, as_model
from glem_augment.tensors import evaluating, send, weights_key

SETTINGS = "p policy alpha strength modes basis partner labels mean std num_classes class_map seed margin".split()


class GLEMAugment(nn.Module):
    """A batch transform on images and labels through a GLEM, without parameters. The flow is no sub-module.

    `p`, `alpha`, `strength`, `margin` and `labels` may be set anew between calls.

    Args:
        model: a GLEM with fitted modes (`model.fit_modes(data)`), or its name (see `GLEM.from_pretrained`).
        p: share of the images that are changed. In a batch p * B rows are, rounded up or down at random; with p = 0
            the same images come back.
        policy: "mixup": with a partner, along the modes. "noise": Gaussian along the modes. "adversarial": noise, and a
            step up the loss of the classifier from `attach`.
        alpha: parameter of the Beta distribution of "mixup".
        strength: of "noise" and "adversarial", in standard deviations of the modes. "auto": the largest of 1/2, 1/4 and
            1/8 at which at most 5 % of the first call's images are put back, or else 1/16. `state_dict` holds the
            choice, see `chosen_strength`.
        modes: how many of the top modes are used, at most `model.modes.rank`; None: 64, or all if there are fewer.
        basis: "class" (the modes of the image's class) or "shared" (modes of the pooled within-class covariance).
        partner: for "mixup". "same": another row of the same data class, or else a draw from the class's RFCM. "any":
            any other row.
        labels: "hard": unchanged. "mix": soft, weighted by the share of the move that the modes keep. "posterior": the
            flow's, at the moved latent. "auto": "mix" where the label may change (partners "any", or soft labels with
            "mixup"), else "hard".
        mean, std: the numbers by which the input is normalised, one or one per channel; None: it is in [0, 1] or uint8.
        num_classes: K', the width of soft labels; by default the length of `class_map`, or else the flow's K.
        class_map: the flow class of every data class, see `match_classes`. Where it is None, -1 or missing at the end,
            the flow lacks the class; images of that class are passed through and counted.
        seed: the seed of the random state; None: drawn from torch's global generator.
        margin: a decoded image that leaves [0, 1] by more, or is not finite, is replaced by the original and counted.
            Noise at strength 0.5 takes single pixels of good images out of range by 0.25 and more; an inverse that
            explodes goes far beyond 1. Some calls also test whether the flow gives the originals back within half a
            uint8 step: the first 8, all calls after a failure, and one call in 32. Failures are replaced, too.
    """

    model: GLEM

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        p: float = 0.5,
        policy: Policy = "mixup",
        alpha: float = 1.0,
        strength: float | Literal["auto"] = "auto",
        modes: int | None = None,
        basis: moves.BasisName = "class",
        partner: moves.Partner = "same",
        labels: Labels = "auto",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        num_classes: int | None = None,
        class_map: Sequence[int | None] | None = None,
        seed: int | None = None,
        margin: float = MARGIN,
    ) -> None:
        super().__init__()
        check_choice("policy", policy, get_args(Policy))
        check_choice("basis", basis, get_args(moves.BasisName))
        check_choice("partner", partner, get_args(moves.Partner))
        check_choice("labels", labels, get_args(Labels))
        self.p = check_number("p", p, 0.0, 1.0)
        self.alpha = check_number("alpha", alpha, 0.0, math.inf, open_low=True)
        if policy == "mixup" and strength != "auto":
            raise ValueError(
                f"strength={strength!r} has no effect on policy='mixup', whose moves follow from alpha: give alpha, or "
                "policy='noise' or 'adversarial'"
            )
        self.strength = strength if strength == "auto" else check_number("strength", strength, 0.0, math.inf)
        self.margin = check_number("margin", margin, 0.0, math.inf)
        self.policy, self.basis, self.partner, self.labels = policy, basis, partner, labels
        self._name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
        model = as_model(model)
        self.__dict__["model"] = model  # nn.Module would register it as a sub-module
        self.modes = model.checked_modes(modes)
        self.pixels = PixelAdapter(model.image_shape, mean=mean, std=std)
        self.class_map = check_class_map(class_map, num_classes, model.num_classes)
        self._classes = FlowClasses(self.class_map or range(model.num_classes), model.num_classes)
        self.num_classes = len(self._classes.to_flow)
        self._random = RandomState(seed)
        self._counts = MoveCounts()
        self._chosen = WorkerCounts()  # the strength that "auto" chose, in units of 1e-4; 0: none yet
        self._inverse = InverseTest()
        self._adversary: moves.Adversary | None = None
        self._copies: dict[torch.device, tuple[object, GLEM]] = {}

    @property
    def seed(self) -> int:
        """The seed of the random state."""
        return self._random.seed

    @property
    def stats(self) -> dict[str, int]:
        """Counts of rows since the start, by name (see `MoveCounts`); reading them waits for the device."""
        return self._counts.stats()

    @property
    def chosen_strength(self) -> float | None:
        """The strength that was set, or that "auto" chose in this process; None before the first move."""
        if isinstance(self.strength, str):
            return int(self._chosen.own()) / 10_000 or None
        return self.strength

    def attach(
        self,
        classifier: nn.Module,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
    ) -> GLEMAugment:
        """Give policy "adversarial" the classifier whose loss chooses the move, and return the transform itself.

        Its parameters, gradients, buffers and training mode stay as they are. Copies of the transform are without it.

        Args:
            classifier: from images as this transform returns them (uint8 ones as floats in [0, 1]) to logits. All
                networks that it calls must be registered in it.
            loss: a function of (output, labels); None: cross-entropy of the output, or of its `logits`.
            autocast: torch.bfloat16 or torch.float16 for that pass; None: as it is set where the transform is called,
                which for a wrapped loader is outside a loop's `with autocast()`.
        """
        if self.policy != "adversarial":
            raise ValueError(f"attach is for policy='adversarial', this transform has policy={self.policy!r}")
        self._adversary = moves.Adversary(classifier, loss, autocast)
        return self

    # ---- a call ----------------------------------------------------------------------------------------------

    @torch.compiler.disable  # a compiled training step must not trace the random state and the counts
    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Tensor]:
        """Augment a batch. For tuples, dicts, tv_tensors and single images see `as_transform`.

        Args:
            x: [B, C, H, W] uint8, or float in [0, 1], or normalised float if mean and std were given. Any size, grey or
                RGB. It is never changed in place.
            y: int64 [B] data classes, or soft labels [B, K']. An image that shows several classes at once (multi-hot
                labels) moves along the modes of the strongest one; use noise or adversarial for these.

        Returns:
            (x', y'): x' has the dtype, device and memory format of x, and equals x bit for bit in rows that were not
            selected. y' is y itself, or float [B, K'].
        """
        data_cls = self._check(x, y)
        return self._augmented(x, y, data_cls, self._draw(data_cls, self._random.generator()))

    def draw(self, x: Tensor | Sequence[int], y: Tensor, generator: torch.Generator | None = None) -> AugmentParams:
        """Draw the random parameters of one call for a batch x, or its shape, with labels y int64 [B] or soft [B, K'].

        A CPU `generator` replaces the random state.
        """
        data_cls = check_labels(y, int(x.shape[0] if isinstance(x, Tensor) else x[0]), self.num_classes)
        return self._draw(data_cls.cpu(), self._random.generator() if generator is None else generator)

    def replay(self, x: Tensor, y: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        """Augment with parameters of `draw`; for other arguments and results see `forward`."""
        return self._augmented(x, y, self._check(x, y), params)

    def _draw(self, data_cls: Tensor, generator: torch.Generator) -> AugmentParams:
        rows = choose_rows(len(data_cls), self.p, generator)
        if self.policy == "mixup" and len(rows):
            return moves.draw_mixup(self.partner, self.alpha, rows, data_cls, self._classes, generator)
        none = rows.new_empty(0)
        cls = self._classes.flow_class(data_cls[rows])
        return AugmentParams(rows, cls, normal(len(rows), self.modes, generator), none, none, none, none)

    @torch.no_grad()
    def _augmented(self, x: Tensor, y: Tensor, data_cls: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        kind = label_kind(self.labels, self.policy, self.partner, y.ndim == 2)
        target = y if kind == "hard" else soft_labels(y, self.num_classes)
        selected, params = len(params.rows), params.where(params.cls >= 0)
        n = len(params.rows)
        if n == 0:
            self._counts.add(selected, selected, torch.zeros((), dtype=torch.int64, device="cpu"))
            return x, target
        model = self._model_on(x.device)
        index, place = moves.rows_to_encode(params, len(x))
        here = params.to(x.device)
        originals = x.index_select(0, send(index, x.device))
        images = self.pixels.to_unit(originals)
        small = self.pixels.to_flow(images)
        with evaluating(model):
            encoded = model.encode(small)[0]
            originals, images, small, z = originals[:n], images[:n], small[:n], encoded[:n]
            basis = moves.basis_of(model, self.basis, self.modes, here.cls, z)
            base, back = self._unmoved(model, z, small)
            if self.policy == "mixup":
                partner = moves.partner_latents(model, encoded[send(place, x.device)], params)
                moved, share = mix_along_modes(z, partner, here.l, basis.cls, basis.directions)
            else:
                shown = torch.float32 if x.dtype == torch.uint8 else x.dtype
                labels = send(y, x.device).index_select(0, here.rows)
                rows = moves.Rows(z, basis, images, base, labels)
                strength = self.chosen_strength
                if strength is None:
                    strength = moves.strongest(self._shares_lost(model, rows, back, shown))
                    self._chosen.own().fill_(round(10_000 * strength))
                moved, share = self._noised(model, rows, here.eps, strength, shown), None
            decoded = model.decode(moved, clamp=False)
            good = plausible(decoded, self.margin) & back
            if kind == "mix" and share is not None:
                target = mixed_labels(target, data_cls, params, self._classes, share, good)
            elif kind == "posterior":
                target = posterior_labels(target, params, self._classes, model.posterior_from_latents(moved), good)
        self._counts.add(selected, selected - n, (~good).sum())
        changed = good & (moved != z).any(dim=1)
        out = torch.where(changed[:, None, None, None], self._images(decoded, images, base, x.dtype), originals)
        return x.clone().index_copy_(0, here.rows, out), target  # clone keeps the memory format

    def _unmoved(self, model: GLEM, z: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
        """The unmoved images at the flow's size, and which rows the flow gives back, bool [n].

        A flow on pixels decodes z to `small` itself. An autoencoder does not, and its error is no part of the change.
        """
        back = torch.ones(len(z), dtype=torch.bool, device=z.device)
        if self._inverse.due(self.model.flow):
            # Information lost in encoding is invisible in z, so z is decoded. The limit is half a uint8 step.
            back = model.flow_error(small) < 0.5 / 255
            self._inverse.saw(back)
        return small if model.autoencoder is None else in_range(model.decode(z, clamp=False)), back

    def _noised(self, model: GLEM, rows: moves.Rows, eps: Tensor, strength: float, shown: torch.dtype) -> Tensor:
        """Latents [n, d] moved by noise along the modes and, with a classifier, a step up its loss.

        The classifier gets images of the dtype `shown`.
        """
        c = strength * eps
        if self._adversary is not None:

            def render(c: Tensor) -> Tensor:
                decoded = model.decode(rows.z + moves.along_modes(rows.basis, c), clamp=False)
                return self._images(decoded, rows.images, rows.base, shown)

            c = self._adversary.coefficients(c, strength, rows.basis, render, rows.labels, model)
        return rows.z + moves.along_modes(rows.basis, c)

    def _shares_lost(
        self, model: GLEM, rows: moves.Rows, back: Tensor, shown: torch.dtype
    ) -> Iterator[tuple[float, float]]:
        """Each strength that "auto" tries, and the share of the rows that it puts back.

        Each of a few rows is moved several times. The noise is the same in every call.
        """
        # An autoencoder's decoder never explodes, and decoding large images takes long.
        times = 1 if model.autoencoder is not None else max(1, moves.TRIALS // len(back))
        rows, back = rows.repeated(times), back.repeat(times)
        eps = normal(len(back), self.modes, torch.Generator("cpu").manual_seed(0)).to(back.device)
        for strength in moves.LADDER:
            decoded = model.decode(self._noised(model, rows, eps, strength, shown), clamp=False)
            yield strength, 1.0 - float((plausible(decoded, self.margin) & back).float().mean())

    def _images(self, decoded: Tensor, images: Tensor, small: Tensor, dtype: torch.dtype) -> Tensor:
        """Images of the user's size and range, from decoded ones at the flow's size; differentiable."""
        return self.pixels.from_unit(self.pixels.from_flow(images, small, in_range(decoded)), dtype)

    def _model_on(self, device: torch.device) -> GLEM:
        """The model, or a copy on another device. A copy is made again when the weights have changed."""
        if self.model.device == device:
            return self.model
        version = weights_key(self.model)
        if device not in self._copies or self._copies[device][0] != version:
            with torch.inference_mode(False):  # a later call may need gradients through the copy
                self._copies[device] = version, self.model.on(device)
        return self._copies[device][1]

    def _check(self, x: Tensor, y: Tensor) -> Tensor:
        """Check a batch; returns its labels' classes, int64 [B] on the CPU."""
        self.pixels.check(x)
        if self.policy == "adversarial" and self._adversary is None:
            raise ValueError("policy='adversarial' needs a classifier: call aug.attach(classifier), on a copy again")
        return check_labels(y, len(x), self.num_classes).cpu()

    # ---- labels without a move -------------------------------------------------------------------------------

    def target(self, y: Tensor) -> Tensor:
        """Labels in the form in which calls return them: y itself, or soft [B, K'] where moves make labels soft."""
        check_labels(y, len(y), self.num_classes)
        hard = label_kind(self.labels, self.policy, self.partner, y.ndim == 2) == "hard"
        return y if hard else soft_labels(y, self.num_classes)

    # ---- ways into a training loop ---------------------------------------------------------------------------

    def wrap(self, loader: Any, device: torch.device | str | None = None, off_epoch: int | None = None) -> Any:
        """The loader with its batches augmented, on `device` or where they are: see `loops.AugmentedLoader`."""
        from glem_augment.augment.loops import AugmentedLoader  # imported here because `loops` imports this module

        return AugmentedLoader(loader, self, device=device, off_epoch=off_epoch)

    def as_mixup_fn(self, smoothing: float = 0.0, mixup: Any = None, data: Any = None) -> Any:
        """A function in the place of timm's `mixup_fn`, whose labels are always soft [B, K']: see `loops.MixupFn`."""
        from glem_augment.augment.loops import MixupFn

        return MixupFn(self, smoothing, mixup, data)

    def collate_fn(self, base: Callable[[list[Any]], Any] | None = None, data: Any = None) -> Any:
        """A collate function for workers, on whose CPUs the flow then runs: see `loops.AugmentingCollate`."""
        from glem_augment.augment.loops import AugmentingCollate

        return AugmentingCollate(self, base, data)

    def as_transform(self) -> Any:
        """A `torchvision.transforms.v2.Transform` on tuples, dicts and tv_tensors: see `loops.GLEMTransform`."""
        from glem_augment.augment.loops import GLEMTransform

        return GLEMTransform(self)

    # ---- saving ----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Whole numbers for `state_dict`: the random state, and the strength that "auto" chose here and in workers."""
        return {**self._random.state(), "strength": self._chosen.trimmed()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue the draws from a state of `get_extra_state`."""
        self._random.restore(state)
        self._chosen.restore(state.get("strength", []))

    def to_config(self) -> dict[str, Any]:
        """Every setting, as JSON or YAML can carry it; `model` is its name, None for a model given as an object."""
        found = {"model": self.model.origin or self._name, **{name: getattr(self, name, None) for name in SETTINGS}}
        found.update(mean=self.pixels.mean, std=self.pixels.std)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: GLEM | str | None = None) -> GLEMAugment:
        """The transform that `to_config` described, at the start of its random state; `model` replaces config["model"].

        Settings that `config` lacks have their defaults.
        """
        given = {name: value for name, value in config.items() if name != "model"}
        return cls(config["model"] if model is None else model, **given)

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the flow are made again where needed. The classifier may be large, and a copy would soon be old.
        return {**self.__dict__, "_adversary": None, "_copies": {}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.to_config().items() if name != "model")
