"""Does augmentation through a flow help a classifier? The best tuned opponent with and without ours, and the control.

    python benchmarks/proof/augmentation/run.py --plan                            # cells, progress, estimated time
    python benchmarks/proof/augmentation/run.py --settings imagenette32-50 --seconds 3600
    python benchmarks/proof/augmentation/run.py --report  # the table from the stored JSON
    python benchmarks/proof/augmentation/run.py --train-flow cifar10 --seconds 600  # a flow, in pieces

A cell is one classifier trained with one stack of augmentations. For every setting and classifier, in this order:

    singles   each opponent with each of its trials (on crop + flip), measured on validation images
    pairs     the best single opponent with each other opponent, at its tuned value; the best of both is *the* opponent
    ours      opponent + each of our methods, through each flow and through the identity (the control), each trial
    final     crop + flip, the opponent, our best methods, and their controls: test images, five seeds

Validation images are training images that no seed draws, the same for all seeds. Test images are read in "final" alone,
when all choices are made. All cells of a setting have the same number of steps. All cells of a seed have the same
images, order and initial weights. Every finished cell is stored at once, in augmentation_tuning.json or (final)
augmentation.json, a list of rows. A rerun continues with the missing cells. See docs/protocol.md.

Data is read from $GLEM_DATA (fashion-mnist, cifar10, imagenette128, mnist), and trained flows from --flows.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository

from benchmarks.common import RESULTS, machine, parser
from benchmarks.proof.augmentation.data import Flows, Task, make_task
from benchmarks.proof.augmentation.plan import ON_TEST, Cell, Plan, Store
from benchmarks.proof.augmentation.report import report
from benchmarks.proof.augmentation.settings import (
    DEFAULT_OURS,
    FINAL_SEEDS,
    FINALISTS,
    FLOWS,
    METHODS,
    OPPONENTS,
    PROTOCOL,
    SETTINGS,
    SMOKE,
    TUNING_SEEDS,
)
from benchmarks.proof.augmentation.train import CLASSIFIERS, accuracy, train
from glem_augment import GLEM
from glem_augment.errors import GLEMError


class Study:
    """Runs cells. Images and adapted flows of the last task are kept, since successive cells share them."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.flows = Flows(args.flows)
        self._key: tuple[str, int] | None = None
        self._task: Task | None = None
        self._adapted: dict[tuple[str, bool], GLEM] = {}
        self._machine = machine()

    def task(self, cell: Cell) -> Task:
        key = (cell.setting.name, cell.seed)
        if self._task is None or self._key != key:
            self._key, self._task, self._adapted = key, make_task(cell.setting, cell.seed), {}
        return self._task

    def flow(self, name: str, pooled: bool, cell: Cell) -> GLEM:
        task = self.task(cell)
        if (name, pooled) not in self._adapted:
            self._adapted[name, pooled] = self.flows.adapted(name, cell.setting, cell.seed, task, pooled)
        return self._adapted[name, pooled]

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure; returns the row."""
        began = time.process_time()
        task, setting = self.task(cell), cell.setting
        for _, params in cell.stack:  # adapting is not part of a step
            if "flow" in params:
                self.flow(params["flow"], params.get("basis") == "shared", cell)
        # A step with adversarial moves takes 1.4 times as long: the best other stack in the same time.
        steps = round(setting.steps[cell.classifier] * (1.4 if cell.stage == "longer" else 1))
        network, measured = train(
            cell.classifier, task.train, len(task.classes), list(cell.stack),
            lambda name, pooled: self.flow(name, pooled, cell), steps, setting.batch, cell.seed,
            self.args.precision == "bf16",
        )  # fmt: skip
        part, name = (task.test, "accuracy") if cell.stage in ON_TEST else (task.val, "val_accuracy")
        return {
            **cell.row(),
            "data": setting.data,
            name: accuracy(network, part),
            **measured,
            "steps": steps,
            "images": len(task.train[1]),
            "measured_on": len(part[1]),
            "cell_seconds": time.process_time() - began,
            "precision": self.args.precision,
            "processor": self._machine["processor"],
            "threads": self._machine["threads"],
            "torch": self._machine["versions"]["torch"],
            "protocol": PROTOCOL,
        }


def todo(plan: Plan, store: Store, args: Any) -> Iterator[Cell]:
    """Cells that can run now, one setting after the other. Later cells depend on the measured cells."""
    for setting in args.settings:
        for classifier in args.classifiers:
            tried: set[str] = set()
            while True:
                cells = plan.cells(setting, classifier, store)
                new = [c for c in cells if not store.has(c) and c.key not in tried and re.search(args.cells, c.key)]
                ready = [c for c in new if not plan.lacks(c)]
                if not ready:
                    break
                tried.add(ready[0].key)
                yield ready[0]


def show_plan(plan: Plan, store: Store, args: Any) -> None:
    """The cells that are known so far, with the seconds of similar cells."""
    for setting in args.settings:
        for classifier in args.classifiers:
            cells = [c for c in plan.cells(setting, classifier, store) if re.search(args.cells, c.key)]
            missing, total = 0, 0.0
            for cell in cells:
                cost = plan.estimate(cell, store)
                state = "?" if cost is None else f"{cost:.0f}s"
                if store.has(cell):
                    state = "done"
                else:
                    missing, total = missing + 1, total + (cost or 0)
                    state = "flow?" if plan.lacks(cell) else state
                print(f"  {state:>6}  {cell.key}")
            print(
                f"{setting.name}, {classifier}: {len(cells) - missing} done, {missing} to do ({total / 60:.0f} minutes "
                "for those whose like has been run), and later ones that depend on these"
            )


def options() -> Any:
    result = parser(__doc__)
    result.set_defaults(threads=1)
    add = result.add_argument
    ours = [name for name, method in METHODS.items() if method.side == "ours"]
    add("--settings", nargs="+", default=list(SETTINGS), metavar="SETTING", help=f"of {', '.join(SETTINGS)} (all)")
    add("--classifiers", nargs="+", choices=CLASSIFIERS, default=["cnn"], help="(%(default)s)")
    add("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS), help="of the final cells (%(default)s)")
    add("--opponents", nargs="+", choices=OPPONENTS, default=list(OPPONENTS), help="(all)")
    add("--methods", nargs="+", choices=ours, default=list(DEFAULT_OURS), help="of ours (%(default)s)")
    add("--best", type=int, default=2, help="of our methods in the final cells, per flow (%(default)s)")
    add("--through", nargs="+", metavar="FLOW", help="only these of a setting's flows (all)")
    add(
        "--beside", choices=["triples", "shorter", "recipe", "moves", "longer"],
        help="only cells beside the stored ones: a third operation on the best pair of opponents, adversarial moves "
        "along the pixels' modes of half the lowest strength, the advised moves where the choices left them out, "
        "`settings.MOVES` through the flows of --through, beside the same moves of pixels, or the best stack with "
        "1.4 times the steps",
    )  # fmt: skip
    add("--leaking", action="store_true", help="also flows that have seen all labels; never counted")
    add("--trials", type=int, default=3, help="at most so many per method (%(default)s)")
    add(
        "--tuning-seeds", type=int, default=len(TUNING_SEEDS), choices=range(1, len(TUNING_SEEDS) + 1),
        help=f"of the best {FINALISTS} trials of a method (%(default)s)",
    )  # fmt: skip
    add("--cells", default="", metavar="PATTERN", help="only cells whose name this expression finds")
    add("--seconds", type=float, help="start no cell after so long")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of the classifier (%(default)s)")
    add("--flows", type=Path, default=Path("runs"), help="folder of trained flows (%(default)s)")
    add("--plan", action="store_true", help="list the cells; do nothing")
    add("--report", action="store_true", help="the table from the stored rows; do nothing else")
    add("--train-flow", metavar="NAME", help=f"make a flow: {', '.join(FLOWS)}")
    add("--smoke", action="store_true", help="half a minute on the bundled images")
    return result


def main() -> None:
    arguments = options()
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.out = args.out if args.out != RESULTS else Path("runs/augmentation-smoke")
        args.settings, args.seeds, args.leaking = ["smoke"], args.seeds[:2], True
        args.trials, args.best, args.tuning_seeds = 1, 1, 1
        args.opponents = ["none", "cropflip", "jitter", "mixup", "cutmix", "trivial", "erasing", "pixel-adversarial"]
    known = {**SETTINGS, "smoke": SMOKE}
    unknown = [name for name in args.settings if name not in known]
    if unknown:
        arguments.error(f"unknown settings {unknown}; there are {', '.join(SETTINGS)}")
    args.settings = [known[name] for name in args.settings]
    store, began = Store(args.out), time.monotonic()
    if args.report:
        report(store, args.out)
        return
    study = Study(args)
    if args.train_flow:
        raise SystemExit(0 if study.flows.train(args.train_flow, args.seconds) else 75)
    plan = Plan(args, study.flows)
    for setting in args.settings:
        for name in setting.proof:
            if why := study.flows.missing(name, setting):
                print(f"augmentation: {setting.name}: without the flow {name}: {why}", file=sys.stderr)
    if args.plan:
        show_plan(plan, store, args)
        return
    for cell in todo(plan, store, args):
        if args.seconds is not None and time.monotonic() - began > args.seconds:
            print(f"stopped before {cell.key}: --seconds; run again to go on", file=sys.stderr)
            break
        row = study.run(cell)
        store.add(row)
        value = 100 * row.get("accuracy", row.get("val_accuracy"))
        print(f"{cell.key}: {value:.2f} %; {1000 * row['seconds_per_step']:.0f} ms a step", flush=True)
    if store.rows(final=True):
        report(store, args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("augmentation: stopped; finished cells are stored, run again to go on") from None
    except (GLEMError, FileNotFoundError) as error:
        raise SystemExit(f"augmentation: {error}") from error
