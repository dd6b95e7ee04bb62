"""The options of `glem train` that are settings of `TrainConfig`, made from what its fields say of themselves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from glem_augment.cli.common import number, whole
from glem_augment.training.config import AUGMENTATIONS, SETTINGS, TrainConfig, check_names, check_setting


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
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(s["group"] for s in SETTINGS.values())}
    for name, about in SETTINGS.items():
        text = f"{about['help']}{_default(name, about, defaults[name])}".replace("%", "%%")
        action = groups[about["group"]].add_argument(
            "--flow" if name == "flow_options" else f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if about.get("research") else text,
            **_parsing(name, about),
        )
        if about.get("research"):
            hidden[action] = text


def _default(name: str, about: Mapping[str, Any], default: Any) -> str:
    if "shown" in about:
        return f" (default: {about['shown']})"
    if name == "flow_options":
        return ""
    if isinstance(default, list):
        return f" (default: {' '.join(f'{v:g}' for v in default) or 'none'})"
    return f" (default: {default})"


def _parsing(name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """What argparse needs to know of a setting's values."""
    kind = about["kind"]
    if isinstance(kind, tuple):
        return {"choices": kind}
    return {
        bool: {"action": argparse.BooleanOptionalAction},
        int: {"type": whole(0), "metavar": "N"},
        float: {"type": number(), "metavar": "X"},
        "numbers": {"nargs": "+", "metavar": "X"},
        "names": {"type": _names, "metavar": "LIST"},
        "table": {"action": "append", "type": _flow_option, "metavar": "KEY=JSON"},
    }[kind]


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
        ValueError: an unknown or removed setting, or a value of the wrong type, naming it and the file.
    """
    check_names({str(key): value for key, value in table.items()}, f"{where}: ")
    return {name: _typed(name, value, f"{where}: ") for name, value in table.items()}


def _typed(name: str, value: Any, where: str) -> Any:
    """`value` in the setting's type: YAML reads 1e-2 as text, and numbers of the command line are text too."""
    about = SETTINGS[name]
    kind = about["kind"]
    try:
        if kind == "numbers" and about["optional"] and value in ("none", ["none"]):
            return None
        if kind == "names" and isinstance(value, str):
            value = _names(value)
        if kind == "numbers" and isinstance(value, list):
            value = [float(v) for v in value]
        if isinstance(value, str) and kind in (int, float):
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        return check_setting(name, value)
    except (TypeError, ValueError, OverflowError) as error:
        text = str(error) if name in str(error) else f"{name} can't be {value!r}"
        raise ValueError(f"{where}{text}") from None
