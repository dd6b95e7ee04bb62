"""SyntheticDataset: class-balanced images drawn from the classes of a GLEM, reproducible item by item.

Images are decoded in fixed aligned blocks of one class, since convolutions and matrix products change in their last
bits with the batch size. So item i is the same image whatever the batch, the order and the worker.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from glem_augment.checks import check_choice, check_whole
from glem_augment.devices import weights_key
from glem_augment.io import expand
from glem_augment.model.glem import GLEM, as_model
from glem_augment.synthetic.balance import PerClass, class_counts, recorded
from glem_augment.synthetic.export import export_imagefolder
from glem_augment.synthetic.latents import ImageSampler, LatentSource, Oracle, rows_by_block

# Images that are decoded together, all of one class. Another number would change images in their last bits.
BLOCK = 64
# Blocks decoded a second time before the user is told that the cache is too small for the way it is read.
TOO_OFTEN = 32


class SyntheticDataset(Dataset):
    """A map-style data set of synthetic images, in the order of the classes.

    Items are (PIL image, int), as torchvision's image data sets give them; `classes`, `class_to_idx`,
    `targets`, `transform` and `target_transform` are those of torchvision.

    A block of images is decoded when the first of them is wanted, and kept as long as `cache_bytes` allow. Every
    DataLoader worker has a cache of its own, so for loaders with workers, and for sets that are shuffled and do not fit
    the cache, call `preload` first (all images in memory, shared by all workers), or `export` and read the files.

    Args:
        model: a GLEM (with fitted modes for source "rfcm"), or its name (see `GLEM.from_pretrained`). It must not
            change afterwards.
        per_class: images of each class: a number for all, K numbers, a mapping from class names, ids or indices (the
            others get none), or "balance": as many as fill up each class of `real` to its largest one, and none of a
            class that `real` does not name.
        temperature: factor on the standard deviation.
        seed: int >= 0; with the class and the place within the class it fixes an item's latent.
        transform: PIL image -> anything; target_transform: int -> anything.
        source: "gaussian" (diagonal Gaussian of the class), "rfcm" (mean and full covariance of its real latents) or
            "mixup" (two images of `real` mixed along the class's modes, as GLEMAugment does; their latents are kept in
            memory, N * d * 4 bytes). A class with one real image has nothing to mix, so all of its images are copies of
            that one; a warning says so.
        device: where to decode; None: where the model is.
        cache_bytes: memory for decoded images in each process; one block is always kept.
        real: real images: an `ImageData`, (uint8 images, labels), or for "balance" any torchvision or timm data set
            whose labels can be read.
        modes, alpha: settings of source "mixup", as in GLEMAugment (64 modes, or as many as there are).
        min_confidence: draw an item again, up to 20 times, until the probability of its class is at least this; the
            best candidate is kept if none is. `acceptance()` reports. None: no rejection. The flow's posterior judges
            latents, and passes nearly all draws of the class Gaussians, its own; to judge images give an oracle.
        oracle: judges in place of the flow's posterior: from float images [n, C, H, W] in [0, 1] to probabilities or
            logits [n, K] of the flow's classes. A row with NaN counts as confidence 0. A module judges in eval mode,
            and an export that is finished later knows it by its weights; another function is known to this data set
            alone.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it and what is allowed.
    """

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        per_class: PerClass = 100,
        temperature: float = 0.8,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source: str = "gaussian",
        device: torch.device | str | None = None,
        cache_bytes: int = 256 * 2**20,
        real: Any = None,
        modes: int | None = None,
        alpha: float = 1.0,
        min_confidence: float | None = None,
        oracle: Oracle | None = None,
    ) -> None:
        model = as_model(model)
        self.counts = class_counts(model, per_class, real)
        self.per_class = recorded(model, per_class)
        self.cache_bytes = check_whole("cache_bytes", cache_bytes, 0)
        self.transform, self.target_transform = transform, target_transform
        self.model = model.on(device)
        wanted = np.asarray(self.counts) > 0
        latents = LatentSource(self.model, source, seed, temperature, real, modes, alpha, wanted)
        self.sampler = ImageSampler(latents, min_confidence, oracle)
        self.source, self.seed, self.temperature = source, latents.seed, latents.temperature
        self.real_name = None if latents.real is None else latents.real.name
        self.block = BLOCK
        self.image_shape: tuple[int, int, int] = model.image_shape
        self.classes: list[str] = list(model.classes)
        self.class_ids: list[str] = list(model.class_ids)
        self.class_to_idx: dict[str, int] = dict(model.class_to_idx)
        self.targets: list[int] = np.repeat(np.arange(model.num_classes), self.counts).tolist()
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._preloaded: Tensor | None = None
        # For each block (class, number) decoded so far: images, images that are not finite, and `Drawn.judged`.
        self._known: dict[tuple[int, int], tuple[int, int, tuple[int, int, float]]] = {}
        self._decoded_again = 0
        self._weights_key: tuple[tuple[int, int], ...] | None = None
        self._make_cache()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def non_finite(self) -> int:
        """The number of images decoded so far in this process whose values were not finite (shown grey, 0 or 255)."""
        return sum(not_finite for _, not_finite, _ in self._known.values())

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Item `index` (negative ones count from the end): (image, label) after the transforms.

        Raises:
            IndexError: out of range. ValueError: for a flow of neither 1 nor 3 channels (use `images`).
            RuntimeError: for a model on CUDA in a forked DataLoader worker.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Several items; each block among them is decoded once. See `__getitem__`."""
        pictures = self.pictures(indices)
        labels: list[Any] = [self.targets[index] for index in indices]
        if self.target_transform is not None:
            labels = [self.target_transform(label) for label in labels]
        return list(zip(pictures, labels, strict=True))

    def pictures(self, indices: Sequence[int]) -> list[Any]:
        """The images of several items, after the transform. See `__getitem__`."""
        self._check_pil()
        pictures = to_pil(self.images(indices))
        return pictures if self.transform is None else [self.transform(picture) for picture in pictures]

    def images(self, indices: Sequence[int]) -> Tensor:
        """Images of several items, uint8 [n, C, H, W] on the CPU, any number of channels."""
        cls, within = self._locate(indices)
        out = torch.empty(len(cls), *self.image_shape, dtype=torch.uint8)
        for (c, number), rows in rows_by_block(cls, within, self.block).items():
            out[rows] = self.decoded_block(c, number)[0][within[rows] - number * self.block]
        return out

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Latents z of several items, float32 [n, d] on the model's device; under rejection those that were kept."""
        cls, within = self._locate(indices)
        out = torch.empty(len(cls), self.model.dim, device=self.model.device)
        for (c, number), rows in rows_by_block(cls, within, self.block).items():
            places = torch.from_numpy(within[rows] - number * self.block).to(out.device)
            out[torch.tensor(rows, device=out.device)] = self.sampler.latents(*self._items(c, number))[places]
        return out

    def preload(self, progress: bool = True) -> None:
        """Decode all images now and keep them in memory (`len(ds) * C * H * W` bytes).

        DataLoader workers started afterwards share this memory, forked or spawned.
        """
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        with tqdm(total=len(self), unit="image", desc="preload", disable=not progress) as bar:
            for start in range(0, len(self), self.block):
                indices = range(start, min(start + self.block, len(self)))
                images[start : indices.stop] = self.images(indices)
                bar.update(len(indices))
        self._preloaded = images
        self._make_cache()

    def acceptance(self) -> dict[str, Any]:
        """What rejection did in the blocks that this process has decoded so far (`images`, `preload`, `export`).

        Returns:
            JSON-able: min_confidence, `total` and one entry per class with `items` (decoded), `candidates` (drawn for
            them), `rate` (accepted / candidates, None before the first block), `failed` (kept though no candidate was
            good enough) and `confidence` (mean).

        Raises:
            ValueError: for a data set without min_confidence.
        """
        if self.sampler.min_confidence is None:
            raise ValueError("nothing is rejected without min_confidence")
        rows = np.zeros((len(self.classes), 4))
        for (cls, _), (items, _, judged) in self._known.items():
            rows[cls] += (items, *judged)
        return {
            "min_confidence": self.sampler.min_confidence,
            "total": _rates(*rows.sum(axis=0)),
            "classes": {name: _rates(*row) for name, row in zip(self.classes, rows, strict=True)},
        }

    def settings(self) -> dict[str, Any]:
        """The settings that decide what the images are, beside weights and classes; JSON can carry them.

        Raises:
            RuntimeError: the model has changed since the first image.
        """
        self._check_model()
        own = {
            "per_class": self.per_class,
            "temperature": self.temperature,
            "seed": self.seed,
            "source": self.source,
            "block": self.block,
        }
        return own | self.sampler.settings()

    def decoded_block(self, cls: int, number: int) -> tuple[Tensor, int]:
        """Images number * block ... of a class, uint8 [m, C, H, W], and how many of them are not finite."""
        if self._preloaded is None:
            return self._cached_block(cls, number)
        start = int(self._starts[cls]) + number * self.block
        stop = min(start + self.block, int(self._starts[cls + 1]))
        return self._preloaded[start:stop], self._known[cls, number][1]

    def _decode_block(self, cls: int, number: int) -> tuple[Tensor, int]:
        self._check_model()
        drawn = self.sampler.draw(*self._items(cls, number))
        self._decoded_again += (cls, number) in self._known
        self._known[cls, number] = (len(drawn.images), drawn.not_finite, drawn.judged)
        if self._decoded_again == TOO_OFTEN:
            warnings.warn(
                "SyntheticDataset decodes the same blocks again and again: its "
                f"{len(self) * math.prod(self.image_shape)} bytes of images do not fit cache_bytes={self.cache_bytes}. "
                "Raise it, or call preload(), or export() the images once and read the files",
                stacklevel=2,
            )
        return drawn.images, drawn.not_finite

    def _items(self, cls: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Class and place within the class of a block's items, int64 [m] each."""
        within = np.arange(number * self.block, min(self.counts[cls], (number + 1) * self.block))
        return np.full_like(within, cls), within

    def _check_model(self) -> None:
        """Refuse to mix images of two models in one set, or under the wrong hash in its provenance."""
        key = weights_key(self.model)
        if self._weights_key is None:
            self._weights_key = key
        elif key != self._weights_key:
            raise RuntimeError(
                "the model's weights or modes have changed since this SyntheticDataset decoded its first images: "
                "make a new SyntheticDataset"
            )

    def export(
        self,
        folder: str | os.PathLike[str],
        format: str = "imagefolder",  # noqa: A002  (the word users expect)
        progress: bool = True,
        overwrite: bool = False,
        license: str | None = None,  # noqa: A002  (the Hub's word)
    ) -> Path:
        """Write all images as PNG: folder/<class>/NNNNNN.png, with glem-provenance.json beside the class folders; or as
        WebDataset shards.

        Class folders are named by the class ids, or a slug of the class names (see `class_folders`).
        Transforms are not applied. Every file appears whole or not at all.

        glem-provenance.json says what the images are (weights, settings, classes), and is the manifest: the SHA-256
        of every shard, a block of images of one class. Exporting the same images to the same folder again checks them,
        and writes what is missing or damaged, so an export that was killed is finished by running it again.

        Args:
            folder: made if missing; format: "imagefolder", or "webdataset" (data/train-*.tar, which timm's reader and
            the Hub take as they are, made in one step at the end); progress: show a bar; overwrite: replace an
            export of other images; license: of the images that the flow was trained on, which its samples inherit, for
            the provenance.

        Returns:
            The folder.

        Raises:
            FileExistsError: for a folder with an export of other images, unless overwrite; for one with anything else.
            OSError: if the disk is full or cannot be written, naming the path.
            ValueError: for another format, or a flow of neither 1 nor 3 channels.
        """
        from glem_augment.synthetic.publish import FORMATS, export_shards  # it loads the Hub's client

        check_choice("format", format, FORMATS)
        folder = expand(folder)
        self._check_pil()
        write = export_imagefolder if format == "imagefolder" else export_shards
        return write(self, folder, overwrite, license, progress)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload all images with a data card to a data set on the Hugging Face Hub, in one commit.

        Args:
            repo_id: `org/name`. options: license, format, private, token, ...: see `publish.push_dataset`, also for
                the errors.

        Returns:
            huggingface_hub's `CommitInfo`.
        """
        from glem_augment.synthetic.publish import push_dataset  # it loads the Hub's client

        return push_dataset(self, repo_id, **options)

    def __repr__(self) -> str:
        return (
            f"SyntheticDataset({len(self)} images, {len(self.classes)} classes, per_class={self.per_class}, "
            f"temperature={self.temperature}, seed={self.seed}, source={self.source!r}, "
            f"image_shape={self.image_shape})"
        )

    def _make_cache(self) -> None:
        bytes_per_block = self.block * math.prod(self.image_shape)
        blocks = max(1, self.cache_bytes // bytes_per_block)
        self._cached_block = functools.lru_cache(blocks)(self._decode_block)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a cache and counts of its own, and other weights of the same values.
        known = {} if self._preloaded is None else self._known
        state = {key: value for key, value in self.__dict__.items() if key != "_cached_block"}
        return state | {"_known": known, "_decoded_again": 0, "_weights_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_cache()

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Class and place within the class of every index, int64 [n] each."""
        index = np.asarray(indices.tolist() if isinstance(indices, Tensor) else list(indices))
        if index.size and not np.issubdtype(index.dtype, np.integer):
            raise TypeError(f"indices must be integers, got {index.dtype}")
        index = index.astype(np.int64)
        total = len(self)
        bad = (index < -total) | (index >= total)
        if bad.any():
            raise IndexError(f"index {index[bad][0]} is out of range for {total} images")
        index = np.where(index < 0, index + total, index)
        cls = np.searchsorted(self._starts, index, side="right") - 1
        return cls, index - self._starts[cls]

    def _check_pil(self) -> None:
        if self.image_shape[0] not in (1, 3):
            raise ValueError(
                f"a PIL image has 1 or 3 channels, this flow {self.image_shape[0]}: use images(indices) for tensors"
            )


def to_pil(images: Tensor) -> list[Image.Image]:
    """Uint8 tensors [n, 1 or 3, H, W] on the CPU as PIL images, mode "L" or "RGB"."""
    rows = images.permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


def _rates(items: float, candidates: float, failed: float, confidence: float) -> dict[str, Any]:
    """One entry of `acceptance`; confidence: the sum over the items."""
    return {
        "items": int(items),
        "candidates": int(candidates),
        "rate": float((items - failed) / candidates) if candidates else None,
        "failed": int(failed),
        "confidence": float(confidence / items) if items else None,
    }
