"""``glem generate``: synthetic images as an ImageFolder."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from glem_augment._export import export_imagefolder
from glem_augment._sources import SOURCES
from glem_augment.commands.common import (
    MODEL_HELP,
    add_device,
    add_threads,
    load_model,
    new_parser,
    number,
    print_json,
    whole,
)
from glem_augment.errors import ClassMismatchError
from glem_augment.model import GLEM
from glem_augment.synthetic import SyntheticDataset

DESCRIPTION = """\
Draw new images of every class from a flow, and write them as PNG files, one folder per class, with
glem-provenance.json beside the folders. The same seed gives the same images, whichever classes and however many
are asked for. Prints a JSON summary.
"""
EXAMPLES = """\
  glem generate bundled:fashion-mnist --per-class 100 --out synthetic/
  glem generate runs/photos --per-class 1000 --temperature 0.9 --source rfcm --out synthetic/
  glem generate runs/photos --per-class 50 --classes cat,dog --seed 1 --out pets/
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "generate", "draw a synthetic data set from a flow", DESCRIPTION, EXAMPLES, run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--per-class", type=whole(1), required=True, metavar="N", help="images of each class")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if missing")
    parser.add_argument(
        "--temperature",
        type=number(0),
        default=0.8,
        metavar="T",
        help="factor on the standard deviation: lower is cleaner and less varied (default: %(default)s)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="gaussian",
        help="gaussian: the class's own Gaussian; rfcm: mean and covariance of the class's real latents "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--classes", metavar="A,B", help="names or ids of the classes wanted, with commas (default: all)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an earlier export in DIR")
    add_threads(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    model = load_model(args)
    kept = find_classes(model, args.classes.split(",")) if args.classes is not None else None
    dataset = SyntheticDataset(
        model, per_class=args.per_class, temperature=args.temperature, seed=args.seed, source=args.source
    )
    began = time.monotonic()
    if kept is None:
        folder = dataset.export(args.out, overwrite=args.overwrite)
        chosen = dataset
    else:
        dataset._check_pil()
        chosen = _SomeClasses(dataset, kept)
        folder = export_imagefolder(chosen, Path(args.out), overwrite=args.overwrite)
    print_json(
        {
            "out": str(folder),
            "images": len(chosen),
            "per_class": args.per_class,
            "classes": list(chosen.classes),
            "model": args.model,
            "temperature": args.temperature,
            "seed": args.seed,
            "source": args.source,
            "not_finite": dataset.non_finite,
            "seconds": round(time.monotonic() - began, 3),
        }
    )
    return 0


def find_classes(model: GLEM, names: Sequence[str]) -> list[int]:
    """Indices of classes given by name or id, each once, in index order.

    Raises:
        ClassMismatchError: a name that the flow does not know.
    """
    known = {**{i: n for n, i in enumerate(model.class_ids)}, **model.class_to_idx}
    wanted = [name.strip() for name in names if name.strip()]
    for name in wanted:
        if name not in known:
            listed = ", ".join(model.classes[:20]) + (", ..." if model.num_classes > 20 else "")
            raise ClassMismatchError(f"the flow has no class {name!r}; it has {listed}")
    if not wanted:
        raise ClassMismatchError("--classes names no class; give names or ids with commas between them")
    return sorted({known[name] for name in wanted})


class _SomeClasses(SyntheticDataset):
    """Some classes of a SyntheticDataset, with the very images that it has for them."""

    def __init__(self, full: SyntheticDataset, kept: Sequence[int]) -> None:
        super().__init__(full.model, full.per_class, full.temperature, full.seed, source=full.source, block=full.block)
        self._full, self._kept = full, list(kept)
        self.classes = [full.classes[i] for i in kept]
        self.class_ids = [full.class_ids[i] for i in kept]
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.counts = [full.counts[i] for i in kept]
        self._starts = full._starts[: len(kept) + 1]
        self.targets = [i for i, count in enumerate(self.counts) for _ in range(count)]

    def decoded_block(self, cls: int, number: int) -> Tensor:
        return self._full.decoded_block(self._kept[cls], number)

    def not_finite_in(self, cls: int, number: int) -> int:
        return self._full.not_finite_in(self._kept[cls], number)

    @property
    def non_finite(self) -> int:
        return self._full.non_finite
