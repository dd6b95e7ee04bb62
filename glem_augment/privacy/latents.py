"""Latents of private images, each from its image alone, in public coordinates.

Every path from an image to the model passes `privacy.sums`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.codec.published import prior_file
from glem_augment.distributed import gather, progress_bar, share, world_size
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData
from glem_augment.privacy.expectation import expectation
from glem_augment.privacy.mechanism import Privacy

Encode = Callable[[Tensor], Tensor]
BATCH = 16  # images per pass; every pass has so many, so that no image's latent depends on the number of images
_DEFAULTS = {"flow": None, "max_per_class": None, "class_model": None, "rank": 64, "seed": 0}
_STATED = {
    "image_size": "image_size= (--image-size)",
    "channels": "channels= (--channels)",
    "classes": "them by folders, or give (images, labels) and classes=",
}


def check_arguments(privacy: object, autoencoder: object, **given: object) -> Path:
    """Refuse arguments of `GLEM.fit` that a private model excludes, before any image is read; the public knowledge.

    TypeError: `privacy` is no `Privacy`. ValueError: there is no public knowledge, or one of `given` is not the
    default.
    """
    if not isinstance(privacy, Privacy):
        raise TypeError(f"privacy must be Privacy(epsilon=...), got {privacy!r}")
    if wrong := [name for name, value in given.items() if value != _DEFAULTS[name]]:
        raise ValueError(f"a private model takes no {' and no '.join(wrong)}: leave it out")
    path = prior_file(autoencoder) if isinstance(autoencoder, str) else None
    if path is None:
        named = "pixels have" if autoencoder is None else "this autoencoder has"
        raise ValueError(
            f"private sets need public knowledge of the latents, and {named} none: give autoencoder='taef2' "
            "(--autoencoder taef2)"
        )
    return path


def check_images(images: ImageData, privacy: Privacy) -> None:
    """Refuse images that are there twice, and so few stated ones that all would be noise; warn of facts that were read.

    The number of images that are there is secret, so only the stated number decides.
    """
    expectation(privacy, len(images.classes), images.image_shape)
    if images.repeated:
        raise DataError(f"one image is in this private set several times ({images.repeated}): give it once")
    if unstated := [*images.unstated, *([] if images.named else ["classes"])]:
        ways = ", ".join(_STATED[name] for name in unstated)
        warnings.warn(
            f"everybody will know the {' and '.join(unstated)} of the private model, but one image could change "
            f"what was read from the images: state {ways}",
            stacklevel=5,  # the caller of GLEM.fit
        )


def public_codec(codec: nn.Module) -> Any:
    """A copy of an autoencoder's codec that does not standardise: a fitted one has the images' mean and deviation."""
    found: Any = copy.deepcopy(codec)
    found.mean.zero_(), found.std.fill_(1), found.fitted.fill_(True)
    return found


def latents_alone(encode: Encode, images: ImageData) -> tuple[Tensor, Tensor]:
    """Latents [n, d] and labels of this rank's images; each latent is a function of its image alone."""
    own = torch.arange(len(images)).numpy()[share(len(images)).rows]
    size = BATCH if rows_are_independent(encode, images.image_shape) else 1
    z, labels = [], []
    with progress_bar("encode", total=len(images)) as bar:
        for x, y in images.batches(own, size):
            # The last pass is filled up: operations may depend on the number of rows.
            full = torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
            z.append(encode(full)[: len(x)].cpu())
            labels.append(y)
            bar.update(len(x) * world_size())
    return torch.cat(z), torch.cat(labels)


def rows_are_independent(encode: Encode, shape: tuple[int, int, int]) -> bool:
    """Whether the latent of an image has the same bits whatever the other images of a pass, and at any place.

    ValueError: not even the same image alone has the same latent each time, or another machine gives another one. The
    number of images decides which rank encodes an image.
    """
    g = torch.Generator().manual_seed(0)
    x, other = (torch.rand(BATCH, *shape, generator=g) for _ in range(2))
    z = encode(x)
    other[1] = x[0]
    first, again = (encode(x[:1]).cpu() for _ in range(2))
    if not torch.equal(first, again):
        raise ValueError("this autoencoder gives an image another latent each time: use one that is a fixed function")
    turned = encode(x.roll(3, 0)).roll(-3, 0)
    independent = torch.equal(encode(other)[1], z[0]) and torch.equal(turned, z)
    found = torch.cat([first, z.cpu(), torch.full_like(first, independent)])
    if not all(torch.equal(found, others) for others in gather(found)):
        raise ValueError("the machines of this run give an image different latents: use machines of one kind")
    return independent
