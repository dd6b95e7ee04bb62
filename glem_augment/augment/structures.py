"""Augmentation of a tuple, a dict or any other structure that holds images and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # torchvision's own transforms use it too
from torchvision import tv_tensors
from torchvision.transforms import v2

from glem_augment.augment.transform import GLEMAugment
from glem_augment.tensors import send

LABEL_KEYS = ("labels", "label", "targets", "target")


class GLEMTransform(v2.Transform):
    """Augments the images of a sample or batch of any structure, see `augment_sample`."""

    def __init__(self, aug: GLEMAugment) -> None:
        super().__init__()
        self.aug = aug

    def forward(self, *inputs: Any) -> Any:
        return augment_sample(inputs[0] if len(inputs) == 1 else inputs, self.aug)


def augment_batch(aug: GLEMAugment, batch: Any, on: bool, device: torch.device | str | None = None) -> Any:
    """A batch on `device`, augmented if `on`. Labels always have the form of augmented ones."""

    def augment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if device is not None:
            x, y = send(x, torch.device(device)), send(y, torch.device(device))
        return aug(x, y) if on else (x, aug.target(y))

    return augment_sample(batch, augment)


def augment_sample(sample: Any, augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Augment a batch [B, C, H, W] with labels [B] or [B, K'], or one image [C, H, W] with an int or [K'] label.

    As with torchvision's MixUp and CutMix, images are the `tv_tensors.Image` in the structure, or else its first plain
    tensor. Labels are the second item of a tuple, or a dict's value under one of `LABEL_KEYS` in upper or lower case.
    Boxes, masks and everything else pass unchanged, because moves do not displace objects. Images keep their type, and
    integer labels keep theirs unless they become soft.

    Raises:
        ValueError, TypeError: for PIL images, no image, or labels that are not found.
    """
    flat, spec = tree_flatten(sample)
    label_place = _label_position(sample)
    image_place = _image_position(flat, label_place)
    image, labels = flat[image_place], flat[label_place]
    x, y = image.as_subclass(Tensor), labels
    single = x.ndim == 3
    if not isinstance(labels, (Tensor, Integral) if single else Tensor):
        raise ValueError(f"labels must be a tensor (or an int, for one image) of the sample, got {labels!r}")
    if single:
        x, y = x[None], torch.as_tensor(labels, device=x.device)[None]
    new_x, new_y = augment(x, y)
    if single:
        new_x = new_x[0]
    flat[image_place] = tv_tensors.wrap(new_x, like=image) if isinstance(image, tv_tensors.TVTensor) else new_x
    if new_y is not y:
        flat[label_place] = new_y[0] if single else new_y
    return tree_unflatten(flat, spec)


def _label_position(sample: Any) -> int:
    """The index of the labels among the leaves of a sample, by torchvision's convention."""
    if isinstance(sample, Mapping):
        names = {str(key).lower(): key for key in sample}
        found = next((names[name] for name in LABEL_KEYS if name in names), None)
        if found is not None:
            return sum(len(tree_leaves(sample[key])) for key in takewhile(lambda key: key != found, sample))
    elif isinstance(sample, (tuple, list)) and len(sample) > 1:
        return len(tree_leaves(sample[0])) + (_label_position(sample[1]) if isinstance(sample[1], Mapping) else 0)
    elif isinstance(sample, (Tensor, Image.Image)):
        raise ValueError(
            "the transform got an image without a label, as a data set's transform= does; it needs both: augment "
            "batches, with aug.wrap(loader) or collate_fn=aug.collate_fn(), or give (image, label)"
        )
    raise ValueError(f"no labels found in {type(sample).__name__}: give (images, labels) or a dict with a key 'labels'")


def _image_position(flat: list[Any], label_place: int) -> int:
    if any(isinstance(item, Image.Image) for item in flat):
        raise TypeError("PIL images can't be moved: put v2.ToImage() before this transform")
    images = [i for i, item in enumerate(flat) if isinstance(item, tv_tensors.Image)]
    plain = [i for i, item in enumerate(flat) if type(item) is Tensor and i != label_place]
    if not images and not plain:
        raise ValueError("no image found: a sample needs a tv_tensors.Image or a tensor besides its labels")
    if len(images) > 1:
        raise ValueError(f"the sample has {len(images)} images, but one tensor of labels: augment them one by one")
    return (images or plain)[0]
