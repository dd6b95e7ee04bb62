"""The ``glem`` command: parses the command line, and turns the library's errors into one line each."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from glem_augment import __version__
from glem_augment.cli.parsers import COMMANDS, HelpFormatter, add_command
from glem_augment.errors import GLEMError

DESCRIPTION = """\
Synthetic-data augmentation from a class-conditional normalizing flow.

A flow learns your labelled images once (glem train), or a trained one is given your classes (glem adapt). From then on
it moves real images while keeping their class, draws new ones (glem generate), and classifies (glem eval).

DATA, wherever a command asks for it, is one of
  a folder with one folder of images per class, or with train/ and test/ (or val/) folders of that kind;
  a folder of MNIST-style idx files; a .tar file; a timm data set as NAME@ROOT: torch/cifar10@data (downloaded already),
  hfds/uoft-cs/cifar100@cache?input_key=img&target_key=fine_label, wds/@shards (needs the extra [wds]);
  bundled:fashion-mnist, 100 real images per class and split, inside the package.
MODEL is a folder that glem train wrote, bundled:NAME, or ORG/NAME[@REVISION] on the Hugging Face Hub. A folder called
like a repository wins; hf-hub:ORG/NAME is always the Hub. HF_TOKEN opens private ones, HF_HUB_OFFLINE=1 uses the cache.
"""

EPILOG = """\
examples:
  glem demo --out demo-out
  glem train photos/ --image-size 32 --augment flip,crop --out runs/photos
  glem preview runs/photos photos/ --out preview.png

GLEM_DEBUG=1 shows where an error came from. Exit codes: 0 done, 2 an error, 75 a training run that stopped at
--max-minutes and goes on with --resume, 130 interrupted.
"""


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of ``glem``; each command sets ``run`` to a function of the parsed arguments.

    Args:
        argv: what will be parsed: only the command in there is imported, the others are names and a line of help. By
            default all are imported.
    """
    parser = argparse.ArgumentParser(prog="glem", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"glem-augment {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    wanted = set(COMMANDS) if argv is None else {next((a for a in argv if not a.startswith("-")), None)}
    for name, command in COMMANDS.items():
        if name in wanted:
            add_command(commands, name)
        else:
            commands.add_parser(name, help=command.summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code: 0, 2 for an error (one line on stderr says which), 75 from ``train --max-minutes``, 130 after
        Ctrl-C. As usual with argparse, ``--help``, ``--version`` and a command line that can't be parsed raise
        SystemExit instead.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        # The command's module is imported here, and torch with it, which takes seconds: Ctrl-C may come already.
        args = build_parser(argv).parse_args(argv)
        args.argv = argv
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `glem ... | head`: the reader has left. What Python would still flush at exit goes nowhere, silently.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        # The trainer says where its run stopped.
        print(f"glem: {stop}" if str(stop) else "glem: interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        return _no_memory(error)
    except (GLEMError, ValueError, TypeError, OSError) as error:
        return _fail(_one_line(error))
    except RuntimeError as error:
        # torch.OutOfMemoryError, by name, since torch may not be there yet; on a CPU torch has no class for it.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        return _no_memory(error)


def _no_memory(error: BaseException) -> int:
    return _fail(f"out of memory ({_one_line(error)}); lower --batch-size or --block, or take a smaller flow")


def _fail(message: str) -> int:
    if os.environ.get("GLEM_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    print(f"glem: error: {message}", file=sys.stderr)
    return 2


def _one_line(error: BaseException) -> str:
    """The message alone: str(OSError) would put "[Errno 2]" before it, and the repr of the path after it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
