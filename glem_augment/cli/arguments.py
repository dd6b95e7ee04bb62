"""The parser, the arguments that commands share, and their types. Like `parsers`, this does not import torch."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import yaml

from glem_augment.checks import closest
from glem_augment.errors import GLEMError


class Parser(argparse.ArgumentParser):
    """Answers what it can't parse in one line, and a mistyped word with the closest one that it knows."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation that works today would change its meaning with the next option.
        formatter = argparse.RawDescriptionHelpFormatter  # it keeps the line breaks of descriptions and examples
        super().__init__(formatter_class=formatter, allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # argparse would first name the options that are missing because of the slip. Those after a command are its own.
        for arg in takewhile(lambda arg: arg != "--" and (not self._subparsers or arg.startswith("-")), args):
            option = arg.partition("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(f"unknown option {option}{closest(option, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            text = f"{value!r} is none of {', '.join(known)}{closest(value, known)}"
            raise argparse.ArgumentError(action, text)

    def error(self, message: str) -> NoReturn:
        raise GLEMError(f"{message} (see {self.prog} --help)")


# The function of a command, as module.function of this folder, and its line in the overview.
COMMANDS = {
    "demo": ("demo.run", "the whole job on bundled images, in minutes"),
    "train": ("train.run", "fit a flow to your images"),
    "adapt": ("commands.adapt", "serve your classes with a flow trained on others"),
    "eval": ("commands.evaluate", "accuracy, bits/dim, calibration and round trip, as JSON"),
    "generate": ("commands.generate", "draw a synthetic data set from a flow"),
    "preview": ("commands.preview", "a picture of augmentations, samples, interpolations"),
    "explore": ("explore.run", "a page on this machine: samples, moves, lines, surprising images"),
    "info": ("commands.info", "what a model is and how it was trained"),
    "list": ("commands.list_flows", "the flows that ship, and those on the Hugging Face Hub"),
    "push": ("commands.push", "upload a flow to the Hugging Face Hub"),
}
EXIT_CODES = "Exit codes: 0 done, 2 an error (one line on stderr says which), 130 interrupted."


def new_parser(commands: Any, name: str, description: str, examples: str, exit_codes: str = EXIT_CODES) -> Parser:
    """The parser of one command."""
    run, summary = COMMANDS[name]
    epilog = f"examples:\n{examples}\n{exit_codes}"
    parser: Parser = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


DATA_HELP = "images: a folder with a folder per class, NAME@ROOT (timm), or bundled:fashion-mnist"
MODEL_HELP = "a folder written by glem train, bundled:NAME, or ORG/NAME[@REVISION] on the Hugging Face Hub"


# ---- arguments that commands share -----------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, **optional: Any) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP, **optional)


def add_data(parser: argparse.ArgumentParser, split: str | None = "test", **optional: Any) -> None:
    """DATA, and the options that say how it is read; `split` is the default, None for test where there are splits."""
    parser.add_argument("data", metavar="DATA", help=DATA_HELP, **optional)
    parser.add_argument("--split", default=split, help=f"of the data (default: {split or 'test, where it has splits'})")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and name images that cannot be read")


def add_class_map(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--class-map",
        type=lambda text: text if text == "order" else table(text, as_text=True),
        metavar="FILE|order",
        help="a YAML or JSON table from the data's class names to the flow's, or 'order': class i is class i "
        "(default: by id or name)",
    )


def add_seed(parser: argparse._ActionsContainer, of: str = "all draws") -> None:
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help=f"of {of} (default: %(default)s)")


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", type=out_folder, required=True, metavar="DIR", help=f"{what}; made if missing")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if present, else cpu)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    # Far more threads than there are cores crash the process.
    most = max(1024, os.cpu_count() or 1)
    parser.add_argument("--threads", type=whole(1, most), metavar="N", help="CPU threads (default: PyTorch's choice)")
    add_device(parser)


def number(low: float = -math.inf, high: float = math.inf, kind: type = float) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if not math.isfinite(value) or not low <= value <= high:
            bound = f"at least {low:g}" if value < low else f"at most {high:g}" if value > high else "finite"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value

    return parse


def in_file(text: str) -> Path:
    """An argparse type: the path of a file."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no home folder of that user") from None


def table(text: str, as_text: bool = False) -> dict[str, Any]:
    """An argparse type: the table in a YAML or JSON file (JSON is YAML), with keys and values `as_text` on request.

    Names of classes are text, since a class may be called 010, no or null.
    """
    try:
        content = in_file(text).read_text(encoding="utf-8")
        found = yaml.load(content, yaml.BaseLoader if as_text else yaml.SafeLoader)  # noqa: S506  (both are safe)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text} can't be read as YAML or JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} must hold a table (key: value), got {type(found).__name__}")
    return found


def out_path(text: str, folder: bool = False) -> Path:
    """An argparse type: a file that can be written. A command that could not save its result must not begin."""
    path = in_file(text)
    there = next(each for each in (path, *path.parents) if each.exists())
    if there.is_dir() != (folder or there != path):
        found = "is a folder, not a file" if there.is_dir() else "is a file, not a folder"
        raise argparse.ArgumentTypeError(f"cannot write {text}: {there} {found}")
    if not os.access(there if there.is_dir() else there.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: you may not write to {there}")
    return path


out_folder = partial(out_path, folder=True)


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""
    return number(low, high, int)


def per_class(text: str) -> Any:
    """An argparse type: a number, `balance`, or a table, as `A=N,B=M` or in a file."""
    if text == "balance":
        return text
    if Path(text).suffix in (".yaml", ".yml", ".json"):
        counts = table(text, as_text=True)
        return {name: int(n) if str(n).strip().isdecimal() else n for name, n in counts.items()}
    if "=" not in text:
        return whole(1)(text)
    counts = {}
    for entry in text.split(","):
        name, _, count = entry.rpartition("=")
        if not name.strip():
            raise argparse.ArgumentTypeError(f"{entry!r} is not CLASS=N (names with commas go into a file)")
        counts[name.strip()] = whole(0)(count)
    return counts
