"""GLEMAugment as a `torchvision.transforms.v2` transform: inside `Compose`, on tuples, dicts and tv_tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten_with_path, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2

if TYPE_CHECKING:
    from glem_augment.augment.transform import GLEMAugment

LABEL_KEYS = ("labels", "label", "targets", "target")


class GLEMTransform(v2.Transform):
    """Augments the images of a sample or batch, whatever the structure around them.

    As with torchvision's MixUp and CutMix, images are the `tv_tensors.Image` in the structure, or else its first
    plain tensor, and labels the second item of a tuple, or what is under a key such as "labels" in a dict. Boxes,
    masks and all else are passed on: the moves do not change where things are.

    Args:
        aug: the transform.
        labels_getter: "default", or from the sample to the labels in it (the object itself); a lambda can't be
            pickled.

    Raises:
        TypeError: for a labels_getter that is neither.
    """

    def __init__(self, aug: GLEMAugment, labels_getter: str | Callable[[Any], Any] = "default") -> None:
        super().__init__()
        if labels_getter != "default" and not callable(labels_getter):
            raise TypeError(f"labels_getter must be 'default' or a function of the sample, got {labels_getter!r}")
        self.aug, self.labels_getter = aug, labels_getter

    def forward(self, *inputs: Any) -> Any:
        """Batches [B, C, H, W] with labels [B] or [B, K'], or one image [C, H, W] with an int, 0-d or [K'] label.

        Returns:
            The same structure; images keep their type, integer labels theirs unless they become soft.

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
    # One image out of a data set, with a number or a soft label [K'].
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
    """What `GLEMTransform.forward` does, to one structure; aug: from images and labels to both."""
    leaves, spec = tree_flatten_with_path(sample)
    flat = [item for _, item in leaves]
    if labels_getter == "default":
        place, labels = default_labels(sample)
        found = [i for i, (path, _) in enumerate(leaves) if path == place]
    else:
        labels = labels_getter(sample)  # type: ignore[operator]
        # Small ints are one object wherever they stand: an index of the same value is found too.
        found = [i for i, item in enumerate(flat) if item is labels]
    if not found and isinstance(labels, Tensor) and isinstance(sample, Mapping) and not isinstance(sample, dict):
        raise ValueError(f"torch's pytrees do not take a {type(sample).__name__} apart: give dict(sample)")
    if not found or not isinstance(labels, (Tensor, Integral)) or isinstance(labels, bool):
        raise ValueError(f"labels must be a tensor (or an int, for one image) of the sample, got {labels!r}")
    where_x = _image_position(flat, found)
    x, y = _batched(flat[where_x], labels)
    new_x, new_y = aug(x, y)
    single = flat[where_x].ndim == 3
    flat[where_x] = _as_type(new_x[0] if single else new_x, flat[where_x])
    if new_y is not y:
        if len(found) > 1 and not isinstance(labels, Tensor):
            raise ValueError(
                f"label {labels} stands in the sample more than once, and soft labels take its place: make it a tensor"
            )
        for place_y in found:  # one tensor may stand in several places
            flat[place_y] = new_y[0] if single else new_y
    return tree_unflatten(flat, spec)


def default_labels(sample: Any) -> tuple[tuple[Any, ...], Any]:
    """Where the labels of a sample are, as a path of torch's pytrees, and the labels, by torchvision's convention.

    Raises:
        ValueError: where there are none to be found.
    """
    place: tuple[Any, ...] = ()
    if isinstance(sample, (tuple, list)) and len(sample) > 1:
        place = (GetAttrKey(sample._fields[1]) if hasattr(sample, "_fields") else SequenceKey(1),)
        sample = sample[1]
    if isinstance(sample, (Tensor, Integral)):
        if not place:
            raise ValueError(
                "the transform got an image without a label, as a data set's transform= does; it needs both: augment "
                "batches, with aug.wrap(loader) or collate_fn=aug.collate_fn(), or give (image, label)"
            )
        return place, sample
    if isinstance(sample, Mapping):
        lower = {str(key).lower(): key for key in sample}
        named = [lower[name] for name in LABEL_KEYS if name in lower]
        for key in (*named, *(key for key in sample if "label" in str(key).lower())):
            return (*place, MappingKey(key)), sample[key]
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


def _batched(image: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    x = image.as_subclass(Tensor)
    if x.ndim != 3:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels of a batch must be a tensor, got {labels!r}")
        return x, labels
    return x[None], labels[None] if isinstance(labels, Tensor) else torch.tensor([labels], device=x.device)


def _as_type(value: Tensor, like: Tensor) -> Tensor:
    return tv_tensors.wrap(value, like=like) if isinstance(like, tv_tensors.TVTensor) else value
