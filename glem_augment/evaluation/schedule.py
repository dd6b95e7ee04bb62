"""The trainings of a comparison, planned again after each one so that all end within the time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from glem_augment.evaluation.stacks import PLAIN, Stack

ENOUGH_STEPS = 200  # cells are cut before a training becomes shorter
FEWEST_STEPS, MOST_STEPS = 30, 3000
LONGER = 4  # how many times as many steps the check of learning takes
FEWEST_SEEDS, GOOD_SEEDS = 2, 3
RESERVE = 0.1  # of the time, which the first plan leaves for a machine that becomes slower


class OutOfTime(Exception):
    """The time is up. What has been measured stays."""


class Cell(NamedTuple):
    """One training. `phase` is "learn" (with the usual steps), "longer" (with more), "choose" or "measure"."""

    phase: str
    stack: Stack
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.phase}: {self.stack.name}, seed {self.seed}"


@dataclass
class Schedule:
    """What to train.

    Args:
        trials: stacks to choose from; later ones are cut first.
        measured: stacks that will be measured; before the choice, one of each kind.
        seeds: of each measured stack.
        deadline: of `time.monotonic()`.
        step_seconds: seconds of a step with a stack of each speed, see `speed_of`.
        judge_seconds: of the accuracy on held-out and on test images.
        copy_seconds: for the stacks with moved copies, of all copies of the images to fit and of all training images.
        fit_seconds: for each kind of moves, of a model of all training images.
        done: accuracies of finished cells by key.
    """

    trials: list[Stack]
    measured: list[Stack]
    seeds: int
    deadline: float
    step_seconds: dict[str, float]
    judge_seconds: tuple[float, float]
    copy_seconds: dict[Stack, tuple[float, float]]
    fit_seconds: dict[str, float]
    done: dict[str, float]
    steps: int = ENOUGH_STEPS
    slower: list[float] = field(default_factory=list)  # actual over expected seconds of the last cells
    cuts: list[str] = field(default_factory=list)

    def left(self) -> list[Cell]:
        """The cells that remain, in order."""
        cells = [Cell("learn", PLAIN), Cell("longer", PLAIN)]
        cells += [Cell("choose", stack) for stack in self.trials]
        cells += [Cell("measure", stack, seed) for seed in range(self.seeds) for stack in self.measured]
        return [cell for cell in cells if cell.key not in self.done]

    def expected(self, cell: Cell) -> float:
        """Seconds of a training on a machine as fast as at the start."""
        steps = self.steps * (LONGER if cell.phase == "longer" else 1)
        return steps * self.step_seconds[speed_of(cell.stack)] + self.judge_seconds[cell.phase == "measure"]

    def seconds(self) -> float:
        """Expected seconds of all cells that remain, on a machine as fast as it is now."""
        cells = self.left()
        pairs = {(cell.stack, cell.phase == "measure") for cell in cells if cell.stack in self.copy_seconds}
        known = {(cell.stack, cell.phase == "measure") for cell in self._finished() if cell.stack in self.copy_seconds}
        copying = sum(self.copy_seconds[stack][measured] for stack, measured in pairs - known)
        fitted = {stack.kind for stack, measured in known if measured}
        copying += sum(self.fit_seconds[kind] for kind in {s.kind for s, measured in pairs if measured} - fitted)
        return (sum(map(self.expected, cells)) + copying) * self.slowdown()

    def slowdown(self) -> float:
        recent = self.slower[-3:]
        return sum(recent) / len(recent) if recent else 1.0

    def _finished(self) -> list[Cell]:
        stacks = dict.fromkeys([*self.trials, *self.measured])
        cells = [Cell(phase, stack, seed) for phase in ("choose", "measure") for stack in stacks for seed in range(10)]
        return [cell for cell in cells if cell.key in self.done]

    def begin(self) -> None:
        """Choose the steps: as many as fit, with as few cuts as possible."""
        self.deadline -= (spare := RESERVE * (self.deadline - time.monotonic()))
        self.cut("the time allows")
        left = self.deadline - time.monotonic()
        self.steps = 0
        fixed = self.seconds()
        self.steps = 1
        each = self.seconds() - fixed
        self.steps = max(FEWEST_STEPS, min(MOST_STEPS, int((left - fixed) / each)))
        self.deadline += spare

    def cut(self, why: str = "steps have become slower") -> None:
        """Leave out seeds and trials until the rest fits into the time that is left, and note them in `cuts`."""
        before = len(self.trials), self.seeds
        tried = {cell.stack for cell in self._finished() if cell.phase == "choose"}
        while self.seconds() > self.deadline - time.monotonic():
            untried = [stack for stack in self.trials if stack not in tried]
            if self.seeds > GOOD_SEEDS and self._seeds_begun() < self.seeds:
                self.seeds -= 1
            elif untried:
                self.trials.remove(untried[-1])
            elif self.seeds > max(FEWEST_SEEDS, self._seeds_begun()):
                self.seeds -= 1
            else:
                break
        for name, had, has in (("trials", before[0], len(self.trials)), ("seeds", before[1], self.seeds)):
            if has < had:
                self.cuts.append(f"{name} from {had} to {has}, since {why}")

    def _seeds_begun(self) -> int:
        return max((cell.seed + 1 for cell in self._finished() if cell.phase == "measure"), default=0)

    def finished_seeds(self) -> int:
        """How many seeds all measured stacks have."""
        return min(
            sum(Cell("measure", stack, seed).key in self.done for seed in range(self.seeds)) for stack in self.measured
        )

    def accuracies(self) -> dict[Stack, list[float]]:
        """Accuracies of the measured stacks, of the seeds that all of them have."""
        seeds = range(self.finished_seeds())
        return {stack: [self.done[Cell("measure", stack, seed).key] for seed in seeds] for stack in self.measured}

    def note(self, cell: Cell, accuracy: float, seconds: float) -> None:
        """A finished cell."""
        self.slower.append(seconds / max(1e-9, self.expected(cell)))
        self.done[cell.key] = accuracy


def speed_of(stack: Stack) -> str:
    """Stacks with steps of about the same time."""
    if stack.adversarial:
        return "adversarial"
    return "plain" if not stack.image else "jitter" if stack.kind == "jitter" else "image"


def interleaved(kinds: Sequence[Sequence[Stack]]) -> list[Stack]:
    """The first of every kind, the second of every kind, ..., so that cuts at the end treat kinds alike."""
    longest = max(map(len, kinds), default=0)
    return [kind[i] for i in range(longest) for kind in kinds if i < len(kind)]
