"""The settings of a training run. Options of the command line are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from glem_augment.checks import check_choice, check_number, check_whole
from glem_augment.names import PRESET_NAMES, Preset
from glem_augment.parts import kinds

OBJECTIVES = ("hybrid", "mle", "glem")
AUGMENTATIONS = ("flip", "crop", "rotate", "jitter")


def _setting(default: Any, kind: Any, text: str, **more: Any) -> Any:
    """A field of `TrainConfig`.

    Args:
        kind: int, float, a tuple of allowed words, "names", "text" or "table".
        more: `low`, `high` and `above` (an excluded lower limit) of a number; `shown`, the default in words; `group`,
            the title of the settings from here on.

    A setting whose default is None takes None as a value.
    """
    metadata = {"kind": kind, "help": text, "optional": default is None, **more}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """How a model is trained. `training.objective` has the losses.

    - "hybrid" minimises `mean NLL / d + beta * cross-entropy` of the class posterior, with d the number of dimensions
      and NLL in nats per image. The loss teaches the flow and the Gaussians together.
    - "mle" minimises the mean NLL alone, for images without classes.
    - "glem" is the paper's. E-steps on the flow (Eq. 3) alternate with M-steps on the Gaussians (Eq. 5), which push the
      classes apart with the weight `kld_weight`.

    ValueError, TypeError: a setting out of its limits.
    """

    preset: Preset = _setting(
        "glow_fast", PRESET_NAMES, "size of the flow: glow_fast (0.6 M parameters for 3x32x32, the best for its time "
        "on a CPU), glow_tiny (1.2 M); with the paper's couplings mef_tiny (2.0 M), mef_small (8.1 M), mef_cifar (37.6 "
        "M, as published), mef_glem (42.8 M); latent, for --autoencoder; identity (none: the pixels)", group="flow",
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
    views: int = _setting(
        4, int, "latents of each image, the first of the image and further ones of augmented copies, that an "
        "autoencoder's run encodes once; flip alone has two", low=1, high=64,
    )  # fmt: skip
    dropout: float = _setting(
        0.0, float, "part of the channels of the flow's networks that each step leaves out in training", high=0.9
    )
    bits: int = _setting(8, int, "bits per channel that are modelled; the paper uses 5", low=1, high=8)
    objective: Literal["hybrid", "mle", "glem"] = _setting(
        "hybrid", OBJECTIVES, "hybrid: likelihood and cross-entropy, with Gaussians learned jointly; mle: likelihood "
        "alone, likewise; glem: the paper's, with repulsion by the KLD in M-steps", group="objective",
    )  # fmt: skip
    beta: float | None = _setting(
        None, float, "of hybrid: weight of the cross-entropy, per nat, against NLL per dimension", shown="0.3"
    )
    beta_end: float | None = _setting(
        None, float, "of hybrid: beta at the end of the run, to which it falls linearly", shown="beta"
    )
    kld_weight: float = _setting(10.0, float, "of glem: lambda_0, weight of the repulsion at the start")
    m_steps: int = _setting(
        5, int, "of glem: Adam steps of the M-step at the start of an epoch, on a tenth of the images", low=1
    )
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
        "hundredth",
    )  # fmt: skip
    modes_rank: int = _setting(
        64, int, "principal modes per class, fitted at the end; 0 for none", high=4096, group="class Gaussians"
    )
    augment: tuple[str, ...] = _setting(
        (), "names", f"augmentations of the model's training images, separated by commas: {', '.join(AUGMENTATIONS)}, "
        "or none; the paper uses all four. Do not flip digits: samples would be flipped too", shown="none",
        group="data",
    )  # fmt: skip
    val_fraction: float = _setting(0.05, float, "part of each class held out, at most 2,000 images in all", high=0.99)
    seed: int = _setting(0, int, "seed of everything random", high=2**63 - 1, group="run")
    precision: Literal["fp32", "bf16"] = _setting(
        "fp32", ("fp32", "bf16"), "of the subnets in training; the bijection is float32"
    )
    threads: int | None = _setting(
        None, int, "CPU threads; equal numbers give equal weights", low=1, high=4096, shown="PyTorch's choice"
    )
    workers: int = _setting(0, int, "processes that decode images that do not fit in memory", high=512)
    sample_every: int = _setting(5, int, "draw a grid of samples every N epochs; 0: never")

    def __post_init__(self) -> None:
        for name in SETTINGS:
            setattr(self, name, check_setting(name, getattr(self, name)))
        if self.beta is None:
            self.beta = 0.3 if self.objective == "hybrid" else 0.0
        if self.beta_end is None:
            self.beta_end = self.beta
        if (self.beta or self.beta_end) and self.objective != "hybrid":
            raise ValueError(f"objective={self.objective!r} has no cross-entropy, got beta={self.beta}; use 'hybrid'")
        if self.latent_noise and self.autoencoder is None:
            raise ValueError(
                "latent_noise is for training in an autoencoder's latents: give autoencoder, or leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can carry them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


SETTINGS: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(TrainConfig)}


def check_setting(name: str, value: Any) -> Any:
    """The value in the type of `TrainConfig`'s field. ValueError, TypeError: another value, by name.

    Text, as on the command line and as YAML reads 1e-2, becomes a number or a list.
    """
    about = SETTINGS[name]
    kind, low, high = about["kind"], about.get("low", 0), about.get("high", math.inf)
    if value is None and about["optional"]:
        return None
    if name == "preset":
        check_choice(name, value, tuple(dict.fromkeys([*kind, *kinds("flow")])))
    elif isinstance(kind, tuple):
        check_choice(name, value, kind)
    elif kind in (int, float):
        with suppress(ValueError):
            if isinstance(value, str):
                value = int(value) if kind is int and value.isdecimal() else float(value)
        if kind is int:
            return check_whole(
                name, int(value) if isinstance(value, float) and value.is_integer() else value, low, high
            )
        return check_number(name, value, about.get("above", low), high, open_low="above" in about)
    elif kind == "table" and not isinstance(value, dict):
        raise TypeError(f"{name} must be a table of the preset's numbers, got {value!r}")
    elif kind == "text" and not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {value!r}")
    elif kind == "names":
        if isinstance(value, str):
            listed = {"none": (), "paper": AUGMENTATIONS}
            value = listed.get(value, [part.strip() for part in value.split(",")])
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a list of names, got {value!r}")
        for each in value:
            check_choice(name, each, AUGMENTATIONS)
        return tuple(value)
    return value
