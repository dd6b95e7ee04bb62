"""Does augmentation through a flow help a classifier? Arms of augmentations, trained alike with few labels.

    python benchmarks/proof/augmentation/run.py --settings imagenette32-50
    python benchmarks/proof/augmentation/run.py --settings fashion-10 --part "test: drawn" \\
        --arms "cropflip + synthetic(temperature=0.75)@fashion-unlabelled" "cropflip"
    python benchmarks/proof/augmentation/run.py --train-flow cifar10  # a flow; resumes

A row is one classifier, trained with one arm: a stack of operations by names, such as "cropflip + jitter(strength=0.2)
+ adversarial(strength=0.25)@identity". After @ stands the flow; "identity" has the modes of the pixels. Operations and
the values over which each was tuned are in settings.py, and choice.py reads the roles of arms out of the rows.

Without --arms, the stored arms of --part are measured, for seeds that have no rows. A part that begins with
"validation" is judged on training images that no seed draws, the same for all seeds; a part that begins with "test" on
the test images, which take no part in any choice. All arms of a setting have the same number of steps. All arms of a
seed have the same images, order and initial weights.

The stored arms were found in this order: each other operation with each of its values (on crop + flip), the best with
each further operation (singles, pairs), our moves on the best stack with each of their values (ours), all on validation
images; then crop + flip, the best stack, our best moves and the same moves of the pixels on test images (final). Commit
309e287 has the code of this order.

Data is read from $GLEM_DATA (fashion-mnist, cifar10, imagenette128, mnist), and trained flows from --flows.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository

from benchmarks.common import RESULTS, Rows, parser
from benchmarks.proof.augmentation.data import Flows, Task, make_task
from benchmarks.proof.augmentation.settings import FINAL_SEEDS, FLOWS, SETTINGS, SMOKE, Setting, stack_of
from benchmarks.proof.augmentation.train import CLASSIFIERS, accuracy, train
from glem_augment import GLEM
from glem_augment.errors import GLEMError

STUDY = "augmentation"


class Study:
    """Trains classifiers. Images and adapted flows of the last task are kept, since successive arms share them."""

    def __init__(self, flows: Path, bf16: bool) -> None:
        self.flows, self.bf16 = Flows(flows), bf16
        self._key: tuple[str, int] | None = None
        self._task: Task | None = None
        self._adapted: dict[tuple[str, bool], GLEM] = {}

    def task(self, setting: Setting, seed: int) -> Task:
        if self._task is None or self._key != (setting.name, seed):
            self._key, self._task, self._adapted = (setting.name, seed), make_task(setting, seed), {}
        return self._task

    def accuracy(self, setting: Setting, classifier: str, arm: str, seed: int, test: bool) -> float:
        """The share of test images, or of validation images, that a classifier trained with this arm recognises."""
        task = self.task(setting, seed)

        def flow(name: str, pooled: bool) -> GLEM:
            if (name, pooled) not in self._adapted:
                self._adapted[name, pooled] = self.flows.adapted(name, setting, seed, task, pooled)
            return self._adapted[name, pooled]

        network = train(
            classifier, task.train, len(task.classes), stack_of(arm), flow, setting.steps[classifier], setting.batch,
            seed, self.bf16,
        )  # fmt: skip
        return accuracy(network, task.test if test else task.val)


def options() -> Any:
    result = parser(__doc__)
    add = result.add_argument
    add("--settings", nargs="+", default=list(SETTINGS), metavar="SETTING", help=f"of {', '.join(SETTINGS)} (all)")
    add("--classifiers", nargs="+", choices=CLASSIFIERS, default=["cnn"], help="(%(default)s)")
    add("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS), help="(%(default)s)")
    add("--part", default="test: final", help="the rows' column `split`: test: ... or validation: ... (%(default)s)")
    add("--arms", nargs="+", help="(default: the stored arms of the part)")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of the classifier (%(default)s)")
    add("--flows", type=Path, default=Path("runs"), help="folder of trained flows (%(default)s)")
    add("--train-flow", metavar="NAME", help=f"make a flow: {', '.join(FLOWS)}")
    add("--smoke", action="store_true", help="half a minute on the bundled images")
    return result


def main() -> None:
    arguments = options()
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    known = {**SETTINGS, "smoke": SMOKE}
    if args.smoke:
        args.out = args.out if args.out != RESULTS else Path("runs/augmentation-smoke")
        args.settings, args.seeds, args.arms = ["smoke"], args.seeds[:1], args.arms or SMOKE_ARMS
    if unknown := [name for name in args.settings if name not in known]:
        arguments.error(f"unknown settings {unknown}; there are {', '.join(SETTINGS)}")
    if not args.part.startswith(("test", "validation")):
        arguments.error(f"--part begins with test or validation, got {args.part!r}")
    study, rows = Study(args.flows, args.precision == "bf16"), Rows(STUDY, args.out)
    if args.train_flow:
        study.flows.train(args.train_flow)
        return
    for setting, classifier in ((known[name], classifier) for name in args.settings for classifier in args.classifiers):
        name, test = f"{setting.name}/{classifier}", args.part.startswith("test")
        stored = dict.fromkeys(arm for arm, split, *_ in rows.arms(name) if split == args.part)
        for seed in args.seeds:
            for arm in args.arms or stored:
                why = next((why for flow in flows_of(arm) if (why := study.flows.missing(flow, setting))), None)
                if why:
                    print(f"augmentation: {name}: without {arm}: {why}", file=sys.stderr)
                    continue

                measure = partial(study.accuracy, setting, classifier, arm, seed, test)
                rows.once(name, arm, seed, args.part, lambda: {"accuracy": measure()})  # noqa: B023


SMOKE_ARMS = ["cropflip", "cropflip + jitter(strength=0.2)", "cropflip + adversarial(strength=0.25)@fashion-mnist"]


def flows_of(arm: str) -> list[str]:
    """The flows that an arm needs."""
    return [str(params["flow"]) for _, params in stack_of(arm) if "flow" in params]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("augmentation: stopped; finished rows are stored, run again to go on") from None
    except (GLEMError, FileNotFoundError) as error:
        raise SystemExit(f"augmentation: {error}") from error
