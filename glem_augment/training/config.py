"""All settings of a training run, checked before any work is done."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from glem_augment.latent.gaussians import INITIAL_VARIANCE, LOWEST_SHARE

OBJECTIVES = ("glem", "mle", "hybrid")
REPULSIONS = ("kld", "saturating", "none")
AVERAGING = ("ema", "swa", "none")
SCHEDULES = ("multistep", "cosine")
MEAN_INITS = ("class_means", "random", "zeros")
LIKELIHOODS = ("class", "marginal")
PRECISIONS = ("fp32", "bf16")
MEMORIES = ("stored", "reversible")
AUGMENTATIONS = ("flip", "crop", "rotate", "jitter")
# Far above any use: settings are also read from the checkpoints of strangers, and must not ask for absurd amounts of
# memory, processes or threads. M_STEPS: in all, since each has a learning rate in memory.
_MOST = {
    "epochs": 10**6,
    "refit_steps": 10**6,
    "modes_rank": 4096,
    "workers": 512,
    "threads": 4096,
    "seed": 2**63 - 1,
}
_MOST_M_STEPS = 10**7


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class TrainConfig:
    """How a GLEM is fitted. Defaults follow the paper where it says (Sec. 4.3 and 5.2) and its public code where not.

    Objective, with d the number of dimensions and NLL in nats per image (Eq. 3):

    - E-step on the flow: ``mean NLL / d + beta * cross-entropy`` (``beta`` is 0 unless ``objective="hybrid"``);
    - M-step on the Gaussians: the same, plus repulsion (Eq. 5) weighted by an annealed ``kld_weight``.

    ``repulsion="kld"`` combines range-normalised gradients as the authors do,
    ``mean NLL / R_nf - lambda * sum KLD / (K d R_kld)``, the sum over ordered pairs of classes, with
    ``R = max - min + 0.2 (|max| + |min|)`` over the per-sample NLLs and over the classes' mean KLDs in nats (both R
    without gradient), so lambda is a ratio of pulls and not the weight of Eq. 5 taken literally, which is unbounded
    below beyond about 1/2. ``"saturating"`` replaces each pair's KLD by ``t (1 - exp(-KLD / t))``,
    t = ``saturation`` * d nats, and is bounded for any weight.

    Attributes:
        preset, flow_options: size of the flow, and numbers of the preset to change.
        objective: "glem" (the paper), "mle" (no repulsion: the paper's Baseline 2) or "hybrid" (beyond the paper).
        epochs, batch_size: of the E-step.
        lr, warmup_steps, schedule, milestones, min_lr, clip_norm: Adamax on the flow; linear warm-up, then halved at
            ``milestones`` (shares of the run) down to ``min_lr``, or a cosine to ``min_lr``.
        averaging, ema_decay, swa_start: of the flow's weights; SWA from that share of the run on.
        beta_end, beta_anneal_from: from that share of the run on, beta falls geometrically to ``beta_end`` times
            itself: classes first, then likelihood, as the paper anneals lambda.
        ce_scale: the class scores are multiplied by this before that cross-entropy. A sum over d dimensions is far too
            sure of itself, so at 1 only images within a few nats of a mistake count; below 1 wider margins are learned.
            By default 0.2 for "hybrid".
        repulsion, kld_weight, kld_weight_end, saturation: lambda_0, annealed linearly to ``kld_weight_end`` * lambda_0.
        beta: weight of the cross-entropy of the flow's own posterior, per nat, against NLL per dimension, by default
            0.3 for "hybrid". The M-step weighs classes equally in both terms; the E-step takes images as they come.
        label_smoothing: of that cross-entropy, in both steps.
        likelihood: of the E-step: "class", -log p(x|y) (Eq. 3), or "marginal", -log p(x) = -log mean_y p(x|y).
        noise_std: dequantise with Gaussian noise of this many levels, in place of the uniform noise at 0. Likelihoods
            are measured with uniform noise all the same.
        joint, joint_lr: learn the Gaussians by the E-step's loss together with the flow, with Adam at ``joint_lr`` (on
            the flow's schedule), in place of M-steps; there is no repulsion then, and the flow sees all of the data.
        m_rounds: M-steps (passes over D_g) per epoch; m_steps: Adam steps in each.
        m_budget: sum of the Adam learning rates over the run, which is how far a mean can move; it is what keeps
            range-normalised repulsion finite. A tenth of the steps takes the first 1.0 / 1.45 of it; what falls to
            M-steps after ``freeze_gaussians_at`` is not spent.
        sigma_lr_scale: the variances' learning rate relative to the means'.
        learn_mu, learn_sigma: which parameters of the Gaussians the M-step may change.
        freeze_gaussians_at: share of the run after which the Gaussians stay and the flow trains on all data.
        refit_steps: Adam steps on the Gaussians after the last E-step, on the latents of the training images (of large
            sets as many as make 47 million numbers, some of each class) under the averaged flow; the averaging has
            moved the latents a little. By default 200 for "hybrid", else 0. With the likelihood alone ("mle"), any
            number above 0 is its maximum in closed form.
        refit_beta: beta of that refit, by default the run's. Its images have been seen by the flow, so less is better.
        mean_init: means at the start: "class_means" of the initial latents, "random" (``mean_init_std``) or "zeros".
            A run that starts from a fitted model takes its Gaussians where the classes are the same, else fits them to
            the latents.
        sigma_init, sigma_init_std: variances at the start (None: the middle of psi's range, or 0.3 without psi), and
            the standard deviation of normal noise on their free parameters s.
        code_rows: the lowest rows of each image are a class code (``evaluation.codes``), which is not augmented.
        psi, bits: see ``GLEM.create``.
        g_fraction, val_fraction: shares of the data for the M-step and (at most ``val_max`` images, but one of each
            class of three or more) for held-out metrics; stratified, seeded.
        augment: any of "flip", "crop", "rotate", "jitter", for the flow's training. None by default: digits must
            not flip, and a flow learns whatever the augmentation adds.
        precision: of the subnets during training; the bijection is float32 always.
        memory: "stored" keeps every activation for the backward pass; "reversible" rebuilds them from the outputs
            through the exact inverse, so that memory does not grow with depth, at about one more forward pass.
        compile: ``torch.compile`` of the flow's steps. Neither of the two changes what is learned, beyond the last
            bits of the weights.
        modes_rank: class modes fitted at the end and stored with the model; 0 for none.
        max_bad_steps: this many non-finite steps in a row are a divergence (see ``training.guard`` for the other kind).
        max_rollbacks: after a divergence the run returns to its last good checkpoint and goes on at half the learning
            rates, at most so many times; then it stops.
        max_minutes: end the run, with a checkpoint, at the first step boundary after that long; None for no limit.
    """

    preset: str = "mef_tiny"
    flow_options: dict[str, Any] = field(default_factory=dict)
    objective: str = "glem"
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-2
    warmup_steps: int = 1000
    schedule: str = "multistep"
    milestones: tuple[float, ...] = (0.5, 0.75)
    min_lr: float = 2.5e-3
    clip_norm: float = 1.0
    averaging: str = "ema"
    ema_decay: float = 0.999
    swa_start: float = 0.75
    repulsion: str | None = None
    kld_weight: float = 3.0
    kld_weight_end: float = 0.5
    saturation: float = 0.05
    beta: float | None = None
    beta_end: float = 1.0
    beta_anneal_from: float = 0.0
    ce_scale: float | None = None
    label_smoothing: float = 0.0
    likelihood: str = "class"
    noise_std: float = 0.0
    joint: bool = False
    joint_lr: float = 1e-3
    m_rounds: int = 1
    m_steps: int = 1
    m_budget: float = 1.45
    sigma_lr_scale: float = 1.0
    learn_mu: bool = True
    learn_sigma: bool = True
    freeze_gaussians_at: float = 1.0
    mean_init: str = "class_means"
    mean_init_std: float = 0.1
    sigma_init: float | None = None
    sigma_init_std: float = 0.0
    code_rows: int = 0
    psi: tuple[float, float, float] | None = (0.5, 0.2, 0.05)
    bits: int = 8
    refit_steps: int | None = None
    refit_beta: float | None = None
    g_fraction: float = 0.1
    val_fraction: float = 0.05
    val_max: int = 2000
    augment: tuple[str, ...] = ()
    precision: str = "fp32"
    memory: str = "stored"
    compile: bool = False
    modes_rank: int = 64
    max_bad_steps: int = 10
    max_rollbacks: int = 3
    seed: int = 0
    threads: int | None = None
    workers: int = 0
    sample_every: int = 5
    checkpoint_minutes: float = 2.0
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("averaging", AVERAGING),
            ("schedule", SCHEDULES),
            ("mean_init", MEAN_INITS),
            ("likelihood", LIKELIHOODS),
            ("precision", PRECISIONS),
            ("memory", MEMORIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.repulsion is None:
            self.repulsion = "kld" if self.objective == "glem" else "none"
        if self.beta is None:
            self.beta = 0.3 if self.objective == "hybrid" else 0.0
        if self.ce_scale is None:
            self.ce_scale = 0.2 if self.objective == "hybrid" else 1.0
        if self.refit_beta is None:
            self.refit_beta = self.beta
        if self.refit_steps is None:
            self.refit_steps = 200 if self.objective == "hybrid" else 0
        if self.repulsion not in REPULSIONS:
            raise ValueError(f"repulsion must be one of {', '.join(REPULSIONS)}, got {self.repulsion!r}")
        self._check("beta", _is_number(self.beta), "a number >= 0")
        if self.joint and self.repulsion != "none":
            raise ValueError(f"joint=True has no M-step for the repulsion {self.repulsion!r}; set repulsion='none'")
        if self.objective == "mle" and (self.repulsion != "none" or self.beta):
            raise ValueError("objective='mle' has neither repulsion nor beta; use 'glem' or 'hybrid' for those")
        if self.objective == "glem" and self.beta:
            raise ValueError(f"objective='glem' has no cross-entropy, got beta={self.beta}; use 'hybrid'")
        for name in self._listed("augment", "names"):
            if name not in AUGMENTATIONS:
                raise ValueError(f"augment takes {', '.join(AUGMENTATIONS)}, got {name!r}")
        self.augment = tuple(self.augment)
        self.milestones = self._numbers("milestones", self._listed("milestones", "shares of the run"))
        if self.psi is not None:
            self.psi = self._numbers("psi", self._listed("psi", "three positive numbers"))
            self._check("psi", len(self.psi) == 3 and min(self.psi) > 0, "three positive numbers (a, b, c), or None")
        self._check_numbers()

    def _listed(self, name: str, what: str) -> list[Any]:
        self._check(name, isinstance(getattr(self, name), list | tuple), f"a list of {what}")
        return list(getattr(self, name))

    def _numbers(self, name: str, values: list[Any]) -> tuple[float, ...]:
        self._check(name, all(_is_number(v) for v in values), "a list of numbers")
        return tuple(float(v) for v in values)

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "m_rounds", "m_steps", "max_bad_steps", "val_max"):
            self._check(name, _is_whole(getattr(self, name)) and getattr(self, name) >= 1, "a whole number >= 1")
        for name in (
            "warmup_steps",
            "modes_rank",
            "workers",
            "sample_every",
            "seed",
            "refit_steps",
            "max_rollbacks",
            "code_rows",
        ):
            self._check(name, _is_whole(getattr(self, name)) and getattr(self, name) >= 0, "a whole number >= 0")
        for name in (
            "lr",
            "ce_scale",
            "beta_end",
            "clip_norm",
            "saturation",
            "m_budget",
            "checkpoint_minutes",
            "joint_lr",
        ):
            self._check(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a positive number")
        for name in (
            "kld_weight",
            "kld_weight_end",
            "beta",
            "min_lr",
            "sigma_lr_scale",
            "mean_init_std",
            "refit_beta",
            "noise_std",
            "sigma_init_std",
        ):
            self._check(name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "a number >= 0")
        for name in ("g_fraction", "ema_decay", "swa_start", "freeze_gaussians_at"):
            self._check(name, _is_number(getattr(self, name)) and 0 < getattr(self, name) <= 1, "in (0, 1]")
        for name in ("learn_mu", "learn_sigma", "compile", "joint"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        self._check("flow_options", isinstance(self.flow_options, dict), "a table of the preset's numbers")
        self._check("preset", isinstance(self.preset, str), "a name")
        self._check("g_fraction", self.g_fraction < 1, "below 1")
        smooth = self.label_smoothing
        self._check("label_smoothing", _is_number(smooth) and 0 <= smooth < 1, "in [0, 1)")
        if self.sigma_init is not None:
            self._check("sigma_init", _is_number(self.sigma_init) and self.sigma_init > 0, "a positive number")
            low, high = LOWEST_SHARE * INITIAL_VARIANCE, math.inf
            if self.psi is not None:
                low, high = self.psi[2], self.psi[0] + self.psi[2]
            self._check("sigma_init", low < self.sigma_init < high, f"a variance that psi can give, {low} to {high}")
        late = self.beta_anneal_from
        self._check("beta_anneal_from", _is_number(late) and 0 <= late < 1, "in [0, 1)")
        self._check("val_fraction", _is_number(self.val_fraction) and 0 <= self.val_fraction < 1, "in [0, 1)")
        self._check("bits", _is_whole(self.bits) and 1 <= self.bits <= 8, "a whole number from 1 to 8")
        self._check("milestones", all(0 < v < 1 for v in self.milestones), "shares of the run in (0, 1)")
        limit = self.max_minutes
        self._check("max_minutes", limit is None or (_is_number(limit) and limit > 0), "a positive number")
        self._check(
            "threads", self.threads is None or (_is_whole(self.threads) and self.threads >= 1), "a whole number >= 1"
        )
        for name, most in _MOST.items():
            self._check(name, (getattr(self, name) or 0) <= most, f"at most {most}")
        in_all = self.epochs * self.m_rounds * self.m_steps
        self._check("m_steps", in_all <= _MOST_M_STEPS, f"such that there are at most {_MOST_M_STEPS} in all")

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-friendly."""
        values = asdict(self)
        for name in ("milestones", "augment"):
            values[name] = list(values[name])
        values["psi"] = None if self.psi is None else list(self.psi)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises ValueError naming unknown settings."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown training settings {unknown}; known are {sorted(f.name for f in fields(cls))}")
        values = dict(values)
        if values.get("psi") is not None:
            values["psi"] = tuple(values["psi"])
        return cls(**values)
