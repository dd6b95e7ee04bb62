"""The settings of a training run, with their help, kinds and limits; the command line makes its options of these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from glem_augment.checks import PRESET_NAMES, Memory, Preset, check_choice, check_number, check_whole, closest

Objective = Literal["glem", "saturating", "mle", "hybrid", "ib"]
OBJECTIVES = get_args(Objective)
AUGMENTATIONS = ("flip", "crop", "rotate", "jitter")
# Every M-step has a learning rate in memory, and checkpoints may come from strangers.
_MOST_M_STEPS = 10**7
# The default of a setting whose value follows from the objective.
BY_OBJECTIVE: Any = "by objective"
HYBRID_JOINT: dict[str, Any] = dict(
    objective="hybrid", beta=0.3, ce_scale=0.1, joint=True, label_smoothing=0.05, random_init=(0.1, 0.0), psi=None
)
PAPER: dict[str, Any] = dict(joint=False, label_smoothing=0.0, random_init=None, psi=(0.5, 0.2, 0.05))


def _setting(default: Any, kind: Any, text: str, **more: Any) -> Any:
    """A field of `TrainConfig`.

    Args:
        kind: int, float, bool, a tuple of allowed words, "numbers", "names", "text" or "table".
        more: `low`, `high` and `above` (an excluded lower limit) of a number; `count` of "numbers"; `optional=True`
            where None is a value; `shown`, the default in words; `group`, the title of the settings from here on;
            `research=True` for settings that only `--help-all` shows.
    """
    metadata = {"kind": kind, "help": text, "optional": default is None, **more}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """How a GLEM is fitted. By default it is this library's "hybrid-joint"; `methods` has the paper's by name.

    The loss of the E-step on the flow, with d the number of dimensions and NLL in nats per image (Eq. 3), is

        mean NLL / d + beta * cross-entropy

    The cross-entropy of the flow's posterior has class scores multiplied by `ce_scale`. A sum over d dimensions is
    overconfident, so a scale below 1 teaches wider margins. `beta` is 0 unless the objective is "hybrid" or "ib". "ib"
    is the objective of IB-INN: -log p(x) = -log mean_y p(x|y) in place of -log p(x|y), and Gaussian dequantisation.

    With `joint`, the default of "hybrid", the same loss teaches the Gaussians, and there is no M-step. Otherwise the
    M-step on the Gaussians weighs classes equally and adds repulsion (Eq. 5):

    - "glem" is `mean NLL / R_nf - lambda * sum KLD / (K d R_kld)`, as the authors compute it. The sum is over ordered
      pairs of classes. `R = max - min + 0.2 (|max| + |min|)`, without gradient, is the range of the per-sample NLLs, or
      of the classes' mean KLDs, in nats. lambda is `kld_weight`, and falls linearly to half of it.
    - "saturating" replaces each pair's KLD by `t (1 - exp(-KLD / t))`, t = 0.05 d nats, and is bounded for any weight.
    - "mle" (the paper's Baseline 2), "hybrid" and "ib" (beyond the paper) have no repulsion.

    After M-steps without repulsion, a refit ends the run. It fits the Gaussians in closed form to latents of the
    training images under the averaged flow. ValueError, TypeError: a setting out of its limits.
    """

    preset: Preset = _setting(
        "mef_tiny", PRESET_NAMES, "size of the flow: mef_tiny (2.0 M parameters for 3x32x32), mef_small (8.1 M), "
        "mef_cifar (37.6 M, as published), mef_glem (42.8 M); with affine couplings glow_tiny (1.2 M) and glow_fast "
        "(0.6 M, the best for its time on a CPU); identity (none: the pixels)", group="flow",
    )  # fmt: skip
    flow_options: dict[str, Any] = _setting(
        dict, "table", "change a number of the preset, e.g. --flow depth=[4,4]; see create_flow; repeatable",
        shown="none",
    )  # fmt: skip
    autoencoder: str | None = _setting(
        None, "text", "model the latents of this autoencoder in place of pixels: taef2 ships with the package; "
        "hub:org/name[@revision]", shown="none",
    )  # fmt: skip
    latent_noise: float = _setting(
        0.0, float, "noise on an autoencoder's latents in training, in standard deviations of the latents"
    )  # fmt: skip
    bits: int = _setting(8, int, "bits per channel that are modelled; the paper uses 5", low=1, high=8)
    objective: Objective = _setting(
        "hybrid", OBJECTIVES, "hybrid: likelihood and cross-entropy, with Gaussians learned jointly, beyond the paper; "
        "glem: the paper's, with repulsion by the KLD; saturating: with bounded repulsion; mle: likelihood alone; "
        "ib: IB-INN's kind of hybrid", group="objective",
    )  # fmt: skip
    kld_weight: float = _setting(3.0, float, "lambda, weight of the repulsion of glem and saturating at the start")
    beta: float = _setting(
        BY_OBJECTIVE, float, "weight of the cross-entropy, per nat, against NLL per dimension",
        shown="0.3 for hybrid and ib",
    )  # fmt: skip
    ce_scale: float = _setting(
        BY_OBJECTIVE, float, "factor of the class scores in the cross-entropy", above=0,
        shown="0.1 for hybrid with --joint, 0.2 for hybrid without it and for ib", research=True,
    )  # fmt: skip
    label_smoothing: float = _setting(
        BY_OBJECTIVE, float, "label smoothing of the cross-entropy", high=0.99,
        shown="0.05 for hybrid with --joint, else 0", research=True,
    )  # fmt: skip
    epochs: int = _setting(
        20, int, "passes over the images", low=1, high=10**6, group="optimisation of the flow (E-step)"
    )
    batch_size: int = _setting(64, int, "images per step, of all processes together", low=1)
    lr: float = _setting(1e-2, float, "learning rate of Adamax", above=0)
    warmup_steps: int = _setting(
        1000, int, "steps of linear warm-up, at most half the run; below 200 steps the rate stays lower"
    )  # fmt: skip
    schedule: Literal["multistep", "cosine"] = _setting(
        "multistep", ("multistep", "cosine"), "halvings after a half and three quarters of the run, or a cosine to a "
        "hundredth", research=True,
    )  # fmt: skip
    random_init: tuple[float, float] | None = _setting(
        BY_OBJECTIVE, "numbers", "random start: standard deviations of the means and of the variances' parameters; "
        "none: start at class means of the initial latents, equal variances", count=2, optional=True,
        shown="0.1 0 for hybrid with --joint, else none", research=True, group="class Gaussians",
    )  # fmt: skip
    psi: tuple[float, float, float] | None = _setting(
        BY_OBJECTIVE, "numbers", "variances are a*sigmoid(b*s)+c; none: plain variances", count=3, optional=True,
        shown="none for hybrid with --joint, else 0.5 0.2 0.05", research=True,
    )  # fmt: skip
    learn: str = _setting(
        "both", ("both", "means", "variances", "none"), "the parameters that are learned", research=True
    )
    joint: bool = _setting(
        BY_OBJECTIVE, bool, "learn the Gaussians by the E-step's loss, on all images, in place of M-steps",
        shown="for hybrid alone", research=True,
    )  # fmt: skip
    m_steps: int = _setting(
        5, int, "Adam steps of the M-step at the start of an epoch, on a tenth of the images (none with --joint)", low=1
    )
    modes_rank: int = _setting(64, int, "principal modes per class, fitted at the end; 0 for none", high=4096)
    augment: tuple[str, ...] = _setting(
        (), "names", f"augmentations of the flow's training images, separated by commas: {', '.join(AUGMENTATIONS)}, "
        "or none; the paper uses all four. Do not flip digits: samples would be flipped too", shown="none",
        group="data",
    )  # fmt: skip
    val_fraction: float = _setting(0.05, float, "share of each class held out, at most 2,000 images in all", high=0.99)
    seed: int = _setting(0, int, "seed of everything random", high=2**63 - 1, group="run")
    precision: Literal["fp32", "bf16"] = _setting(
        "fp32", ("fp32", "bf16"), "of the subnets in training; the bijection is float32"
    )
    memory: Memory = _setting(
        "stored", get_args(Memory), "reversible: rebuild activations in the backward pass; memory does not "
        "grow with the flow's depth, and steps are slower",
    )  # fmt: skip
    threads: int | None = _setting(
        None, int, "CPU threads; equal numbers give equal weights", low=1, high=4096, shown="PyTorch's choice"
    )
    workers: int = _setting(0, int, "processes that decode images that do not fit in memory", high=512)
    sample_every: int = _setting(5, int, "draw a grid of samples every N epochs; 0: never")
    max_minutes: float | None = _setting(
        None, float, "stop after that long, with a checkpoint and exit status 75; --resume goes on", above=0,
        shown="no limit",
    )  # fmt: skip

    def __post_init__(self) -> None:
        hybrid = self.objective in ("hybrid", "ib")
        shared = PAPER | (dict(beta=0.3, ce_scale=0.2) if hybrid else dict(beta=0.0, ce_scale=1.0))
        ours = self.objective == "hybrid" and self.joint is not False
        for name, value in (HYBRID_JOINT if ours else shared).items():
            if getattr(self, name) == BY_OBJECTIVE:
                setattr(self, name, value)
        for name in SETTINGS:
            setattr(self, name, check_setting(name, getattr(self, name)))
        # The order is not stored in checkpoints.
        self.flow_options = dict(sorted(self.flow_options.items()))
        if not hybrid and self.beta:
            raise ValueError(f"objective={self.objective!r} has no cross-entropy, got beta={self.beta}; use 'hybrid'")
        if self.latent_noise and self.autoencoder is None:
            raise ValueError(
                "latent_noise is for training in an autoencoder's latents: give autoencoder, or leave it out"
            )
        if self.joint and self.repels:
            raise ValueError(
                f"joint=True has no M-step for the repulsion of objective={self.objective!r}; use 'mle' or 'hybrid'"
            )
        if self.psi is not None and min(self.psi) <= 0:
            raise ValueError(f"psi must be three positive numbers (a, b, c), or None; got {self.psi!r}")
        if self.epochs * self.m_steps > _MOST_M_STEPS:
            raise ValueError(f"m_steps must be such that there are at most {_MOST_M_STEPS} in all, got {self.m_steps}")

    @property
    def repels(self) -> bool:
        """Whether the M-step pushes the classes apart."""
        return self.objective in ("glem", "saturating")

    def learns(self, which: str) -> bool:
        """Whether the "means" or the "variances" of the Gaussians are learned."""
        return self.learn in ("both", which)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can carry them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


SETTINGS: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(TrainConfig)}


def check_names(settings: Mapping[str, Any], where: str) -> None:
    """ValueError, beginning with `where`, if a name is no setting."""
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        known = f"known are {', '.join(sorted(SETTINGS))}{closest(unknown[0], SETTINGS)}"
        raise ValueError(f"{where}unknown training settings {unknown}; {known}")


def check_setting(name: str, value: Any) -> Any:
    """The value in the type of `TrainConfig`'s field. ValueError, TypeError: another value, by name."""
    about = SETTINGS[name]
    kind, low, high = about["kind"], about.get("low", 0), about.get("high", math.inf)
    if value is None and about["optional"]:
        return None
    if isinstance(kind, tuple):
        check_choice(name, value, kind)
    elif kind is int:
        if check_whole(name, value, low) > high:
            raise ValueError(f"{name} must be at most {high}, got {value}")
        return int(value)
    elif kind is float:
        above = "above" in about
        return check_number(name, value, about["above"] if above else low, high, open_low=above)
    elif kind is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    elif kind == "table" and not isinstance(value, dict):
        raise TypeError(f"{name} must be a table of the preset's numbers, got {value!r}")
    elif kind == "numbers":
        if not isinstance(value, list | tuple) or len(value) != about["count"]:
            raise TypeError(f"{name} must be a list of {about['count']} numbers, got {value!r}")
        return tuple(check_number(name, v, -math.inf, math.inf) for v in value)
    elif kind == "text" and not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {value!r}")
    elif kind == "names":
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a list of names, got {value!r}")
        for each in value:
            check_choice(name, each, AUGMENTATIONS)
        return tuple(value)
    return value


# Methods by name: the paper's methods, ablations and baselines, related published methods, and this library's
# "hybrid-joint" (the default), "unlabelled" and "saturating". No method sets the flow's size, the epochs, the batch
# size or the learning rate. docs/reproduction.md has a sentence about each.
_GLEM: dict[str, Any] = dict(objective="glem", kld_weight=10.0)  # Eq. 5 with the main setting of Table 2
_IDENTITY: dict[str, Any] = dict(random_init=(1.0, 0.0), psi=None)  # means N(0, I), identity covariance
METHODS: dict[str, dict[str, Any]] = {
    "glem": _GLEM,
    "lambda0": dict(objective="mle", psi=None),  # Baseline 2 = configuration 1 of Table 6
    "lambda0-psi": dict(objective="mle"),
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
    "unlabelled": HYBRID_JOINT | dict(objective="mle", beta=0.0),
    "saturating": dict(objective="saturating", kld_weight=0.3),
}  # fmt: skip


def method(name: str, **changes: Any) -> TrainConfig:
    """The settings of the method of that name, with `changes` winning over them. ValueError: no such method."""
    check_choice("method", name, tuple(METHODS))
    return TrainConfig(**{**METHODS[name], **changes})
