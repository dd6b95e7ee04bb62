"""The `glem` command: `main` parses the command line and prints an error as one line."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from glem_augment import __version__
from glem_augment.errors import GLEMError

DESCRIPTION = """\
Augmentation along the directions in which each class varies, and synthetic images, also with differential privacy.

glem fit makes a model of your labelled images in one pass: a Gaussian and principal modes of each class, of the pixels
or of an autoencoder's latents. Noise along the pixels' modes is PCA jitter per class, as AlexNet's colour PCA was for
colours. A model also draws new images (glem generate) and classifies (glem eval). glem train fits a
class-conditional normalizing flow, whose latents can take the place of the pixels.

DATA is one of
  a folder with one folder of images per class, or with such folders in train/ and test/ (or val/);
  a .tar file; a timm data set as NAME@ROOT: torch/cifar10@data or torch/fashion_mnist@data (downloaded already), or
  hfds/ylecun/mnist;
  bundled:fashion-mnist, 100 real images per class and split, or bundled:photographs, three photographs, inside the
  package.
MODEL is a folder that glem train or glem fit wrote, bundled:NAME, or ORG/NAME[@REVISION] on the Hugging Face Hub. A
local folder of that name is used first; hf-hub:ORG/NAME always means the Hub. HF_TOKEN opens private repositories,
HF_HUB_OFFLINE=1 uses the cache alone.
"""

EPILOG = """\
examples:
  glem fit photos/ --image-size 64 --out runs/photos
  glem preview runs/photos photos/ --out preview.png

GLEM_DEBUG=1 prints the traceback of an error. Exit codes: 0 done, 2 an error, 130 interrupted.
"""


# Each command has the file of its name, which is imported when it is called, and a line in the overview.
COMMANDS = {
    "train": "train a model of your images",
    "fit": "make a model of your images in one pass, nothing is trained",
    "eval": "accuracy, bits/dim, calibration and round trip, as JSON",
    "generate": "draw a synthetic data set from a model",
    "preview": "a picture of augmentations, samples, interpolations",
    "info": "describe a model and its training",
    "list": "the models inside the package",
    "push": "upload a model to the Hugging Face Hub",
}


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of `glem` with the options of the command that is among the words.

    The files of the commands import torch when they run, so that `--help` answers at once.
    """
    # The texts have line breaks. An abbreviation that works today would change its meaning with the next option.
    looks: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="glem", description=DESCRIPTION, epilog=EPILOG, **looks)
    parser.add_argument("--version", action="version", version=f"glem-augment {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    called = next((word for word in words if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, **looks)
        if name == called:
            command = import_module(f"glem_augment.cli.{name}")
            command.add_arguments(own)
            own.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; `sys.argv` by default.

    Returns:
        The exit code: 0; 2 for an error, which one line on stderr explains; 130 after Ctrl-C. As usual with argparse,
        `--help`, `--version` and options that do not exist raise SystemExit.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    try:
        args = build_parser(argv).parse_args(argv)
        args.argv = argv
        _import(getattr(args, "modules", ()))
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            args.run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader of a pipe has ended, as in `glem ... | head`. Python's last flush must not fail on it.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:  # its message says where the command stopped
        print(f"glem: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except (GLEMError, ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _fail(error, "out of memory; lower --batch-size, or take a smaller flow or smaller images: ")


def _import(modules: Sequence[str]) -> None:
    """Import modules of the user's. ImportError: one is missing, or fails."""
    for name in modules:
        sys.path.insert(0, os.getcwd())
        try:
            import_module(name)
        except Exception as error:  # a user's module may raise anything
            raise ImportError(f"--import {name}: {type(error).__name__}: {error}") from error


def _warn(message: Warning | str, *about: object, **more: object) -> None:
    """Print a warning as one line, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"glem: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(error: BaseException, advice: str = "") -> int:
    """Print an error as one line."""
    if os.environ.get("GLEM_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    text = str(error).rpartition(f"{type(error).__name__}: ")[2]  # a DataLoader's worker puts its traceback before it
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    print(f"glem: error: {advice}{' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    return 2
