"""Methods by name, for `research.py`: the paper's, its ablations and baselines, related ones, and the library's.

Settings are the fields of `TrainConfig` and `Research`. No method sets the flow's size, the epochs, the batch size
or the learning rate. docs/reproduction.md has a sentence about each.
"""

from __future__ import annotations

from typing import Any

HYBRID_JOINT: dict[str, Any] = dict(
    objective="hybrid", beta=0.3, ce_scale=0.1, joint=True, label_smoothing=0.05, random_init=(0.1, 0.0), psi=None
)
PAPER: dict[str, Any] = dict(joint=False, label_smoothing=0.0, random_init=None, psi=(0.5, 0.2, 0.05))
_GLEM: dict[str, Any] = dict(objective="glem", kld_weight=10.0)  # Eq. 5 with the main setting of Table 2
_IDENTITY: dict[str, Any] = dict(random_init=(1.0, 0.0), psi=None)  # means N(0, I), identity covariance
METHODS: dict[str, dict[str, Any]] = {
    "glem": _GLEM,
    "lambda0": dict(objective="mle", psi=None),  # Baseline 2 = configuration 1 of Table 6
    "no-psi": _GLEM | dict(psi=None),  # configuration 2 of Table 6
    # Table 7; parameters that are not learned are random.
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
    # After Fetaya et al., ICLR 2020, who condition only the deepest level. Class means of the latents as a start would
    # set scores hundreds of nats apart.
    "ulcgm": PAPER | dict(objective="hybrid", beta=1.0, ce_scale=1.0, joint=True, random_init=(0.01, 0.0)),
    "hybrid-joint": HYBRID_JOINT,
}  # fmt: skip
# Flows of images with class codes, Baselines 1 and 3: the code of commit 309e287 measured the stored rows.
CODED: dict[str, dict[str, Any]] = {
    "ce": dict(objective="mle", psi=None, learn="none", random_init=(0.0, 0.0)),
    "ceglem": _GLEM,
}
