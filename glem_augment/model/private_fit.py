"""Latents of private images, each from its image alone, in public coordinates.

Every path from an image to the model passes `classes.private`.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from glem_augment.classes.privacy import Privacy
from glem_augment.classes.private import PrivateClasses, private_classes
from glem_augment.codec.published import coordinates_file
from glem_augment.distributed import gather, progress_bar, share, world_size
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData

if TYPE_CHECKING:
    from glem_augment.model.latent_model import LatentModel

BATCH = 16  # images per pass; every pass has so many, so that no image's latent depends on the number of images
_PUBLIC_IMAGES = 2000
_DEFAULTS = {"flow": None, "max_per_class": None, "rank": 64, "seed": 0}
_STATED = {
    "image_size": "image_size= (--image-size)",
    "channels": "channels= (--channels)",
    "classes": "them by folders, or give (images, labels) and classes=",
}
_CLIP_SHARE = 0.95  # the share of public latents that the first clip leaves as they are


@torch.no_grad()
def fit_private(
    model: LatentModel,
    images: ImageData,
    privacy: Privacy,
    parts: int | None,
    public: ImageData | None,
) -> PrivateClasses:
    """Give `model`, with a flow of public coordinates, the classes of private images; see `GLEM.fit`.

    All ranks call this together. DataError: images that were chosen by comparison, are there twice, or are public, too.
    ValueError: an autoencoder gives an image several latents.
    """
    check_images(images, public)
    prior, clip = set_coordinates(model, public)
    z, y = latents_alone(model, images)
    found = private_classes(z, y, model.num_classes, prior, clip, privacy, parts)
    if (total := float(found.counts.sum())) * privacy.delta > 1:
        warnings.warn(
            f"there are about {total:.0f} images, and delta={privacy.delta:g} is above one over them: the promise "
            "holds, but a release could show one of them",
            stacklevel=5,
        )
    model.latent_classes = found.classes.to(model.device, model.dtype)
    return found


def check_arguments(privacy: object, autoencoder: object, public: object, **given: object) -> None:
    """Refuse arguments of `GLEM.fit` that a private model excludes, before any image is read.

    TypeError: `privacy` is no `Privacy`. ValueError: there are no coordinates, or one of `given` is not the default.
    """
    if not isinstance(privacy, Privacy):
        raise TypeError(f"privacy must be Privacy(epsilon=...), got {privacy!r}")
    if wrong := [name for name, value in given.items() if value != _DEFAULTS[name]]:
        raise ValueError(f"a private model takes no {' and no '.join(wrong)}: leave it out")
    if public is None and (autoencoder is None or isinstance(autoencoder, str)):
        stored_coordinates("pixels" if autoencoder is None else autoencoder)


def stored_coordinates(name: str) -> Path:
    """The file of the public coordinates of an autoencoder. ValueError: it has none."""
    path = coordinates_file(name)
    if path is None:
        raise ValueError(
            f"private sets need public coordinates, and {name} has none: give autoencoder='taef2' (--autoencoder "
            "taef2), or public images like yours (public=, --public)"
        )
    return path


def check_images(images: ImageData, public: ImageData | None) -> None:
    """Refuse images of which one has influence beyond its latent, and warn of public facts that were read from them."""
    if images.repeated:
        raise DataError(f"one image is in this private set several times ({images.repeated}): give it once")
    if public is not None and public.image_shape == images.image_shape:
        # An image of one colour may be in both.
        known = {hash(x.numpy().tobytes()) for x in public.some(_PUBLIC_IMAGES) if x.min() < x.max()}
        rows = progress_bar("compare", range(len(images)))
        if any(hash(images[row][0].numpy().tobytes()) in known for row in rows):
            raise DataError("a private image is among the public images (public=, --public): give other images there")
    if unstated := [*images.unstated, *([] if images.named else ["classes"])]:
        ways = ", ".join(_STATED[name] for name in unstated)
        warnings.warn(
            f"everybody will know the {' and '.join(unstated)} of the private model, but one image could change "
            f"what was read from the images: state {ways}",
            stacklevel=6,  # the caller of GLEM.fit
        )


def set_coordinates(model: LatentModel, public: ImageData | None) -> tuple[Tensor, float]:
    """Set the codec and the flow of `model` from public numbers alone: their variances [d], and the norm to clip to.

    ValueError: there are no stored coordinates, and no public images.
    """
    codec: Any = copy.deepcopy(model.codec)
    model.codec = codec
    if model.autoencoder is not None:  # the flow has the public mean and deviation; a fitted codec has others
        codec.mean.zero_(), codec.std.fill_(1), codec.fitted.fill_(True)
    flow: Any = model.flow
    if public is not None:
        x = public.some(_PUBLIC_IMAGES)
        if not codec.ready:
            codec.fit(x)
        h = torch.cat([model.numbers(part.to(model.device)) for part in x.split(codec.most)])
        flow.fit(h)
        ratio = clip_ratio(flow, h)
    else:
        named = model.config.autoencoder or {"name": "pixels"}
        path = stored_coordinates(named["name"])
        kind = "grey" if model.image_shape[0] == 1 else "colour"
        stored = {name.partition(".")[2]: tensor for name, tensor in load_file(path).items() if name.startswith(kind)}
        ratio = float(stored.pop("clip_ratio"))
        flow.load_state_dict(stored)
    prior = flow.prior().cpu()
    return prior, ratio * float(prior.sum().sqrt())


def clip_ratio(flow: Any, h: Tensor) -> float:
    """The norm that `_CLIP_SHARE` of the latents of public numbers h [N, C, H, W] keep, in roots of the prior's sum."""
    norms = torch.cat([flow(part)[0].norm(dim=1) for part in h.split(256)]).double()
    return float(torch.quantile(norms, _CLIP_SHARE) / flow.prior().sum().sqrt())


def latents_alone(model: LatentModel, images: ImageData) -> tuple[Tensor, Tensor]:
    """Latents [n, d] and labels of this rank's images; each latent is a function of its image alone."""
    own = torch.arange(len(images)).numpy()[share(len(images)).rows]
    size = BATCH if rows_are_independent(model) else 1
    z, labels = [], []
    with progress_bar("encode", total=len(images)) as bar:
        for x, y in images.batches(own, size):
            # The last pass is filled up: operations may depend on the number of rows.
            full = torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
            z.append(model.encode(full)[0][: len(x)].cpu())
            labels.append(y)
            bar.update(len(x) * world_size())
    return torch.cat(z), torch.cat(labels)


def rows_are_independent(model: LatentModel) -> bool:
    """Whether the latent of an image has the same bits whatever the other images of a pass, and at any place.

    ValueError: not even the same image alone has the same latent each time, or another machine gives another one. The
    number of images decides which rank encodes an image.
    """
    g = torch.Generator().manual_seed(0)
    x, other = (torch.rand(BATCH, *model.image_shape, generator=g) for _ in range(2))
    z = model.encode(x)[0]
    other[1] = x[0]
    first, again = (model.encode(x[:1])[0].cpu() for _ in range(2))
    if not torch.equal(first, again):
        raise ValueError("this autoencoder gives an image another latent each time: use one that is a fixed function")
    turned = model.encode(x.roll(3, 0))[0].roll(-3, 0)
    independent = torch.equal(model.encode(other)[0][1], z[0]) and torch.equal(turned, z)
    found = torch.cat([first, z.cpu(), torch.full_like(first, independent)])
    if not all(torch.equal(found, others) for others in gather(found)):
        raise ValueError("the machines of this run give an image different latents: use machines of one kind")
    return independent
