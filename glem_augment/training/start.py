"""A run before its first step: the split and augmentation of the images, an autoencoder's latents, and the model."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from glem_augment.classes.statistics import pooled_covariance
from glem_augment.codec.autoencoder import Latents, StandardisedAutoencoder
from glem_augment.codec.codec import LUMA, Codec
from glem_augment.distributed import Share, is_primary
from glem_augment.errors import DataError, GLEMError, TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.model.config import GLEMConfig
from glem_augment.model.glem import GLEM
from glem_augment.tensors import send
from glem_augment.training.config import TrainConfig
from glem_augment.training.folder import Checkpoint
from glem_augment.training.objective import LatentStatistics, encode
from glem_augment.training.optim import LossGuard, independent_latents, independent_pixels

G_FRACTION, MAX_HELD_OUT = 0.1, 2000
# Magnitudes of the augmentations, from Ardizzone et al. 2020 (IB-INN), whom the paper follows.
PAD_SHARE, ROTATION_DEGREES, JITTER = 1 / 8, 12.0, 0.1
VIEWS = 4  # latents of every image, with an augmentation that has more than two outcomes
_PIXELS = 2**19  # images of so many pixels in all are encoded at a time


@dataclass(frozen=True)
class Split:
    """Disjoint, sorted indices of the images that train the flow (D_nf), fit the Gaussians (D_g) and only measure."""

    nf: np.ndarray
    g: np.ndarray
    val: np.ndarray


def stratified_split(targets: np.ndarray, num_classes: int, val_fraction: float, seed: int) -> Split:
    """Split every class in the same proportions (GLEM, Sec. 4.3: |D_g| = 0.1 |D|).

    Every class has at least one image in `nf` and in `g`. A class of three images or more has one in `val`. The share
    `val_fraction` of each class for `val` is lowered where `val` would have more than about `MAX_HELD_OUT` images.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    counts = np.bincount(targets, minlength=num_classes)
    if counts.min() < 2:
        few = np.nonzero(counts < 2)[0][:5].tolist()
        raise DataError(
            f"classes {few} have fewer than the 2 images that a Gaussian needs: add images, or leave these classes out"
        )
    scale = min(1.0, MAX_HELD_OUT / max(1.0, val_fraction * len(targets)))
    parts: dict[str, list[np.ndarray]] = {"nf": [], "g": [], "val": []}
    for index in range(num_classes):
        members = rng.permutation(np.nonzero(targets == index)[0])
        n = len(members)
        n_val = min(max(1, round(n * val_fraction * scale)), n - 2) if val_fraction > 0 and n >= 3 else 0
        n_g = min(max(1, round((n - n_val) * G_FRACTION)), n - n_val - 1)
        parts["val"].append(members[:n_val])
        parts["g"].append(members[n_val : n_val + n_g])
        parts["nf"].append(members[n_val + n_g :])
    return Split(**{name: np.sort(np.concatenate(value)).astype(np.int64) for name, value in parts.items()})


def epoch_order(indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Indices [steps, B] of the batches of one epoch, a function of seed and epoch alone.

    So a resumed run takes the batches of the killed run. A smaller last batch is dropped, unless it is the only one.
    """
    order = np.random.default_rng([seed, 0xE90C, epoch]).permutation(indices)
    batch = min(batch_size, len(order))
    steps = len(order) // batch
    return order[: steps * batch].reshape(steps, batch)


def augment_batch(x: Tensor, names: Sequence[str], generator: torch.Generator, share: Share | None = None) -> Tensor:
    """The paper's training augmentations of uint8 images [B,C,H,W], with other parameters for every image.

    Torchvision's transforms would draw one set of parameters for the whole batch.

    Args:
        names: any of "flip" (horizontal); "crop" (shift by up to an eighth of the side, edges repeated); "rotate" (up
            to 12 degrees); "jitter" (brightness, contrast and, for RGB, saturation by up to 10 %).
        share: the part of a batch that x is, see `draw_noise`.

    Returns:
        uint8 [B,C,H,W]; rounded, because dequantisation assumes levels.
    """
    if not names:
        return x
    batch, _, height, width = x.shape
    first, last, total = share or (0, batch, batch)

    def draw(*shape: int) -> Tensor:
        return send(torch.rand(*shape, total, generator=generator)[..., first:last] * 2 - 1, x.device)

    if "flip" in names:
        x = torch.where((draw() > 0)[:, None, None, None], x.flip(3), x)
    if "crop" in names:
        shift_y, shift_x = draw() * height * PAD_SHARE, draw() * width * PAD_SHARE
        rows = (torch.arange(height, device=x.device) + shift_y.round().long()[:, None]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + shift_x.round().long()[:, None]).clamp(0, width - 1)
        index = torch.arange(batch, device=x.device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if not {"rotate", "jitter"} & set(names):
        return x.contiguous()
    y = x.float()
    if "rotate" in names:
        angle = draw() * math.radians(ROTATION_DEGREES)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        aspect = height / width
        theta = torch.stack([torch.stack([cos, -sin * aspect, zero], 1), torch.stack([sin / aspect, cos, zero], 1)], 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        y = F.grid_sample(y, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if "jitter" in names:
        factors = 1 + JITTER * draw(3)[:, :, None, None, None]
        y = y * factors[0]
        mean = y.mean((1, 2, 3), keepdim=True)
        y = mean + (y - mean) * factors[1]
        if x.shape[1] == 3:
            grey = (y * y.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
            y = grey + (y - grey) * factors[2]
    return y.round_().clamp_(0, 255).to(torch.uint8)


# ---- an autoencoder's latents, computed once per run, so that a step costs only the flow ----------------------------


@torch.no_grad()
def latent_views(
    codec: Codec, data: ImageData, augment: Sequence[str], seed: int, device: torch.device, progress: bool
) -> Tensor:
    """Latents of every image and of augmented copies of it, float16 [N, V, C, h, w] on the CPU.

    The first view is the image. Without augmentation there is no other view. With flips alone the second view is the
    flipped image. Otherwise `augment_batch` draws the second to the last of `VIEWS` views.
    """
    count = 1 if not augment else 2 if tuple(augment) == ("flip",) else VIEWS
    batch = max(1, min(256, _PIXELS // math.prod(data.image_shape[1:])))
    generator, parts = torch.Generator().manual_seed(seed), []
    with tqdm(total=len(data), unit="image", desc="encoding", disable=not progress, dynamic_ncols=True) as bar:
        for x, _ in data.batches(np.arange(len(data)), batch):
            others = [x.flip(3)] if count == 2 else [augment_batch(x, augment, generator) for _ in range(count - 1)]
            views = [codec.encode(v.to(device)).half() for v in (x, *others)]
            parts.append(torch.stack(views, 1).contiguous().cpu())
            bar.update(len(x))
    return torch.cat(parts)


def choose_views(x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    """One random view [b, C, h, w] of each of the images x [b, V, C, h, w], the part `share` of a batch."""
    view = torch.randint(x.shape[1], (share.total,), generator=generator)[share.rows].to(x.device)
    return x[torch.arange(len(x), device=x.device), view]


# ---- the start of a run ----------------------------------------------------------------------------------------------

EVAL_BATCH = 256
_INIT_IMAGES = 1024  # ActNorm's start needs a fair estimate of each element's spread
# So many numbers of latents fit in memory (60,000 of 784 are 190 MB); the least number of images of each class.
MOST_NUMBERS, LEAST_IMAGES = 60_000 * 784, 8


class Start:
    """The model and the images of a run, before its first step."""

    def __init__(
        self,
        data: ImageData,
        config: TrainConfig,
        init_model: GLEM | None,
        begun: Checkpoint | None,
        device: str | torch.device | None,
        progress: bool,
    ) -> None:
        self.data, self.config, self.progress = data, config, progress and is_primary()
        self.views = data  # the steps' data: with an autoencoder, several latents of each image
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.split = stratified_split(data.targets, len(data.classes), config.val_fraction, config.seed)
        self.guard = LossGuard(config.bits)
        self.model = self._new_model(init_model, begun).to(self.device)
        self.saved_as, self.codec = self.model.config, self.model.autoencoder
        if self.codec is not None:
            self._take_latents(self.codec)

    def _new_model(self, init_model: GLEM | None, begun: Checkpoint | None) -> GLEM:
        config, data = self.config, self.data
        torch.manual_seed(config.seed)
        if begun is not None:
            # All weights are in the checkpoint, so `init_model` is not needed.
            try:
                return self._build(json.loads(begun.facts["flow"]), begun.facts.get("autoencoder"))
            except (GLEMError, KeyError, ValueError, TypeError, RuntimeError) as error:
                raise TrainingError(f"{begun.path} describes no flow that can be built: {error}") from error
        if init_model is None:
            about = data.image_shape, data.classes, data.class_ids, config.bits, config.psi, config.autoencoder
            return GLEM.create(config.preset, *about, **config.flow_options)
        if (init_model.bits, init_model.image_shape) != (config.bits, tuple(data.image_shape)):
            raise DataError(
                f"the model to start from takes images {init_model.image_shape} at {init_model.bits} bits, this run "
                f"has {data.image_shape} at {config.bits} bits: use the same"
            )
        model = self._build(init_model.config.flow, init_model.config.autoencoder, init_model.autoencoder)
        model.flow.load_state_dict(init_model.flow.state_dict())
        return model

    def _build(
        self, flow: dict[str, Any], autoencoder: dict[str, Any] | None = None, module: nn.Module | None = None
    ) -> GLEM:
        ids, names, bits, psi = list(self.data.class_ids), list(self.data.classes), self.config.bits, self.config.psi
        config = GLEMConfig(flow, bits, psi, class_ids=ids, class_names=names, autoencoder=autoencoder)
        return GLEM(config, codec=copy.deepcopy(module))

    def _take_latents(self, codec: StandardisedAutoencoder) -> None:
        """Replace the run's images by their latents, so that they are encoded only once; `whole` undoes it."""
        config, data = self.config, self.data
        x = data.some(_INIT_IMAGES)
        codec.fit(x)
        views = latent_views(codec, data, config.augment, config.seed, self.device, self.progress)
        self.data, self.views = data.with_numbers(views[:, 0]), data.with_numbers(views)
        named = {"name": "latents", "sha256": "", "image_shape": list(self.saved_as.flow_shape)}
        config_of_latents = replace(self.saved_as, autoencoder=named)
        self.model = GLEM(config_of_latents, self.model.flow, self.model.latent_classes, Latents(codec))

    def whole(self, model: GLEM) -> GLEM:
        """`model` for images, where it is one for latents."""
        if self.codec is None:
            return model
        config = replace(model.config, autoencoder=self.saved_as.autoencoder)
        return GLEM(config, model.flow, model.latent_classes, self.codec)

    @torch.no_grad()
    def initialise(self, init_model: GLEM | None) -> None:
        """Data-dependent ActNorms, then the Gaussians: a function of the seed and the data."""
        config, gaussians = self.config, self.model.gaussians
        rows = np.random.default_rng([config.seed, 0x1217]).permutation(self.split.nf)[:_INIT_IMAGES]
        x = torch.cat([x for x, _ in self.data.batches(rows, EVAL_BATCH, config.workers)]).to(self.device)
        if self.codec is None:
            self.guard.pixels = independent_pixels(x, config.bits)
        else:
            self.guard.pixels = independent_latents(self.codec.std)
            self.guard.uniform = self.guard.pixels + 2
        whiten = getattr(self.model.flow, "whiten", None)
        if whiten is not None and not whiten.initialised:
            facts = pooled_covariance(self._numbers_of_class, self.model.num_classes, len(whiten.gain), self.model.dim)
            whiten.fit(*facts)
        with self.bar_of("start: ActNorm", 1, "pass") as bar:
            self.model.initialise(x, self.generator(1))
            bar.update()
        if init_model is not None:
            if (init_model.class_ids, init_model.config.psi) == (self.model.class_ids, config.psi):
                gaussians.load_state_dict(init_model.gaussians.state_dict())
                return
            self.latent_pass(-1, self.split.g).start_of_trained_flow(gaussians)
        elif config.random_init is None:
            self.latent_pass(-1, self.split.g).start_of_new_flow(gaussians)
        else:
            if config.psi is None:
                gaussians.set_variance(torch.ones_like(gaussians.s))
            means, noise = (torch.randn(gaussians.mu.shape, generator=self.generator(key)) for key in (2, 6))
            gaussians.mu.copy_(config.random_init[0] * means)
            gaussians.s.add_(config.random_init[1] * noise.to(gaussians.s))
            gaussians.project()

    def _numbers_of_class(self, y: int) -> Tensor:
        """The flow's input for training images of class y, at most `MOST_NUMBERS` numbers: [n, d]."""
        rows = self.split.nf[self.data.targets[self.split.nf] == y]
        rows = rows[: max(LEAST_IMAGES, MOST_NUMBERS // self.model.dim)]
        batches = self.data.batches(rows, EVAL_BATCH, self.config.workers)
        return torch.cat([self.model.numbers(x.to(self.device)).flatten(1).cpu() for x, _ in batches])

    # ---- images --------------------------------------------------------------------------------------------------

    def images(
        self, indices: np.ndarray, batch_size: int, data: ImageData | None = None
    ) -> Generator[tuple[Tensor, Tensor, Share], None, None]:
        """The batches of `ImageData.shared_batches` of `data`, by default of the run's data, on the device."""
        for x, y, share in (data or self.data).shared_batches(indices, batch_size, self.config.workers):
            yield send(x, self.device), send(y, self.device), share

    def augmented(self, x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
        """`x` uint8 [b,C,H,W] under the run's augmentation, or one of the views of latents [b,V,C,h,w].

        A subclass may keep parts of the images as they are.
        """
        if x.ndim == 5:
            return choose_views(x, generator, share)
        return augment_batch(x, self.config.augment, generator, share)

    def generator(self, *key: int) -> torch.Generator:
        """A generator, seeded with the run's seed and the key."""
        seed = np.random.SeedSequence([self.config.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed) & (2**63 - 1))

    @torch.no_grad()
    def latent_pass(self, round_index: int, rows: np.ndarray, model: GLEM | None = None) -> LatentStatistics:
        """One pass over the images `rows` with the noise of an M-step; with a bar at the start and for the refit."""
        title = "start: latents" if round_index < 0 else "encoding for the refit"
        bar = self.bar_of(title, len(rows), "image", round_index < 0 or model is not None)
        model = model or self.model
        statistics = self.new_statistics()
        generator = self.generator(3, round_index + 1)
        with bar:
            for x, y, share in self.images(rows, EVAL_BATCH, self.views):
                z, logdet = encode(model, self.augmented(x, generator, share), self.config, generator, share)
                statistics.add(z, y, -(model.gaussians.log_prob_of(z, y) + logdet))
                bar.update(share.total)
        statistics.add_ranks()
        return statistics

    def new_statistics(self) -> LatentStatistics:
        """Empty statistics."""
        return LatentStatistics(self.model.num_classes, self.model.dim, self.device)

    def bar_of(self, title: str, total: int, unit: str, show: bool = True, begun: int = 0) -> tqdm:
        """A bar on stderr, if the run shows bars."""
        shown = show and self.progress
        return tqdm(total=total, initial=begun, desc=title, unit=unit, disable=not shown, dynamic_ncols=True)
