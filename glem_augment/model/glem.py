"""The model: codec, flow, classes (GLEM, Enescu & Sahbi, ACCV 2024)."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from glem_augment.checks import check_whole
from glem_augment.classes.classes import Classes
from glem_augment.classes.covariances import to_public
from glem_augment.classes.fit import directions_of_class, fit_classes, fit_modes
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.classes.modes import ClassModes
from glem_augment.classes.statistics import ClassStatistics, class_statistics
from glem_augment.codec.autoencoder import StandardisedAutoencoder, latent_shape
from glem_augment.codec.codec import Codec
from glem_augment.codec.levels import Levels, Values
from glem_augment.codec.pixel_range import UINT8, PixelRange
from glem_augment.codec.published import prior_file
from glem_augment.distributed import progress_bar
from glem_augment.errors import ModelFileError
from glem_augment.flows import Flow, build_flow, check_flow, flow_facts, resolve_preset
from glem_augment.flows.public import PublicFlow
from glem_augment.images.dataset import ImageData, LabelledImages, Limits, as_image_data, images_for, open_data
from glem_augment.images.matching import ONE_CLASS, ClassMap
from glem_augment.model.config import MAX_MODES, GLEMConfig, class_facts
from glem_augment.model.files import (
    WEIGHTS,
    autoencoder_of,
    check_canonical,
    check_parts,
    codec_facts,
    find_autoencoder,
    find_folder,
    load_model,
    private_sha256,
    read_config,
    weights_sha256,
    write_model,
)
from glem_augment.model.latent_model import LatentModel
from glem_augment.names import DEFAULT_MODES, Preset
from glem_augment.parts import CUSTOM, find
from glem_augment.privacy.coordinates import ReleaseCoordinates
from glem_augment.privacy.fit import private_classes
from glem_augment.privacy.latents import check_arguments, check_images, latents_alone, public_codec
from glem_augment.privacy.mechanism import Privacy
from glem_augment.tensors import usable

STANDARDISED_BY = 64  # images that standardise an autoencoder's latents, each at many positions


class GLEM(LatentModel):
    """A codec, a flow f and Gaussians of classes, `p(x | y) = N(f(x); mu_y, Sigma_y) |det df/dx|` (Eq. 2).

    Densities are over pixel *levels*, bins of width 1 of which there are 2^bits, so that
    bits/dim = -log_prob / (d ln 2), d = C H W. With an autoencoder E they are over E(x), the numbers of its latents,
    which have no levels, hence no bits/dim.

    Likelihoods of pixels add uniform dequantisation noise to images on levels, uint8 or float. By default the noise
    depends on the image alone, so an image has one likelihood, whatever the batch. A float image between the levels is
    a point with a density. Prediction and augmentation use the middle of the bin.

    `GLEM.create` makes an untrained model, `GLEM.from_pretrained` loads one, `glem_augment.training` trains it.

    Args:
        config: describes the model.
        flow, latent_classes, codec: the parts; by default untrained ones as the config describes them, and a codec of
            pixels. A codec that is no `Codec` is an autoencoder.

    Attributes:
        origin: `org/name@commit` if the model came from the Hub, else None.
        origin_file: the weights file that it was loaded from, or None.
    """

    def __init__(
        self,
        config: GLEMConfig,
        flow: Flow | None = None,
        latent_classes: Classes | None = None,
        codec: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self.flow = build_flow(config.flow) if flow is None else flow
        if latent_classes is None:
            gaussians, modes = ClassGaussians(self.num_classes, self.dim, config.psi), None
            full = config.covariance == "full"
            if config.modes_rank is not None:
                shared = self.dim if full else None
                modes = ClassModes(self.num_classes, config.modes_rank, self.dim, shared, config.modes_common)
            fitted = None
            if config.classes is not None:
                named = dict(config.classes)
                fitted = find("class model", named.pop("kind"))(self.num_classes, config.flow_shape, **named)
            latent_classes = Classes(gaussians, modes, full, config.posterior_temperature, fitted)
        dtype = next((p.dtype for p in self.flow.parameters()), torch.float32)
        self.latent_classes = latent_classes.to(dtype)
        if codec is None:
            shape, pixels = config.image_shape, config.pixel_range
            codec = (Values(shape, pixels) if pixels.continuous else Levels(shape, config.bits, pixels)).to(dtype)
        elif not isinstance(codec, Codec):
            codec = StandardisedAutoencoder(codec, config.image_shape, config.flow_shape)
        self.codec = codec
        self.origin: str | None = None
        self.origin_file: Path | None = None

    # ---- making, loading and saving ------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        preset: Preset | str,
        image_shape: tuple[int, int, int],
        classes: Sequence[str],
        class_ids: Sequence[str] | None = None,
        bits: int | None = None,
        psi: tuple[float, float, float] | None = (0.5, 0.2, 0.05),
        autoencoder: str | nn.Module | None = None,
        pixel_range: PixelRange = UINT8,
        **overrides: Any,
    ) -> GLEM:
        """An untrained model.

        >>> photos = GLEM.create("identity", (3, 64, 64), ["cat", "dog"], autoencoder="taef2")
        >>> photos.image_shape, photos.dim
        ((3, 64, 64), 2048)

        Args:
            preset: name of a flow size, see `flows.PRESETS`, or of a registered flow.
            image_shape: (C, H, W).
            classes, class_ids: names and identifiers in index order, by default the same.
            bits: top bits of each channel that are modelled; the paper reports 5. None: all bits.
            psi: (a, b, c) of the variances, None for plain variances.
            autoencoder: the flow models its latents in place of pixels; it is frozen. "taef2" (in the package),
                "hub:org/name[@revision]" (see `open_autoencoder`), the name of a registered codec, a module of the
                protocol `Autoencoder`, or any `Codec`.
            pixel_range: of the images, such as `ImageData.pixel_range`.
            overrides: numbers of the preset to change.

        Raises:
            ValueError: anything that does not describe a model, such as a size that the autoencoder does not divide.
            TypeError: a module that is no autoencoder, or classes that are no list. ModelFileError: see
                `open_autoencoder`.
        """
        if isinstance(classes, int | str):
            raise TypeError(f"classes are a list of names, such as ['cat', 'dog'], got {classes!r}")
        if autoencoder is not None:
            pixel_range.need_8_bits("an autoencoder (leave it out, for a model of the pixels)")
        autoencoder, facts, shape = _found(autoencoder, image_shape)
        config = GLEMConfig(
            flow=resolve_preset(preset, shape, **overrides),
            bits=pixel_range.bits if bits is None else bits,
            psi=psi,
            class_ids=[str(c) for c in (classes if class_ids is None else class_ids)],
            class_names=[str(c) for c in classes],
            autoencoder=facts,
            pixel_range=pixel_range,
        )
        return cls(config, codec=autoencoder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        module: Flow | None = None,
        autoencoder: nn.Module | None = None,
    ) -> GLEM:
        """Load a saved model for inference: in eval mode, without gradients.

        Args:
            name: a folder with `model.safetensors` and `config.json`; `bundled:NAME`; or `org/name[@revision]` on the
                Hugging Face Hub, `hf-hub:org/name` if a folder has the same name.
            device: where to put the model. ValueError: it can't be used.
            cache_dir: where downloads are kept, by default the Hub client's cache (`HF_HOME`).
            token: for private and gated repositories; None: the stored one, if any. False: none.
            revision: branch, tag or commit hash on the Hub.
            module: for a model that `from_bijection` made: a flow of the same class; a copy of it gets the stored
                weights. No code is ever imported because a file names it.
            autoencoder: for a model that was made with an autoencoder or a codec of the user's: that module.

        Raises:
            ModelFileError: missing, truncated, inconsistent or hostile files. Its subclass `HubError`: no network, no
                such repository or revision, no access, a damaged download.
        """
        client, device = dict[str, Any](cache_dir=cache_dir, token=token), usable(device)
        folder, origin = find_folder(name, revision, **client)
        config = read_config(folder)
        flow = None
        if module is not None:
            if config.flow["coupling"] != CUSTOM:
                raise ModelFileError("this model holds a flow of the library's: leave module= out")
            check_flow(module, config.flow_shape)
            flow = copy.deepcopy(module)
        autoencoder = autoencoder_of(folder, config, autoencoder, **client)
        model = load_model(folder / WEIGHTS, config, partial(cls, flow=flow, codec=autoencoder))
        model.check_promise()
        if config.privacy is not None:
            check_canonical(folder, model)
        model = model.to(device).eval().requires_grad_(False)
        model.origin, model.origin_file = origin, folder / WEIGHTS
        return model

    @classmethod
    def from_bijection(
        cls, module: Flow, image_shape: tuple[int, int, int], autoencoder: str | nn.Module | None = None
    ) -> GLEM:
        """A model around a user's flow, in eval mode, with one class, "image", a standard normal; see `adapt`.

        Args:
            module: a subclass of `flows.Flow`. It is not copied, and from now on frozen and in eval mode.
            image_shape: (C, H, W).
            autoencoder: see `create`; the flow is then one of its latents.

        Raises:
            TypeError, ValueError: see `flows.check_flow`.
        """
        autoencoder, facts, shape = _found(autoencoder, image_shape)
        check_flow(module, shape)
        config = GLEMConfig(
            flow=flow_facts(module, shape),
            bits=UINT8.bits,
            psi=None,
            class_ids=[ONE_CLASS],
            class_names=[ONE_CLASS],
            autoencoder=facts,
        )
        gaussians = ClassGaussians(1, math.prod(shape), None, initial_variance=1.0)
        return cls(config, module, Classes(gaussians), autoencoder).eval().requires_grad_(False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` to `folder`, atomically. An OSError names the path.

        ModelFileError: a part of the user's that could not be built again, or a private model whose weights or config
        are not the ones of its fit.
        """
        check_parts(self)
        self.config = replace(self.config, **self._facts())
        self.check_promise()
        write_model(folder, self.config, self.state_dict())

    def check_promise(self) -> None:
        """ModelFileError: this private model is not as its fit made it, so its promise does not hold."""
        if self.config.privacy is not None and self.config.privacy["sha256"] != private_sha256(self):
            raise ModelFileError(
                "the weights or the config of this private model have changed since its fit, so it has no promise: fit "
                "another model"
            )

    def _facts(self) -> dict[str, Any]:
        """What `config.json` says of the classes."""
        classes, modes = self.latent_classes, self.modes
        return {
            "psi": classes.gaussians.psi,
            "modes_rank": None if modes is None else modes.rank,
            "modes_common": modes is not None and modes.common,
            "covariance": "full" if classes.full else "diagonal",
            "classes": class_facts(classes.fitted),
            "posterior_temperature": classes.temperature,
        }

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the model, its card and a picture of samples to the Hugging Face Hub; see `hub.client.push_to_hub`."""
        from glem_augment.hub.client import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def __repr__(self) -> str:
        c, h, w = self.image_shape
        parameters = sum(p.numel() for p in self.flow.parameters())
        flow = f"{parameters / 1e6:.2f} M flow parameters" if parameters else "no flow"
        counts = ["no"] if self.modes is None else map(str, self.modes.fewest_and_most)
        return (
            f"GLEM({self.config.flow.get('preset', 'flow')}, {c}x{h}x{w} {self.numbers_are}, "
            f"{self.num_classes} class{'es' * (self.num_classes > 1)}, {flow}, "
            f"{' to '.join(dict.fromkeys(counts))} modes per class)"
        )

    # ---- fitting to labelled images ------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        data: LabelledImages,
        autoencoder: str | nn.Module | None = None,
        flow: GLEM | str | os.PathLike[str] | None = None,
        *,
        privacy: Privacy | None = None,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        value_range: Limits | None = None,
        classes: Sequence[str] | None = None,
        split: str = "train",
        rank: int = 64,
        max_per_class: int | None = None,
        class_model: str | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> GLEM:
        """A model of labelled images in one pass; nothing is trained.

        >>> model = GLEM.fit("bundled:fashion-mnist", autoencoder="taef2", max_per_class=10)
        >>> model.classes[:2], model.modes.rank
        (['T-shirt/top', 'Trouser'], 9)

        Args:
            data: an `ImageData`, or anything else that `open_data` takes.
            autoencoder: model its latents, for photographs; see `create`. None: the pixels, or the flow's latents.
            flow: a model, or its name: its codec and flow give the latents. Images are converted to its size.
            privacy: make the model differentially private, so that it and its samples can be shared; see
                `privacy.sums` and docs/privacy.md. It needs autoencoder="taef2", and has noise without a seed.
            image_size, channels: see `open_data`; by default read from the images. With privacy state them, here or
                where `data` is opened: everybody will know them, and one image could change them.
            value_range: see `open_data`; int16 images, and floats outside [0, 1], need it.
            classes: names in place of the data's. A pair (images, labels) has none: it gets the names given to `create`
                if their number fits, or else "0", "1", ...
            split: split to open, for data given by name.
            rank: k modes per class, fewer if no class has so many (n images have n - 1); the variation outside them
                is kept as a variance per dimension.
            max_per_class: use only the first images of every class, at most this many; at least 2.
            class_model: kind of a registered `ClassModel`, which learns from a second pass and gives densities and
                samples in place of the covariances below.
            seed: of the dequantisation noise.
            device: where the model computes.

        Every class gets a mean, a covariance, and the leading directions of this covariance (`classes.fit`). What one
        class lacks in images comes from all classes, and what these lack from public photographs in the latents of
        "taef2". `config.classes` says how. The posterior's temperature is fitted to latents that are left out.

        Returns:
            A new GLEM in eval mode. `config.training["adapted_from"]` names the model of the flow.

        Raises:
            ValueError: both an autoencoder and a flow, an image size with a flow, arguments that privacy excludes, so
                few stated images that a private model would be noise, or a codec that says it is exact and is not.
                DataError: images of another shape, a class without images, no class with two, latents off any scale.
                TypeError: arguments that make no sense.
        """
        opening = dict(image_size=image_size, channels=channels, value_range=value_range)
        given = {name: value for name, value in opening.items() if value is not None}
        rank, max_per_class, seed = _checked(rank, max_per_class, seed)  # before images are read
        how: dict[str, Any] = dict(rank=rank, max_per_class=max_per_class, class_model=class_model, seed=seed)
        if privacy is not None:
            prior = check_arguments(privacy, autoencoder, flow=flow, **how)
            images = _opened(data, split, classes, given)
            return cls._fit_private(images, str(autoencoder), prior, privacy, device)
        if flow is not None:
            if autoencoder is not None:
                raise ValueError("give an autoencoder or a flow, not both: a flow has its codec already")
            if given:
                raise ValueError(f"{' and '.join(given)}: the flow's model has them: leave them out")
            return as_model(flow).adapt(data, classes=classes, split=split, device=device, **how)
        images = _opened(data, split, classes, given)
        shape, pixel_range = images.image_shape, images.pixel_range
        base = cls.create("identity", shape, images.classes, autoencoder=autoencoder, pixel_range=pixel_range)
        return base.to(device)._fitted(images, images, **how)

    def adapt(
        self,
        data: LabelledImages,
        *,
        classes: Sequence[str] | None = None,
        split: str = "train",
        device: str | torch.device | None = None,
        **how: Any,
    ) -> GLEM:
        """A new model with this codec and flow for other images and classes. They are converted to this model's size.

        `data`, `classes`, `split` and `how` (rank, max_per_class, class_model, seed) as in `fit`, where errors are
        listed, too. `device`: where to compute; None: where this model is.
        """
        images = as_image_data(data, self.image_shape, classes, self.pixel_range, split=split)
        named: GLEM | ImageData = images
        if classes is None and isinstance(data, tuple) and not self.config.training:  # just made, for these classes
            named = self if self.num_classes == len(images.classes) else images
        return copy.deepcopy(self).to(device or self.device)._fitted(images, named, **how)

    @torch.no_grad()
    def _fitted(
        self,
        images: ImageData,
        named: GLEM | ImageData,
        rank: int = 64,
        max_per_class: int | None = None,
        class_model: str | None = None,
        seed: int = 0,
    ) -> GLEM:
        """A model of the images with this codec, which is fitted to them if it needs it, and this flow.

        `named` has the names of the classes. The other arguments are as for `fit`.
        """
        how = rank, max_per_class, seed = _checked(rank, max_per_class, seed)
        self.eval()
        if not self.codec.ready:
            self.codec.fit(images.some(STANDARDISED_BY))
            latent_shape(self.codec, self.image_shape)  # what it says of itself can be tried now
        found = self._classes_of(images, class_model, *how)
        totals = np.bincount(images.targets, minlength=len(images.classes)).tolist()
        counts = [min(total, max_per_class or total) for total in totals]
        of_flow = dict(weights_sha256=weights_sha256(self), origin=self.origin, training=self.config.training)
        rank = 0 if found.modes is None else found.modes.rank
        config = replace(
            self.config,
            privacy=None,  # a private model's promise says nothing about these images
            covariance="diagonal",  # until the facts of the new classes are known
            classes=None,
            class_ids=list(named.class_ids),
            class_names=list(named.classes),
            training={
                "data": images.name,
                "images": sum(counts),
                "images_per_class": [min(counts), max(counts)],
                "adapt": dict(rank=rank, max_per_class=max_per_class, class_model=class_model, seed=seed),
                "adapted_from": of_flow,
            },
        )
        model = GLEM(config, self.flow, found, self.codec)
        model.config = replace(config, **model._facts())
        return model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def fit_modes(
        self,
        data: LabelledImages,
        rank: int = 64,
        max_per_class: int | None = None,
        class_map: ClassMap = None,
        seed: int = 0,
    ) -> ClassModes:
        """Estimate each class's mean and principal modes from the latents of `data` (RFCM); saved with the model.

        Gaussians that were learned with the flow stay, and the modes are fitted to each class alone, as in the paper.
        Classes that `fit` took from images are fitted again.

        Args:
            data: an `ImageData` of the model's shape, or anything else that `open_data` takes, which is then resized.
                Labels of data that name no classes are the model's indices.
            rank, max_per_class, seed: see `fit`.
            class_map: how the data's classes map to the model's, see `match_classes`.

        All ranks call this together. Each encodes its share of the images, and all get the modes.

        Raises:
            DataError: a class of the model without at least two images, or images of another shape. ValueError: `rank`
                below 1 or `max_per_class` below 2.
        """
        self.refuse_if_private("fit_modes")
        how = rank, max_per_class, seed = _checked(rank, max_per_class, seed)
        made = self.config.training.get("adapt")
        images = images_for(self, data, class_map)
        if isinstance(made, dict):  # the Gaussians come from images, too
            found = self._classes_of(images, made.get("class_model"), *how)
            made = {**made, "rank": found.modes and found.modes.rank, "max_per_class": max_per_class, "seed": seed}
            self.config.training = {**self.config.training, "adapt": made}
        else:
            statistics = self._statistics(images, None, *how)
            found = Classes(self.gaussians, fit_modes(statistics, rank), False, self.latent_classes.temperature)
        self.latent_classes = found.to(self.device, self.dtype)
        self.config = replace(self.config, **self._facts())
        assert self.modes is not None
        return self.modes

    def _classes_of(
        self, images: ImageData, class_model: str | None, rank: int, max_per_class: int | None, seed: int
    ) -> Classes:
        """The classes of the images as `classes.fit` estimates them, with a class model of this kind, if any."""
        kind = None if class_model is None else find("class model", class_model)
        public = self._public_coordinates()
        statistics = self._statistics(images, public, rank, max_per_class, seed)
        found = fit_classes(statistics, self.config.flow_shape, rank, public, self.config.psi)
        if kind is None:
            return found
        part, rows = kind(len(images.classes), self.config.flow_shape), images.rows_of_classes(max_per_class)
        with progress_bar("class model", total=sum(map(len, rows))) as bar:
            part.fit(self.latents_of_classes(images, rows, seed, bar.update))
        return Classes(found.gaussians, found.modes, fitted=part)

    def _statistics(
        self, images: ImageData, public: PublicFlow | None, rank: int, max_per_class: int | None, seed: int
    ) -> ClassStatistics:
        """Counts, means and scatter of the latents of each class of the images, in public coordinates if there are."""
        rows = images.rows_of_classes(max_per_class)
        total = sum(len(each) for each in rows)
        rank = max(rank, directions_of_class(len(rows), self.dim))
        with progress_bar("fit", total=total) as bar:
            latents = self.latents_of_classes(images, rows, seed, bar.update)
            return class_statistics(lambda y: to_public(latents(y), public), images.classes, self.dim, rank)

    def _public_coordinates(self) -> PublicFlow | None:
        """Coordinates in which public photographs are uncorrelated; None for pixels and behind a trained flow."""
        named = self.config.autoencoder
        path = None if named is None else prior_file(named["name"])
        if path is None or self.autoencoder is None or self.config.flow["coupling"] != "identity":
            return None
        std = self.autoencoder.std.flatten()
        return PublicFlow.from_file(path, self.config.flow_shape, self.image_shape[0] == 1, std).to(std.dtype)

    @classmethod
    def _fit_private(
        cls, images: ImageData, autoencoder: str, prior: Path, privacy: Privacy, device: str | torch.device
    ) -> GLEM:
        shape = images.image_shape
        images.pixel_range.need_8_bits("a private model")
        check_images(images, privacy)
        base = cls.create("identity", shape, images.classes, images.class_ids, autoencoder=autoencoder)
        base.codec = public_codec(base.codec)
        base = base.eval().requires_grad_(False).to(device)
        coordinates = ReleaseCoordinates(prior, base.config.flow_shape, shape[0] == 1)
        u, y = latents_alone(lambda x: coordinates(base.encode(x)[0].cpu()), images)
        found = private_classes(u, y, base.num_classes, coordinates, privacy)
        if (total := float(found.counts.sum())) * privacy.delta > 1:
            warnings.warn(
                f"there are about {total:.0f} images, and delta={privacy.delta:g} is above one over them: the promise "
                "holds, but a release could show one of them",
                stacklevel=4,
            )
        if lost := [images.classes[k] for k in found.lost]:
            warnings.warn(
                f"mostly noise, so drawn much like the average of classes: {', '.join(lost)}; merge them with other "
                "classes, give more images, or raise epsilon",
                stacklevel=4,
            )
        base.latent_classes = found.classes.to(base.device, base.dtype)
        expect = {
            "images": [round(count) for count in found.counts.tolist()],
            "kept": [round(share, 3) for share in found.kept.tolist()],
            "mostly_noise": lost,
        }
        record = {**found.privacy, "expect": expect, "sha256": ""}
        base.config = replace(base.config, privacy=record, training={"data": "private images"}, **base._facts())
        record["sha256"] = private_sha256(base)
        return base

    def refuse_if_private(self, what: str) -> None:
        """ValueError: the model is private, and `what` would put facts of images into it that no promise covers."""
        if self.config.privacy is not None:
            raise ValueError(
                f"{what} would break the model's privacy, since it looks at images again: fit another model, whose "
                "promise adds up with this one"
            )

    def checked_modes(self, modes: int | None) -> int:
        """How many modes to use: `modes` itself, or by default 64, or all if fewer are stored.

        ValueError: no modes are stored, or fewer than `modes`. TypeError: `modes` is no integer.
        """
        if self.modes is None:
            raise ValueError("model.modes is missing: fit the modes first with model.fit_modes(data)")
        modes = min(DEFAULT_MODES, self.modes.rank) if modes is None else check_whole("modes", modes, 1)
        if modes > self.modes.rank:
            raise ValueError(
                f"modes must be from 1 to {self.modes.rank}, got {modes}; for more call model.fit_modes(data, rank), "
                "with more images than modes in a class"
            )
        return modes


def _checked(rank: int, max_per_class: int | None, seed: int) -> tuple[int, int | None, int]:
    """Arguments of `GLEM.fit` as Python's numbers. The variation of a class needs two images."""
    most = None if max_per_class is None else check_whole("max_per_class", max_per_class, 2)
    return check_whole("rank", rank, 1, MAX_MODES), most, check_whole("seed", seed, 0)


def _opened(data: LabelledImages, split: str, classes: Sequence[str] | None, opening: Mapping[str, Any]) -> ImageData:
    """The images of `GLEM.fit`, opened with the arguments `opening` of `open_data`."""
    if opening and isinstance(data, ImageData):
        raise ValueError(f"these images are opened already: give {' and '.join(opening)} to open_data")
    images = data if isinstance(data, ImageData) else open_data(data, split=split, **opening)
    return as_image_data(images, images.image_shape, classes, images.pixel_range, split=split)


def _found(
    autoencoder: str | nn.Module | None, image_shape: tuple[int, int, int]
) -> tuple[nn.Module | None, dict[str, Any] | None, tuple[int, int, int]]:
    """The autoencoder or codec of `create`, its entry in a config, and the shape of the numbers of these images."""
    if autoencoder is None:
        return None, None, image_shape
    if isinstance(autoencoder, str):
        autoencoder, facts = find_autoencoder(autoencoder, image_shape)
    else:
        facts = codec_facts(autoencoder)
    shape = latent_shape(autoencoder, image_shape)
    return autoencoder, {**facts, "image_shape": [int(side) for side in image_shape]}, shape


def as_model(model: GLEM | str | os.PathLike[str]) -> GLEM:
    """`model` itself, or the one that `GLEM.from_pretrained` finds under that name. TypeError: it is neither."""
    if not isinstance(model, GLEM | str | os.PathLike):
        raise TypeError(f"model must be a GLEM or the name of one, got {type(model).__name__}")
    return model if isinstance(model, GLEM) else GLEM.from_pretrained(model)
