"""The paper's methods, ablations and baselines by name, and related published ones, on one backbone.

A method is a set of training settings, and whoever asks for one may change any of them. What this library adds to the
paper ("hybrid-joint", which is the default, "unlabelled" and "saturating") is in the same table. No method sets the
flow's size, the epochs, the batch size or the learning rate. docs/reproduction.md has a sentence about each.
"""

from __future__ import annotations

from typing import Any

from glem_augment.checks import check_choice
from glem_augment.training.config import HYBRID_JOINT, PAPER, TrainConfig

_GLEM: dict[str, Any] = dict(objective="glem", kld_weight=10.0)  # Eq. 5 with the main setting of Table 2
_IDENTITY: dict[str, Any] = dict(random_init=(1.0, 0.0), psi=None)  # means N(0, I), identity covariance
METHODS: dict[str, dict[str, Any]] = {
    "glem": _GLEM,
    "lambda0": dict(objective="mle", psi=None),  # Baseline 2 = configuration 1 of Table 6
    "lambda0-psi": dict(objective="mle"),
    "no-psi": _GLEM | dict(psi=None),  # configuration 2 of Table 6
    # Table 7; what is not learned is random.
    "only-mu": _GLEM | dict(learn="means"),
    "only-sigma": _GLEM | dict(learn="variances", random_init=(1.0, 0.0)),
    "random": dict(objective="mle", learn="none", random_init=(1.0, 5.0)),
    # Izmailov et al., ICML 2020, with all images labelled.
    "flowgmm": _IDENTITY | dict(objective="mle", learn="none"),
    # Ardizzone et al., NeurIPS 2020. Small initial means were the best of a few on held-out training images of a 14x14
    # Fashion-MNIST.
    "ib-inn": _IDENTITY | dict(
        objective="ib", beta=1.0, joint=True, label_smoothing=0.05, ce_scale=1.0, random_init=(0.1, 0.0), learn="means",
    ),
    # After Fetaya et al., ICLR 2020, in all latent dimensions, where the original conditions only the deepest level's.
    # Means of the latents themselves would begin with scores that are hundreds of nats apart.
    "ulcgm": PAPER | dict(objective="hybrid", beta=1.0, ce_scale=1.0, joint=True, random_init=(0.01, 0.0)),
    "hybrid-joint": HYBRID_JOINT,
    "unlabelled": HYBRID_JOINT | dict(objective="mle", beta=0.0),
    "saturating": dict(objective="saturating", kld_weight=0.3),
}  # fmt: skip


def method(name: str, **changes: Any) -> TrainConfig:
    """The settings of the method of that name, with `changes` winning over them. ValueError: no such method."""
    check_choice("method", name, tuple(METHODS))
    return TrainConfig(**{**METHODS[name], **changes})
