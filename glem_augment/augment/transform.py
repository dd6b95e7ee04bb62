"""GLEMAugment: move real images along the principal modes of their class, in the latent space of a model.

A call draws random parameters (`draw`), encodes the selected images, lets the policy move their latents (`policies`),
decodes them, and adds the change to the images (`codec.resize`). Drawing is separate from using what was drawn
(`replay`), so a call can be repeated. Every call has a new generator, seeded from (seed, rank, number of the call).
So a checkpoint of rank 0 resumes every rank. In a DataLoader worker torch's seed of the worker takes part as well.

Source: Enescu & Sahbi, ACCV 2024 (principal-mode mixup).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from glem_augment.augment.labels import soft_labels
from glem_augment.augment.policies import (
    AugmentParams,
    Batch,
    Classifier,
    ClassIndex,
    Function,
    Policy,
    Selected,
    as_policy,
    cross_entropy,
)
from glem_augment.checks import check_number, check_whole
from glem_augment.codec.resize import PixelAdapter
from glem_augment.distributed import rank
from glem_augment.errors import ClassMismatchError
from glem_augment.images.matching import check_class_map, match_classes, named_classes
from glem_augment.model.glem import GLEM, as_model
from glem_augment.model.latent_model import largest_change
from glem_augment.names import PolicyName
from glem_augment.tensors import evaluating, send, weights_key

_MAP = (
    "Give the transform class_map=match_classes(model, data, partial=True), which passes images of other classes "
    "through; or class_map=range(K) if both list the same K classes in the same order; or adapt the model to the data "
    "(model.adapt, glem fit)."
)


class MoveCounts:
    """Counts of rows over all calls in this process; each DataLoader worker has counts of its rows.

    selected: rows chosen to be changed. rejected: chosen rows that were kept, since the decoded image was out of range
    or the model did not give the original back. unmapped: chosen rows of a class that the model lacks.
    """

    FIRST, MOST = 100, 0.5  # a warning is given if more than this part of the first rows was kept as it was

    def __init__(self) -> None:
        self._selected = self._unmapped = 0
        self._rejected = torch.zeros((), dtype=torch.int64, device="cpu")
        self._judged = False

    def add(self, selected: int, unmapped: int, rejected: Tensor) -> None:
        """Add one call's counts. `rejected` is a tensor of one number on any device, which is not waited for."""
        self._selected += selected
        self._unmapped += unmapped
        self._rejected = self._rejected.to(rejected.device) + rejected
        if self._judged or self._selected < self.FIRST:
            return
        self._judged, found = True, self.stats()
        if found["rejected"] + found["unmapped"] > self.MOST * found["selected"]:
            warnings.warn(
                f"of the first {found['selected']} images chosen {found['rejected']} were kept as they were because "
                "the moved ones were out of range or the model does not give the originals back, and "
                f"{found['unmapped']} because the model does not have their class (see aug.stats). Fit the model to "
                "images like these (model.adapt), lower the strength, or put the transform before strong crops, "
                "RandAugment and RandomErasing",
                stacklevel=4,
            )

    def stats(self) -> dict[str, int]:
        """All counts by name; reading them waits for the device."""
        return {"selected": self._selected, "rejected": int(self._rejected), "unmapped": self._unmapped}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rejected": self._rejected.cpu()}


class GLEMAugment(nn.Module):
    """A batch transform on images and labels through a GLEM, without parameters. The model is no sub-module.

    A moved image is rejected, and the original kept, if it is not finite or leaves [0, 1] by more than 1: an inverse
    that explodes goes far beyond. It is also rejected if a flow does not give the original back within half a uint8
    step. Rejections are counted.

    Args:
        model: a GLEM with fitted modes (`model.fit_modes(data)`), or its name (see `GLEM.from_pretrained`).
        policy: how images are moved: Mixup(), Noise() or Adversarial(), with arguments; "mixup", "noise" and
            "adversarial" are short for their defaults, and {"name": "noise", "strength": 0.3} is a policy in a file of
            settings. A policy of your own is a subclass of `Policy`.
            Adversarial(strength=0.25) measured better, where a classifier is at hand: see docs/evidence.md.
        p: float in [0, 1]: the part of the images that is moved. In a batch p * B rows are, rounded up or down at
            random; with p = 0 the same images come back.
        modes: how many of the top modes are used, at most `model.modes.rank`; None: 64, or all if there are fewer.
        mean, std: the numbers by which the input is normalised, one or one per channel; None: it is in [0, 1] or uint8.
        classes: the names (or ids) of the K' data classes in index order, or the data set, which are matched with the
            model's; see `match_classes`. None: the data has the model's classes in the model's order; the first call
            warns that this was not checked. Soft labels have the width K'.
        class_map: in place of `classes` the model's class for each of the K' data classes; None or -1: the model lacks
            the class, and its images are passed through and counted.
        seed: whole number, of all draws; None: drawn from torch's global generator.

    Attributes:
        policy, p: may be set anew between calls.
        seed: of all draws.
        num_classes: K'.
    """

    model: GLEM

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        policy: Policy | PolicyName | Mapping[str, Any] = "mixup",
        p: float = 0.5,
        modes: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        classes: Any = None,
        class_map: Sequence[int | None] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.p = check_number("p", p, 0.0, 1.0)
        model = as_model(model)
        self.__dict__["model"] = model  # nn.Module would register it as a sub-module
        self.modes = model.checked_modes(modes)
        self.pixels = PixelAdapter(model.image_shape, mean, std, model.pixel_range)
        if classes is not None and class_map is not None:
            raise ValueError("give classes or class_map, not both: class_map says which classes the data has")
        self._by_name = classes is not None
        if classes is not None:
            listed = list(classes) if isinstance(classes, (tuple, list)) else classes
            class_map = match_classes(model, listed, fix=_MAP).tolist()
        self.class_map = check_class_map(class_map, model.num_classes)
        self._order_known = self.class_map is not None or model.num_classes == 1
        self._classes = ClassIndex(self.class_map or range(model.num_classes), model.num_classes)
        self.num_classes = len(self._classes.to_model)
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        self.seed, self._calls = check_whole("seed", seed, -(2**63)), 0
        self._counts = MoveCounts()
        self._classifier: Classifier | None = None
        self._copies: dict[torch.device, tuple[object, GLEM]] = {}

    @property
    def policy(self) -> Policy:
        """How images are moved."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy | PolicyName | Mapping[str, Any]) -> None:
        self._policy = as_policy(policy)

    @property
    def stats(self) -> dict[str, int]:
        """Counts of rows since the start, by name (see `MoveCounts`); reading them waits for the device."""
        return self._counts.stats()

    def attach(
        self,
        classifier: nn.Module,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
    ) -> GLEMAugment:
        """Give a policy such as Adversarial the classifier whose loss guides it, and return the transform itself.

        Its parameters, gradients, buffers and training mode stay as they are. Copies of the transform are without it.

        Args:
            classifier: from images as this transform returns them (uint8 ones as floats in [0, 1]) to logits. All
                networks that it calls must be registered in it.
            loss: a function of (output, labels); None: cross-entropy of the output, or of its `logits`.
            autocast: torch.bfloat16 or torch.float16 for that pass; None: as it is set where the transform is called,
                which for a wrapped loader is outside a loop's `with autocast()`.
        """
        if not self.policy.wants_classifier:
            raise ValueError(f"{self.policy!r} uses no classifier: attach is for policies such as Adversarial()")
        self._classifier = Classifier(classifier, loss or cross_entropy(self.num_classes), autocast)
        return self

    # ---- a call ----------------------------------------------------------------------------------------------

    @torch.compiler.disable  # a compiled training step must not trace the draws and the counts
    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Tensor]:
        """Augment a batch. For tuples, dicts, tv_tensors and single images see `as_transform`.

        Args:
            x: [B, C, H, W] of the model's dtype (uint8, uint16, int16), or float in [0, 1]; for a model of float images
                float in its range. Normalised float if mean and std were given. Any size; grey and RGB are converted
                into each other. It is never changed in place.
            y: int64 [B] data classes, or soft labels [B, K']. An image that shows several classes at once (multi-hot
                labels) moves along the modes of the strongest one; use Noise or Adversarial for these.

        Returns:
            (x', y'): x' has the dtype, device and memory format of x, and equals x bit for bit in rows that were not
            selected. y' is y itself, or float [B, K'].
        """
        data_cls = self._check(x, y)
        if not self._order_known:
            self._order_known = True
            names = ", ".join(self.model.classes[:3]) + (", ..." if self.num_classes > 3 else "")
            warnings.warn(
                f"it was not checked that the labels count the model's classes ({names}): name the data's classes in "
                "index order, as in GLEMAugment(..., classes=data.classes)",
                stacklevel=5,
            )
        return self._augmented(x, y, data_cls, self._draw(data_cls))

    def draw(self, x: Tensor | Sequence[int], y: Tensor) -> AugmentParams:
        """The random parameters of one call for a batch x, or its shape, with labels y int64 [B] or soft [B, K']."""
        return self._draw(self.classes_of(y, int(x.shape[0] if isinstance(x, Tensor) else x[0])).cpu())

    def replay(self, x: Tensor, y: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        """Augment with parameters of `draw`; for other arguments and results see `forward`."""
        return self._augmented(x, y, self._check(x, y), params)

    def _check(self, x: Tensor, y: Any) -> Tensor:
        """Check a batch; returns its labels' classes, int64 [B] on the CPU."""
        self.pixels.check(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("moves have no gradient, and these images require one: give x.detach()")
        if self.policy.wants_classifier and self._classifier is None:
            raise ValueError(f"{self.policy!r} needs a classifier: call aug.attach(classifier), on a copy again")
        if self.model.modes is None or self.model.modes.rank < self.modes:  # modes may have been fitted again
            self.model.checked_modes(self.modes)
        return self.classes_of(y, len(x)).cpu()

    def _generator(self) -> torch.Generator:
        """The generator of the next call; on the CPU, so that the draws are the same on every device."""
        info = get_worker_info()
        key = [self.seed % 2**64, rank(), self._calls, *([] if info is None else [info.seed])]
        self._calls += 1
        word = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        return torch.Generator("cpu").manual_seed(word >> 1)

    def _draw(self, data_cls: Tensor) -> AugmentParams:
        generator = self._generator()
        rows = _choose_rows(len(data_cls), self.p, generator)
        selected = Selected(rows, data_cls, self._classes, self.modes)
        drawn = self.policy.draw(selected, generator) if len(rows) else {}
        if not isinstance(drawn, dict):
            raise TypeError(
                f"{self.policy!r}.draw gives a {type(drawn).__name__}: give tensors by name, as {{'eps': ...}}"
            )
        for name, value in drawn.items():
            if len(value) != len(rows):
                raise ValueError(f"{self.policy!r}.draw gives {len(value)} rows of {name!r}: give n = {len(rows)}")
        return AugmentParams(rows, self._classes.model_class(data_cls[rows]), drawn)

    @torch.no_grad()
    def _augmented(self, x: Tensor, y: Tensor, data_cls: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
        softens = self.policy.softens(y.ndim == 2)
        target = soft_labels(y, self.num_classes) if softens else y
        selected, params = len(params.rows), params.where(params.cls >= 0)
        if len(params.rows) == 0:
            self._counts.add(selected, selected, torch.zeros((), dtype=torch.int64, device="cpu"))
            return x, target
        model = self._model_on(x.device)
        with evaluating(model):
            images, base, z, partner, back = self._encoded(model, x, params)
            chosen = Selected(params.rows, data_cls, self._classes, self.modes)
            seen = partial(self._images, images, base, x.dtype if x.is_floating_point() else torch.float32)
            gradient = partial(self._loss_gradient, model, seen, y, params.rows)
            batch = Batch(model, z, partner, target if softens else None, chosen, params, gradient)
            found = self.policy.move(batch)
            moved, labels = found if isinstance(found, tuple) else (found, None)
            if moved.shape != z.shape:
                raise ValueError(f"{self.policy!r}.move gives {list(moved.shape)}: give latents {list(z.shape)}")
            decoded = model.decode(moved, clamp=False)
        good = model.pixel_range.near(decoded) & back
        self._counts.add(selected, selected - len(params.rows), (~good).sum())
        if labels is not None:
            there = send(params.rows, target.device)
            own, kept = target.index_select(0, there), good.to(target.device)[:, None]
            target = target.index_copy(0, there, torch.where(kept, labels.to(target.dtype), own))
        changed, new = good & ((moved - z).abs().amax(1) > 0), self._images(images, base, x.dtype, decoded)
        return _replaced(x, new, send(params.rows, x.device), changed), target

    def _encoded(self, model: GLEM, x: Tensor, params: AugmentParams) -> tuple[Tensor, ...]:
        """The selected rows of a batch x: floats [n, C, H, W], at the user's size; the same at the model's size, as the
        model decodes them; latents [n, d]; latents of the partners; and whether the flow gives the row back, bool [n].
        """
        n, (index, place) = len(params.rows), _rows_to_encode(params, len(x))
        images = self.pixels.to_floats(x.view(_bits(x)).index_select(0, send(index, x.device)).view(x.dtype))
        small = self.pixels.to_model(images)
        h, encoded, _ = model.numbers_and_latents(small)
        # Information lost in encoding is invisible in z, so z is decoded. The limit is half of 1/255 of the range.
        unmoved = model.inverse(encoded[:n])
        back = largest_change(h[:n], unmoved) < 0.5 / 255
        # An autoencoder does not decode z to `small`, and its error is no part of the change.
        base = small[:n] if model.codec.exact else model.pixel_range.clamp(model.decode_numbers(unmoved))
        partner = encoded[:n] if place is None else encoded[send(place, x.device)]
        return images[:n], base, encoded[:n], partner, back

    def _loss_gradient(
        self, model: GLEM, seen: Function, y: Tensor, rows: Tensor, latents: Function, at: Tensor
    ) -> Tensor:
        """`Batch.loss_gradient`: `seen` makes images from decoded ones, and y[rows] are their labels."""
        assert self._classifier is not None
        labels = send(y, at.device).index_select(0, send(rows, at.device))
        return self._classifier.gradient(lambda c: seen(model.decode(latents(c), clamp=False)), at, labels, model)

    def _model_on(self, device: torch.device) -> GLEM:
        """The model, or a copy on another device. A copy is made again when the weights have changed."""
        if self.model.device == device:
            return self.model
        version = weights_key(self.model)
        if device not in self._copies or self._copies[device][0] != version:
            with torch.inference_mode(False):  # a later call may need gradients through the copy
                self._copies[device] = version, self.model.on(device)
        return self._copies[device][1]

    def _images(self, images: Tensor, base: Tensor, dtype: torch.dtype, decoded: Tensor) -> Tensor:
        """Images of the user's size and range, from decoded ones at the model's size; differentiable."""
        return self.pixels.from_model(images, base, self.model.pixel_range.clamp(decoded), dtype)

    # ---- labels and classes ----------------------------------------------------------------------------------

    def target(self, y: Tensor) -> Tensor:
        """Labels in the form in which calls return them: y itself, or soft [B, K'] where moves make labels soft."""
        self.classes_of(y, len(y))
        return soft_labels(y, self.num_classes) if self.policy.softens(y.ndim == 2) else y

    def classes_of(self, y: object, batch: int) -> Tensor:
        """The class of each row of a batch's labels, integers [batch] or floats [batch, K']: int64 [batch].

        Integers come back on the CPU. The class of a soft label is the strongest one, or -1 for a row of zeros; it
        stays on its device. TypeError, ValueError: other labels.
        """
        classes = self.num_classes
        if not isinstance(y, Tensor):
            fix = ": call aug(x, y); nn.Sequential passes images alone, v2.Compose passes both" if y is None else ""
            raise TypeError(f"y must be a tensor of labels, got {type(y).__name__}{fix}")
        if y.shape not in ((batch,), (batch, classes)):
            fix = ""
            if y.ndim == 2 and len(y) == batch:
                fix = ": give y[:, 0]" if y.shape[1] == 1 else f": {self._more_classes}"
            wanted = f"integers [{batch}] or soft labels [{batch}, {classes}]"
            raise ValueError(f"y must be {wanted}, got {tuple(y.shape)}{fix}")
        if y.is_floating_point() != (y.ndim == 2) or y.is_complex() or y.dtype == torch.bool:
            fix = "y.float(), or y.argmax(1) for the classes" if y.ndim == 2 else "y.long()"
            raise TypeError(
                f"labels [B] must be integers, and soft labels [B, K'] floating point; got {y.dtype}: give {fix}"
            )
        if y.ndim == 2:
            strongest = y.detach().max(dim=1)
            return strongest.indices.masked_fill(strongest.values <= 0, -1)
        found = y.long().cpu()
        if batch:
            low, high = (int(v) for v in torch.aminmax(found))
            if low < 0 or high >= classes:
                raise ValueError(
                    f"label {low if low < 0 else high} is out of range: this transform has classes 0 to "
                    f"{classes - 1}; {self._more_classes}"
                )
        return found

    @property
    def _more_classes(self) -> str:
        return "name the data's classes, GLEMAugment(..., classes=data.classes), if they are not the model's"

    def check_data(self, data: Any) -> None:
        """ClassMismatchError unless the classes of the data are the transform's, in the same order.

        Data without class names is not checked, nor is any data if class_map was given.
        """
        if (self.class_map is not None and not self._by_name) or (named := named_classes(data)) is None:
            return
        found = match_classes(self.model, data, fix=_MAP).tolist()
        wanted = [*(self.class_map or range(self.num_classes))][: len(found)]
        i = next((i for i, (a, b) in enumerate(zip_longest(found, wanted)) if a != b), None)
        if i is not None:
            other = f"class {self.model.classes[wanted[i]]!r}" if i < len(wanted) else f"only {len(wanted)} classes"
            raise ClassMismatchError(
                f"class {i} of the data is {named[1][i]!r}, and the transform has {other} of the model there: make it "
                "with GLEMAugment(..., classes=data.classes)"
            )
        self._order_known = True

    # ---- ways into a training loop ---------------------------------------------------------------------------

    def wrap(self, loader: Any, device: torch.device | str | None = None, off_epoch: int | None = None) -> Any:
        """The loader with its batches augmented, on `device` or where they are: see `loops.AugmentedLoader`."""
        from glem_augment.augment.loops import AugmentedLoader  # imported here because `loops` imports this module

        return AugmentedLoader(loader, self, device=device, off_epoch=off_epoch)

    def as_mixup_fn(self, smoothing: float = 0.0, mixup: Any = None) -> Any:
        """A function in the place of timm's `mixup_fn`, whose labels are always soft: see `loops.MixupFn`."""
        from glem_augment.augment.loops import MixupFn

        return MixupFn(self, smoothing, mixup)

    def collate_fn(self, base: Callable[[list[Any]], Any] | None = None) -> Any:
        """A collate function for workers, on whose CPUs the model then runs: see `loops.AugmentingCollate`."""
        from glem_augment.augment.loops import AugmentingCollate

        return AugmentingCollate(self, base)

    def as_transform(self) -> Any:
        """A `torchvision.transforms.v2.Transform` on tuples, dicts and tv_tensors: see `structures.GLEMTransform`."""
        from glem_augment.augment.structures import GLEMTransform

        return GLEMTransform(self)

    # ---- saving ----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """The seed and the number of calls, for `state_dict`."""
        return {"seed": self.seed, "calls": self._calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue the draws from a state of `get_extra_state`."""
        self.seed, self._calls = state["seed"], state["calls"]

    def _settings(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("p", "modes", "class_map", "seed")}
        return {**named, "mean": self.pixels.mean, "std": self.pixels.std}

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the model are made again where needed. The classifier may be large, and a copy would soon be old.
        return {**self.__dict__, "_classifier": None, "_copies": {}}

    def extra_repr(self) -> str:
        settings = {"policy": self.policy, **self._settings()}
        if isinstance(found := settings.get("class_map"), tuple) and len(found) > 20:
            settings["class_map"] = f"{sum(cls >= 0 for cls in found)} of {len(found)} classes"
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _bits(x: Tensor) -> torch.dtype:
    """The dtype as which rows of x are copied: torch has few operations for uint16."""
    return torch.int16 if x.dtype == torch.uint16 else x.dtype


def _replaced(x: Tensor, new: Tensor, rows: Tensor, changed: Tensor) -> Tensor:
    """A batch x with new images [n, C, H, W] in place of `rows`, int64 [n], where they are `changed`, bool [n]."""
    # One copy of rows takes less time than torch.where and index_copy.
    sources = torch.arange(len(x), device=x.device)
    number = torch.arange(len(x), len(x) + len(rows), device=x.device)
    sources = sources.index_copy(0, rows, torch.where(changed, number, rows))
    out = torch.empty_like(x)  # which keeps the memory format
    torch.index_select(torch.cat([x.view(_bits(x)), new.view(_bits(x))]), 0, sources, out=out.view(_bits(x)))
    return out


def _choose_rows(batch: int, p: float, generator: torch.Generator) -> Tensor:
    """Rows to change, int64 [n], rising. Each is chosen with probability p; n is p * batch, rounded up or down.

    A coin for each row would give another n in each batch. oneDNN, cuDNN and torch.compile prepare for each new shape.
    """
    n = math.floor(p * batch + float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu")))
    return torch.randperm(batch, generator=generator, device="cpu")[:n].sort().values


def _rows_to_encode(params: AugmentParams, batch: int) -> tuple[Tensor, Tensor | None]:
    """The batch rows to encode, the n selected ones first, and the place of each partner among them, int64 [n].

    The place of a missing partner is not used; None: the policy has no partners.
    """
    if "partner" not in params.drawn:
        return params.rows, None
    partner = torch.where(params.drawn["partner"] < 0, params.rows, params.drawn["partner"])
    others = partner[~torch.isin(partner, params.rows)].unique()
    index = torch.cat([params.rows, others])
    place = torch.zeros(batch, dtype=torch.int64, device="cpu")
    place[index] = torch.arange(len(index), device="cpu")
    return index, place[partner]
