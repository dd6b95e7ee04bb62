"""SyntheticDataset and SyntheticStream: images drawn from the classes of a GLEM, by index or new ones in every epoch.

Images are decoded in fixed aligned blocks, since convolutions and matrix products change in their last bits with the
batch size. So item i is the same image whatever the batch, the order and the worker.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from glem_augment.checks import FORMATS, Format, Source, check_choice, check_number, check_whole
from glem_augment.data.dataset import ImageData, check_indices
from glem_augment.data.sources import open_source
from glem_augment.devices import weights_key
from glem_augment.distributed import rank, world_size
from glem_augment.io import expand
from glem_augment.model.glem import GLEM, as_model
from glem_augment.synthetic.balance import PerClass, class_counts, class_values, match_targets
from glem_augment.synthetic.latents import Sampler, rows_by_block

# Images that are decoded together, in a SyntheticDataset all of one class. Another number would change their last bits.
BLOCK = 64


class SyntheticDataset(Dataset):
    """A map-style data set of synthetic images, in the order of the classes, with torchvision's attributes.

    Items are (PIL image, int). A block of images is decoded when the first of them is wanted, and kept as long as
    `cache_bytes` allow. Every DataLoader worker has a cache of its own, so for loaders with workers, and for sets that
    are shuffled and do not fit the cache, call `preload` first, or `export` and read the files.

    Args:
        model: a GLEM (with fitted modes for source "rfcm"), or its name (see `GLEM.from_pretrained`). It must not
            change afterwards.
        per_class: images of each class: a number for all, K numbers, a mapping from class names, ids or indices (the
            others get none), or "balance": as many as fill up each class of `real` to its largest one.
        temperature: factor on the standard deviation.
        seed: int >= 0; with the class and the place within the class it fixes an item's latent.
        transform: PIL image -> anything; target_transform: int -> anything.
        source: "gaussian" (diagonal Gaussian of the class), "rfcm" (mean and full covariance of its real latents) or
            "mixup" (two images of `real` mixed along the class's modes, as GLEMAugment does; their latents are kept in
            memory, N * d * 4 bytes). None: rfcm, or gaussian if the model has no modes.
        device: where to decode; None: where the model is.
        cache_bytes: memory for decoded images in each process; one block is always kept.
        real: real images, see `open_data`, for "balance" and "mixup". Exports number the classes as they do.
        modes, alpha: settings of source "mixup", as in GLEMAugment (64 modes, or as many as there are).
        min_confidence: draw an item again, up to 20 times, until the flow's posterior gives its class at least this;
            the best candidate is kept if none has that much. Nearly all draws of the class Gaussians pass, which are
            the posterior's own. `acceptance()` reports. None: no rejection.
    """

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        per_class: PerClass = 100,
        temperature: float = 0.9,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source: Source | None = None,
        device: torch.device | str | None = None,
        cache_bytes: int = 256 * 2**20,
        real: Any = None,
        modes: int | None = None,
        alpha: float = 1.0,
        min_confidence: float | None = None,
    ) -> None:
        model = as_model(model)
        if real is not None and not isinstance(real, ImageData):
            real = open_source(real)
        self.counts = class_counts(model, per_class, real)
        self.label_order = list(range(model.num_classes))
        if real is not None:
            order = match_targets(model, real)[1].tolist()
            self.label_order = [*order, *(i for i, count in enumerate(self.counts) if count and i not in order)]
        self.cache_bytes = check_whole("cache_bytes", cache_bytes, 0)
        self.transform, self.target_transform = transform, target_transform
        self.model = model.on(device)
        drawing = (source, seed, temperature, real, modes, alpha, min_confidence)
        self.sampler = Sampler(self.model, *drawing, wanted=np.asarray(self.counts) > 0)
        self.source, self.seed, self.temperature = self.sampler.source, self.sampler.seed, self.sampler.temperature
        self.block = BLOCK
        self.image_shape: tuple[int, int, int] = model.image_shape
        self.classes, self.class_ids = list(model.classes), list(model.class_ids)
        self.class_to_idx = dict(model.class_to_idx)
        self.targets: list[int] = np.repeat(np.arange(model.num_classes), self.counts).tolist()
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._preloaded: Tensor | None = None
        # For each block (class, number) decoded so far: images, images that are not plausible, and `Drawn.judged`.
        self.decoded: dict[tuple[int, int], tuple[int, int, tuple[int, int, float]]] = {}
        self._weights_key: tuple[tuple[int, int], ...] | None = None
        self._make_cache()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def implausible(self) -> int:
        """Images decoded so far in this process whose values leave [0, 1] by more than 1, or are not finite."""
        return sum(count for _, count, _ in self.decoded.values())

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Item `index`: (image, label) after the transforms."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Several items; each block among them is decoded once. See `__getitem__`."""
        pictures = self.pictures(indices)
        labels = [self.targets[index] for index in indices]
        transform = self.target_transform or int
        return [(picture, transform(label)) for picture, label in zip(pictures, labels, strict=True)]

    def pictures(self, indices: Sequence[int]) -> list[Any]:
        """The images of several items, after the transform. See `__getitem__`."""
        self._check_pil()
        pictures = map(to_pil_image, self.images(indices))
        return [picture if self.transform is None else self.transform(picture) for picture in pictures]

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
            out[rows] = self.sampler.latents(*self._items(c, number))[0][within[rows] - number * self.block]
        return out

    def preload(self, progress: bool = True) -> None:
        """Decode all images now and keep them in memory, which DataLoader workers started afterwards share."""
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        starts = range(0, len(self), self.block)
        for start in tqdm(starts, unit="block", desc="preload", disable=not progress):
            indices = range(start, min(start + self.block, len(self)))
            images[start : indices.stop] = self.images(indices)
        self._preloaded = images
        self._make_cache()

    def acceptance(self) -> dict[str, Any]:
        """What rejection did in the blocks that this process has decoded so far.

        Returns:
            JSON-able: min_confidence, `total` and one entry per class with `items` (decoded), `candidates` (drawn for
            them), `rate` (accepted / candidates), `failed` (no candidate was good enough) and `confidence` (mean).
        """
        if self.sampler.min_confidence is None:
            raise ValueError("nothing is rejected without min_confidence")
        rows = np.zeros((len(self.classes), 4))
        for (cls, _), (items, _, judged) in self.decoded.items():
            rows[cls] += (items, *judged)
        return {
            "min_confidence": self.sampler.min_confidence,
            "total": _rates(*rows.sum(axis=0)),
            "classes": {name: _rates(*row) for name, row in zip(self.classes, rows, strict=True)},
        }

    def settings(self) -> dict[str, Any]:
        """The settings that decide what the images are, beside weights, classes and counts, as JSON can carry them."""
        self._check_model()
        own = {key: getattr(self, key) for key in ("temperature", "seed", "source", "block")}
        return own | self.sampler.settings()

    def decoded_block(self, cls: int, number: int) -> tuple[Tensor, int]:
        """Images number * block ... of a class, uint8 [m, C, H, W], and how many of them are not plausible."""
        if self._preloaded is None:
            return self._cached_block(cls, number)
        start = int(self._starts[cls]) + number * self.block
        stop = min(start + self.block, int(self._starts[cls + 1]))
        return self._preloaded[start:stop], self.decoded[cls, number][1]

    def _decode_block(self, cls: int, number: int) -> tuple[Tensor, int]:
        self._check_model()
        drawn = self.sampler.images(*self._items(cls, number))
        self.decoded[cls, number] = (len(drawn.images), drawn.implausible, drawn.judged)
        return drawn.images, drawn.implausible

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
            raise RuntimeError("the model's weights or modes have changed: make a new SyntheticDataset")

    def export(
        self,
        folder: str | os.PathLike[str],
        format: Format = "imagefolder",  # noqa: A002  (the word users expect)
        progress: bool = True,
        overwrite: bool = False,
        license: str | None = None,  # noqa: A002  (the Hub's word)
        distributed: bool = False,
    ) -> Path:
        """Write all images, without the transforms, and glem-provenance.json; every file appears whole or not at all.

        Classes are numbered in `label_order`: those of `real` as it numbers them, followed by other classes of the flow
        that have images; without `real`, as the flow numbers them. An ImageFolder has no folder for a class of no
        images, so that torchvision would number the later ones differently: its classes.json holds the label of every
        folder, and `open_data` and `RealAndSynthetic` go by that.

        Exporting the same images to the same folder again checks them, and writes what is missing or damaged, so an
        export that was killed is finished by running it again, on any number of ranks.

        Args:
            format: "imagefolder" (folder/<class>/NNNNNN.png, see `class_folders`), or "webdataset" (data/train-*.tar,
                which timm and the Hub read; packed at the end from an ImageFolder in a hidden folder).
            overwrite: replace an export of other images.
            license: of the images that the flow was trained on, which its samples inherit, for the provenance; by
                default the one in the flow's record (not for mixtures, whose real images may have another).
            distributed: share the blocks out among all ranks of the process group, which must all make this call and
                see the same folder. The files are the same for any number of them, with as many threads.

        Raises:
            FileExistsError: for a folder with an export of other images, unless overwrite; for one with anything else.
            OSError: if the disk is full or cannot be written, naming the path.
        """
        from glem_augment.hub.cards import CardFacts  # it loads the Hub's client
        from glem_augment.synthetic.export import ALONE, Ranks, export_imagefolder, warn_of_implausible, warn_of_numbers
        from glem_augment.synthetic.publish import export_shards  # both modules import this one

        check_choice("format", format, FORMATS)
        folder = expand(folder)
        self._check_pil()
        ranks = Ranks.all() if distributed else ALONE
        progress = progress and ranks.rank == 0
        if format == "webdataset":
            export_shards(self, folder, CardFacts(license), overwrite, progress, ranks)
        else:
            manifest = export_imagefolder(self, folder, overwrite, license, progress, ranks)
            if ranks.rank == 0:
                warn_of_numbers(manifest["classes"], folder)
        if ranks.rank == 0:
            warn_of_implausible(self)
        return folder

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload all images to the data set `org/name` on the Hub in one commit; see `publish.push_dataset`."""
        from glem_augment.synthetic.publish import push_dataset  # which imports this module

        self._check_pil()
        return push_dataset(self, repo_id, **options)

    def _make_cache(self) -> None:
        blocks = max(1, self.cache_bytes // (self.block * math.prod(self.image_shape)))
        self._cached_block = functools.lru_cache(blocks)(self._decode_block)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a cache and counts of its own, and other tensors with the same weights.
        known = {} if self._preloaded is None else self.decoded
        state = {key: value for key, value in self.__dict__.items() if key != "_cached_block"}
        return state | {"decoded": known, "_weights_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_cache()

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Class and place within the class of every index, int64 [n] each."""
        index = check_indices(indices, len(self))
        cls = np.searchsorted(self._starts, index, side="right") - 1
        return cls, index - self._starts[cls]

    def _check_pil(self) -> None:
        if self.image_shape[0] not in (1, 3):
            raise ValueError(f"a PIL image has 1 or 3 channels, this flow {self.image_shape[0]}: use images(indices)")


class SyntheticStream(IterableDataset):
    """An iterable data set of (PIL image, int): every epoch, worker and rank gives other images.

    Images are made in blocks; block number b is a function of seed, epoch and b alone. The workers of all ranks share
    the blocks out among themselves, so how many workers there are decides the order of an epoch's images, but not what
    they are. Every rank has equally many. Nothing is kept: it costs a decode per image and epoch.

    As with torch's `DistributedSampler`, call `set_epoch` before each epoch; otherwise every epoch has the same images.
    timm's train.py does so by itself. Without a `length` there is one epoch without an end.

    Args:
        model: a GLEM or its name.
        length: images per epoch, over all ranks and workers (rounded up to a multiple of the ranks); None: no end.
        weights: relative frequencies of the classes, K numbers >= 0, or a mapping to them from class names, ids or
            indices (the others get no image); None: all the same.
        temperature, seed, transform, target_transform, source, device, real, modes, alpha, min_confidence: as for
            `SyntheticDataset`.
    """

    def __init__(
        self,
        model: GLEM | str | os.PathLike[str],
        length: int | None = None,
        weights: Sequence[float] | Mapping[Any, float] | None = None,
        temperature: float = 0.9,
        seed: int = 0,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source: Source | None = None,
        device: torch.device | str | None = None,
        real: Any = None,
        modes: int | None = None,
        alpha: float = 1.0,
        min_confidence: float | None = None,
    ) -> None:
        model = as_model(model)
        self.length = None if length is None else check_whole("length", length, 1)
        given = [1.0] * model.num_classes if weights is None else class_values(model, weights, "weights", 0.0)
        frequencies = np.array([check_number(f"weights[{i}]", w, 0.0, math.inf) for i, w in enumerate(given)])
        if frequencies.sum() <= 0:
            raise ValueError("weights must not all be 0")
        self.probabilities = frequencies / frequencies.sum()
        self.transform, self.target_transform = transform, target_transform
        drawing = (source, seed, temperature, real, modes, alpha, min_confidence)
        self.sampler = Sampler(model.on(device), *drawing, wanted=self.probabilities > 0)
        self.block = BLOCK
        self.classes, self.class_to_idx = list(model.classes), dict(model.class_to_idx)
        self._sender = (0, 1)  # rank and number of ranks of the process that sent this copy
        # In shared memory, so that persistent DataLoader workers see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, before its iterator is made. It holds for the workers of a DataLoader too."""
        self._epoch.fill_(check_whole("epoch", epoch, 0))

    def __len__(self) -> int:
        """Images per epoch on this rank. Every worker of a DataLoader may end with a short batch of its own."""
        if self.length is None:
            raise TypeError("this SyntheticStream has no end, and so no length: give length=")
        return -(-self.length // self._ranks()[1])

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own, ranks = self._ranks()
        epoch, share = int(self._epoch), None if self.length is None else len(self)
        local = worker  # number of the block among those of this rank
        while share is None or local * self.block < share:
            count = self.block if share is None else min(self.block, share - local * self.block)
            yield from self._block(epoch, local * ranks + own, count)
            local += workers

    def _block(self, epoch: int, number: int, count: int) -> Iterator[tuple[Any, Any]]:
        """The first `count` items of a block."""
        sequence = np.random.SeedSequence([self.sampler.seed, epoch, number])
        y = np.random.default_rng(sequence).choice(len(self.probabilities), size=self.block, p=self.probabilities)
        # Each place is used once over all blocks and epochs; 2^40 images are enough for an epoch.
        within = epoch * 2**40 + number * self.block + np.arange(self.block)
        drawn = self.sampler.images(y[:count], within[:count])
        for image, label in zip(drawn.images, y[:count].tolist(), strict=True):
            picture = to_pil_image(image)
            yield (
                picture if self.transform is None else self.transform(picture),
                label if self.target_transform is None else self.target_transform(label),
            )

    def _ranks(self) -> tuple[int, int]:
        return (rank(), world_size()) if world_size() > 1 else self._sender

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned, rather than forked, is not part of the process group.
        return self.__dict__ | {"_sender": self._ranks()}


def _rates(items: float, candidates: float, failed: float, confidence: float) -> dict[str, Any]:
    """One entry of `acceptance`; confidence: the sum over the items."""
    return {
        "items": int(items),
        "candidates": int(candidates),
        "rate": float((items - failed) / candidates) if candidates else None,
        "failed": int(failed),
        "confidence": float(confidence / items) if items else None,
    }
