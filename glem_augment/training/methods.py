"""The paper's methods, ablations and baselines by name, and the related ones that it compares with, on one backbone.

A method is a set of training settings; whoever asks for one may change any of them. What this library adds beyond the
paper ("hybrid", "hybrid-joint", "saturating") is in the same list. None of the settings is about size: flow, epochs,
batch and learning rate stay as they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glem_augment.data.dataset import ImageData
from glem_augment.evaluation.codes import ClassCodes
from glem_augment.flows import resolve_preset
from glem_augment.training.config import TrainConfig

# The learning rate of jointly learned Gaussians (1e-2 in all methods that have them), and IB-INN's small initial means,
# were the best for each method of a few on held-out training images of a 14x14 Fashion-MNIST.
# Identity covariance, as FlowGMM and IB-INN have it.
_UNIT = dict(psi=None, sigma_init=1.0, learn_sigma=False)
_RANDOM = dict(mean_init="random")


@dataclass(frozen=True)
class Method:
    """How to get a published method from ``TrainConfig``.

    Attributes:
        settings: of ``TrainConfig``. about: one sentence, with the source.
        codes: images carry a class code (conditional encoding). monomodal: one Gaussian for all classes.
    """

    settings: Mapping[str, Any]
    about: str
    codes: bool = False
    monomodal: bool = False

    def config(self, **changes: Any) -> TrainConfig:
        """The method's settings under ``changes``."""
        return TrainConfig.from_dict({**self.settings, **changes})


@dataclass
class Prepared:
    """Data and settings with the method's codes in them; ``codes`` is None without."""

    data: ImageData
    config: TrainConfig
    codes: ClassCodes | None = field(default=None)


METHODS: dict[str, Method] = {
    "glem": Method(
        dict(objective="glem", kld_weight=10.0), "GLEM (Eq. 5), the paper's main setting lambda_0 = 10 (Table 2)"
    ),
    # Their M-steps end where the budget of Adam's steps does, short of the maximum; the refit goes there.
    "lambda0": Method(
        dict(objective="mle", psi=None, refit_steps=1),
        "Baseline 2 = configuration 1 of Table 6: Gaussians by likelihood alone",
    ),
    "lambda0-psi": Method(
        dict(objective="mle", refit_steps=1), "likelihood alone, with the reparametrisation psi"
    ),
    "no-psi": Method(
        dict(objective="glem", kld_weight=10.0, psi=None), "configuration 2 of Table 6: KLD without psi"
    ),
    "ce": Method(
        dict(objective="mle", psi=None, sigma_init=1.0, learn_mu=False, learn_sigma=False, mean_init="zeros"),
        "Baseline 1: a monomodal flow, N(0, I), on images with class codes",
        codes=True,
        monomodal=True,
    ),
    "ceglem": Method(
        dict(objective="glem", kld_weight=10.0), "Baseline 3: GLEM on images with class codes", codes=True
    ),
    "only-mu": Method(dict(objective="glem", kld_weight=10.0, learn_sigma=False), "Table 7: only the means learned"),
    "only-sigma": Method(
        dict(objective="glem", kld_weight=10.0, learn_mu=False, mean_init_std=1.0, **_RANDOM),
        "Table 7: only the variances learned, the means random, N(0, I) as FlowGMM's, and fixed",
    ),
    "random": Method(
        dict(objective="mle", learn_mu=False, learn_sigma=False, sigma_init_std=5.0, mean_init_std=1.0, **_RANDOM),
        "Table 7: means, N(0, I), and variances random and fixed",
    ),
    "flowgmm": Method(
        dict(objective="mle", learn_mu=False, mean_init_std=1.0, **_RANDOM, **_UNIT),
        "FlowGMM (Izmailov et al., ICML 2020), all images labelled: random fixed means N(0, I), identity covariance",
    ),
    "ib-inn": Method(
        dict(
            objective="hybrid", beta=1.0, likelihood="marginal", joint=True, joint_lr=1e-2, label_smoothing=0.05,
            noise_std=0.5, refit_steps=0, ce_scale=1.0, mean_init_std=0.1, **_RANDOM, **_UNIT,
        ),
        "IB-INN (Ardizzone et al., NeurIPS 2020): learned means, identity covariance, -log p(x) + beta cross-entropy, "
        "Gaussian dequantisation noise, smoothed labels",
    ),
    "ulcgm": Method(
        dict(objective="hybrid", beta=1.0, ce_scale=1.0, joint=True, joint_lr=1e-2, refit_steps=0),
        "after Fetaya et al., ICLR 2020 (ULCGM): -log p(x|y) plus a classification loss, Gaussians learned with the "
        "flow; in all latent dimensions, where the original conditions only the deepest level's",
    ),
    "hybrid": Method(dict(objective="hybrid"), "this library's: beta times the cross-entropy of the flow's posterior"),
    "hybrid-joint": Method(
        dict(
            objective="hybrid", beta=0.3, ce_scale=0.1, joint=True, joint_lr=1e-2, label_smoothing=0.05, refit_steps=0,
            psi=None, sigma_init=1.0, mean_init_std=0.1, **_RANDOM,
        ),
        "this library's: the same with means and variances learned at every step of the flow, and wider margins",
    ),
    "saturating": Method(
        dict(objective="glem", repulsion="saturating", kld_weight=0.3), "this library's bounded repulsion"
    ),
}  # fmt: skip


def method(name: str) -> Method:
    """The method of that name. Raises ValueError with the names that there are."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def prepare(name: str, data: ImageData, codes_seed: int = 0, **changes: Any) -> Prepared:
    """Settings of a method for ``data``, and the data that it trains on: with codes, where the method has them.

    Args:
        name: of METHODS. data: training images. changes: settings of ``TrainConfig`` that win over the method's.

    Raises:
        ValueError: an unknown name or setting.
    """
    chosen = method(name)
    config = chosen.config(**changes)
    if not chosen.codes:
        return Prepared(data, config)
    spec = resolve_preset(config.preset, tuple(data.image_shape), **config.flow_options)
    levels = len(spec.get("depth", [0]))  # the identity flow has no levels; two rows do
    codes = ClassCodes.design(len(data.classes), tuple(data.image_shape), levels, bits=config.bits, seed=codes_seed)
    coded = codes.dataset(data, seed=config.seed, monomodal=chosen.monomodal)
    config = TrainConfig.from_dict({**config.to_dict(), "code_rows": codes.rows})
    return Prepared(coded, config, codes)
