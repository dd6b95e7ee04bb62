"""The stored arms of `run.py` in their roles: the best other stack, moves along the pixels' modes or through a flow.

Validation images choose; test images are read once. Only the opponent may be chosen on test images, which favours it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.common import Interval, Rows, paired
from benchmarks.proof.augmentation.settings import METHODS, PLAIN, SETTINGS, fixed_move, split_arm

BySeed = dict[str, float]
FAMILIES = {**dict.fromkeys(("fashion-mnist", "mnist", "notmnist"), "grey images"), "cifar10": "CIFAR-10"}
FAMILIES["imagenette"] = "Imagenette"
KINDS = {"own": "own images", "unlabelled": "unlabelled images", "": "other images"}  # that trained a flow


def move_of(arm: str) -> tuple[str, str, str] | None:
    """Base, method and flow of an arm that ends with one of our moves."""
    base, method, flow = split_arm(arm)
    return (base, method, flow) if METHODS[method].side == "ours" else None


def over(values: BySeed, seeds: Iterable[str]) -> float:
    return statistics.mean([values[seed] for seed in seeds if seed in values] or [0.0])


class Task:
    """A setting with a classifier, from its stored rows.

    If the opponent was tuned again, only arms on the newest base count. The fixed moves, which the pages advise, may
    stand on a stack without a flow where the newest opponent has one.
    """

    def __init__(self, name: str, rows: Rows) -> None:
        self.name, (setting, self.classifier) = name, name.split("/")
        self.setting = SETTINGS[setting]
        parts: dict[str, dict[str, BySeed]] = {}
        self.validation: dict[str, list[float]] = {}
        for arm, split, _, values in rows.arms(name):
            parts.setdefault(split, {})[arm] = {seed: 100 * value for seed, value in values.items()}
            if split == "validation: ours":
                self.validation[arm] = list(values.values())
        self.final, self.recipe, self.longer, self.beside = (
            parts.get(f"test: {stage}", {}) for stage in ("final", "recipe", "longer", "moves")
        )
        moves = {arm: move for arm in self.final if (move := move_of(arm))}
        bases = [arm for arm in self.final if arm not in moves and any(move[0] == arm for move in moves.values())]
        self.base = bases[-1] if bases else ""
        self.moves = {arm: move for arm, move in moves.items() if move[0] == self.base}
        others = [arm for arm in self.final if arm not in moves and split_arm(arm)[0] == self.base]
        self.others = [arm for arm in (self.base, *others, *PLAIN) if arm in self.final]

    def strongest(self, values: BySeed, later: bool = False) -> tuple[str, BySeed]:
        """The best other stack on the test images of these seeds; `later`: of moves measured beside it again."""
        known = [(arm, self.final[arm]) for arm in self.others]
        again = [(arm, v) for arm, v in self.recipe.items() if not move_of(arm) and (later or arm != self.base)]
        found = [(arm, v) for arm, v in (*known, *again) if set(v) & set(values)]
        return max(found, key=lambda pair: over(pair[1], values))

    def best(self, flows: Iterable[str]) -> str | None:
        """The arm through one of these flows that was best on validation images (with most tuning seeds)."""

        def value(arm: str) -> tuple[int, float]:
            found = self.validation.get(arm, [])
            return len(found), statistics.mean(found or [0.0])

        return max((arm for arm, move in self.moves.items() if move[2] in set(flows)), key=value, default=None)

    def tuned(self) -> str | None:
        """Adversarial moves along the pixels' modes."""
        found = (arm for arm, move in self.moves.items() if move[1:] == ("adversarial", "identity"))
        return next(found, None)

    def gain(self, arm: str | None) -> Interval | None:
        """Points of an arm over the best other stack."""
        return paired(self.final[arm], self.strongest(self.final[arm])[1]) if arm else None

    def fixed(self, method: str) -> Interval | None:
        """Points of the advised moves of a method, whose strength is fixed, over the best other stack."""
        for arms in (self.final, self.recipe):
            for arm, values in arms.items():
                move = move_of(arm)
                if move and arm == f"{move[0]} + {fixed_move(method)}" and (arms is self.recipe or arm in self.moves):
                    return paired(values, self.strongest(values, arms is self.recipe)[1])
        return None


def comparisons(tasks: list[Task]) -> dict[str, dict[str, Interval]]:
    """Gains in points by comparison, and by task (with the flow, where a task has several)."""
    found: dict[str, dict[str, Interval]] = {}

    def put(name: str, where: str, gain: Interval | None) -> None:
        if gain is not None:
            found.setdefault(name, {})[where] = gain

    for task in tasks:
        for flow in task.setting.proof:
            arm, control = task.best([flow]), task.best(["identity"])
            ending = next(end for end in KINDS if flow.endswith(end))
            name = f"flow of {KINDS[ending]}"
            put(f"{name}, over the best other stack", f"{task.name}/{flow}", task.gain(arm))
            if arm and control:
                gain = paired(task.final[arm], task.final[control])
                put(f"{name}, over the pixels' modes", f"{task.name}/{flow}", gain)
        put("pixels' modes, tuned, over the best other stack", task.name, task.gain(task.tuned()))
        put("`Adversarial(strength=0.25)` of pixels, over the best other stack", task.name, task.fixed("adversarial"))
        put("`Noise(strength=0.5)` of pixels, over the best other stack", task.name, task.fixed("noise"))
    return dict(sorted(found.items()))


def family_means(gains: dict[str, Interval]) -> dict[str, float]:
    """Mean gain of each family of data sets: of the data sets' means, so that many settings of one weigh no more."""
    sets: dict[str, list[float]] = {}
    for name, gain in gains.items():
        sets.setdefault(SETTINGS[name.split("/")[0]].data, []).append(gain.mean)
    families: dict[str, list[float]] = {}
    for data, means in sets.items():
        families.setdefault(FAMILIES[data], []).append(statistics.mean(means))
    return {family: statistics.mean(means) for family, means in families.items()}
