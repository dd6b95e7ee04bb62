"""Does augmentation through a flow help a classifier? Tuned opponents against the best of them + ours, and the control.

    python benchmarks/proof/augmentation.py --plan                            # cells, what is done, estimated time
    python benchmarks/proof/augmentation.py --settings imagenette32-50 --seconds 3600
    python benchmarks/proof/augmentation.py --report                          # tables and plot from the stored JSON
    python benchmarks/proof/augmentation.py --train-flow cifar10 --seconds 600    # a flow that settings need, in pieces
    python benchmarks/proof/augmentation.py --task flowers=data/flowers --flow user/flow --per-class 50

A cell is one classifier trained with one stack of augmentations. For every setting and classifier, in this order:

    singles   each opponent with each of its trials (on crop + flip), measured on validation images
    pairs     the best single opponent with each other one, at its tuned value; the best of both is *the* opponent
    ours      opponent + each of our methods, through each flow and through the identity (the control), each trial
    final     crop + flip, the opponent, the methods of ours that did best, and their controls: test images, five seeds

The validation images are training images that no seed draws, the same for all; the test images are read in "final"
alone, when everything is fixed. All cells of a setting have the same steps, and those of a seed the same images, order
and start.
Every finished cell is stored at once, in augmentation_tuning.json or (final) augmentation.json, a list of rows; a rerun
goes on with what is missing. See docs/augmentation.md.

Data is looked for in $GLEM_DATA (fashion-mnist, cifar10, imagenette128, mnist), trained flows in --flows.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import RESULTS, machine, parser
from benchmarks.proof.augmentation_data import Flows, Library, Task
from benchmarks.proof.augmentation_ops import Component
from benchmarks.proof.augmentation_plan import Cell, Plan
from benchmarks.proof.augmentation_report import report
from benchmarks.proof.augmentation_settings import (
    DEFAULT_OURS,
    FINAL_SEEDS,
    FINALISTS,
    FLOWS,
    METHODS,
    OPPONENTS,
    PROTOCOL,
    SETTINGS,
    SMOKE,
    TEACHER_STEPS,
    TUNING_SEED,
    TUNING_SEEDS,
    Setting,
)
from benchmarks.proof.augmentation_store import Store
from benchmarks.proof.augmentation_task import own_task
from benchmarks.proof.augmentation_train import CLASSIFIERS, Classifier, accuracy, make_body, train
from glem_augment import GLEM
from glem_augment.errors import GLEMError
from glem_augment.io import atomic_write


class Study:
    """Runs cells. Images and adapted flows of the last task are kept, since neighbouring cells share them."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.library = Library(args.cache)
        self.flows = Flows(args.flows, self.library)
        self._task: tuple[tuple[str, int], Task] | None = None
        self._adapted: dict[tuple[str, str, int], GLEM] = {}
        self._machine = machine()

    def task(self, cell: Cell) -> Task:
        key = (cell.setting.name, cell.seed)
        if self._task is None or self._task[0] != key:
            self._task, self._adapted = (key, self.library.task(cell.setting, cell.seed)), {}
        return self._task[1]

    def flow(self, name: str, cell: Cell) -> GLEM:
        key = (name, cell.setting.name, cell.seed)
        if key not in self._adapted:
            self._adapted[key] = self.flows.adapted(name, cell.setting, cell.seed, self.task(cell))
        return self._adapted[key]

    def teacher(self, cell: Cell) -> Classifier:
        """A classifier of the same kind, trained on all training images that are not for validation; kept in a file."""
        setting = cell.setting
        which = "all" if setting.classes is None else "".join(map(str, setting.classes))
        file = self.args.cache / f"teacher-{setting.data}-{which}-{setting.size}-{cell.classifier}.safetensors"
        x, y = self.library.rest(setting)
        num_classes, steps = int(y.max()) + 1, 20 if setting is SMOKE else TEACHER_STEPS
        if file.is_file():
            body = make_body(cell.classifier, setting.channels, num_classes, setting.size)
            blank = torch.zeros(setting.channels)
            network = Classifier(body, blank, blank, self.args.precision == "bf16")
            network.load_state_dict(load_file(file))
            return network.eval().requires_grad_(False)
        network, _ = train(
            cell.classifier, (x, y), num_classes, [(setting.plain, {})], lambda name: self.flow(name, cell), steps,
            setting.batch, TUNING_SEED, self.args.precision == "bf16",
        )  # fmt: skip
        print(
            f"teacher of {setting.name}: {100 * accuracy(network, self.task(cell).val):.2f} % (validation)", flush=True
        )
        with atomic_write(file) as out:
            out.write(safetensors_bytes({k: v.contiguous() for k, v in network.state_dict().items()}))
        return network.requires_grad_(False)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure; returns the row."""
        began = time.process_time()
        task = self.task(cell)
        for _, params in cell.stack:  # adapting is not part of a step
            if "flow" in params:
                self.flow(params["flow"], cell)
        components: list[Component] = list(cell.stack)
        teacher = self.teacher(cell) if cell.method == "distill" else None
        steps = cell.setting.steps[cell.classifier]
        network, measured = train(
            cell.classifier, task.train, len(task.classes), components, lambda name: self.flow(name, cell), steps,
            cell.setting.batch, cell.seed, self.args.precision == "bf16", teacher,
        )  # fmt: skip
        part = task.test if cell.stage == "final" else task.val
        return {
            **cell.row(),
            "data": cell.setting.data,
            ("accuracy" if cell.stage == "final" else "val_accuracy"): accuracy(network, part),
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


def check_same_images(store: Store, setting: Setting, out: Path) -> None:
    """SystemExit where stored rows of a task were measured on images that have changed since, or on others."""
    rows = [*store.rows(final=False), *store.rows(final=True)]
    if any(row["setting"] == setting.name and row.get("data") != setting.data for row in rows):
        raise SystemExit(
            f"augmentation: {out} has results of {setting.name} on other images, or on these before files changed: "
            "choose another NAME in --task, or remove the folder"
        )


def todo(plan: Plan, store: Store, args: Any) -> Iterator[Cell]:
    """Cells that can run now, each setting's to its end before the next; later ones follow from what was measured."""
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


def show_plan(plan: Plan, store: Store, args: Any, flows: Flows) -> None:
    total = 0.0
    for setting in args.settings:
        for name in dict.fromkeys((*setting.proof, *(setting.leaking if args.leaking else ()))):
            why = flows.missing(name, setting)
            if why:
                print(f"{setting.name}: without the flow {name}: {why}")
            elif name == "own":
                print(f"{setting.name}: flows of the labelled images alone, one per seed, are trained on top of this")
        for classifier in args.classifiers:
            cells = [c for c in plan.cells(setting, classifier, store) if re.search(args.cells, c.key)]
            missing, seconds = 0, 0.0
            for cell in cells:
                done, cost = store.has(cell), plan.estimate(cell, store)
                missing, seconds = missing + (not done), seconds + (0 if done else cost)
                state = "done" if done else "flow?" if plan.lacks(cell) else f"{cost:4.0f}s"
                print(f"  {state}  {cell.key}")
            more, later = plan.later(setting, classifier, store)
            print(
                f"{setting.name}, {classifier}: {len(cells) - missing} done, {missing} to do in about "
                f"{seconds / 60:.0f} minutes; then about {more} that depend on these, in about {later / 60:.0f} minutes"
            )
            total += seconds + later
    print(f"in all about {total / 3600:.1f} hours")


def options() -> Any:
    result = parser(__doc__)
    result.set_defaults(threads=1)
    result.add_argument("--settings", nargs="+", default=list(SETTINGS), help=f"of {', '.join(SETTINGS)} (all)")
    result.add_argument("--classifiers", nargs="+", choices=CLASSIFIERS, default=["cnn"], help="(%(default)s)")
    result.add_argument(
        "--seeds", type=int, nargs="+", default=list(FINAL_SEEDS), help="of the final cells (%(default)s)"
    )
    result.add_argument("--opponents", nargs="+", choices=OPPONENTS, default=list(OPPONENTS), help="(all)")
    ours = [name for name, method in METHODS.items() if method.side == "ours"]
    result.add_argument("--methods", nargs="+", choices=ours, default=list(DEFAULT_OURS), help="of ours (%(default)s)")
    result.add_argument("--best", type=int, default=2, help="of our methods in the final cells, per flow (%(default)s)")
    result.add_argument("--through", nargs="+", metavar="FLOW", help="only these of a setting's flows (all)")
    result.add_argument("--leaking", action="store_true", help="also flows that have seen all labels; never counted")
    result.add_argument("--trials", type=int, default=3, help="at most so many per method (%(default)s)")
    result.add_argument(
        "--tuning-seeds", type=int, default=len(TUNING_SEEDS), choices=range(1, len(TUNING_SEEDS) + 1),
        help=f"of the best {FINALISTS} trials of a method (%(default)s)",
    )  # fmt: skip
    result.add_argument("--cells", default="", metavar="PATTERN", help="only cells whose name this expression finds")
    result.add_argument("--seconds", type=float, default=None, help="start no cell that would end later")
    result.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the classifier (%(default)s)")
    result.add_argument("--flows", type=Path, default=Path("runs"), help="folder of trained flows (%(default)s)")
    result.add_argument("--cache", type=Path, default=Path("runs/images"), help="for decoded images (%(default)s)")
    result.add_argument("--plan", action="store_true", help="list the cells and the time they will take; do nothing")
    result.add_argument("--report", action="store_true", help="tables and plot from the stored rows; do nothing else")
    result.add_argument("--train-flow", metavar="NAME", help=f"make a flow: {', '.join(FLOWS)}")
    result.add_argument(
        "--task",
        metavar="NAME=SPEC",
        help="a setting of your own images: a folder with train/ and test/ or val/, or "
        "what open_data takes; results go to runs/augmentation-NAME",
    )
    result.add_argument(
        "--flow",
        action="append",
        metavar="FLOW",
        help="of --task: a folder, a Hub repository, a name "
        "of --train-flow, or 'own', trained on the labelled images alone (the default); may be repeated",
    )
    result.add_argument("--per-class", type=int, default=50, help="of --task: labelled images (%(default)s)")
    result.add_argument("--size", type=int, help="of --task: side of the classifier's images (the flow's)")
    result.add_argument("--no-flip", action="store_true", help="of --task: mirror images are wrong, as of digits")
    result.add_argument("--smoke", action="store_true", help="half a minute on the bundled images")
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
    if args.task:
        setting = own_task(args.task, args.per_class, args.size, args.flow or ["own"], flip=not args.no_flip)
        args.settings = [setting.name]
        args.out = args.out if args.out != RESULTS else Path("runs") / f"augmentation-{args.task.partition('=')[0]}"
    known = {**SETTINGS, "smoke": SMOKE}
    unknown = [name for name in args.settings if name not in known]
    if unknown:
        arguments.error(f"unknown settings {unknown}; there are {', '.join(SETTINGS)}")
    args.settings = [known[name] for name in args.settings]
    store, began = Store(args.out), time.monotonic()
    if args.report:
        report(store, args.out)
        return
    if args.task:
        check_same_images(store, args.settings[0], args.out)
    study = Study(args)
    if args.train_flow:
        raise SystemExit(0 if study.flows.train(args.train_flow, args.seconds) else 75)
    plan = Plan(args, study.flows)
    if args.plan:
        show_plan(plan, store, args, study.flows)
        return
    for setting in args.settings:
        for name in setting.proof:
            if why := study.flows.missing(name, setting):
                print(f"augmentation: {setting.name}: without the flow {name}: {why}", file=sys.stderr)
    slow = 1.0  # wall-clock seconds per second of CPU time; estimates are in the latter
    for cell in todo(plan, store, args):
        expected = slow * plan.estimate(cell, store)
        if args.seconds is not None and time.monotonic() - began + expected > args.seconds:
            print(f"stopped before {cell.key}: --seconds; run again to go on", file=sys.stderr)
            break
        start = time.monotonic()
        row = study.run(cell)
        store.add(row)
        slow = max(1.0, (time.monotonic() - start) / max(row["cell_seconds"], 1e-3))
        value = row.get("accuracy", row.get("val_accuracy"))
        print(
            f"{cell.key}: {100 * value:.2f} %; {1000 * row['seconds_per_step']:.0f} ms a step, "
            f"{row['cell_seconds']:.0f} s",
            flush=True,
        )
    if store.rows(final=True):
        report(store, args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("augmentation: stopped; finished cells are stored, run again to go on") from None
    except (GLEMError, FileNotFoundError) as error:
        raise SystemExit(f"augmentation: {error}") from error
