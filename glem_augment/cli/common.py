"""Parts of the commands that several of them share.

At its top this imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import torch

    from glem_augment.model.glem import GLEM

EXIT_CODES = "Exit codes: 0 done, 2 an error (one line on stderr says which), 130 interrupted."
DATA_HELP = "images or arrays: a folder with a folder per class, NAME@ROOT (timm), or bundled:NAME"
# Usual identifiers of the Hub. Its whole list is at https://huggingface.co/docs/hub/repositories-licenses.
LICENCES = "mit apache-2.0 bsd-3-clause cc0-1.0 pddl odc-by odbl other unknown".split()
LICENCES += [f"cc-by{terms}-{version}" for terms in ("", "-sa", "-nc", "-nc-sa", "-nd") for version in ("3.0", "4.0")]
MODEL_HELP = "a folder from glem fit or train, bundled:NAME, or ORG/NAME[@REVISION] on the Hugging Face Hub"


def describe(parser: argparse.ArgumentParser, description: str, examples: str) -> None:
    """Give the parser of a command its texts."""
    parser.description, parser.epilog = description, f"examples:\n{examples}\n{EXIT_CODES}"


# ---- arguments that commands share -----------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, **optional: Any) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP, **optional)
    add_import(parser)


def add_import(parser: argparse.ArgumentParser) -> None:
    text = "import this module of yours first, for codecs, flows, couplings and policies that it registers; repeatable"
    parser.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help=text)


def add_data(parser: argparse.ArgumentParser, split: str = "test", **optional: Any) -> None:
    """DATA and its options; `split` is the default."""
    parser.add_argument("data", metavar="DATA", help=DATA_HELP, **optional)
    parser.add_argument("--split", default=split, help=f"of DATA, where it has splits (default: {split})")


def add_class_map(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--class-map",
        type=lambda text: text if text == "order" else table(text, as_text=True),
        metavar="FILE|order",
        help="a YAML or JSON table from class names of DATA to class names of the model, or 'order' to match classes "
        "by number (default: by id or name)",
    )


def add_count(parser: argparse._ActionsContainer, flag: str, text: str, default: int | None = None) -> None:
    """An option that takes a whole number, whose limits the command checks."""
    text += "" if default is None else f" (default: {default})"
    parser.add_argument(flag, type=int, default=default, metavar="N", help=text)


def add_out(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help=f"{text}; made if missing")


def add_license(parser: argparse.ArgumentParser) -> None:
    text = "licence of the model's training images, as the Hub names it: mit, cc-by-4.0, other, ...; samples inherit it"
    parser.add_argument("--license", metavar="ID", help=f"{text} (default: the one in the model's record)")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if present, else cpu)")


def add_image_size(parser: argparse._ActionsContainer, more: str) -> None:
    text = f"height and width in pixels, or one number for both; images are resized, then cropped at the centre; {more}"
    parser.add_argument("--image-size", nargs="+", type=int, metavar="N", help=text)


# ---- types of arguments ----------------------------------------------------------------------------------------------


def folder(text: str) -> Path:
    """An argparse type: the path of a folder, which need not exist."""
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file: give a folder")
    return Path(text)


def table(text: str, as_text: bool = False) -> dict[str, Any]:
    """An argparse type: the table in a YAML or JSON file (JSON is YAML). `as_text`: keys and values are text.

    Names of classes are text, since a class may be called 010, no or null.
    """
    try:
        content = Path(text).read_text(encoding="utf-8")
        found = yaml.load(content, yaml.BaseLoader if as_text else yaml.SafeLoader)  # noqa: S506  (both are safe)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{text} can't be read as YAML or JSON: {reason}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} must hold a table (key: value), got {type(found).__name__}")
    return found


# ---- models, data and output ---------------------------------------------------------------------------------------


def pick_device(args: argparse.Namespace, ranks: bool = False) -> torch.device:
    """The device of `args.device`, by default CUDA where it is present. ValueError: it cannot be used.

    With `ranks`, the ranks of torchrun join here, each gets another device, and only the first one prints.
    """
    import torch

    from glem_augment import distributed
    from glem_augment.tensors import usable

    device = usable(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if ranks:
        device = distributed.start(args.device or device.type)
    if not distributed.is_primary():
        warnings.simplefilter("ignore")
    return device


def load_model(args: argparse.Namespace, ranks: bool = False) -> GLEM:
    """The model of `args.model` on the device of `pick_device`."""
    from glem_augment.model.glem import GLEM

    return GLEM.from_pretrained(args.model, device=pick_device(args, ranks))


def uncovered(args: argparse.Namespace, model: GLEM, *written: Path | None) -> None:
    """Say that the result of a command on a private model and real images is not private.

    ValueError: a path that is `written` is in the model's folder, which is shared.
    """
    from glem_augment.io import expand

    if model.config.privacy is None:
        return
    for path in written:
        if path is not None and path.resolve().is_relative_to(expand(args.model).resolve()):
            raise ValueError(f"{path} would show real images in a folder that is shared: write it elsewhere")
    note("glem: this uses real images, so the model's privacy does not cover it: share it only if they are public")


def note_licence(licence: str | None) -> None:
    """Say that a licence may be a typing error, where it is no usual one."""
    if licence is not None and licence not in LICENCES:
        note(f"glem: {licence!r} is no usual licence: see https://huggingface.co/docs/hub/repositories-licenses")


def print_json(obj: dict[str, Any]) -> None:
    """Print one JSON object on stdout, with null for non-finite numbers, which JSON does not have."""
    from glem_augment.io import finite, json_text

    say(json_text(finite(obj)))


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as YAML for people, or as JSON."""
    if as_json:
        print_json(facts)
    else:
        say(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None).rstrip())


def say(text: str) -> None:
    """Print a result on stdout, on the first rank."""
    from glem_augment.distributed import is_primary

    if is_primary():
        print(text, flush=True)


def note(text: str) -> None:
    """Print a line for people on stderr, on the first rank."""
    from glem_augment.distributed import is_primary

    if is_primary():
        print(text, file=sys.stderr, flush=True)
