"""The model of a run before its first step: its flow and its Gaussians."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from glem_augment.classes.statistics import pooled_covariance
from glem_augment.codec.codec import Codec
from glem_augment.errors import DataError
from glem_augment.images.dataset import ImageData
from glem_augment.model.config import GLEMConfig
from glem_augment.model.glem import GLEM
from glem_augment.training.batches import EVAL_BATCH, LEAST_IMAGES, MOST_NUMBERS, Batches, seeded
from glem_augment.training.config import TrainConfig
from glem_augment.training.moments import LatentStatistics
from glem_augment.training.objective import Objective
from glem_augment.training.steps import latent_pass

INIT_IMAGES = 1024  # ActNorm's start needs a fair estimate of each element's spread


def new_model(data: ImageData, config: TrainConfig, objective: Objective, init_model: GLEM | None) -> GLEM:
    """The model that is trained: with the flow of `init_model`, or a new one. DataError: images of another shape."""
    data.pixel_range.need_8_bits("training a flow (GLEM.fit needs no training)")
    torch.manual_seed(config.seed)
    if init_model is None:
        about = data.image_shape, data.classes, data.class_ids, config.bits, objective.psi, config.autoencoder
        model = GLEM.create(config.preset, *about, **config.flow_options)
    elif (init_model.bits, init_model.image_shape) != (config.bits, tuple(data.image_shape)):
        raise DataError(
            f"the model to start from takes images {init_model.image_shape} at {init_model.bits} bits, this run "
            f"has {data.image_shape} at {config.bits} bits: use the same"
        )
    else:
        first, ids, names = init_model.config, list(data.class_ids), list(data.classes)
        same = GLEMConfig(
            first.flow, config.bits, first.psi, class_ids=ids, class_names=names, autoencoder=first.autoencoder
        )
        flow, codec = copy.deepcopy((init_model.flow, init_model.codec))
        model = GLEM(same, flow.train().requires_grad_(True), codec=codec)
    return model


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
        numbers = partial(numbers_of_class, model, batches)
        whiten.fit(*pooled_covariance(numbers, model.classes, len(whiten.gain), model.dim))
    model.flow.initialise(batches.numbers(model, x, seeded(config.seed, 1)))

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
    return torch.cat([batches.numbers(model, x.to(batches.device)).flatten(1).cpu() for x, _ in read])


def independent_pixels(x: Tensor, bits: int) -> float:
    """Bits/dim of independent pixels: the mean entropy of the channels' histograms.

    One histogram serves all positions of a channel. A histogram per position would suit aligned images better, but it
    takes more images than many sets have. x is uint8 [N,C,H,W], and its top `bits` bits count.
    """
    channels = (x >> (8 - bits)).transpose(0, 1).flatten(1).long()
    shares = torch.stack([channel.bincount(minlength=2**bits) for channel in channels]) / channels.shape[1]
    return float(torch.special.entr(shares.double()).sum(1).mean() / math.log(2))


def independent_latents(codec: Codec) -> float:
    """Bits per number, if the codec's numbers are independent standard normal."""
    return 0.5 * math.log2(2 * math.pi * math.e) - float(codec.logdet()) / (math.log(2) * math.prod(codec.shape))
