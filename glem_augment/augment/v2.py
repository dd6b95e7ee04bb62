"""GLEMAugment as a `torchvision.transforms.v2` transform: inside `Compose`, on tuples, dicts and tv_tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # torchvision's own transforms use it too
from torchvision import tv_tensors
from torchvision.transforms import v2

LABEL_KEYS = ("labels", "label", "targets", "target")


class GLEMTransform(v2.Transform):
    """Augments the images of a sample or batch, whatever the structure around them.

    As with torchvision's MixUp and CutMix, images are the `tv_tensors.Image` in the structure, or else its first plain
    tensor, and labels are the second item of a tuple, or what a dict has under a key such as "labels". Boxes, masks and
    everything else are passed on, because the moves do not change where things are.

    Args:
        aug: the GLEMAugment.
        labels_getter: "default", or a function from the sample to the very object in it that is the labels. A lambda
            can't be pickled.

    Raises:
        TypeError: for a labels_getter that is neither.
    """

    def __init__(self, aug: nn.Module, labels_getter: str | Callable[[Any], Any] = "default") -> None:
        super().__init__()
        if labels_getter != "default" and not callable(labels_getter):
            raise TypeError(f"labels_getter must be 'default' or a function of the sample, got {labels_getter!r}")
        self.aug, self.labels_getter = aug, labels_getter

    def forward(self, *inputs: Any) -> Any:
        """Augment batches [B, C, H, W] with labels [B] or [B, K'], or one image [C, H, W] with an int or [K'] label.

        Returns:
            The same structure. Images keep their type, and integer labels theirs unless they become soft.

        Raises:
            ValueError, TypeError: for PIL images, no image, or labels that are not found.
        """
        return augment_sample(self.aug, inputs[0] if len(inputs) == 1 else inputs, self.labels_getter)

    def extra_repr(self) -> str:
        return "" if self.labels_getter == "default" else f"labels_getter={self.labels_getter!r}"


def is_structure(x: Any, y: Any) -> bool:
    """Whether the arguments of a call are one of torchvision's structures rather than a plain batch and its labels."""
    if y is None or isinstance(y, Mapping) or isinstance(x, tv_tensors.TVTensor):
        return True
    # One image of a data set comes with a number, or with a soft label [K'].
    single = isinstance(y, Integral) or (
        isinstance(y, Tensor) and (y.ndim == 0 or (y.ndim == 1 and y.is_floating_point()))
    )
    return isinstance(x, Tensor) and x.ndim == 3 and single


def like(batch: Any, items: list[Any]) -> Any:
    """The items in the kind of sequence that `batch` is: a list, a tuple, a namedtuple."""
    if hasattr(batch, "_fields"):
        return type(batch)(*items)
    return items if isinstance(batch, list) else tuple(items)


def augment_sample(aug: Callable[..., Any], sample: Any, labels_getter: str | Callable[[Any], Any] = "default") -> Any:
    """What `GLEMTransform.forward` does with one structure; aug takes images and labels and returns both."""
    flat, spec = tree_flatten(sample)
    if callable(labels_getter):
        labels = labels_getter(sample)
        # Small ints are one object wherever they stand, so an index of the same value is found too.
        places = [i for i, item in enumerate(flat) if item is labels]
    else:
        places = [_label_position(sample)]
        labels = flat[places[0]]
    if not places or not isinstance(labels, (Tensor, Integral)) or isinstance(labels, bool):
        raise ValueError(f"labels must be a tensor (or an int, for one image) of the sample, got {labels!r}")
    image_place = _image_position(flat, places)
    image = flat[image_place]
    x, y = image.as_subclass(Tensor), labels
    single = x.ndim == 3
    if single:
        x = x[None]
        y = labels[None] if isinstance(labels, Tensor) else torch.tensor([labels], device=x.device)
    new_x, new_y = aug(x, y)
    new_x = new_x[0] if single else new_x
    flat[image_place] = tv_tensors.wrap(new_x, like=image) if isinstance(image, tv_tensors.TVTensor) else new_x
    if new_y is not y:
        if len(places) > 1 and not isinstance(labels, Tensor):
            raise ValueError(
                f"label {labels} stands in the sample more than once, and soft labels take its place: make it a tensor"
            )
        for place in places:  # one tensor may stand in several places
            flat[place] = new_y[0] if single else new_y
    return tree_unflatten(flat, spec)


def _label_position(sample: Any) -> int:
    """Where the labels are among the leaves of a sample, by torchvision's convention."""
    if isinstance(sample, dict):
        lower = {str(key).lower(): key for key in sample}
        named = [lower[name] for name in LABEL_KEYS if name in lower]
        keys = [*named, *(key for key in sample if "label" in str(key).lower())]
        if keys:
            return sum(len(tree_leaves(sample[key])) for key in takewhile(lambda key: key != keys[0], sample))
    elif isinstance(sample, (tuple, list)) and len(sample) > 1:
        return len(tree_leaves(sample[0])) + (_label_position(sample[1]) if isinstance(sample[1], Mapping) else 0)
    elif isinstance(sample, Tensor):
        raise ValueError(
            "the transform got an image without a label, as a data set's transform= does; it needs both: augment "
            "batches, with aug.wrap(loader) or collate_fn=aug.collate_fn(), or give (image, label)"
        )
    raise ValueError(
        f"no labels found in {type(sample).__name__}: give (images, labels) or a dict with a key 'labels', or a "
        "labels_getter"
    )


def _image_position(flat: list[Any], labels: list[int]) -> int:
    if any(isinstance(item, Image.Image) for item in flat):
        raise TypeError("PIL images can't be moved: put v2.ToImage() before this transform")
    images = [i for i, item in enumerate(flat) if isinstance(item, tv_tensors.Image)]
    plain = [i for i, item in enumerate(flat) if type(item) is Tensor and i not in labels]
    if not images and not plain:
        raise ValueError("no image found: a sample needs a tv_tensors.Image or a tensor besides its labels")
    if len(images) > 1:
        raise ValueError(f"the sample has {len(images)} images, but one tensor of labels: augment them one by one")
    return (images or plain)[0]
