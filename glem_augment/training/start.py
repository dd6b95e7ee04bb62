"""The model of a run before its first step."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glem_augment.classes.statistics import pooled_covariance
from glem_augment.errors import DataError, GLEMError, TrainingError
from glem_augment.images.dataset import ImageData
from glem_augment.model.config import GLEMConfig
from glem_augment.model.glem import GLEM
from glem_augment.training.batches import EVAL_BATCH, LEAST_IMAGES, MOST_NUMBERS, Batches, seeded
from glem_augment.training.checkpoint import Checkpoint
from glem_augment.training.config import TrainConfig
from glem_augment.training.guard import independent_latents, independent_pixels
from glem_augment.training.log import progress_bar
from glem_augment.training.objective import Objective
from glem_augment.training.statistics import LatentStatistics
from glem_augment.training.steps import latent_pass

INIT_IMAGES = 1024  # ActNorm's start needs a fair estimate of each element's spread


def new_model(
    data: ImageData, config: TrainConfig, objective: Objective, init_model: GLEM | None, begun: Checkpoint | None
) -> GLEM:
    """The model that is trained: with the flow of `init_model`, with the weights still to come from `begun`, or new."""
    data.pixel_range.need_8_bits("training a flow (GLEM.fit needs no training)")
    torch.manual_seed(config.seed)
    if begun is not None:
        # All weights are in the checkpoint, so `init_model` is not needed.
        try:
            facts = begun.facts
            psi = None if facts["psi"] is None else tuple(facts["psi"])
            return _build(data, config, json.loads(facts["flow"]), psi, facts.get("autoencoder"))
        except (GLEMError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise TrainingError(f"{begun.path} describes no flow that can be built: {error}") from error
    if init_model is None:
        about = data.image_shape, data.classes, data.class_ids, config.bits, objective.psi, config.autoencoder
        return GLEM.create(config.preset, *about, **config.flow_options)
    if (init_model.bits, init_model.image_shape) != (config.bits, tuple(data.image_shape)):
        raise DataError(
            f"the model to start from takes images {init_model.image_shape} at {init_model.bits} bits, this run "
            f"has {data.image_shape} at {config.bits} bits: use the same"
        )
    first = init_model.config
    model = _build(data, config, first.flow, first.psi, first.autoencoder, init_model.autoencoder)
    model.flow.load_state_dict(init_model.flow.state_dict())
    return model


def _build(
    data: ImageData,
    config: TrainConfig,
    flow: dict[str, Any],
    psi: Any,
    autoencoder: dict[str, Any] | None,
    module: nn.Module | None = None,
) -> GLEM:
    ids, names = list(data.class_ids), list(data.classes)
    about = GLEMConfig(flow, config.bits, psi, class_ids=ids, class_names=names, autoencoder=autoencoder)
    return GLEM(about, codec=copy.deepcopy(module))


@torch.no_grad()
def initialise(model: GLEM, batches: Batches, objective: Objective, init_model: GLEM | None) -> float:
    """Initialise the flow, then the Gaussians: a function of the seed and the images.

    Returns the likelihood to compare with, bits per number: of independent pixels, or of independent latents.
    """
    gaussians, nf, config = model.gaussians, batches.split.nf, batches.config
    rows = np.random.default_rng([config.seed, 0x1217]).permutation(nf)[:INIT_IMAGES]
    x = torch.cat([x for x, _ in batches.data.batches(rows, EVAL_BATCH, config.workers)]).to(batches.device)
    whiten = getattr(model.flow, "whiten", None)
    if whiten is not None and not whiten.initialised:

        def numbers(y: int) -> Tensor:
            return numbers_of_class(model, batches, y)

        whiten.fit(*pooled_covariance(numbers, model.num_classes, len(whiten.gain), model.dim))
    with progress_bar("start: ActNorm", 1, "pass", batches.shown) as bar:
        model.initialise(x, seeded(config.seed, 1))
        bar.update()

    def statistics() -> LatentStatistics:
        return latent_pass(model, batches, objective, batches.split.g, -1, "start: latents")

    if init_model is None:
        objective.start(gaussians, statistics, lambda number: seeded(config.seed, number))
    elif (init_model.class_ids, init_model.config.psi) == (model.class_ids, model.config.psi):
        gaussians.load_state_dict(init_model.gaussians.state_dict())
    else:
        statistics().start_of_trained_flow(gaussians)
    return independent_pixels(x, config.bits) if model.codec.levels else independent_latents(model.codec)


def numbers_of_class(model: GLEM, batches: Batches, y: int) -> Tensor:
    """The flow's input for training images of class y, at most `MOST_NUMBERS` numbers: [n, d]."""
    rows = batches.split.nf[batches.data.targets[batches.split.nf] == y]
    rows = rows[: max(LEAST_IMAGES, MOST_NUMBERS // model.dim)]
    read = batches.data.batches(rows, EVAL_BATCH, batches.config.workers)
    return torch.cat([model.numbers(x.to(batches.device)).flatten(1).cpu() for x, _ in read])
