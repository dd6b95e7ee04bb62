"""`glem train`: fit a flow to labelled images. Its options come from the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glem_augment import __version__
from glem_augment.cli.common import note, pick_device
from glem_augment.cli.settings import checked, given
from glem_augment.data.dataset import ImageData, open_data
from glem_augment.distributed import is_primary, world_size
from glem_augment.errors import ModelFileError
from glem_augment.io import lock_folder, write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import CONFIG
from glem_augment.training import EXIT_TIME_UP, TimeUpError, TrainConfig, Trainer
from glem_augment.training.checkpoint import NEWEST, has_checkpoint, load_checkpoint, require_unused
from glem_augment.training.logs import TRACKERS
from glem_augment.training.methods import method

RUN_FILE = "run.json"
# How DATA is opened. This is not part of TrainConfig, but a resumed run must see the same images.
_VIEW = {
    "split": "train", "image_size": None, "channels": None, "init": None, "skip_bad": False, "method": None,
    "log_to": None, "unlabelled": False,
}  # fmt: skip
SKIPPED_FILE = "skipped.json"
FEW_STEPS = 500  # fewer leave a flow of images unlearned, whatever the images


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    device, out = pick_device(args), args.out
    settings, view = given(args), {name: getattr(args, name) for name in _VIEW if hasattr(args, name)}
    if args.config is not None:
        settings = _over(checked(args.config, "--config"), settings)
    if args.resume and not has_checkpoint(out):
        # A run can be killed before its first checkpoint. Whoever restarts it cannot know.
        note(f"glem: no checkpoint in {out}; starting from the beginning")
        args.resume = False
    if args.resume:
        # The checkpoint is read before the data, because opening the data may take minutes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Trainer loads it again and warns of damage
            earlier = load_checkpoint(out)
        # max_minutes limited the part of the run before, not the whole run.
        settings = _over({**checked(earlier.facts["config"], str(earlier.path)), "max_minutes": None}, settings)
        before = _earlier_view(out)
        for name in ("method", "init"):
            if name in view and view[name] != before.get(name):
                raise ValueError(
                    f"the run in {out} has --{name} {before.get(name) or '(none)'}, not {view[name]}: leave it out to "
                    "go on, or give another --out"
                )
        view = {**before, **view}
    else:
        require_unused(out)  # before any image is read; the Trainer checks it again
    view = {**_VIEW, **view}
    if view["log_to"] and find_spec(view["log_to"]) is None:
        raise ValueError(f"--log-to {view['log_to']} needs that package: pip install {view['log_to']}")
    # The run takes image size and bits from the model that it starts from, unless others are asked for. A resumed run
    # needs its checkpoint alone, and that model may be gone.
    init_model = None if view["init"] is None or args.resume else GLEM.from_pretrained(view["init"])
    if init_model is not None:
        settings.setdefault("bits", init_model.bits)
        if view["method"] is None:  # a method may have a psi of its own
            settings.setdefault("psi", init_model.config.psi)
        channels, *side = init_model.image_shape
        view["image_size"] = view["image_size"] or side
        view["channels"] = view["channels"] or (channels if channels in (1, 3) else None)
    if view["unlabelled"] and not (view["method"] or "objective" in settings):
        view["method"] = "unlabelled"
    # Settings are checked before the data is opened. A checkpoint has all of them, whatever its method means today.
    chosen = None if args.resume else view["method"]
    config = TrainConfig(**settings) if chosen is None else method(chosen, **settings)
    size = view["image_size"]
    if size is not None and len(size) > 2:
        raise ValueError(f"--image-size takes height and width, or one number for both, got {len(size)} numbers")
    size = None if size is None else (size[0], size[-1])
    # Before the images are decoded, which may take minutes; the first rank locks for all.
    with lock_folder(out) if is_primary() else nullcontext():
        reading = {"progress": not args.quiet, **{name: view[name] for name in ("skip_bad", "unlabelled")}}
        data = open_data(args.data, view["split"], size, view["channels"], **reading)
        trainer = Trainer(data, config, out, args.resume, init_model, device, progress=not args.quiet, began=began)
        return _train(args, trainer, view)


def _train(args: argparse.Namespace, trainer: Trainer, view: dict[str, Any]) -> int:
    """Train, and report the result."""
    out, data = trainer.out, trainer.data
    if args.resume and trainer.step >= trainer.total_steps and (finished := _finished(out)) is not None:
        print(f"{out} is already finished: {_held_out(finished)}")
        return 0
    if is_primary() and (not args.resume or not (out / RUN_FILE).exists()):
        command = shlex.join(["glem", *args.argv])
        write_json(out / RUN_FILE, {"command": command, "version": __version__, "data": args.data, **view})
    if is_primary() and view["skip_bad"]:
        listed = [{"image": where, "reason": reason} for where, reason in data.skipped]
        write_json(out / SKIPPED_FILE, {"skipped": len(listed), "used": len(data), "images": listed})
    if view["log_to"] and is_primary():
        trainer.log.callbacks.append(TRACKERS[view["log_to"]](out, trainer.step))
    print(summary(trainer, data), flush=True)
    if trainer.total_steps < FEW_STEPS and not args.quiet:
        note(
            f"glem: {trainer.total_steps} steps are few: a flow takes thousands. Give more --epochs, or give a trained "
            "flow your classes in seconds with glem adapt"
        )
    if trainer.config.sample_every and find_spec("matplotlib") is None:
        note("glem: curves.png is left out, because matplotlib is not installed: pip install matplotlib")
    try:
        with warnings.catch_warnings():
            # Returns after a divergence, for example, are said above the bar.
            warnings.showwarning = lambda message, *about: tqdm.write(f"glem: {message}", file=sys.stderr)
            model = trainer.fit()
    except TimeUpError as stop:
        note(f"glem: {stop}")
        return EXIT_TIME_UP
    print(f"saved {out} after {tqdm.format_interval(trainer.seconds())}: {_held_out(model)}", flush=True)
    if model.config.training["worse_than_independent_pixels"]:
        note(
            f"glem: that is worse than independent pixels, {model.config.training['independent_pixels']:.3f}: "
            "this flow is no model of the images yet. Train for more --epochs, or at a lower --lr"
        )
    return 0


def _over(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`base` updated by `settings`, and its `flow_options` by those of `settings`."""
    merged = {**base, **settings}
    if "flow_options" in merged:
        merged["flow_options"] = {**base.get("flow_options", {}), **settings.get("flow_options", {})}
    return merged


def _earlier_view(out: Path) -> dict[str, Any]:
    """How the first part of the run opened its data; empty where there is no readable record."""
    try:
        earlier = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
        return {name: earlier[name] for name in _VIEW if name in earlier}
    except (OSError, ValueError, TypeError):
        return {}


def _finished(out: Path) -> GLEM | None:
    """The model, if it was written after the last checkpoint. A kill may have come between the two."""
    try:
        if (out / CONFIG).stat().st_mtime_ns < (out / NEWEST).stat().st_mtime_ns:
            return None
        return GLEM.from_pretrained(out)
    except (OSError, ModelFileError):
        return None


def summary(trainer: Trainer, data: ImageData) -> str:
    """A table for people of what is about to be trained."""
    model, split, config = trainer.whole(trainer.model), trainer.split, trainer.config
    shape = "x".join(str(side) for side in model.image_shape)
    parameters = sum(p.numel() for p in model.flow.parameters())
    where = f" on {trainer.device}" + (f", from step {trainer.step}" if trainer.step else "")
    names = ", ".join(data.classes[:10]) + (", ..." if len(data.classes) > 10 else "")
    learners = f"{len(split.nf)} for the flow, {len(split.g)} for the Gaussians"
    if not trainer.frozen_from:  # there are no M-steps
        learners = f"{len(split.nf) + len(split.g)} for the flow{' and the Gaussians' if config.joint else ''}"
    rows = [
        ("data", f"{data.name}: {len(data)} images, {shape}, {len(data.classes)} classes ({names})"),
        *([("skipped", f"{len(data.skipped)} images that can't be used, see {SKIPPED_FILE}")] if data.skipped else []),
        ("split", f"{learners}, {len(split.val)} held out"),
        ("flow", f"{model.config.flow['preset']}, {parameters:,} parameters, {model.numbers_are}"),
        ("objective", f"{config.objective}, beta {config.beta:g}"),
        ("batch", f"{config.batch_size} images on {world_size()} processes, learning rate {trainer.lr:g}"),
        ("steps", f"{trainer.total_steps} ({config.epochs} epochs of {trainer.steps_per_epoch}){where}"),
        ("out", str(trainer.out)),
    ]
    return "\n".join(f"{key:<11}{value}" for key, value in rows)


def _held_out(model: GLEM) -> str:
    held_out = model.config.training.get("held_out") or {}
    key, unit, _ = model.likelihood
    likelihood, accuracy = held_out.get(f"val_{key}"), held_out.get("val_accuracy")
    if likelihood is None:
        return repr(model)
    right = "" if accuracy is None else f", accuracy {100 * accuracy:.2f} %"
    return f"{likelihood:.3f} {unit}{right} on {held_out['val_images']} held-out images"
