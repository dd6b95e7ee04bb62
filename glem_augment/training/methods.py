"""The paper's methods, ablations and baselines by name, and related published ones, on one backbone.

A method is a set of training settings, and whoever asks for one may change any of them. What this library adds to the
paper ("hybrid-joint", which is the default, and "saturating") is in the same table. No method sets the flow's size, the
epochs, the batch size or the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glem_augment.checks import check_choice
from glem_augment.training.config import HYBRID_JOINT, PAPER, TrainConfig


@dataclass(frozen=True)
class Method:
    """A published method as settings of `TrainConfig`, with one sentence about it that names the source."""

    settings: Mapping[str, Any]
    about: str

    def config(self, **changes: Any) -> TrainConfig:
        """The method's settings, with `changes` winning over them."""
        return TrainConfig(**{**self.settings, **changes})


METHODS: dict[str, Method] = {
    "glem": Method(
        dict(objective="glem", kld_weight=10.0), "GLEM (Eq. 5), the paper's main setting lambda_0 = 10 (Table 2)"
    ),
    "lambda0": Method(
        dict(objective="mle", psi=None), "Baseline 2 = configuration 1 of Table 6: Gaussians by likelihood alone"
    ),
    "lambda0-psi": Method(dict(objective="mle"), "likelihood alone, with the reparametrisation psi"),
    "no-psi": Method(
        dict(objective="glem", kld_weight=10.0, psi=None), "configuration 2 of Table 6: KLD without psi"
    ),
    "only-mu": Method(dict(objective="glem", kld_weight=10.0, learn="means"), "Table 7: only the means learned"),
    "only-sigma": Method(
        dict(objective="glem", kld_weight=10.0, learn="variances", random_init=(1.0, 0.0)),
        "Table 7: only the variances learned, the means random, N(0, I) as FlowGMM's, and fixed",
    ),
    "random": Method(
        dict(objective="mle", learn="none", random_init=(1.0, 5.0)),
        "Table 7: means, N(0, I), and variances random and fixed",
    ),
    "flowgmm": Method(
        dict(objective="mle", learn="none", random_init=(1.0, 0.0), psi=None),
        "FlowGMM (Izmailov et al., ICML 2020), all images labelled: random fixed means N(0, I), identity covariance",
    ),
    # Small initial means were the best of a few on held-out training images of a 14x14 Fashion-MNIST.
    "ib-inn": Method(
        dict(
            objective="ib", beta=1.0, joint=True, label_smoothing=0.05, ce_scale=1.0, random_init=(0.1, 0.0),
            learn="means", psi=None,
        ),
        "IB-INN (Ardizzone et al., NeurIPS 2020): learned means, identity covariance, -log p(x) + beta cross-entropy, "
        "Gaussian dequantisation noise, smoothed labels",
    ),
    "ulcgm": Method(
        # Means of the latents themselves would begin with scores that are hundreds of nats apart.
        PAPER | dict(objective="hybrid", beta=1.0, ce_scale=1.0, joint=True, random_init=(0.01, 0.0)),
        "after Fetaya et al., ICLR 2020 (ULCGM): -log p(x|y) plus a classification loss, Gaussians learned with the "
        "flow; in all latent dimensions, where the original conditions only the deepest level's",
    ),
    "hybrid-joint": Method(
        HYBRID_JOINT, "this library's default: likelihood and the cross-entropy of the flow's posterior, with wide "
        "margins, the means and variances learned at every step of the flow",
    ),
    "unlabelled": Method(
        HYBRID_JOINT | dict(objective="mle", beta=0.0), "for images without classes: likelihood alone, of the flow and "
        "one Gaussian, learned together",
    ),
    "saturating": Method(dict(objective="saturating", kld_weight=0.3), "this library's bounded repulsion"),
}  # fmt: skip


def method(name: str) -> Method:
    """The method of that name. Raises ValueError with the names that exist."""
    check_choice("method", name, tuple(METHODS))
    return METHODS[name]
