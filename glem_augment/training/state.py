"""The whole state of a run as JSON facts and named tensors, and back.

What follows from the settings and the step is not stored but made again: the schedules, the optimizers' learning rates,
the order of the images, the noise. So a file can't bring in anything but counters and numbers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glem_augment.errors import TrainingError
from glem_augment.training.checkpoint import RULES, Checkpoint
from glem_augment.training.optim import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from glem_augment.training.trainer import Trainer

_COUNTERS = ("step", "m_done", "bad_steps", "bad_in_a_row", "m_bad_in_a_row", "rollbacks")


def state_of(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of ``trainer``, for ``Checkpoints.save``."""
    guard, losses = trainer.guard.state()
    facts = {
        "config": trainer.config.to_dict(),
        "fingerprint": trainer.fingerprint,
        "init_from": trainer.init_from,
        "flow": trainer.model.config.flow,
        "rules": RULES,
        **{name: getattr(trainer, name) for name in _COUNTERS},
        "lr_scale": trainer.lr_scale,
        "epoch_loss": list(trainer.epoch_loss),
        "seconds": trainer.seconds(),
        "guard": guard,
    }
    groups = {
        "model": trainer.model.state_dict(),
        "average": trainer.average.state_dict(),
        "flow_optimizer": optimizer_tensors(trainer.flow_optimizer) if trainer.flow_optimizer else {},
        "m_optimizer": optimizer_tensors(trainer.m_optimizer),
        "run": {"rng": torch.get_rng_state(), "losses": losses},
    }
    return facts, {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put ``trainer``, made with the same settings and data, into the state that ``state_of`` described.

    Raises:
        TrainingError: the checkpoint is not of such a run.
    """
    try:
        _restore(trainer, checkpoint)
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError, IndexError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(f"{checkpoint.path} does not fit this run: {type(error).__name__}: {first}") from error


def _restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    facts = checkpoint.facts
    flow = trainer.model.config.flow  # older versions did not write it
    if json.dumps(facts.get("flow", flow), sort_keys=True) != json.dumps(flow, sort_keys=True):  # lists are tuples here
        raise ValueError("its flow is another one")
    for name in _COUNTERS:
        if type(facts[name]) is not int or not 0 <= facts[name] < 2**53:
            raise ValueError(f"{name} is {facts[name]!r}")
    if facts["step"] > trainer.total_steps or facts["m_done"] > trainer.m_total:
        raise ValueError(f"step {facts['step']} of {trainer.total_steps}, M-step {facts['m_done']}")
    scale, seconds = facts["lr_scale"], facts["seconds"]
    if type(scale) is not float or not 0 < scale <= 1 or type(seconds) is not float or not 0 <= seconds < 1e12:
        raise ValueError(f"lr_scale is {scale!r}, seconds {seconds!r}")
    parts: dict[str, dict[str, Tensor]] = {
        "model": {}, "average": {}, "flow_optimizer": {}, "m_optimizer": {}, "run": {}
    }  # fmt: skip
    for name, tensor in checkpoint.tensors.items():
        group, _, rest = name.partition("/")
        parts[group][rest] = tensor
    trainer.model.load_state_dict(parts["model"], strict=True)
    trainer.average.load_state_dict(parts["average"])
    if trainer.flow_optimizer is not None:
        load_optimizer_tensors(trainer.flow_optimizer, parts["flow_optimizer"])
    load_optimizer_tensors(trainer.m_optimizer, parts["m_optimizer"])
    torch.set_rng_state(parts["run"]["rng"])
    trainer.guard.load(facts["guard"], parts["run"]["losses"])
    for name in _COUNTERS:
        setattr(trainer, name, facts[name])
    total, count = facts["epoch_loss"]
    trainer.epoch_loss = (float(total), int(count))
    trainer.set_lr_scale(scale)


def all_finite(trainer: Trainer) -> bool:
    """Whether every weight, averaged ones too, is finite; one synchronisation."""
    tensors = [*trainer.model.state_dict().values(), *trainer.average.state_dict().values()]
    flags = [torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    return bool(torch.stack(flags).all()) if flags else True
