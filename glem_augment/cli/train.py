"""`glem train`: train a model of images. Its options come from the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import json
import shlex
import time
import warnings
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from glem_augment import __version__
from glem_augment.checks import RUN_FILE
from glem_augment.cli import common
from glem_augment.training.config import AUGMENTATIONS, SETTINGS, TrainConfig, check_names, check_setting

if TYPE_CHECKING:
    from glem_augment.model.glem import GLEM
    from glem_augment.training import Trainer

DESCRIPTION = """\
Train a model of labelled images, or of images without classes (--unlabelled). DIR gets the model
(model.safetensors, config.json), the checkpoint, metrics.jsonl and samples/. A run that was stopped, even killed, goes
on with

  glem train DATA --out DIR --resume

and ends with the weights of an uninterrupted run (on a CPU, with the same --threads). --max-minutes cuts a run into
pieces. Each piece ends with a checkpoint, and with exit status 75 until the run is finished. A loop for it:

  until glem train DATA --out DIR --max-minutes 9 --resume; do [ $? = 75 ] || break; done

A run that diverges returns to its last good checkpoint and goes on at half the learning rate, up to three times.
"""
EXAMPLES = """\
  glem train photos/ --image-size 32 --augment flip,crop --out runs/photos
  glem train bundled:fashion-mnist --epochs 5 --out runs/quick
  glem train torch/cifar10@data --objective glem --preset mef_cifar --bits 5 --epochs 500 --out runs/cifar
  glem train photos/ --config settings.yaml --lr 5e-3 --out runs/photos2
  glem train --unlabelled unsorted/ --image-size 32 --out runs/unsorted
  glem train photos/ --init runs/photos --lr 3e-3 --warmup-steps 100 --out runs/tuned
"""
EXIT_CODES = "Exit codes: 0 finished, 2 an error, 75 stopped by --max-minutes, 130 stopped by Ctrl-C or SIGTERM."


# How DATA is opened. This is not part of TrainConfig, but a resumed run must open the same images.
_VIEW = {
    "split": "train", "image_size": None, "channels": None, "init": None, "log_to": None,
    "unlabelled": False,
}  # fmt: skip
# Arguments of argparse for each kind of setting. `_typed` parses the text of lists and tables.
PARSING: dict[Any, dict[str, Any]] = {
    int: {"type": common.whole(0), "metavar": "N"},
    float: {"type": common.number(), "metavar": "X"},
    "names": {"metavar": "LIST"},
    "text": {"metavar": "NAME"},
    "table": {"action": "append", "metavar": "KEY=JSON"},
}
LARGE = 64  # pixels above which a flow is slow on a CPU
FEW_STEPS = 500  # fewer steps are not enough for any flow of images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES, EXIT_CODES)
    # A usage line with all flags would fill half a screen.
    parser.usage = "glem train DATA --out DIR [--resume] [--config FILE] [options]"
    parser.add_argument("data", metavar="DATA", help=common.DATA_HELP)
    common.add_out(parser, "folder for everything that the run writes")
    resume = "continue from DIR's checkpoint, with its settings as defaults; without a checkpoint, start"
    parser.add_argument("--resume", action="store_true", help=resume)
    config = "YAML or JSON file of settings, named as the flags with _ for - (--flow: flow_options); flags win"
    parser.add_argument("--config", type=common.table, metavar="FILE", help=config)
    common.add_device(parser)
    parser.argument_default = argparse.SUPPRESS  # a flag that is not given leaves no attribute behind
    init = "start from the flow of this model (fine-tuning), with its image size and bits as defaults"
    parser.add_argument("--init", metavar="MODEL", help=init)
    log = "also send the rows of metrics.jsonl to DIR/tensorboard, or to the W&B project WANDB_PROJECT"
    parser.add_argument("--log-to", choices=("tensorboard", "wandb"), help=log)
    view = parser.add_argument_group("images")
    view.add_argument("--split", help="split of DATA (default: train)")
    common.add_image_size(view, "above 64 a flow is slow on a CPU (default: the common size of the images)")
    view.add_argument("--channels", type=int, choices=(1, 3), help="grey or RGB (default: as in the files)")
    switch = argparse.BooleanOptionalAction
    unlabelled = "train by likelihood on all images in DATA and its folders; glem fit gives the model classes later"
    view.add_argument("--unlabelled", action=switch, help=f"{unlabelled} (default: learn classes)")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, grouped. Flags that are not given leave no attribute behind."""
    defaults = TrainConfig().to_dict()
    group: argparse._ActionsContainer = parser
    for name, about in SETTINGS.items():
        if "group" in about:
            group = parser.add_argument_group(about["group"])
        text = f"{about['help']} (default: {about.get('shown', defaults[name])})".replace("%", "%%")
        kind = about["kind"]
        parsing: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else PARSING[kind]
        group.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, help=text, **parsing)


def _flag(name: str) -> str:
    """The option of a setting."""
    return "--flow" if name == "flow_options" else f"--{name.replace('_', '-')}"


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names, in the types that TrainConfig takes."""
    return {name: _typed(name, getattr(args, name), f"{_flag(name)}: ") for name in SETTINGS if hasattr(args, name)}


def checked(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a configuration file, in the types that TrainConfig takes.

    Raises:
        ValueError: an unknown setting, or a value of the wrong type; the message names setting and file.
    """
    check_names({str(key): value for key, value in table.items()}, f"{where}: ")
    return {name: _typed(name, value, f"{where}: ") for name, value in table.items()}


def _typed(name: str, value: Any, where: str) -> Any:
    """`value` in the setting's type. Lists of the command line are text, and YAML reads 1e-2 as text."""
    about = SETTINGS[name]
    kind = about["kind"]
    try:
        if kind == "table" and isinstance(value, list):
            value = dict(map(_flow_option, value))
        elif kind == "names" and isinstance(value, str):
            named = {"none": (), "": (), "paper": AUGMENTATIONS}
            value = named.get(value.strip(), [part.strip() for part in value.split(",")])
        elif kind in (int, float) and isinstance(value, str):
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        return check_setting(name, value)
    except (TypeError, ValueError, OverflowError) as error:
        text = str(error) if name in str(error) else f"{name} can't be {value!r}"
        raise ValueError(f"{where}{text}") from None


def _flow_option(text: Any) -> tuple[str, Any]:
    """`depth=[4,4]` as a key and a value; a bare word, as in `coupling=affine`, is a string."""
    key, equals, value = (part.strip() for part in str(text).partition("="))
    if not key or not equals:
        raise ValueError(f"flow_options are KEY=JSON, such as depth=[4,4], got {text!r}")
    with suppress(ValueError):
        return key, json.loads(value)
    return key, value


def run(args: argparse.Namespace) -> int:
    from glem_augment.distributed import is_primary
    from glem_augment.images.dataset import open_data
    from glem_augment.io import lock_folder
    from glem_augment.model.glem import GLEM
    from glem_augment.training import Trainer
    from glem_augment.training.checkpoint import has_checkpoint, load_checkpoint, require_unused

    began = time.monotonic()
    device, out = common.pick_device(args), args.out
    settings, view = given(args), {name: getattr(args, name) for name in _VIEW if hasattr(args, name)}
    if args.config is not None:
        settings = _over(checked(args.config, "--config"), settings)
    if args.resume and not has_checkpoint(out):
        # A run may have been killed before its first checkpoint.
        common.note(f"glem: no checkpoint in {out}; starting from the beginning")
        args.resume = False
    if args.resume:
        # The checkpoint is read before the data, because opening the data may take minutes.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Trainer loads it again and warns of damage
            earlier = load_checkpoint(out)
        # max_minutes limited the part of the run before, not the whole run.
        settings = _over({**checked(earlier.facts["config"], str(earlier.path)), "max_minutes": None}, settings)
        record = json.loads((out / RUN_FILE).read_text(encoding="utf-8")) if (out / RUN_FILE).is_file() else {}
        before = {name: record[name] for name in _VIEW if name in record}
        if "init" in view and view["init"] != before.get("init"):
            raise ValueError(
                f"the run in {out} has --init {before.get('init') or '(none)'}, not {view['init']}: leave it out to "
                "go on, or give another --out"
            )
        view = {**before, **view}
    else:
        require_unused(out)  # before any image is read; the Trainer checks it again
    view = {**_VIEW, **view}
    if view["log_to"] and find_spec(view["log_to"]) is None:
        raise ValueError(f"--log-to {view['log_to']} needs that package: pip install {view['log_to']}")
    # A run takes image size and bits from its start model, unless they are given. A resumed run needs its checkpoint
    # alone, and the start model may be gone.
    init_model = None if view["init"] is None or args.resume else GLEM.from_pretrained(view["init"])
    if init_model is not None:
        settings.setdefault("bits", init_model.bits)
        channels, *side = init_model.image_shape
        view["image_size"] = view["image_size"] or side
        view["channels"] = view["channels"] or (channels if channels in (1, 3) else None)
    if view["unlabelled"]:
        settings.setdefault("objective", "mle")
    config = TrainConfig(**settings)  # checked before the data is opened
    size = common.height_and_width(view["image_size"])
    # The folder is locked before the images are decoded, which may take minutes. The first rank locks it for all ranks.
    with lock_folder(out) if is_primary() else nullcontext():
        reading = {"progress": not args.quiet, "unlabelled": view["unlabelled"]}
        data = open_data(args.data, view["split"], size, view["channels"], **reading)
        progress = not args.quiet
        trainer = Trainer(data, config, out, args.resume, init_model, device, progress, began, ready=_header)
        return _train(args, trainer, view)


def _header(trainer: Trainer) -> None:
    """Print the summary before the flow is initialised."""
    common.say(summary(trainer))
    model = trainer.model
    side = max(model.image_shape[1:])
    if (
        side > LARGE
        and trainer.device.type == "cpu"
        and model.autoencoder is None
        and trainer.config.preset != "identity"
    ):
        common.note(
            f"glem: at {side} pixels a CPU takes minutes to start, and long for each step: give --image-size 32 or 64. "
            "glem fit needs no training"
        )


def _train(args: argparse.Namespace, trainer: Trainer, view: dict[str, Any]) -> int:
    """Train, and report the result."""
    from glem_augment.distributed import is_primary
    from glem_augment.io import write_json
    from glem_augment.training import EXIT_TIME_UP, TimeUpError
    from glem_augment.training.log import TRACKERS

    out = trainer.out
    if args.resume and trainer.step >= trainer.total_steps and (finished := _finished(out)) is not None:
        common.say(f"{out} is already finished: {_held_out(finished)}")
        return 0
    if is_primary() and (not args.resume or not (out / RUN_FILE).exists()):
        command = shlex.join(["glem", *args.argv])
        write_json(out / RUN_FILE, {"command": command, "version": __version__, "data": args.data, **view})
    if view["log_to"] and is_primary():
        trainer.log.callbacks.append(TRACKERS[view["log_to"]](out, trainer.step))
    if args.resume:
        common.say(summary(trainer))
    if trainer.total_steps < FEW_STEPS and not args.quiet:
        common.note(
            f"glem: {trainer.total_steps} steps are few: a flow takes thousands. Give more --epochs, or give a trained "
            "model your classes in seconds with glem fit"
        )
    if trainer.config.sample_every and find_spec("matplotlib") is None:
        common.note("glem: curves.png is left out, because matplotlib is not installed: pip install matplotlib")
    try:
        model = trainer.fit()
    except TimeUpError as stop:
        common.note(f"glem: {stop}")
        return EXIT_TIME_UP
    common.say(f"saved {out} after {tqdm.format_interval(trainer.seconds())}: {_held_out(model)}")
    if model.config.training["worse_than_independent_pixels"]:
        common.note(
            f"glem: that is worse than independent pixels, {model.config.training['independent_pixels']:.3f}: "
            "the model has not learned the images. Train for more --epochs, or at a lower --lr"
        )
    return 0


def _over(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`base` updated by `settings`; `flow_options` are updated one by one."""
    merged = {**base, **settings}
    if "flow_options" in merged:
        merged["flow_options"] = {**base.get("flow_options", {}), **settings.get("flow_options", {})}
    return merged


def _finished(out: Path) -> GLEM | None:
    """The model, if it was written after the last checkpoint. A kill may have come between the two."""
    from glem_augment.errors import ModelFileError
    from glem_augment.model.glem import GLEM
    from glem_augment.model.weights import CONFIG
    from glem_augment.training.checkpoint import NEWEST

    try:
        if (out / CONFIG).stat().st_mtime_ns < (out / NEWEST).stat().st_mtime_ns:
            return None
        return GLEM.from_pretrained(out)
    except (OSError, ModelFileError):
        return None


def summary(trainer: Trainer) -> str:
    """A table for people: data, model and steps of the training."""
    from glem_augment.distributed import world_size

    model, config, batches = trainer.whole(trainer.model), trainer.config, trainer.batches
    data, split = batches.data, batches.split
    shape = "x".join(str(side) for side in model.image_shape)
    parameters = sum(p.numel() for p in model.flow.parameters())
    where = f" on {trainer.device}" + (f", from step {trainer.step}" if trainer.step else "")
    names = ", ".join(data.classes[:10]) + (", ..." if len(data.classes) > 10 else "")
    learners = f"{len(split.nf)} for the flow, {len(split.g)} for the Gaussians"
    if not trainer.m_step.total:  # there are no M-steps
        learners = f"{len(split.nf) + len(split.g)} for the flow and the Gaussians"
    rows = [
        ("data", f"{data.name}: {len(data)} images, {shape}, {len(data.classes)} classes ({names})"),
        ("split", f"{learners}, {len(split.val)} held out"),
        ("flow", f"{model.config.flow['preset']}, {parameters:,} parameters, {model.numbers_are}"),
        ("objective", _objective(config)),
        ("batch", f"{config.batch_size} images on {world_size()} processes, learning rate {trainer.e_step.lr:g}"),
        ("steps", f"{trainer.total_steps} ({config.epochs} epochs of {trainer.steps_per_epoch}){where}"),
        ("out", str(trainer.out)),
    ]
    return "\n".join(f"{key:<11}{value}" for key, value in rows)


def _objective(config: TrainConfig) -> str:
    weights = {"hybrid": f", beta {config.beta:g}", "glem": f", KLD weight {config.kld_weight:g}"}
    return config.objective + weights.get(config.objective, "")


def _held_out(model: GLEM) -> str:
    held_out = model.config.training.get("held_out") or {}
    key, unit, _ = model.likelihood
    likelihood, accuracy = held_out.get(f"val_{key}"), held_out.get("val_accuracy")
    if likelihood is None:
        return repr(model)
    right = "" if accuracy is None else f", accuracy {100 * accuracy:.2f} %"
    return f"{likelihood:.3f} {unit}{right} on {held_out['val_images']} held-out images"
