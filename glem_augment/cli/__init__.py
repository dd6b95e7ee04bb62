"""The `glem` command: `main` parses the command line and turns the library's errors into one line each."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

from glem_augment import __version__
from glem_augment.errors import GLEMError

DESCRIPTION = """\
Synthetic-data augmentation from a class-conditional normalizing flow.

A flow learns your labelled images once (glem train), or a trained flow is given your classes (glem adapt). From then on
it moves real images while keeping their class, draws new ones (glem generate), and classifies (glem eval).

DATA, wherever a command asks for it, is one of
  a folder with one folder of images per class, or with train/ and test/ (or val/) folders of that kind;
  a folder of MNIST-style idx files; a .tar file; a timm data set as NAME@ROOT: torch/cifar10@data (downloaded already),
  hfds/uoft-cs/cifar100@cache?input_key=img&target_key=fine_label, wds/@shards (needs the extra [wds]);
  bundled:fashion-mnist, 100 real images per class and split, inside the package.
MODEL is a folder that glem train wrote, bundled:NAME, or ORG/NAME[@REVISION] on the Hugging Face Hub. A folder of the
same name comes first; hf-hub:ORG/NAME is always the Hub. HF_TOKEN opens private repositories, HF_HUB_OFFLINE=1 uses the
cache alone.
"""

EPILOG = """\
examples:
  glem demo --out demo-out
  glem train photos/ --image-size 32 --augment flip,crop --out runs/photos
  glem preview runs/photos photos/ --out preview.png

GLEM_DEBUG=1 shows where an error came from. Exit codes: 0 done, 2 an error, 75 a training run that stopped at
--max-minutes and continues with --resume, 130 interrupted.
"""
EXIT_CODES = "Exit codes: 0 done, 2 an error (one line on stderr says which), 130 interrupted."


class Command(NamedTuple):
    """The module of a command, which has `add_parser(subparsers)`, and its line in the overview."""

    module: str
    summary: str


# The modules are imported when their command is used, so that `glem --help` does not wait for torch.
COMMANDS = {
    "demo": Command("demo", "the whole job on bundled images, in minutes"),
    "train": Command("train", "fit a flow to your images"),
    "adapt": Command("adapt", "serve your classes with a flow trained on others"),
    "eval": Command("evaluate", "accuracy, bits/dim, calibration and round trip, as JSON"),
    "generate": Command("generate", "draw a synthetic data set from a flow"),
    "preview": Command("preview", "a picture of augmentations, samples, interpolations"),
    "info": Command("info", "what a model is and how it was trained"),
    "push": Command("push", "upload a flow to the Hugging Face Hub"),
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""

    def __init__(self, prog: str) -> None:
        columns = max(60, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=32, width=min(110, columns))


def new_parser(
    subparsers: Any,
    name: str,
    description: str,
    examples: str,
    run: Callable[[argparse.Namespace], int],
    exit_codes: str = EXIT_CODES,
) -> argparse.ArgumentParser:
    """The parser of a command. `run` gets the parsed arguments and returns the exit code."""
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


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of `glem`. Each command sets `run` to a function of the parsed arguments.

    Args:
        argv: the arguments that will be parsed. Only the command that they name is imported; None imports all commands.
    """
    parser = argparse.ArgumentParser(prog="glem", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"glem-augment {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    wanted = set(COMMANDS) if argv is None else {next((a for a in argv if not a.startswith("-")), None)}
    for name, command in COMMANDS.items():
        if name in wanted:
            import_module(f"glem_augment.cli.{command.module}").add_parser(commands)
        else:
            commands.add_parser(name, help=command.summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; `sys.argv` by default.

    Returns:
        The exit code: 0; 2 for an error, which one line on stderr explains; 75 from `train --max-minutes`; 130 after
        Ctrl-C. As usual with argparse, `--help`, `--version` and a command line that cannot be parsed raise
        SystemExit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser(argv).parse_args(argv)
        args.argv = argv
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of a pipe, as in `glem ... | head`, has left: Python's last flush must not complain about it.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        # The trainer's message says where the run stopped.
        print(f"glem: {stop}" if str(stop) else "glem: interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        return _no_memory(error)
    except (GLEMError, ValueError, TypeError, OSError) as error:
        return _fail(_one_line(error))
    except RuntimeError as error:
        # torch.OutOfMemoryError is compared by name, since torch may not be imported. On a CPU torch has no such class.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        return _no_memory(error)


def _no_memory(error: BaseException) -> int:
    return _fail(f"out of memory ({_one_line(error)}); lower --batch-size, or take a smaller flow")


def _fail(message: str) -> int:
    if os.environ.get("GLEM_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    print(f"glem: error: {message}", file=sys.stderr)
    return 2


def _one_line(error: BaseException) -> str:
    """The message without the "[Errno 2]" that str(OSError) puts before it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__
