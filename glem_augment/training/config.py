"""All settings of a training run; each carries its help, its kind and its limits, from which the options are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from glem_augment.checks import check_choice, check_number, check_whole
from glem_augment.flows.presets import PRESETS
from glem_augment.latent.gaussians import INITIAL_VARIANCE, LOWEST_SHARE

OBJECTIVES = ("glem", "saturating", "mle", "hybrid")
AUGMENTATIONS = ("flip", "crop", "rotate", "jitter")
FLOW, OBJECTIVE, OPTIMISER, GAUSSIANS, DATA, RUN = (
    "flow",
    "objective",
    "optimisation of the flow (E-step)",
    "class Gaussians (M-step)",
    "data",
    "run",
)
# Every M-step has a learning rate in memory, and settings are also read from the checkpoints of strangers.
_MOST_M_STEPS = 10**7
REMOVED = {
    "milestones": "the learning rate is halved after 1/2 and 3/4 of the run; schedule='cosine' is the other choice",
    "clip_norm": "gradients are clipped to norm 1",
    "ema_decay": "it is 0.999",
    "swa_start": "SWA averages the last quarter of the run",
    "repulsion": "objective='glem' repels by the KLD, 'saturating' by a bounded KLD, 'mle' and 'hybrid' not at all",
    "kld_weight_end": "kld_weight falls to half of itself",
    "saturation": "it is 0.05 nats per dimension",
    "beta_end": "use beta_anneal=(share of the run, final factor)",
    "beta_anneal_from": "use beta_anneal=(share of the run, final factor)",
    "joint_lr": "it is 0.01",
    "learn_mu": "use learn='both', 'means', 'variances' or 'none'",
    "learn_sigma": "use learn='both', 'means', 'variances' or 'none'",
    "mean_init": "use mean_init_std: None for class means, 0 for zeros, a number for random means",
    "code_rows": "class codes are part of benchmarks/paper",
    "refit_steps": "use refit_beta; 0 leaves the refit out",
    "g_fraction": "a tenth of each class fits the Gaussians",
    "val_max": "at most 2,000 images are held out",
    "max_bad_steps": "10 steps in a row that are not finite are a divergence",
    "max_rollbacks": "a diverging run returns to its last good checkpoint up to three times",
}


def _setting(default: Any, group: str, kind: Any, text: str, **more: Any) -> Any:
    """A field of `TrainConfig`.

    Args:
        kind: int, float, bool, a tuple of allowed words, "numbers", "names" or "table".
        more: `low`, `high` and `above` (an excluded lower limit) of a number; `count` of "numbers"; `research=True`
            for settings that only `--help-all` shows; `shown`, the default in words.
    """
    metadata = {"group": group, "kind": kind, "help": text, "optional": default is None and kind != "table", **more}
    if kind == "table":
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """How a GLEM is fitted. Defaults follow the paper where it says (Sec. 4.3 and 5.2) and its public code elsewhere.

    The loss of the E-step on the flow, with d the number of dimensions and NLL in nats per image (Eq. 3), is

        mean NLL / d + beta * cross-entropy

    where the cross-entropy is that of the flow's own posterior, with class scores multiplied by `ce_scale`. A sum
    over d dimensions is far too sure of itself, so with a scale below 1 wider margins are learned. `beta` is 0 unless
    `objective="hybrid"`. The M-step on the Gaussians weighs classes equally and adds repulsion (Eq. 5):

    - "glem" combines range-normalised gradients as the authors do,
      `mean NLL / R_nf - lambda * sum KLD / (K d R_kld)`, where the sum runs over ordered pairs of classes and
      `R = max - min + 0.2 (|max| + |min|)` over the per-sample NLLs and over the classes' mean KLDs in nats (both R
      without gradient). lambda, `kld_weight`, is therefore a ratio of pulls and not the weight of Eq. 5 taken
      literally, which is unbounded below beyond about 1/2. It falls linearly to half of itself.
    - "saturating" replaces each pair's KLD by `t (1 - exp(-KLD / t))`, t = 0.05 d nats, and is bounded for any weight.
    - "mle" (the paper's Baseline 2) and "hybrid" (beyond the paper) have no repulsion.

    `m_budget` is the sum of Adam's learning rates over the run, which is how far a mean can move; it keeps
    range-normalised repulsion finite. What falls to M-steps after `freeze_gaussians_at` is not spent.

    After the last E-step the Gaussians are fitted once more to latents of the training images under the averaged flow:
    in closed form for "mle", by 200 steps of Adam with the cross-entropy's weight `refit_beta` for "hybrid".

    Raises:
        ValueError, TypeError: a setting that does not exist (any more), or a value that makes no sense.
    """

    preset: str = _setting(
        "mef_tiny", FLOW, tuple(PRESETS),
        "size of the flow: mef_tiny (2.0 M parameters for 3x32x32), mef_small (8.1 M), mef_cifar (37.6 M, as "
        "published), mef_glem (42.8 M); with affine couplings glow_tiny (1.2 M) and glow_fast (0.6 M, the best for "
        "its time on a CPU); identity (none: the pixels)",
    )  # fmt: skip
    flow_options: dict[str, Any] = _setting(
        None, FLOW, "table",
        "change a number of the preset, e.g. --flow depth=[4,4] (also blocks, width, coupling, actnorm, bound, "
        "rank, subnet, activation, patch: see create_flow); repeatable",
    )  # fmt: skip
    bits: int = _setting(8, FLOW, int, "bits per channel that are modelled; the paper uses 5", low=1, high=8)
    objective: str = _setting(
        "glem", OBJECTIVE, OBJECTIVES,
        "glem: the paper's, with repulsion by the KLD; saturating: with bounded repulsion; mle: likelihood alone; "
        "hybrid: likelihood and cross-entropy, beyond the paper",
    )  # fmt: skip
    kld_weight: float = _setting(3.0, OBJECTIVE, float, "lambda, weight of the repulsion at the start", low=0)
    beta: float | None = _setting(
        None, OBJECTIVE, float, "weight of the cross-entropy, per nat, against NLL per dimension", low=0,
        shown="0.3 for hybrid",
    )  # fmt: skip
    beta_anneal: tuple[float, float] | None = _setting(
        None, OBJECTIVE, "numbers",
        "from this share of the run on, beta falls geometrically to this multiple of itself", count=2, research=True,
        shown="no annealing",
    )  # fmt: skip
    ce_scale: float | None = _setting(
        None, OBJECTIVE, float, "class scores are multiplied by this before the cross-entropy, for wider margins",
        above=0, research=True, shown="0.2 for hybrid",
    )  # fmt: skip
    label_smoothing: float = _setting(
        0.0, OBJECTIVE, float, "label smoothing of the cross-entropy", low=0, high=0.99, research=True
    )
    likelihood: str = _setting(
        "class", OBJECTIVE, ("class", "marginal"),
        "likelihood of the E-step: -log p(x|y), or -log p(x) = -log mean_y p(x|y)", research=True,
    )  # fmt: skip
    noise_std: float = _setting(
        0.0, OBJECTIVE, float,
        "dequantise with Gaussian noise of this many levels; 0: uniform noise, which measurements always use", low=0,
        research=True,
    )  # fmt: skip
    epochs: int = _setting(20, OPTIMISER, int, "passes over the images", low=1, high=10**6)
    batch_size: int = _setting(64, OPTIMISER, int, "images per step", low=1)
    lr: float = _setting(1e-2, OPTIMISER, float, "learning rate of Adamax", above=0)
    warmup_steps: int = _setting(1000, OPTIMISER, int, "steps of linear warm-up, at most half the run", low=0)
    schedule: str = _setting(
        "multistep", OPTIMISER, ("multistep", "cosine"), "halve the learning rate twice, or let it follow a cosine",
        research=True,
    )  # fmt: skip
    min_lr: float = _setting(2.5e-3, OPTIMISER, float, "lowest learning rate of the schedule", low=0, research=True)
    averaging: str = _setting(
        "ema", OPTIMISER, ("ema", "swa", "none"),
        "average of the flow's weights: exponential, or uniform over the last quarter of the run", research=True,
    )  # fmt: skip
    mean_init_std: float | None = _setting(
        None, GAUSSIANS, float, "draw the means at the start from N(0, X^2); 0: zeros", low=0, research=True,
        shown="class means of the initial latents",
    )  # fmt: skip
    sigma_init: float | None = _setting(
        None, GAUSSIANS, float, "variances at the start", above=0, research=True,
        shown="the middle of psi's range, 0.3 without psi",
    )  # fmt: skip
    sigma_init_std: float = _setting(
        0.0, GAUSSIANS, float, "standard deviation of noise on the variances' free parameters at the start", low=0,
        research=True,
    )  # fmt: skip
    psi: tuple[float, float, float] | None = _setting(
        (0.5, 0.2, 0.05), GAUSSIANS, "numbers", "variances are a*sigmoid(b*s)+c; none: plain variances", count=3,
        optional=True, research=True,
    )  # fmt: skip
    learn: str = _setting(
        "both", GAUSSIANS, ("both", "means", "variances", "none"), "which parameters of the Gaussians are learned",
        research=True,
    )  # fmt: skip
    joint: bool = _setting(
        False, GAUSSIANS, bool,
        "learn the Gaussians by the E-step's loss, together with the flow and on all images, in place of M-steps",
        research=True,
    )  # fmt: skip
    m_rounds: int = _setting(1, GAUSSIANS, int, "M-steps per epoch, each a pass over a tenth of the images", low=1)
    m_steps: int = _setting(1, GAUSSIANS, int, "Adam steps in each M-step", low=1)
    m_budget: float = _setting(
        1.45, GAUSSIANS, float, "sum of Adam's learning rates over the run: how far a mean can move", above=0,
        research=True,
    )  # fmt: skip
    sigma_lr_scale: float = _setting(
        1.0, GAUSSIANS, float, "learning rate of the variances relative to that of the means", low=0, research=True
    )
    freeze_gaussians_at: float = _setting(
        1.0, GAUSSIANS, float, "share of the run after which the Gaussians stay and the flow trains on all images",
        above=0, high=1, research=True,
    )  # fmt: skip
    refit_beta: float | None = _setting(
        None, GAUSSIANS, float, "beta of the Gaussians' refit at the end of a hybrid run; 0: no refit", low=0,
        research=True, shown="beta, or 0 with --joint",
    )  # fmt: skip
    modes_rank: int = _setting(
        64, GAUSSIANS, int, "principal modes per class, fitted at the end; 0 for none", low=0, high=4096
    )
    augment: tuple[str, ...] = _setting(
        (), DATA, "names",
        f"augmentation of the flow's training images, with commas: {', '.join(AUGMENTATIONS)}; paper: all four; none. "
        "Digits must not flip, and a flow learns whatever the augmentation adds",
    )  # fmt: skip
    val_fraction: float = _setting(
        0.05, DATA, float, "share of each class held out for measuring, at most 2,000 images in all", low=0, high=0.99
    )
    seed: int = _setting(0, RUN, int, "seed of everything random", low=0, high=2**63 - 1)
    precision: str = _setting(
        "fp32", RUN, ("fp32", "bf16"), "precision of the subnets during training; the bijection is float32"
    )
    memory: str = _setting(
        "stored", RUN, ("stored", "reversible"),
        "reversible: rebuild activations in the backward pass, so that memory does not grow with the flow's depth; "
        "slower",
    )  # fmt: skip
    compile: bool = _setting(False, RUN, bool, "torch.compile the flow's steps: a slow start, then faster steps")
    threads: int | None = _setting(
        None, RUN, int, "CPU threads; the same number gives the same weights bit for bit", low=1, high=4096,
        shown="PyTorch's choice",
    )  # fmt: skip
    workers: int = _setting(0, RUN, int, "processes that decode images that do not fit in memory", low=0, high=512)
    sample_every: int = _setting(5, RUN, int, "draw sample grids and curves every N epochs; 0: never", low=0)
    checkpoint_minutes: float = _setting(
        2.0, RUN, float, "time between checkpoints; there is one at the end of each epoch too", above=0
    )
    max_minutes: float | None = _setting(
        None, RUN, float,
        "stop after that long, with a checkpoint and exit status 75; the same command with --resume goes on", above=0,
        shown="no limit",
    )  # fmt: skip

    def __new__(cls, *args: Any, **settings: Any) -> TrainConfig:
        check_names(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in SETTINGS:
            setattr(self, name, check_setting(name, getattr(self, name)))
        hybrid = self.objective == "hybrid"
        if self.beta is None:
            self.beta = 0.3 if hybrid else 0.0
        if self.ce_scale is None:
            self.ce_scale = 0.2 if hybrid else 1.0
        if self.refit_beta is None:
            self.refit_beta = 0.0 if self.joint else self.beta
        if not hybrid and (self.beta or self.refit_beta):
            raise ValueError(
                f"objective={self.objective!r} has no cross-entropy, got beta={self.beta} and "
                f"refit_beta={self.refit_beta}; use 'hybrid'"
            )
        if self.joint and self.repels:
            raise ValueError(
                f"joint=True has no M-step for the repulsion of objective={self.objective!r}; use 'mle' or 'hybrid'"
            )
        if self.psi is not None and min(self.psi) <= 0:
            raise ValueError(f"psi must be three positive numbers (a, b, c), or None; got {self.psi!r}")
        if self.beta_anneal is not None and not (0 <= self.beta_anneal[0] < 1 and self.beta_anneal[1] > 0):
            raise ValueError(
                f"beta_anneal must be a share of the run in [0, 1) and a positive factor, got {self.beta_anneal!r}"
            )
        if self.sigma_init is not None:
            low, high = LOWEST_SHARE * INITIAL_VARIANCE, math.inf
            if self.psi is not None:
                low, high = self.psi[2], self.psi[0] + self.psi[2]
            if not low < self.sigma_init < high:
                raise ValueError(
                    f"sigma_init must be a variance that psi can give, {low} to {high}, got {self.sigma_init}"
                )
        if self.epochs * self.m_rounds * self.m_steps > _MOST_M_STEPS:
            raise ValueError(f"m_steps must be such that there are at most {_MOST_M_STEPS} in all, got {self.m_steps}")

    @property
    def repels(self) -> bool:
        """Whether the M-step pushes the classes apart."""
        return self.objective in ("glem", "saturating")

    @property
    def learns_means(self) -> bool:
        """Whether the means of the Gaussians are learned."""
        return self.learn in ("both", "means")

    @property
    def learns_variances(self) -> bool:
        """Whether the variances of the Gaussians are learned."""
        return self.learn in ("both", "variances")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can carry them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


SETTINGS: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(TrainConfig)}


def check_names(settings: Mapping[str, Any], where: str = "") -> None:
    """ValueError, beginning with `where`, if there is no setting of one of these names (any more)."""
    for name in settings:
        if name in REMOVED:
            raise ValueError(f"{where}the setting {name!r} was removed: {REMOVED[name]}")
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(f"{where}unknown training settings {unknown}; known are {', '.join(sorted(SETTINGS))}")


def check_setting(name: str, value: Any) -> Any:
    """The value in the type that `TrainConfig` keeps. Raises ValueError or TypeError, naming the setting."""
    about = SETTINGS[name]
    kind = about["kind"]
    if value is None and about["optional"]:
        return None
    if isinstance(kind, tuple):
        check_choice(name, value, kind)
        return value
    if kind is int:
        value, high = check_whole(name, value, about.get("low", 0)), about.get("high", math.inf)
        if value > high:
            raise ValueError(f"{name} must be at most {high}, got {value}")
        return value
    if kind is float:
        low, above = about.get("low", 0.0), about.get("above")
        return check_number(
            name, value, low if above is None else above, about.get("high", math.inf), open_low=above is not None
        )
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    if kind == "table" and not isinstance(value, dict):
        raise TypeError(f"{name} must be a table of the preset's numbers, got {value!r}")
    if kind == "numbers":
        if not isinstance(value, list | tuple) or len(value) != about["count"]:
            raise TypeError(f"{name} must be a list of {about['count']} numbers, got {value!r}")
        return tuple(check_number(name, v, -math.inf, math.inf) for v in value)
    if kind == "names":
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a list of names, got {value!r}")
        for each in value:
            check_choice(name, each, AUGMENTATIONS)
        return tuple(value)
    return value
