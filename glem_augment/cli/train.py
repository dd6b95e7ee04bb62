"""`glem train`: train a model of images. Its options come from the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from glem_augment.checks import check_choice
from glem_augment.cli import common
from glem_augment.training.config import SETTINGS, TrainConfig, check_setting

if TYPE_CHECKING:
    from glem_augment.training import Trainer

DESCRIPTION = """\
Train a model of labelled images. DIR gets the model (model.safetensors, config.json), checkpoint.pt, metrics.jsonl
and samples/. After a stop, even a kill, the same command with --resume goes on, and ends with the weights of an
uninterrupted run (on a CPU, with the same --threads). Ctrl-C and SIGTERM write a checkpoint first, so this trains in
pieces of nine minutes (timeout exits with 124):

  while timeout -s TERM 9m glem train DATA --out DIR --resume; [ $? = 124 ]; do :; done

A run that diverges stops, and its last good checkpoint stays: go on with --resume and a lower --lr.
"""
EXAMPLES = """\
  glem train photos/ --image-size 32 --augment flip,crop --out runs/photos
  glem train bundled:fashion-mnist --epochs 5 --out runs/quick
  glem train torch/cifar10@data --objective glem --preset mef_cifar --bits 5 --epochs 500 --out runs/cifar
  glem train photos/ --config settings.yaml --lr 5e-3 --out runs/photos2
  glem train photos/ --init runs/photos --lr 3e-3 --warmup-steps 100 --out runs/tuned
"""
METAVARS = {int: "N", float: "X", "names": "LIST", "text": "NAME"}  # of settings, by kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    # A usage line with all flags would fill half a screen.
    parser.usage = "glem train DATA --out DIR [--resume] [--config FILE] [options]"
    parser.add_argument("data", metavar="DATA", help=common.DATA_HELP)
    common.add_out(parser, "folder for everything that the run writes")
    resume = "go on from DIR's checkpoint, with the same options; without a checkpoint, start"
    parser.add_argument("--resume", action="store_true", help=resume)
    config = "YAML or JSON file of settings, named as the flags with _ for - (--flow: flow_options); flags win"
    parser.add_argument("--config", type=common.table, metavar="FILE", help=config)
    common.add_device(parser)
    common.add_import(parser)
    init = "start from the flow of this model (fine-tuning), with its image size and bits as defaults"
    parser.add_argument("--init", metavar="MODEL", help=init)
    view = parser.add_argument_group("images")
    view.add_argument("--split", default="train", help="split of DATA (default: train)")
    common.add_image_size(view, "above 64 a flow is slow on a CPU (default: the common size of the images)")
    view.add_argument("--channels", type=int, choices=(1, 3), help="grey or RGB (default: as in the files)")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, grouped. Flags that are not given leave no attribute behind."""
    defaults = TrainConfig().to_dict()
    group: argparse._ActionsContainer = parser
    for name, about in SETTINGS.items():
        if "group" in about:
            group = parser.add_argument_group(about["group"])
        text = f"{about['help']} (default: {about.get('shown', defaults[name])})".replace("%", "%%")
        kind, flag = about["kind"], f"--{name.replace('_', '-')}"
        how: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"metavar": METAVARS.get(kind)}
        if name == "preset":  # a flow of --import has a name, too
            how, text = {"metavar": "NAME"}, f"{', '.join(kind)}, or a flow of --import: {text}"
        if kind == "table":
            flag, how = "--flow", {"action": "append", "type": _flow_option, "metavar": "KEY=JSON"}
        group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **how)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of --config, and the settings that the command line names, which win."""
    named = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    table = {str(name): value for name, value in (args.config or {}).items()}
    for name in table:
        check_choice("a setting of --config", name, tuple(SETTINGS))
    if "flow_options" in named:
        stated = check_setting("flow_options", table.get("flow_options", {}))
        named["flow_options"] = {**stated, **dict(named["flow_options"])}
    return {**table, **named}


def _flow_option(text: str) -> tuple[str, Any]:
    """`depth=[4,4]` as a key and a value; a bare word, as in `coupling=affine`, is a string."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON, such as depth=[4,4]")
    with suppress(ValueError):
        return key, json.loads(value)
    return key, value


def run(args: argparse.Namespace) -> None:
    from glem_augment.images.dataset import open_data
    from glem_augment.model.glem import GLEM
    from glem_augment.training.checkpoint import has_checkpoint, require_unused
    from glem_augment.training.trainer import Trainer

    device, out = common.pick_device(args, ranks=True), args.out
    settings = given(args)
    if not (args.resume and has_checkpoint(out)):
        require_unused(out)  # before any image is read; the Trainer checks it again
        if args.resume:
            common.note(f"glem: no checkpoint in {out}; starting from the beginning")
    size, init_model = args.image_size, None
    if args.init is not None:  # a run takes image size and bits from its start model, unless they are given
        init_model = GLEM.from_pretrained(args.init)
        settings.setdefault("bits", init_model.bits)
        channels, *side = init_model.image_shape
        size = size or side
        args.channels = args.channels or (channels if channels in (1, 3) else None)
    config = TrainConfig(**settings)  # checked before the data is opened
    data = open_data(args.data, args.split, size, args.channels)
    trainer = Trainer(data, config, out, args.resume, init_model, device, ready=_tell)
    model = trainer.fit()
    common.say(f"saved {out} after {tqdm.format_interval(trainer.seconds())}: {model!r}")
    if model.config.training["worse_than_independent_pixels"]:
        common.note(
            "glem: its likelihood is worse than that of independent numbers, "
            f"{model.config.training['independent_pixels']:.3f}: train for more --epochs, or at a lower --lr"
        )


def _tell(trainer: Trainer) -> None:
    common.say(summary(trainer))


def summary(trainer: Trainer) -> str:
    """A table for people: data, model and steps of the training."""
    from glem_augment.distributed import world_size

    model, config, batches = trainer.model, trainer.config, trainer.batches
    data, held_out = batches.data, len(batches.split.val)
    shape = "x".join(str(side) for side in model.image_shape)
    parameters = sum(p.numel() for p in model.flow.parameters())
    where = f" on {trainer.device}" + (f", from step {trainer.step}" if trainer.step else "")
    names = ", ".join(data.classes[:10]) + (", ..." if len(data.classes) > 10 else "")
    rows = [
        ("data", f"{data.name}: {len(data)} images, {shape}, {len(data.classes)} classes ({names})"),
        ("split", f"{len(data) - held_out} to train on, {held_out} held out"),
        ("flow", f"{model.config.flow['preset']}, {parameters:,} parameters, {model.numbers_are}"),
        ("objective", config.objective),
        ("batch", f"{config.batch_size} images on {world_size()} processes, learning rate {trainer.lr:g}"),
        ("steps", f"{trainer.total_steps} ({config.epochs} epochs of {trainer.steps_per_epoch}){where}"),
        ("out", str(trainer.out)),
    ]
    return "\n".join(f"{key:<11}{value}" for key, value in rows)
