"""SyntheticDataset: class-balanced images drawn from the classes of a GLEM, reproducible item by item.

Item i's latent depends on the seed, its class and its place within the class alone: never on the batch, the
order, the worker, or how many items there are (see `_sources`; where images are judged by an oracle, also on
`block`). Images are decoded in fixed aligned blocks, since convolutions and matrix products change in their last
bits with the batch size; a block is decoded once, whichever process needs it first (see `_blocks`).
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from glem_augment.checks import check_choice, check_whole
from glem_augment.devices import WeightsVersion, fingerprint
from glem_augment.io import expand
from glem_augment.model.glem import GLEM, as_model
from glem_augment.synthetic.balance import PerClass, as_image_data, as_list, class_counts, find_class
from glem_augment.synthetic.block_decoder import BlockDecoder
from glem_augment.synthetic.blocks import BlockStore, move_if_sent, one_at_a_time
from glem_augment.synthetic.latents import LatentSource, RealLatents, warn_of_single_images
from glem_augment.synthetic.rejection import Oracle, Rejection, acceptance_report

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# Blocks decoded a second time before the user is told that the cache is too small for the way it is read.
TOO_OFTEN = 32


class SyntheticDataset(Dataset):
    """A map-style data set of synthetic images, in the order of the classes.

    Items are (PIL image, int), as torchvision's image data sets give them; `classes`, `class_to_idx`,
    `targets`, `transform` and `target_transform` are those of torchvision.

    A block is decoded when the first of its images is wanted, and kept. While all images fit into `cache_bytes`
    (`len(ds) * C * H * W`) each is decoded once, in whatever order and for however many epochs they are read, and
    DataLoader workers share what they have decoded, with each other and with those of the next epoch: on Linux all
    workers, elsewhere those that are forked (`multiprocessing_context="fork"`; others keep a cache each). With more
    images than fit, reading in order still decodes each once per epoch, but a shuffled epoch decodes a whole block for
    nearly every image: raise `cache_bytes`, or `export` the images and read them from the disk. A warning says so when
    it happens. Threads may read at the same time; they decode in turns.

    Args:
        model: a GLEM (with fitted modes for source "rfcm"), or its name (see `GLEM.from_pretrained`).
        per_class: images of each class: a number for all, K numbers, a mapping from class names, ids or indices (the
            others get none), or "balance": as many as fill up each class of `real` to its largest one, and none of a
            class that `real` does not name.
        temperature: factor on the standard deviation.
        seed: int >= 0; with the class and the place within the class it fixes an item's latent.
        transform: PIL image -> anything; target_transform: int -> anything.
        source: "gaussian" (diagonal Gaussian of the class), "rfcm" (mean and full covariance of its real latents) or
            "mixup" (two images of `real` mixed along the class's modes, as GLEMAugment does; their latents are kept in
            memory, N * d * 4 bytes). A class of one real image has nothing to mix: all of its images are that one, of
            which there is a warning.
        block: images decoded at a time.
        device: where to decode; None: where the model is.
        cache_bytes: of decoded images kept in memory (always at least one block); taken as it is needed.
        real: real images: an `ImageData`, (uint8 images, labels), or for "balance" any torchvision or timm data set
            whose labels can be read.
        modes, alpha: of source "mixup", as in GLEMAugment (64 modes, or as many as there are).
        min_confidence: draw an item again, up to `max_attempts` times, until the probability of its class is at least
            this; the best is kept where none is. `acceptance()` reports. None: no rejection. The flow's posterior
            judges latents (a few in a hundred of the decoded, rounded images fall short), and passes nearly all draws
            of the class Gaussians, its own: what judges images is an oracle.
        oracle: judges in place of the flow's posterior: from float images [n, C, H, W] in [0, 1] to probabilities or
            logits [n, K] of the flow's classes. Which of them is told from the first batch it judges and kept for the
            set; a row with NaN is a confidence of 0. A module is put in eval mode for the while, and known by its
            weights to an export that is finished later; another function is known to this data set alone.
        max_attempts: candidates per item.

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
        block: int = 64,
        device: torch.device | str | None = None,
        cache_bytes: int = 256 * 2**20,
        real: Any = None,
        modes: int | None = None,
        alpha: float = 1.0,
        min_confidence: float | None = None,
        oracle: Oracle | None = None,
        max_attempts: int = 20,
    ) -> None:
        model = as_model(model)
        self.counts = class_counts(model, per_class, real)
        self.per_class = _plain(per_class, model)
        self.seed = check_whole("seed", seed, 0)
        self.block = check_whole("block", block, 1)
        self.cache_bytes = check_whole("cache_bytes", cache_bytes, 0)
        self.rejection = Rejection.given(min_confidence, oracle, max_attempts)
        self.source = source
        self.transform = transform
        self.target_transform = target_transform
        self.model = model.on(device)
        # The arguments are checked before the real images are encoded, which may take long.
        latents = None
        if source == "mixup" and real is not None:
            images = as_image_data(model, real)
            there = np.bincount(images.targets, minlength=model.num_classes)
            empty = [name for name, n, count in zip(model.classes, there, self.counts, strict=True) if count and not n]
            if empty:
                raise ValueError(
                    f"source='mixup' has no real image of {', '.join(empty[:10])}: leave them out of per_class (give a "
                    "mapping), or take another source"
                )
            warn_of_single_images(model.classes, there * (np.asarray(self.counts) > 0))
            LatentSource(self.model, "rfcm", self.seed, temperature, None, modes, alpha)
            latents = RealLatents(self.model, images)
        self.latent_source = LatentSource(self.model, source, self.seed, temperature, latents, modes, alpha)
        self.temperature = self.latent_source.temperature
        self.image_shape: tuple[int, int, int] = model.image_shape
        self.classes: list[str] = list(model.classes)
        self.class_ids: list[str] = list(model.class_ids)
        self.class_to_idx: dict[str, int] = dict(model.class_to_idx)
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.targets: list[int] = np.repeat(np.arange(model.num_classes), self.counts).tolist()
        # Blocks are numbered through, class after class.
        blocks = [-(-count // self.block) for count in self.counts]
        self._first_block = np.concatenate([[0], np.cumsum(blocks)[:-1]])
        self._decoder = BlockDecoder(self.model, self.latent_source, self.rejection, self.counts, self.block)
        self._model_version: WeightsVersion | None = None
        self._warned = False
        self._make_store()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def non_finite(self) -> int:
        """Images decoded so far with values that are not finite (shown as grey, 0, 255), in this process and those
        that share its cache."""
        return self._store.not_finite

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Item `index` (negative ones count from the end): (image, label) after the transforms.

        Raises:
            IndexError: out of range. ValueError: for a flow of neither 1 nor 3 channels (use `images`).
            RuntimeError: for a model on CUDA in a forked DataLoader worker.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Several items, each block among them decoded once. See `__getitem__`."""
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
        """Decoded images, uint8 [n, C, H, W] on the CPU, any number of channels."""
        cls, within = self._locate(indices)
        block, place = self._first_block[cls] + within // self.block, within % self.block
        out = np.empty((len(cls), *self.image_shape), dtype=np.uint8)
        missing = ~self._store.read(block, place, out)
        while missing.any():
            number = self._store.claim(np.array(sorted(set(block[missing].tolist()))))
            if number is not None:
                decoded = self._decode_claimed(number)
                rows = np.flatnonzero(block == number)
                out[rows] = decoded[place[rows]]
                missing[rows] = False
                continue
            # Others decode all that is missing here.
            rows = np.flatnonzero(missing)
            arrived = np.empty((len(rows), *self.image_shape), dtype=np.uint8)
            found = self._store.read(block[rows], place[rows], arrived)
            out[rows[found]] = arrived[found]
            missing[rows[found]] = False
            if not found.any():
                self._use_the_wait(int(block[rows].max()))
        return torch.from_numpy(out)

    def _decode_claimed(self, number: int) -> np.ndarray:
        """Block `number` of all, which this process has claimed; uint8 [m, C, H, W]."""
        c = int(np.searchsorted(self._first_block, number, side="right")) - 1
        try:
            return self.decoded_block(c, number - int(self._first_block[c])).numpy()
        finally:
            self._store.give_up(number)

    def _use_the_wait(self, last: int) -> None:
        """While others decode what is wanted here, up to block `last`: decode what will be wanted next, or sleep.

        Workers whose batches are smaller than a block would otherwise stand still in turns.
        """
        info = get_worker_info()
        number = None if info is None else self._store.claim_ahead(last, 2 * info.num_workers)
        if number is None:
            time.sleep(1e-3)
        else:
            self._decode_claimed(number)

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Latents z, float32 [n, d] on the model's device; they do not depend on the other indices.

        With rejection those that were accepted, for which whole blocks are judged again.
        """
        cls, within = self._locate(indices)
        if self.rejection is None:
            with one_at_a_time():
                return self.latent_source.draw(cls, within)
        out = torch.empty(len(cls), self.model.dim, device=self.model.device)
        number = within // self.block
        for c, b in np.unique(np.stack([cls, number], axis=1), axis=0).tolist():
            rows = np.flatnonzero((cls == c) & (number == b))
            places = torch.from_numpy(within[rows] - b * self.block).to(out.device)
            out[torch.from_numpy(rows).to(out.device)] = self._decoder.accepted(c, b).z[places]
        return out

    def acceptance(self) -> dict[str, Any]:
        """What rejection did in the blocks decoded so far (`images`, `export`, ... decode them).

        Returns:
            JSON-able: min_confidence, `total` and one entry per class with `items` (decoded), `candidates` (drawn for
            them), `rate` (accepted / candidates), `failed` (kept though no candidate was good enough) and
            `confidence` (mean). As with `non_finite`, workers that do not share the cache count for themselves, and
            `rate` is None where this process has seen no block.

        Raises:
            ValueError: for a data set without min_confidence.
        """
        if self.rejection is None:
            raise ValueError("nothing is rejected without min_confidence")
        ends = [*self._first_block[1:], self._store.blocks]
        rows = [self._store.judged(int(a), int(b)) for a, b in zip(self._first_block, ends, strict=True)]
        return acceptance_report(self.rejection.min_confidence, self.classes, np.stack(rows))

    def decoded_block(self, cls: int, number: int) -> Tensor:
        """Images number * block ... of a class, uint8 [m, C, H, W], m <= block; kept in the cache."""
        self.check_model()
        key = int(self._first_block[cls]) + number
        kept = self._store.whole(key)
        if kept is not None:
            return torch.from_numpy(kept)
        images, not_finite, judged = self._decoder.decode(cls, number)
        self._store.write(key, images.numpy(), not_finite, judged)
        if not self._warned and self._store.decoded_again >= TOO_OFTEN:
            self._warned = True
            needed = len(self) * int(np.prod(self.image_shape))
            warnings.warn(
                f"SyntheticDataset decodes the same blocks again and again: its {needed} bytes of images do not fit "
                f"cache_bytes={self.cache_bytes}. Raise it to {needed}, or export() the images once and read the files",
                stacklevel=2,
            )
        return images

    def check_model(self) -> None:
        """Images of two models must not stand in one set, nor under the wrong hash in its provenance.

        Raises:
            RuntimeError: the model has changed since the first block was decoded.
        """
        modes = self.model.modes
        version = WeightsVersion(self.model, others=() if modes is None else (modes,))
        seen = self._model_version  # another thread may put the first one in its place at any time
        same = version == seen
        if seen is None:
            # Other processes may have decoded before, and the model been changed since.
            same = self._store.agrees(fingerprint(self.model))
            self._model_version = version if same else None
        if not same:
            raise RuntimeError(
                "the model's weights or modes have changed since this SyntheticDataset decoded its first images: "
                "make a new SyntheticDataset"
            )

    def not_finite_in(self, cls: int, number: int) -> int:
        """Images of a block that has been decoded (`decoded_block`) whose values were not finite."""
        return self._store.not_finite_in(int(self._first_block[cls]) + number)

    def decode_ahead(self, cls: int, number: int) -> None:
        """Start to decode a block, for the next call of `decoded_block`, where that need not be waited for: on CUDA.

        At most one block is under way; another call replaces it.
        """
        key = int(self._first_block[cls]) + number
        if self.model.device.type == "cuda" and self._store.whole(key) is None:
            self._decoder.decode_ahead(cls, number)

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
        and writes what is missing or damaged: all that an export which was killed takes to be finished.

        Args:
            folder: made if missing; format: "imagefolder", or "webdataset" (data/train-*.tar, which timm's reader and
            the Hub take as they are, made in one step at the end); progress: show a bar; overwrite: write over an
            export of other images (what of it is left over is removed); license: of the images that the flow was
            trained on, which its samples inherit, for the provenance.

        Returns:
            The folder.

        Raises:
            FileExistsError: for a folder with an export of other images, unless overwrite; for one with anything else.
            OSError: where the disk is full or can't be written, naming the path.
            ValueError: for another format, or a flow of neither 1 nor 3 channels.
        """
        from glem_augment.synthetic.export import export_imagefolder

        check_choice("format", format, ("imagefolder", "webdataset"))
        folder = expand(folder)
        self._check_pil()
        if format == "webdataset":
            from glem_augment.synthetic.publish import export_shards

            return export_shards(self, folder, overwrite, license, progress)
        return export_imagefolder(self, folder, progress=progress, overwrite=overwrite, license=license)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload all images with a data card to a data set on the Hugging Face Hub, in one commit.

        Args:
            repo_id: ``org/name``; options: see `hub_dataset.push_dataset`: license, format, private, token, ...

        Returns, Raises: as there.
        """
        from glem_augment.synthetic.publish import push_dataset

        return push_dataset(self, repo_id, **options)

    def __repr__(self) -> str:
        return (
            f"SyntheticDataset({len(self)} images, {len(self.classes)} classes, per_class={self.per_class}, "
            f"temperature={self.temperature}, seed={self.seed}, source={self.source!r}, block={self.block}, "
            f"image_shape={self.image_shape})"
        )

    def __getstate__(self) -> dict[str, Any]:
        oracle = None if self.rejection is None else self.rejection.oracle
        move_if_sent(self.model, oracle, getattr(self.latent_source.real, "z", None))
        # Where the cache is not shared, a copy decodes for itself: sending it would cost more than it saves.
        left = () if self._store.can_be_sent else ("_store",)
        return {**{k: v for k, v in self.__dict__.items() if k not in left}, "_model_version": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_store" not in state:
            self._make_store()

    def _make_store(self) -> None:
        sizes: list[int] = []
        for count in self.counts:
            full, rest = divmod(count, self.block)
            sizes += [self.block] * full + [rest] * (rest > 0)
        self._store = BlockStore(sizes, self.image_shape, self.cache_bytes)

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
    """Uint8 tensors [n, 1 or 3, H, W] on the CPU as PIL images, mode "L" or "RGB".

    What `Image.fromarray` does for each, in half of its time. Grey ones are views of `images`, which PIL copies before
    it writes to them.
    """
    _, channels, height, width = images.shape
    mode = "L" if channels == 1 else "RGB"
    rows = images.permute(0, 2, 3, 1).contiguous().flatten(1).numpy()
    return [Image.frombuffer(mode, (width, height), row, "raw", mode, 0, 1) for row in rows]


def _plain(per_class: PerClass, model: GLEM) -> Any:
    """As JSON can carry it; classes by name, since an index as text may be another class's name."""
    if isinstance(per_class, Mapping):
        return {model.classes[find_class(model, key, "per_class")]: int(value) for key, value in per_class.items()}
    if isinstance(per_class, str):
        return per_class
    return as_list(per_class)
