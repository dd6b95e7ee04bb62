"""The options of `glem train`, made from the fields of `TrainConfig`. Like `parsers`, it does not import torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from glem_augment.cli.arguments import DATA_HELP, add_device, add_out, new_parser, number, table, whole
from glem_augment.training.config import AUGMENTATIONS, SETTINGS, TrainConfig, check_names, check_setting
from glem_augment.training.methods import METHODS

TRAIN = """\
Fit a class-conditional flow to labelled images, or a flow to images without classes (--unlabelled). DIR gets the model
(model.safetensors, config.json), the checkpoint, metrics.jsonl and samples/. A run that was stopped, even killed, goes
on with

  glem train DATA --out DIR --resume

and ends with the same weights as one that never stopped (on a CPU, with the same --threads). --max-minutes cuts a run
into pieces: each ends with a checkpoint, and with exit status 75 until the run is finished. A loop for it:

  until glem train DATA --out DIR --max-minutes 9 --resume; do [ $? = 75 ] || break; done

A run that diverges returns to its last good checkpoint and goes on at half the learning rate, up to three times.
--help-all shows the settings for research too.
"""
TRAIN_EXAMPLES = """\
  glem train photos/ --image-size 32 --augment flip,crop --out runs/photos
  glem train bundled:fashion-mnist --epochs 5 --out runs/quick
  glem train torch/cifar10@data --method glem --preset mef_cifar --bits 5 --epochs 500 --batch-size 512 --out runs/cifar
  glem train photos/ --config settings.yaml --lr 5e-3 --out runs/photos2
  glem train --unlabelled unsorted/ --image-size 32 --out runs/unsorted
  glem train photos/ --init runs/photos --lr 3e-3 --warmup-steps 100 --out runs/tuned
"""
EXIT_CODES = "Exit codes: 0 finished, 2 an error, 75 stopped by --max-minutes, 130 stopped by Ctrl-C or SIGTERM."


def add_train(commands: Any) -> None:
    parser = new_parser(commands, "train", TRAIN, TRAIN_EXAMPLES, EXIT_CODES)
    # A usage line with all flags would fill half a screen.
    parser.usage = "glem train DATA --out DIR [--resume] [--config FILE] [options]"
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    add_out(parser, "folder for everything that the run writes")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from DIR's checkpoint, with its settings where none are given; start if there is none",
    )
    parser.add_argument(
        "--config",
        type=table,
        metavar="FILE",
        help="settings of the flow and its training from a YAML or JSON file: the names from --preset on, with _ for - "
        "(--flow is flow_options); flags win",
    )
    add_device(parser)
    parser.argument_default = argparse.SUPPRESS  # a flag that is not given leaves no attribute behind
    parser.add_argument(
        "--init",
        metavar="MODEL",
        help="start from this model's flow (fine-tuning) in place of a new one; images are resized and converted to "
        "its own, and bits and psi are its own where none are given",
    )
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="settings of a published method, under all others that are given (docs/reproduction.md describes each; "
        "glem is the paper's; default: hybrid-joint, this library's)",
    )
    parser.add_argument(
        "--log-to",
        choices=("tensorboard", "wandb"),
        help="send the rows of metrics.jsonl there as well: to DIR/tensorboard, or to the W&B project WANDB_PROJECT",
    )
    view = parser.add_argument_group("images")
    view.add_argument("--split", help="of the data (default: train)")
    view.add_argument(
        "--image-size",
        nargs="+",
        type=whole(1),
        metavar="N",
        help="height and width in pixels, or one number for both; images are resized, then cropped at the centre "
        "(default: the size that they share)",
    )
    view.add_argument("--channels", type=int, choices=(1, 3), help="grey or RGB (default: what they are)")
    view.add_argument(
        "--unlabelled",
        action=argparse.BooleanOptionalAction,
        help="DATA has no classes: all images below the folder, however nested, train by likelihood alone; glem adapt "
        "gives the flow classes (default: classes)",
    )
    view.add_argument(
        "--skip-bad",
        action=argparse.BooleanOptionalAction,
        help="leave out images that can't be read, and list them in DIR/skipped.json (default: stop at the first)",
    )
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, grouped. Flags that are not given leave no attribute behind.

    `--help` leaves out the settings that only research needs; `--help-all` shows them too.
    """
    hidden: dict[argparse.Action, str] = {}

    class HelpAll(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
            for action, text in hidden.items():
                action.help = text
            parser.print_help()
            parser.exit()

    parser.add_argument("--help-all", action=HelpAll, nargs=0, help="show the settings for research as well, and exit")
    defaults = TrainConfig().to_dict()
    group: argparse._ActionsContainer = parser
    for name, about in SETTINGS.items():
        if "group" in about:
            group = parser.add_argument_group(about["group"])
        text = f"{about['help']} (default: {about.get('shown', defaults[name])})".replace("%", "%%")
        action = group.add_argument(
            "--flow" if name == "flow_options" else f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if about.get("research") else text,
            **_parsing(name, about),
        )
        if about.get("research"):
            hidden[action] = text


def _parsing(name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What argparse needs to know of a setting's values."""
    kind = about["kind"]
    if isinstance(kind, tuple):
        return {"choices": kind}
    parsing: dict[Any, dict[str, Any]] = {
        bool: {"action": argparse.BooleanOptionalAction},
        int: {"type": whole(0), "metavar": "N"},
        float: {"type": number(), "metavar": "X"},
        "numbers": {"nargs": "+", "metavar": "X"},
        "names": {"type": _names, "metavar": "LIST"},
        "text": {"metavar": "NAME"},
        "table": {"action": "append", "type": _flow_option, "metavar": "KEY=JSON"},
    }
    return parsing[kind]


def _flow_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON, such as depth=[4,4]")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        # A bare word is a string: coupling=affine need not be coupling='"affine"'.
        return key.strip(), value


def _names(text: str) -> tuple[str, ...]:
    text = text.strip()
    if text in ("none", ""):
        return ()
    return AUGMENTATIONS if text == "paper" else tuple(part.strip() for part in text.split(","))


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names, in the form that TrainConfig takes."""
    values = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    if "flow_options" in values:
        values["flow_options"] = dict(values["flow_options"])
    return {name: _typed(name, value, f"--{name.replace('_', '-')}: ") for name, value in values.items()}


def checked(table: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a configuration file, in the types that TrainConfig takes.

    Raises:
        ValueError: an unknown setting, or a value of the wrong type, naming it and the file.
    """
    check_names({str(key): value for key, value in table.items()}, f"{where}: ")
    return {name: _typed(name, value, f"{where}: ") for name, value in table.items()}


def _typed(name: str, value: Any, where: str) -> Any:
    """`value` in the setting's type: YAML reads 1e-2 as text, and numbers of the command line are text too."""
    about = SETTINGS[name]
    kind = about["kind"]
    try:
        if kind == "numbers" and about["optional"] and value in ("none", ["none"]):
            value = None
        elif kind == "numbers" and isinstance(value, list):
            value = [float(v) for v in value]
        elif kind == "names" and isinstance(value, str):
            value = _names(value)
        elif kind in (int, float) and isinstance(value, str):
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        return check_setting(name, value)
    except (TypeError, ValueError, OverflowError) as error:
        text = str(error) if name in str(error) else f"{name} can't be {value!r}"
        raise ValueError(f"{where}{text}") from None
