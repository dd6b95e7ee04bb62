"""The ways to put GLEMAugment into a training loop, as methods of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glem_augment.augment.adversarial import Adversary
from glem_augment.augment.labels import soft_labels
from glem_augment.augment.v2 import augment_sample, is_structure
from glem_augment.devices import evaluating
from glem_augment.flows.precision import full_precision

if TYPE_CHECKING:
    from timm.data.mixup import Mixup

    from glem_augment.augment.collate import AugmentingCollate
    from glem_augment.augment.loops import AugmentedLoader
    from glem_augment.augment.mixup import MixupFn
    from glem_augment.augment.transform import GLEMAugment
    from glem_augment.augment.v2 import GLEMTransform
    from glem_augment.model.glem import GLEM


SETTINGS = (
    "p policy alpha strength modes basis partner labels mean std num_classes class_map detail seed margin rescale bank"
).split()


class PlugIn:
    """Mixed into GLEMAugment."""

    def attach(
        self: GLEMAugment,
        classifier: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
    ) -> GLEMAugment:
        """Give policy "adversarial" the classifier whose loss chooses the move; the one in training, as a rule.

        Its parameters, their gradients, its buffers (BatchNorm's statistics) and its training mode stay as they are:
        the pass runs in eval mode, on the module inside DistributedDataParallel or torch.compile. It is not
        registered as a sub-module, and not part of copies and pickles of the transform.

        Args:
            classifier: from images as this transform returns them (uint8 ones as floats in [0, 1]) to logits. What it
                runs must be registered in it: a network that it reaches in another way is neither frozen nor in eval
                mode.
            loss: takes (output, labels), the classifier's output as it comes and labels as given to the transform;
                None: cross-entropy of the output, of its `logits`, or of the one item of a tuple that is a matrix.
            autocast: dtype of that pass (torch.bfloat16, torch.float16); None: as set where the transform is called,
                which for a wrapped loader is outside a loop's `with autocast()`.

        Returns:
            The transform itself.

        Raises:
            ValueError, TypeError: for another policy, or what is no module, loss or dtype.
        """
        if self.policy != "adversarial":
            raise ValueError(f"attach is for policy='adversarial', this transform has policy={self.policy!r}")
        self._adversary = Adversary(classifier, loss, autocast)
        return self

    def wrap(
        self: GLEMAugment,
        loader: Any,
        device: torch.device | str | None = None,
        off_epoch: int | None = None,
    ) -> AugmentedLoader:
        """The loader with its batches augmented, on `device` or where they are; see `loader.AugmentedLoader`.

        The best place on a GPU: after timm's prefetching loader, on the training device.
        """
        from glem_augment.augment.loops import AugmentedLoader

        return AugmentedLoader(loader, self, device=device, off_epoch=off_epoch)

    def as_mixup_fn(
        self: GLEMAugment, smoothing: float = 0.0, mixup: Mixup | None = None, order: str = "aug"
    ) -> MixupFn:
        """A function in the place of timm's `mixup_fn`: labels are soft [B, K'] always; see `mixup.MixupFn`."""
        from glem_augment.augment.mixup import MixupFn

        return MixupFn(self, smoothing, mixup, order)

    def collate_fn(self: GLEMAugment, base: Callable[[list[Any]], Any] | None = None) -> AugmentingCollate:
        """A collate function for DataLoader workers; see `collate.AugmentingCollate`.

        The flow then runs on the workers' CPUs, with one thread each: for small flows, or where the GPU is the
        bottleneck.
        """
        from glem_augment.augment.collate import AugmentingCollate

        return AugmentingCollate(self, base)

    def as_transform(self: GLEMAugment, labels_getter: str | Callable[[Any], Any] = "default") -> GLEMTransform:
        """A `torchvision.transforms.v2.Transform` on tuples, dicts and tv_tensors; see `transform.GLEMTransform`."""
        from glem_augment.augment.v2 import GLEMTransform

        return GLEMTransform(self, labels_getter)

    def target(self: GLEMAugment, y: Tensor) -> Tensor:
        """Labels as they come out of a call that changes no image: y itself, or soft where moves make soft ones.

        Raises:
            ValueError, TypeError: for labels that a call would not take.
        """
        self._check_labels(y, len(y))
        return y if self._labels_for(y) == "hard" else self.soft_target(y)

    def unmoved(self: GLEMAugment, x: Any, y: Any) -> tuple[Any, Any]:
        """What a call gives that changes no image, whatever structure the batch comes in: (x, `target` of y).

        Raises:
            ValueError, TypeError: for what a call would not take.
        """
        if is_structure(x, y):
            return augment_sample(lambda x, y: (x, self.target(y)), (x, y))
        return x, self.target(y)

    def soft_target(self: GLEMAugment, y: Tensor) -> Tensor:
        """Labels as soft ones [B, K']: one-hot float32, or y itself.

        Raises:
            ValueError, TypeError: for labels that a call would not take.
        """
        self._check_labels(y, len(y))
        self._held.tables(y.device)  # from now on an accelerator is not waited for
        return soft_labels(y, self.num_classes)

    @torch.no_grad()
    def fill_bank(self: GLEMAugment, x: Tensor, y: Tensor) -> None:
        """Put a batch into the bank of latents (`bank=` of the constructor), for partners from the first step on.

        Batches that are augmented are put there anyway, in each DataLoader worker into one of its own, which ends
        with it. The bank is not part of `state_dict`: fill it again when a run is resumed. It is emptied when the
        flow's weights change, which makes its latents another flow's.

        Args:
            x, y: as for a call.

        Raises:
            ValueError: for a transform without a bank; otherwise as a call.
        """
        if not self.bank:
            raise ValueError("this transform has no bank: make it with GLEMAugment(..., bank=16)")
        self._check(x, y)
        flow = self._held.flow(x.device)
        with full_precision(x.device.type), evaluating(flow.model):
            z = flow.model.encode(self.pixels.to_flow(self.pixels.to_unit(x.clone())).flow)[0]
        cls = self._flow_class(y, self._held.tables(y.device))
        self._held.bank(x.device).add(z, self._bank_class(y, cls, torch.arange(len(y), device=y.device)).to(x.device))

    # ---- saving ----

    def get_extra_state(self: GLEMAugment) -> dict[str, Any]:
        """The random state, for `state_dict`: whole numbers, the same on every rank."""
        return self._random.state()

    def set_extra_state(self: GLEMAugment, state: dict[str, Any]) -> None:
        """Go on drawing where the state was taken."""
        self._random.restore(state)

    def to_config(self: GLEMAugment) -> dict[str, Any]:
        """Every setting, as JSON or YAML can carry it, and `model`: where a model from the Hub came from, or the name
        or folder that the transform was made with; None for a model given as an object."""
        found = {name: getattr(self, name, None) for name in SETTINGS}
        found.update(mean=self.pixels.mean, std=self.pixels.std)
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        return {"model": self.model.origin or self._name, **plain}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: GLEM | str | None = None) -> GLEMAugment:
        """The transform that `to_config` described, at the start of its random state.

        Args:
            config: settings by name; those that are missing have their defaults.
            model: a GLEM or its name; None: the one that config["model"] names.

        Raises:
            ValueError: for an unknown setting, or no model. Otherwise as the constructor.
        """
        unknown = set(config) - {"model", *SETTINGS}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}; there are {', '.join(SETTINGS)}")
        model = model if model is not None else config.get("model")
        if model is None:
            raise ValueError("the config names no model: give one, GLEMAugment.from_config(config, model)")
        return cls(model, **{name: value for name, value in config.items() if name != "model"})  # type: ignore[call-arg,return-value]
