"""The commands by name, and the frame of their help. Nothing here imports torch: ``glem --help`` answers at once."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command: the module in this package with its ``add_parser(subparsers)``, and a line on it."""

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "demo": Command("demo_command", "the whole job on bundled images, in minutes"),
    "train": Command("train", "fit a flow to your images"),
    "adapt": Command("adapt", "serve your classes with a flow trained on others"),
    "eval": Command("evaluate", "accuracy, bits/dim, calibration and round trip, as JSON"),
    "generate": Command("generate", "draw a synthetic data set from a flow"),
    "preview": Command("preview", "a picture of augmentations, samples, interpolations"),
    "info": Command("info", "what a model is and how it was trained"),
    "push": Command("push", "upload a flow to the Hugging Face Hub"),
}
EXIT_CODES = "Exit codes: 0 done, 2 an error (one line on stderr says which), 130 interrupted."


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(110, _columns()))


def _columns() -> int:
    return max(60, shutil.get_terminal_size().columns - 2)


def new_parser(
    subparsers: Any,
    name: str,
    description: str,
    examples: str,
    run: Callable[..., int],
    exit_codes: str = EXIT_CODES,
) -> argparse.ArgumentParser:
    """A command's parser; ``run`` gets the parsed arguments and returns the exit code."""
    parser = subparsers.add_parser(
        name,
        help=COMMANDS[name].summary,
        description=description,
        epilog=f"examples:\n{examples}\n{exit_codes}",
        formatter_class=HelpFormatter,
        # An abbreviation that works today would change its meaning with the next option.
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_command(subparsers: Any, name: str) -> None:
    """The parser of a command, from its module, which is imported for it."""
    import_module(f"glem_augment.cli.{COMMANDS[name].module}").add_parser(subparsers)
