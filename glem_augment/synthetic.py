"""SyntheticDataset: class-balanced images drawn from the classes of a GLEM, reproducible item by item.

Item i's latent depends on the seed, its class and its place within the class alone: never on the batch, the
order, the worker, or how many items there are. Images are decoded in fixed aligned blocks, since convolutions
and matrix products change in their last bits with the batch size.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from glem_augment._arguments import check_choice, check_number
from glem_augment._transfer import check_worker_device
from glem_augment.model import GLEM

SOURCES = ("gaussian", "rfcm")
# Items whose noise comes from one generator. Not the block of decoding: that one may be chosen to fit the
# memory without changing what is drawn.
NOISE_BLOCK = 16


class SyntheticDataset(Dataset):
    """A map-style data set of samples, `per_class` of each class, in the order of the classes.

    Items are (PIL image, int), as torchvision's image data sets give them; `classes`, `class_to_idx`,
    `targets`, `transform` and `target_transform` are those of torchvision. Blocks are decoded once and kept
    up to `cache_bytes`; for shuffled training on more than fits, `export` the images and read them from the
    disk.

    Args:
        model: a GLEM (with fitted modes for source "rfcm").
        per_class: images of each class.
        temperature: factor on the standard deviation.
        seed: int >= 0; with the class and the place within the class it fixes an item's latent.
        transform: PIL image -> anything; target_transform: int -> anything.
        source: "gaussian" (diagonal Gaussian of the class) or "rfcm" (mean and full covariance of its real
            latents).
        block: images decoded at a time.
        device: where to decode; None: where the model is.
        cache_bytes: of decoded images kept in memory.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it and what is allowed.
    """

    def __init__(
        self,
        model: GLEM,
        per_class: int = 100,
        temperature: float = 0.8,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source: str = "gaussian",
        block: int = 64,
        device: torch.device | str | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        if not isinstance(model, GLEM):
            raise TypeError(f"model must be a GLEM, got {type(model).__name__}: load one with GLEM.from_pretrained")
        self.per_class = _whole("per_class", per_class, 1)
        self.seed = _whole("seed", seed, 0)
        self.block = _whole("block", block, 1)
        self.cache_bytes = _whole("cache_bytes", cache_bytes, 0)
        self.temperature = check_number("temperature", temperature, 0.0, float("inf"))
        check_choice("source", source, SOURCES)
        if source == "rfcm" and model.modes is None:
            raise ValueError("source='rfcm' needs model.modes: fit them first with model.fit_modes(data)")
        self.source = source
        self.transform = transform
        self.target_transform = target_transform
        self.model = model
        if device is not None and torch.device(device) != model.device:
            self.model = copy.deepcopy(model).to(device)
        self.image_shape: tuple[int, int, int] = model.image_shape
        self.classes: list[str] = list(model.classes)
        self.class_ids: list[str] = list(model.class_ids)
        self.class_to_idx: dict[str, int] = dict(model.class_to_idx)
        self.counts = [self.per_class] * model.num_classes
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.targets: list[int] = np.repeat(np.arange(model.num_classes), self.counts).tolist()
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._not_finite: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def non_finite(self) -> int:
        """Images decoded so far in this process with values that are not finite (shown as grey, 0, 255)."""
        return sum(self._not_finite.values())

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Item `index` (negative ones count from the end): (image, label) after the transforms.

        Raises:
            IndexError: out of range. ValueError: for a flow of neither 1 nor 3 channels (use `images`).
            RuntimeError: for a model on CUDA in a forked DataLoader worker.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Several items, each block among them decoded once. See `__getitem__`."""
        self._check_pil()
        items = []
        for index, image in zip(indices, self.images(indices), strict=True):
            picture: Any = to_pil(image)
            label: Any = self.targets[index]
            picture = picture if self.transform is None else self.transform(picture)
            label = label if self.target_transform is None else self.target_transform(label)
            items.append((picture, label))
        return items

    def images(self, indices: Sequence[int]) -> Tensor:
        """Decoded images, uint8 [n, C, H, W] on the CPU, any number of channels."""
        cls, within = self._locate(indices)
        out = torch.empty(len(cls), *self.image_shape, dtype=torch.uint8)
        number = within // self.block
        keys = np.stack([cls, number], axis=1)
        for c, b in np.unique(keys, axis=0).tolist():
            rows = np.flatnonzero((cls == c) & (number == b))
            place = torch.from_numpy(within[rows] - b * self.block)
            out[torch.from_numpy(rows)] = self.decoded_block(c, b)[place]
        return out

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Latents z, float32 [n, d] on the model's device; they do not depend on the other indices."""
        cls, within = self._locate(indices)
        width = self.model.dim
        if self.source == "rfcm":
            width += self._modes().rank
        noise = np.empty((len(cls), width), dtype=np.float32)
        number = within // NOISE_BLOCK
        for c, b in np.unique(np.stack([cls, number], axis=1), axis=0).tolist():
            rows = np.flatnonzero((cls == c) & (number == b))
            # SeedSequence mixes the three so that neighbouring seeds, classes and blocks are unrelated.
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, c, b])))
            drawn = generator.standard_normal((NOISE_BLOCK, width), dtype=np.float32)
            noise[rows] = drawn[within[rows] - b * NOISE_BLOCK]
        check_worker_device(self.model.device)
        y = torch.from_numpy(cls).to(self.model.device)
        eps = torch.from_numpy(noise).to(self.model.device)
        with torch.no_grad():
            if self.source == "rfcm":
                return self._modes().sample_from_noise(y, eps, self.temperature)
            gaussians = self.model.gaussians
            return gaussians.mu[y] + self.temperature * gaussians.variance()[y].sqrt() * eps

    def decoded_block(self, cls: int, number: int) -> Tensor:
        """Images number * block ... of a class, uint8 [m, C, H, W], m <= block; kept in the cache."""
        key = (cls, number)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        first = number * self.block
        last = min(self.counts[cls], first + self.block)
        start = int(self._starts[cls])
        z = self.latents(range(start + first, start + last))
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                x = self.model.decode(z, clamp=False)
        finally:
            self.model.train(training)
        # Not drawn again: item i would then no longer be a function of the seed alone.
        self._not_finite[key] = int((~torch.isfinite(x)).flatten(1).any(dim=1).sum())
        x = x.nan_to_num(nan=0.5, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)
        images = (x * 255).round().to(torch.uint8).cpu()
        self._cache[key] = images
        held = sum(block.numel() for block in self._cache.values())
        while held > self.cache_bytes and len(self._cache) > 1:
            held -= self._cache.popitem(last=False)[1].numel()
        return images

    def export(
        self,
        folder: str | os.PathLike[str],
        format: str = "imagefolder",  # noqa: A002  (the word users expect)
        progress: bool = True,
        overwrite: bool = False,
    ) -> Path:
        """Write all images as PNG: folder/<class>/NNNNNN.png, with glem-provenance.json beside the class
        folders.

        Class folders are named by the class ids, or a slug of the class names (see `class_folders`).
        Transforms are not applied. Every file appears whole or not at all.

        Args:
            folder: made if missing; format: "imagefolder"; progress: show a bar; overwrite: write into a
            folder that already holds an export (what of it is left over is removed).

        Returns:
            The folder.

        Raises:
            FileExistsError: for a folder that is not empty; with overwrite=True, one that holds other things.
            OSError: where the disk is full or can't be written, naming the path.
            ValueError: for another format, or a flow of neither 1 nor 3 channels.
        """
        from glem_augment._export import export_imagefolder

        check_choice("format", format, ("imagefolder",))
        self._check_pil()
        return export_imagefolder(self, Path(folder), progress=progress, overwrite=overwrite)

    def __repr__(self) -> str:
        return (
            f"SyntheticDataset({len(self)} images, {len(self.classes)} classes, per_class={self.per_class}, "
            f"temperature={self.temperature}, seed={self.seed}, source={self.source!r}, block={self.block}, "
            f"image_shape={self.image_shape})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Workers decode for themselves; sending the cache would cost more than it saves.
        return {**self.__dict__, "_cache": OrderedDict()}

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Class and place within the class of every index, int64 [n] each."""
        index = np.asarray(indices.tolist() if isinstance(indices, Tensor) else list(indices), dtype=np.int64)
        total = len(self)
        bad = (index < -total) | (index >= total)
        if bad.any():
            raise IndexError(f"index {index[bad][0]} is out of range for {total} images")
        index = np.where(index < 0, index + total, index)
        cls = np.searchsorted(self._starts, index, side="right") - 1
        return cls, index - self._starts[cls]

    def _modes(self) -> Any:
        if self.model.modes is None:
            raise ValueError("model.modes is missing: fit the modes first with model.fit_modes(data)")
        return self.model.modes

    def _check_pil(self) -> None:
        if self.image_shape[0] not in (1, 3):
            raise ValueError(
                f"a PIL image has 1 or 3 channels, this flow {self.image_shape[0]}: use images(indices) for tensors"
            )


def to_pil(image: Tensor) -> Image.Image:
    """A uint8 tensor [1 or 3, H, W] as a PIL image, mode "L" or "RGB"."""
    if image.shape[0] == 1:
        return Image.fromarray(image[0].numpy())
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _whole(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)
