"""The start of a run: the split of the images, the model, an autoencoder's latents, and the Gaussians."""

from __future__ import annotations

import copy
import json
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from glem_augment.autoencoders import StandardisedAutoencoder
from glem_augment.data.dataset import ImageData
from glem_augment.devices import send
from glem_augment.distributed import Share, is_primary
from glem_augment.errors import DataError, GLEMError, TrainingError
from glem_augment.latent.fit import pooled_covariance
from glem_augment.model.config import GLEMConfig
from glem_augment.model.glem import GLEM
from glem_augment.training.batches import AlreadyEncoded, augment_batch, choose_views, latent_views, stratified_split
from glem_augment.training.checkpoint import Checkpoint
from glem_augment.training.config import TrainConfig
from glem_augment.training.objective import LatentStatistics, encode
from glem_augment.training.optim import LossGuard, independent_latents, independent_pixels

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
            # All weights are in the checkpoint: the model that the run started from need not be there any more.
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
        return GLEM(config, autoencoder=copy.deepcopy(module))

    def _take_latents(self, codec: StandardisedAutoencoder) -> None:
        """Let the images be their latents for the run, so that they are encoded only once; `whole` undoes it."""
        config, data = self.config, self.data
        x = data.some(_INIT_IMAGES)
        self.model.standardise(x)
        views = latent_views(codec.autoencoder, data, config.augment, config.seed, self.device, self.progress)
        self.data, self.views = data.with_numbers(views[:, 0]), data.with_numbers(views)
        stand_in = StandardisedAutoencoder(AlreadyEncoded(), len(codec.mean)).to(self.device)
        stand_in.load_state_dict({name: codec.state_dict()[name] for name in stand_in.state_dict()})
        named = {"name": "latents", "sha256": "", "image_shape": list(self.saved_as.flow_shape)}
        config_of_latents = replace(self.saved_as, autoencoder=named)
        self.model = GLEM(config_of_latents, self.model.flow, self.model.gaussians, autoencoder=stand_in)

    def whole(self, model: GLEM) -> GLEM:
        """`model` for images, where it is one for latents."""
        if self.codec is None:
            return model
        config = replace(model.config, autoencoder=self.saved_as.autoencoder)
        return GLEM(config, model.flow, model.gaussians, model.modes, self.codec)

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
        layers = [module for module in self.model.flow.modules() if isinstance(module, nn.Conv2d)]
        with self.bar_of("start: ActNorm", len(layers), "layer") as bar, ExitStack() as stack:

            def passed(*_: object) -> None:  # a hook's result would replace the output, and `update` has one
                bar.update()

            for layer in layers:
                stack.callback(layer.register_forward_hook(passed).remove)
            self.model.initialise(x, self.generator(1))
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
        """The flow's input for training images of class y, as many as memory holds: [n, d]."""
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
        """A generator that is a function of the run's seed and the key."""
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
        """Statistics of no image so far."""
        return LatentStatistics(self.model.num_classes, self.model.dim, self.device)

    def bar_of(self, title: str, total: int, unit: str, show: bool = True, begun: int = 0) -> tqdm:
        """A bar on stderr, if the run shows bars."""
        shown = show and self.progress
        return tqdm(total=total, initial=begun, desc=title, unit=unit, disable=not shown, dynamic_ncols=True)
