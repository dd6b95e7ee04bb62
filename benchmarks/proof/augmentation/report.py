"""The comparisons of `augmentation/run.py` and the page of its arms, from the stored rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Interval, interval, markdown, processors
from benchmarks.proof.augmentation.plan import Store, needs_flow, params_text
from benchmarks.proof.augmentation.settings import PLAIN, RECIPES, SETTINGS, SMOKE
from glem_augment.io import atomic_write


def paired_gain(ours: dict[int, float], other: dict[int, float], seeds: Iterable[int] | None = None) -> Interval | None:
    """Difference in points between accuracies by seed, over the common seeds (within `seeds`); None without seeds."""
    both = sorted(set(ours) & set(other) & set(ours if seeds is None else seeds))
    return interval(100 * (ours[seed] - other[seed]) for seed in both) if both else None


@dataclass
class Arm:
    """The final rows of one method in one setting."""

    side: str
    flow: str
    method: str
    rows: list[dict[str, Any]]

    @property
    def params(self) -> dict[str, Any]:
        return self.rows[0]["params"]

    @property
    def stack(self) -> list[Any]:
        """Methods and parameters of an opponent."""
        return self.rows[0]["base"] + [[self.method, self.params]] * (self.method != "opponent")

    @property
    def accuracies(self) -> dict[int, float]:
        return {row["seed"]: row["accuracy"] for row in self.rows}

    def over(self, seeds: Iterable[int]) -> Interval:
        """Mean accuracy in % over these seeds."""
        return interval(100 * value for seed, value in self.accuracies.items() if seed in set(seeds))

    @property
    def step(self) -> float:
        return statistics.median(row["seconds_per_step"] for row in self.rows)

    @property
    def mean(self) -> Interval:
        return self.over(self.accuracies)


def arms_of(rows: list[dict[str, Any]]) -> list[Arm]:
    """The arms of these rows, in order."""
    arms: list[Arm] = []
    for row in rows:
        key = (row["side"], row["flow"], row["method"], row["params"])
        arm = next((a for a in arms if (a.side, a.flow, a.method, a.params) == key), None)
        if arm is None:
            arms.append(arm := Arm(*key[:3], []))
        arm.rows.append(row)
    return arms


class Result:
    """One setting and classifier: its arms and the comparisons. `recipe`: arms of the advised moves, measured later.

    Rows on an older base than the newest opponent's are left out, because the opponent has been tuned again. The
    advised moves were measured on a stack without a flow where the newest opponent has one.
    """

    def __init__(
        self, setting: str, classifier: str, final: list[dict[str, Any]], tuning: list[dict[str, Any]]
    ) -> None:
        self.setting, self.classifier = setting, classifier
        measured = [row for row in final if (row["setting"], row["classifier"]) == (setting, classifier)]
        own = [row for row in measured if row["stage"] == "final"]
        newest = [row for row in own if row["method"] == "opponent"]
        self.base = newest[-1]["base"] if newest else []
        self.arms = arms_of([row for row in own if row["method"] in PLAIN or row["base"] == self.base])
        later = [row for row in measured if row["stage"] == "recipe"]
        flowless = [row["base"] for row in later if row["method"] == "opponent" and not needs_flow(row["base"])]
        bases = [self.base, *(flowless[-1:] if needs_flow(self.base) else [])]
        self.recipe = arms_of([row for row in later if row["base"] in bases])
        self.moves, self.longer = (
            arms_of([row for row in measured if row["stage"] == stage]) for stage in ("moves", "longer")
        )
        self.tuning = [row for row in tuning if (row["setting"], row["classifier"]) == (setting, classifier)]

    @property
    def opponents(self) -> list[Arm]:
        """The tuned stacks without our moves. A third operation has an arm only if validation preferred it."""
        return [arm for arm in self.arms if arm.side == "opponent" and arm.method not in PLAIN]

    @property
    def opponent(self) -> Arm | None:
        """The stack that was best on validation images."""
        return max(self.opponents, key=lambda arm: len(arm.stack), default=None)

    @property
    def plain(self) -> Arm | None:
        """Crop + flip (or crop) alone, also if it is the best opponent."""
        found = next((arm for arm in self.arms if arm.method in PLAIN), None)
        return found or (self.opponent if len(self.base) == 1 and self.base[0][0] in PLAIN else None)

    def strongest(self, arm: Arm) -> Arm | None:
        """The best of the tuned stacks and crop + flip on the test images of the arm's seeds.

        A stack that was measured again counts beside the arms that were measured with it; another stack, which came
        with them, counts beside all.
        """
        seeds = set(arm.accuracies)
        later = [other for other in self.recipe if other.side == "opponent"]
        again = [other for other in later if arm in self.recipe or other.stack != self.base]
        known = [other for other in (*self.opponents, self.plain, *again) if other and seeds & set(other.accuracies)]
        return max(known, key=lambda other: other.over(seeds).mean, default=None)

    def advised(self, method: str) -> Interval | None:
        """The gain of the advised moves of a method over the best stack; None if they were not measured."""
        arms = [arm for arm in (*self.arms, *self.recipe) if (arm.method, arm.params) == (method, RECIPES[method])]
        strongest = self.strongest(arms[0]) if arms else None
        return paired_gain(arms[0].accuracies, strongest.accuracies) if strongest else None

    def validation(self, arm: Arm) -> tuple[int, float]:
        """The criterion of the choice: number of tuning seeds (earlier rows have one), and mean over these seeds."""
        values = [
            row["val_accuracy"]
            for row in self.tuning
            if (row["flow"], row["method"], row["params"], row["base"]) == (arm.flow, arm.method, arm.params, self.base)
        ]
        return len(values), statistics.mean(values or [0.0])

    def best(self, flows: tuple[str, ...]) -> Arm | None:
        """Our arm through one of these flows that was best on validation images, regardless of the test images."""
        arms = [arm for arm in self.arms if arm.side == "ours" and arm.flow in flows]
        return max(arms, key=self.validation) if arms else None

    def control(self, arm: Arm) -> Arm | None:
        return next((a for a in self.arms if a.side == "control" and a.method == arm.method), None)

    def best_control(self) -> Arm | None:
        """The control of any method that was best on validation images."""
        arms = [arm for arm in self.arms if arm.side == "control"]
        return max(arms, key=self.validation) if arms else None


def results_of(store: Store) -> list[Result]:
    final, tuning = store.rows(final=True), store.rows(final=False)
    pairs = dict.fromkeys((row["setting"], row["classifier"]) for row in final)
    return [Result(*pair, final, tuning) for pair in pairs]


def report(store: Store, folder: Path) -> None:
    """Write augmentation.md, and print it."""
    text = markdown(page(results_of(store)))
    with atomic_write(folder / "augmentation.md", "w") as file:
        file.write(text)
    print(text)


# ---- text ------------------------------------------------------------------------------------------------------------


def signed(gain: Interval | None, digits: int = 2) -> str:
    return gain.text(digits, sign=True) if gain else ""


def base_text(base: list[Any]) -> str:
    names = ["crop + flip" if name == "cropflip" else name for name, _ in base]
    return " + ".join(names) or "nothing"


def against_controls(result: Result, arm: Arm) -> tuple[Interval | None, Interval | None]:
    """Gains over the same method along the pixels' modes, and over the best method along the pixels' modes."""
    own, best = result.control(arm), result.best_control()
    return own and paired_gain(arm.accuracies, own.accuracies), best and paired_gain(arm.accuracies, best.accuracies)


def page(results: list[Result]) -> dict[str, Any]:
    """All arms on the test images; docs/evidence.md has the comparisons."""
    rows = []
    for result in results:
        leaking = SETTINGS.get(result.setting, SMOKE).leaking
        groups = (
            ("", result.arms), (", measured later", result.recipe), (", beside a pretrained flow", result.moves),
            (", 1.4 times the steps", result.longer),
        )  # fmt: skip
        for group, arm in ((group, arm) for group, arms in groups for arm in arms):
            beside = dict(groups)[group] if group else []
            other = next((other for other in beside if other.side == "opponent"), result.opponent)
            gain = None if other is None or arm is other else paired_gain(arm.accuracies, other.accuracies)
            opponent = arm.side == "opponent"
            shown = arm.stack if opponent else [[arm.method, arm.params]]
            rows.append(
                {
                    "setting": result.setting, "classifier": result.classifier,
                    "side": "leaking" if arm.flow in leaking else arm.side, "flow": arm.flow,
                    "method": (base_text(arm.stack) if opponent else arm.method) + group,
                    "tuned": "; ".join(params_text(params) for _, params in shown if params),
                    "test accuracy %": str(arm.mean), "over the opponent": signed(gain),
                    "ms per step": f"{1000 * arm.step:.0f}", "seeds": len(arm.accuracies),
                }
            )  # fmt: skip
    return {
        "title": "Augmentation through a flow: all arms",
        "command": "python benchmarks/proof/augmentation/run.py --report",
        "measured on": processors([row for result in results for arm in result.arms for row in arm.rows]),
        "gains": "points over the opponent, the stack that validation chose, paired by seed, 95 % interval; the "
        "control is the same method along the pixels' modes; flows of the side 'leaking' have seen all labels",
        "rows": rows,
    }
