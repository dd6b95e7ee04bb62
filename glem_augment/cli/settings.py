"""The options of ``glem train`` that are settings of ``TrainConfig``: flags, help and types, in one table.

Defaults are read from ``TrainConfig``, so they are written down once.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

from glem_augment.cli.common import number, whole
from glem_augment.flows.presets import PRESETS
from glem_augment.training.config import (
    AUGMENTATIONS,
    AVERAGING,
    LIKELIHOODS,
    MEAN_INITS,
    MEMORIES,
    OBJECTIVES,
    PRECISIONS,
    REPULSIONS,
    SCHEDULES,
    TrainConfig,
)


class Setting(NamedTuple):
    """One field of TrainConfig. ``kind``: int, float, bool, a tuple of choices, or the name of a special form."""

    kind: Any
    help: str
    metavar: str | None = None


FLOW, OBJECTIVE, OPTIMISER, GAUSSIANS, DATA, RUN = (
    "flow",
    "objective",
    "optimisation of the flow (E-step)",
    "class Gaussians (M-step)",
    "data",
    "run",
)
SETTINGS: dict[str, dict[str, Setting]] = {
    FLOW: {
        "preset": Setting(
            tuple(PRESETS),
            "size of the flow: mef_tiny (2.0 M parameters for 3x32x32), mef_small (8.1 M), mef_cifar (37.6 M, as "
            "published), mef_glem (42.8 M); with affine couplings glow_tiny (1.2 M) and glow_fast (0.6 M, the best for "
            "its time on a CPU); identity (none: the pixels)",
        ),
        "flow_options": Setting(
            "flow",
            "change a number of the preset, e.g. --flow depth=[4,4] (also blocks, width, coupling, actnorm, bound, "
            "rank, subnet, activation, patch: see create_flow); repeatable",
            "KEY=JSON",
        ),
        "bits": Setting(int, "bits per channel that are modelled, 1 to 8; the paper reports bits/dim at 5"),
    },
    OBJECTIVE: {
        "objective": Setting(
            OBJECTIVES, "glem: the paper's; mle: likelihood alone; hybrid: with cross-entropy, beyond the paper"
        ),
        "repulsion": Setting(
            REPULSIONS, "what pushes the classes apart in the M-step; by default kld for glem, else none"
        ),
        "kld_weight": Setting(float, "lambda, weight of the repulsion at the start"),
        "kld_weight_end": Setting(float, "lambda at the end, as a share of the one at the start"),
        "saturation": Setting(float, "where saturating repulsion levels off, nats per dimension"),
        "beta": Setting(
            float, "weight of the cross-entropy, per nat, against NLL per dimension; by default 0.3 for hybrid, else 0"
        ),
        "beta_end": Setting(float, "beta at the end, as a share of itself"),
        "beta_anneal_from": Setting(float, "share of the run from which beta falls to that, geometrically", "SHARE"),
        "ce_scale": Setting(
            float, "class scores are multiplied by this before the cross-entropy, for wider margins; by default 0.2"
        ),
        "label_smoothing": Setting(float, "of the cross-entropy"),
        "likelihood": Setting(LIKELIHOODS, "of the E-step: of an image given its class, or of the image alone"),
        "noise_std": Setting(float, "dequantise with Gaussian noise of this many levels; 0: uniform noise"),
    },
    OPTIMISER: {
        "epochs": Setting(int, "passes over the images"),
        "batch_size": Setting(int, "images per step"),
        "lr": Setting(float, "learning rate of Adamax"),
        "schedule": Setting(SCHEDULES, "of the learning rate: halved at the milestones, or a cosine"),
        "milestones": Setting("floats", "shares of the run in (0, 1) at which lr is halved", "SHARE"),
        "min_lr": Setting(float, "lr is not lowered beyond this"),
        "warmup_steps": Setting(int, "steps of linear warm-up, at most half the run"),
        "clip_norm": Setting(float, "gradients are cut to this norm"),
        "averaging": Setting(AVERAGING, "of the flow's weights"),
        "ema_decay": Setting(float, "of ema, per step"),
        "swa_start": Setting(float, "share of the run after which swa averages"),
        "max_bad_steps": Setting(int, "this many non-finite steps in a row are a divergence"),
        "max_rollbacks": Setting(
            int, "after a divergence, return to the last good checkpoint at half the learning rate, at most N times"
        ),
    },
    GAUSSIANS: {
        "mean_init": Setting(MEAN_INITS, "means at the start"),
        "mean_init_std": Setting(float, "standard deviation of random means"),
        "sigma_init": Setting(float, "variances at the start; by default the middle of psi's range, 0.3 without psi"),
        "sigma_init_std": Setting(float, "standard deviation of noise on the variances' parameters at the start"),
        "joint": Setting(bool, "learn the Gaussians with the flow, by the E-step's loss, in place of M-steps"),
        "joint_lr": Setting(float, "learning rate of the Gaussians then"),
        "psi": Setting("psi", "variances a*sigmoid(b*s)+c; none: plain variances", "A"),
        "m_rounds": Setting(int, "M-steps per epoch"),
        "m_steps": Setting(int, "Adam steps in each M-step"),
        "m_budget": Setting(float, "sum of Adam's learning rates over the run: how far a mean can move"),
        "sigma_lr_scale": Setting(float, "learning rate of the variances relative to the means'"),
        "learn_mu": Setting(bool, "learn the means"),
        "learn_sigma": Setting(bool, "learn the variances"),
        "freeze_gaussians_at": Setting(
            float, "share of the run after which the Gaussians stay and the flow trains on all images"
        ),
        "refit_steps": Setting(
            int, "Adam steps on the Gaussians at the end, on the training images; by default 200 for hybrid, else 0"
        ),
        "refit_beta": Setting(float, "beta of that refit; by default the run's"),
        "modes_rank": Setting(int, "principal modes per class, fitted at the end; 0 for none"),
    },
    DATA: {
        "augment": Setting(
            "augment",
            f"of the flow's training images, with commas: {', '.join(AUGMENTATIONS)}; paper: all four; none. "
            "Digits must not flip",
            "LIST",
        ),
        "code_rows": Setting(int, "the lowest rows of the images are a class code, and are not augmented"),
        "g_fraction": Setting(float, "share of each class for the M-step"),
        "val_fraction": Setting(float, "share of each class held out for measuring"),
        "val_max": Setting(int, "at most this many images held out, but one of each class"),
    },
    RUN: {
        "seed": Setting(int, "of everything random"),
        "precision": Setting(PRECISIONS, "of the subnets during training; the bijection is float32"),
        "memory": Setting(
            MEMORIES,
            "reversible: rebuild activations in the backward pass, so that memory does not grow with the flow's depth; "
            "slower",
        ),
        "compile": Setting(bool, "torch.compile the flow's steps: a slow start, then faster steps"),
        "threads": Setting(int, "CPU threads; the same number gives the same weights bit for bit"),
        "workers": Setting(int, "processes that decode images that don't fit in memory"),
        "sample_every": Setting(int, "draw sample grids and curves every N epochs; 0 never"),
        "checkpoint_minutes": Setting(float, "time between checkpoints; there is one at each end of an epoch too"),
        "max_minutes": Setting(
            float,
            "stop after that long, with a checkpoint and exit status 75; the same command with --resume goes on",
        ),
    },
}
KINDS = {name: setting.kind for group in SETTINGS.values() for name, setting in group.items()}
_NULL = {field.name for field in fields(TrainConfig) if field.default is None} | {"psi"}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of TrainConfig. Flags that are not given leave no attribute behind."""
    defaults = {f.name: _default(f) for f in fields(TrainConfig)}
    for title, settings in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, setting in settings.items():
            flag = "--flow" if name == "flow_options" else f"--{name.replace('_', '-')}"
            options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": setting.help}
            if defaults[name] is not None and setting.kind != "flow":
                options["help"] += f" (default: {_shown(name, defaults[name])})"
            options.update(_argparse_options(setting))
            group.add_argument(flag, **options)


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    assert field.default_factory is not MISSING
    return field.default_factory()


def _shown(name: str, value: Any) -> str:
    if name == "augment":
        return ",".join(value) or "none"
    return " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def _argparse_options(setting: Setting) -> dict[str, Any]:
    kind = setting.kind
    if isinstance(kind, tuple):
        return {"choices": kind}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is int:
        return {"type": whole(0), "metavar": "N"}
    if kind is float:
        return {"type": number(), "metavar": "X"}
    if kind == "floats":
        return {"type": number(0), "nargs": "*", "metavar": setting.metavar}
    if kind == "psi":
        return {"nargs": "+", "metavar": ("A", "B C | none")}
    if kind == "flow":
        return {"action": "append", "type": _flow_option, "metavar": setting.metavar}
    return {"type": _augment, "metavar": setting.metavar}


def _flow_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON, such as depth=[4,4]")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        # A bare word is a string: coupling=affine need not be coupling='"affine"'.
        return key.strip(), value


def _augment(text: str) -> tuple[str, ...]:
    text = text.strip()
    if text in ("none", ""):
        return ()
    return AUGMENTATIONS if text == "paper" else tuple(part.strip() for part in text.split(","))


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names, in the form that TrainConfig takes."""
    values = {name: getattr(args, name) for name in KINDS if hasattr(args, name)}
    if "flow_options" in values:
        values["flow_options"] = dict(values["flow_options"])
    if "milestones" in values:
        values["milestones"] = tuple(values["milestones"])
    if "psi" in values:
        values["psi"] = _psi(values["psi"])
    return values


def _psi(words: list[str]) -> tuple[float, float, float] | None:
    if [word.lower() for word in words] == ["none"]:
        return None
    try:
        a, b, c = (float(word) for word in words)
    except ValueError:
        raise ValueError(f"--psi takes three numbers or none, got {' '.join(words)}") from None
    return a, b, c


def checked(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a configuration file, in the types that TrainConfig takes.

    YAML reads ``1e-2`` as text, and both YAML and JSON hold lists where TrainConfig has tuples.

    Raises:
        ValueError: an unknown setting, or one of the wrong type, naming it and the file.
    """
    unknown = sorted(str(key) for key in table if key not in KINDS)
    if unknown:
        raise ValueError(f"{where}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(KINDS))}")
    return {name: _typed(name, value, where) for name, value in table.items()}


def _typed(name: str, value: Any, where: str) -> Any:
    kind, plain = KINDS[name], not isinstance(value, bool)
    if value is None and name in _NULL:
        return None
    try:
        if kind is int and plain and float(value) == int(float(value)):
            return int(float(value))
        if kind is float and plain:
            return float(value)
        if kind is bool and not plain:
            return value
        if isinstance(kind, tuple) and isinstance(value, str):
            return value
        # "none" is a word of the command line; YAML's false and null are not meant by it.
        if kind == "psi" and value == "none":
            return None
        if kind in ("psi", "floats") and isinstance(value, list):
            numbers = tuple(float(v) for v in value)
            if kind == "floats" or len(numbers) == 3:
                return numbers
        if kind == "flow" and isinstance(value, dict):
            return {str(key): v for key, v in value.items()}
        if kind == "augment":
            if isinstance(value, list) and all(isinstance(v, str) for v in value):
                return tuple(value)
            if isinstance(value, str):
                return _augment(value)
    except (TypeError, ValueError, OverflowError):
        pass
    wanted = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        "psi": "three numbers or none",
        "floats": "a list of numbers",
        "flow": "a table",
        "augment": "a list of names",
    }.get(kind if not isinstance(kind, tuple) else "", "a word")
    raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}")
