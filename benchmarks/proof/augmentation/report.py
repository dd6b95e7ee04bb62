"""Tables and plot of `augmentation/run.py`, made from the stored rows alone."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Interval, interval
from benchmarks.proof.augmentation.plan import FINAL, TUNING, Store, needs_flow, params_text
from benchmarks.proof.augmentation.settings import PLAIN, RECIPES, REUSE, SETTINGS, SMOKE, TUNING_SEED
from glem_augment.io import atomic_write

NAMES = {"pairs": "best single + ", "triples": "best pair + "}
AIM, LEAST_SEEDS = 1.0, 5  # points over the opponent; least number of seeds


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

    def trials(self) -> dict[str, int]:
        """Number of tuning cells per side; for ours, per flow."""
        counted: dict[str, int] = {}
        for row in self.tuning:
            if row["stage"] == "ours" and row["base"] != self.base:
                continue
            side = row["side"] if row["side"] != "ours" else f"ours ({row['flow']})"
            counted[side] = counted.get(side, 0) + 1
        return counted


def results_of(store: Store) -> list[Result]:
    final, tuning = store.rows(final=True), store.rows(final=False)
    pairs = dict.fromkeys((row["setting"], row["classifier"]) for row in final)
    return [Result(*pair, final, tuning) for pair in pairs]


def report(store: Store, folder: Path) -> None:
    """Write augmentation.md and augmentation.png."""
    results = results_of(store)
    text = "\n".join(markdown(results)) + "\n"
    with atomic_write(folder / "augmentation.md", "w") as file:
        file.write(text)
    print(text)
    draw(results, folder / "augmentation.png")


# ---- text ------------------------------------------------------------------------------------------------------------


def _setting(name: str) -> Any:
    return SETTINGS.get(name, SMOKE)


def signed(gain: Interval | None, digits: int = 2) -> str:
    return gain.text(digits, sign=True) if gain else ""


def base_text(base: list[Any]) -> str:
    names = ["crop + flip" if name == "cropflip" else name for name, _ in base]
    return " + ".join(names) or "nothing"


def markdown(results: list[Result]) -> list[str]:
    lines = [
        "# Augmentation through a flow: what it adds to the best tuned opponent",
        "",
        "`python benchmarks/proof/augmentation/run.py --report`, from "
        f"`{FINAL}` (test images, read once, after all settings were fixed) and `{TUNING}` (validation images). "
        "The protocol is in docs/protocol.md. Gains are paired over seeds, in points, with 95 % intervals "
        f"(Student's t), as are accuracies; a row counts with at least {LEAST_SEEDS} seeds. Gains are over the "
        "opponent, the best pair or crop + flip, whichever is best on the test images. The control is the same method "
        "with the modes of the pixels; the control's best, the method that validation put first with these.",
        "",
    ]
    lines += ["## Proof: the flow has seen these labelled images alone, or other images", ""]
    lines += _gains(results, leaking=False)
    counted = [row for result in results if (row := _verdict(result)) is not None]
    over = [g for g, *_ in counted if g.seeds >= LEAST_SEEDS and g.clear]
    clear = [g for g in over if g.mean >= AIM]
    above = [_above_controls(against) for _, *against in counted]
    lines += [
        "",
        f"Settings and classifiers: {len(counted)}. Interval over the opponent above zero: {len(over)} (with at least "
        f"{AIM:g} point: {len(clear)}). Interval over the control above zero: {sum(own for own, _ in above)}; over the "
        f"control's best method: {sum(best for _, best in above)}.",
        "",
        "## Never counted as proof: flows that have seen the labels of the full training set",
        "",
        *_gains(results, leaking=True),
        "",
        "## All arms",
        "",
    ]
    for result in results:
        lines += [f"### {result.setting}, {result.classifier}", "", *_arms(result), ""]
    facts = {(row["processor"], row["threads"], row["torch"]) for r in results for arm in r.arms for row in arm.rows}
    for processor, threads, version in sorted(facts):
        lines.append(f"{processor}, {threads} thread{'s' * (threads > 1)}, torch {version}; CPU seconds.")
    return lines


def _verdict(result: Result) -> tuple[Interval, Interval | None, Interval | None] | None:
    """Gains of ours over the opponent, over its control, and over the best control."""
    arm = result.best(_setting(result.setting).proof)
    if arm is None or (strongest := result.strongest(arm)) is None:
        return None
    over = paired_gain(arm.accuracies, strongest.accuracies)
    return None if over is None else (over, *against_controls(result, arm))


def against_controls(result: Result, arm: Arm) -> tuple[Interval | None, Interval | None]:
    """Gains over the same method along the pixels' modes, and over the best method along the pixels' modes."""
    own, best = result.control(arm), result.best_control()
    return own and paired_gain(arm.accuracies, own.accuracies), best and paired_gain(arm.accuracies, best.accuracies)


def _above_controls(against: list[Interval | None]) -> list[bool]:
    return [gain is not None and gain.seeds >= LEAST_SEEDS and gain.clear for gain in against]


def _gains(results: list[Result], leaking: bool) -> list[str]:
    lines = []
    for result in results:
        setting = _setting(result.setting)
        for flow in setting.leaking if leaking else setting.proof:
            arm, opponent = result.best((flow,)), result.opponent
            if arm is None or opponent is None or (strongest := result.strongest(arm)) is None:
                continue
            control, plain = result.control(arm), result.plain
            over = paired_gain(arm.accuracies, strongest.accuracies)
            own, best = against_controls(result, arm)
            lines.append(
                f"| {result.setting} | {result.classifier} | {plain.mean if plain else ''} | {opponent.mean} "
                f"({base_text(opponent.stack)}) | {arm.mean} ({arm.method}, {flow}) | "
                f"{control.mean if control else ''} | {signed(over)} | {signed(own)} | {signed(best)} | "
                f"{over.seeds if over else 0} |"
            )
    if not lines:
        return ["Nothing measured yet."]
    head = "| setting | classifier | crop + flip | best opponent | + ours, best by validation | + its control "
    head += "| ours - opponent | ours - control | ours - control's best | seeds |"
    return [head, "|" + "---|" * 10, *lines]


def _arms(result: Result) -> list[str]:
    plain, opponent = result.plain, result.opponent
    lines = [
        "| side | flow | method | tuned | test accuracy % | - opponent | ms per step | added to crop + flip | seeds |",
        "|" + "---|" * 9,
    ]
    again = next((arm for arm in result.recipe if arm.side == "opponent"), opponent)
    for arm in (*result.arms, *result.recipe):
        other = again if arm in result.recipe else opponent
        gain = None if other is None or arm is other else paired_gain(arm.accuracies, other.accuracies)
        added = "" if plain is None or arm is plain else f"{1000 * (arm.step - plain.step):+.0f} ms"
        method = f"opponent: {base_text(arm.stack)}" if arm.side == "opponent" else arm.method
        method += ", measured later" * (arm in result.recipe)
        shown = arm.stack if arm.side == "opponent" else [[arm.method, arm.params]]
        tuned = "; ".join(params_text(params) for _, params in shown if params)
        lines.append(
            f"| {arm.side} | {arm.flow} | {method} | {tuned} | {arm.mean} | {signed(gain)} | {1000 * arm.step:.0f} | "
            f"{added} | {len(arm.accuracies)} |"
        )
    trials = ", ".join(f"{side} {count}" for side, count in result.trials().items())
    some = result.arms[0].rows[0]
    lines += [
        "",
        f"{some['images']} training and {some['measured_on']} test images, {some['steps']} steps; every augmented "
        f"image is used {REUSE} times on average. Tuning cells: {trials}.",
    ]
    tuned = [row for row in result.tuning if row["stage"] != "ours" or row["base"] == result.base]
    best: dict[tuple[str, str], float] = {}
    for row in tuned:
        if row["seed"] == TUNING_SEED:
            key = (row["flow"], NAMES.get(row["stage"], "") + row["method"])
            best[key] = max(best.get(key, 0.0), 100 * row["val_accuracy"])
    listed = ", ".join(f"{m}{'' if f == 'none' else f' ({f})'} {v:.1f}" for (f, m), v in best.items())
    lines.append(f"Validation accuracy % of each at its best, first tuning seed: {listed}.")
    return lines


# ---- plot ------------------------------------------------------------------------------------------------------------


def draw(results: list[Result], path: Path) -> None:
    """Gains over the opponent and the controls, with intervals. One line per setting and classifier shows the flow and
    method that were best on validation images."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("augmentation: no picture without matplotlib (pip install 'glem-augment[plots]')", file=sys.stderr)
        return
    found = [(result, verdict) for result in results if (verdict := _verdict(result)) is not None]
    if not found:
        return
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    kinds = (
        (-0.2, "tab:blue", "over the best opponent"),
        (0.0, "tab:orange", "over the control: the same method, modes of the pixels"),
        (0.2, "tab:green", "over the control's best method"),
    )
    for index, (_, verdict) in enumerate(found):
        for gain, (shift, colour, label) in zip(verdict, kinds, strict=True):
            if gain is not None:
                half = None if math.isnan(gain.half) else [gain.half]
                label = None if index else label
                axis.errorbar([gain.mean], [index + shift], xerr=half, fmt="o", color=colour, capsize=3, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(AIM, color="grey", linewidth=0.8, linestyle=":")
    arms = [result.best(_setting(result.setting).proof) for result, _ in found]
    names = [f"{r.setting}, {r.classifier}\n{a.method}, {a.flow}" for (r, _), a in zip(found, arms, strict=True) if a]
    axis.set_yticks(range(len(found)), names, fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlabel("points of test accuracy, mean and 95 % interval over paired seeds")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # above: rows are below
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
