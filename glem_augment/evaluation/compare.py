"""Does augmentation help on a user's images? One small network is trained with several stacks of augmentation.

All stacks crop and flip. Stacks compete within their kind: ordinary operations, ColorJitter, and moves along the modes
of pixels, of an autoencoder's latents, or of a flow. Held-out training images choose the best stack of each kind, with
one seed. The chosen stacks and the usual move are measured on the test images with several seeds. Differences have
95 % intervals (Student's t).
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from glem_augment import __version__
from glem_augment.augment.policies import Noise
from glem_augment.augment.transform import GLEMAugment
from glem_augment.checks import closest
from glem_augment.errors import DataError
from glem_augment.evaluation.classifier import accuracy, new_network
from glem_augment.evaluation.intervals import difference, interval
from glem_augment.evaluation.metrics import spread
from glem_augment.evaluation.pictures import Section, compose
from glem_augment.evaluation.schedule import LONGER, Cell, OutOfTime, Schedule, interleaved, speed_of
from glem_augment.evaluation.stacks import ADVERSARIAL, BASE, JITTER, ORDINARY, PLAIN, POLICIES, USUAL, Stack, moves
from glem_augment.evaluation.trainings import BATCH, COPIES, NETWORK, Comparison, models_for
from glem_augment.images.dataset import ImageData
from glem_augment.io import write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import weights_sha256

__all__ = ["CELLS", "advice", "compare", "parted", "picture", "report"]

CELLS = "cells.json"  # finished trainings, from which a run resumes
LEARNED = 0.8  # the least share of the accuracy above chance that LONGER times as many steps give
WIDE = 3.0  # points: wider intervals can't tell that nothing helps
COPYING = 0.3  # the largest part of the time for moved copies
TRIED_STEPS = 5  # to measure the time of a step
SHOWN = 8  # images in the picture


def parted(data: ImageData, every: int) -> tuple[ImageData, ImageData]:
    """The images in two parts; the second part has every `every`-th image of each class."""
    place = np.empty(len(data), dtype=np.int64)
    for k in range(len(data.classes)):
        rows = np.flatnonzero(data.targets == k)
        place[rows] = np.arange(len(rows))
    held = place % every == every - 1
    return data.subset(np.flatnonzero(~held)), data.subset(np.flatnonzero(held))


def compare(
    train: ImageData,
    test: ImageData,
    minutes: float = 10.0,
    seeds: int = 5,
    autoencoder: str | None = "taef2",
    flow: GLEM | None = None,
    network: str = NETWORK,
    pretrained: bool = False,
    progress: bool = True,
    folder: Path | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Choose and measure stacks within `minutes`; the result has `rows`, `advice`, `cut` and the settings.

    The trainings are planned again after each one. Where time is short, seeds and trials are cut, which `cut` says.
    There are no `rows` where the networks have learned too little, or two seeds took too long; `advice` then says how
    many minutes it takes.

    Args:
        train, test: images of one shape with the same classes; sizes that the autoencoder divides.
        seeds: 2 to 10 trainings of every chosen stack.
        network: a network of timm. pretrained: it starts from timm's weights.
        folder: finished trainings are stored there in cells.json. The same call resumes from them with the time that
            was left.
        began: `time.monotonic()` at the start of the time; by default now.

    Raises:
        DataError: classes that differ, or a class with fewer than five images. ValueError: see `check_network`.
            FileExistsError: the folder holds trainings of other images, options (but for the minutes) or versions.
    """
    began = time.monotonic() if began is None else began
    train.pixel_range.need_8_bits("a comparison", train.image_shape[0])
    if train.classes != test.classes:
        raise DataError(f"training and test images differ in classes: {train.classes[:5]} and {test.classes[:5]}")
    if np.bincount(train.targets, minlength=len(train.classes)).min() < 5:
        raise DataError("every class needs at least 5 training images, a fifth of which are held out for the choice")
    check_network(network, pretrained, train.image_shape)
    settings = {
        "train": _fingerprint(train), "test": _fingerprint(test), "minutes": minutes, "seeds": seeds,
        "autoencoder": autoencoder, "flow": flow and weights_sha256(flow), "network": network, "pretrained": pretrained,
        "library": __version__,
    }  # fmt: skip
    store = Store(None if folder is None else folder / CELLS, settings)
    fit, held = parted(train, 5)
    run = Run(Comparison(models_for(train, autoencoder, flow), 1, network, pretrained), fit, held, train, test, store)
    run.began = began
    with tqdm(unit="step", desc="compare", disable=not progress, dynamic_ncols=True) as bar:
        schedule = run.planned(began + 60 * minutes - store.seconds, seeds, autoencoder, bar)
        with suppress(OutOfTime):
            run.all_cells(schedule, bar)
    finished = schedule.finished_seeds()
    result = {
        "train": len(train), "test": len(test), "image_shape": list(train.image_shape), "classes": len(train.classes),
        "network": network, "pretrained": pretrained, "steps": schedule.steps, "batch": BATCH,
        "seeds": finished, "cut": schedule.cuts, "tuning": run.tuned(schedule),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    refusal = run.too_little(schedule)
    if refusal is None and finished < 2:
        needed = (store.seconds + schedule.seconds()) / 60 if schedule.left() else minutes
        needed = math.ceil(max(needed, minutes) + 1)
        refusal = f"Time ran out before two seeds were measured, so no advice. Give it about {needed} minutes."
    if refusal is None:
        rows = report(schedule.accuracies())
        for row, stack in zip(rows, schedule.measured, strict=True):
            row["step_cost"] = run.step_cost(stack, schedule)
    store.spent(time.monotonic() - began)
    return {
        **result, "rows": rows, "advice": refusal or advice(rows), "seconds": round(store.seconds, 1),
        "pictures": run.pictures([stack for stack in schedule.measured if stack.policy]) if rows else {},
    }  # fmt: skip


def check_network(name: str, pretrained: bool, shape: tuple[int, int, int]) -> None:
    """ValueError: timm has no such network, or no weights for it, or it can't take images of shape [C, H, W]."""
    import timm  # takes a second

    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}{closest(name.split('.')[0], timm.list_models())}")
    try:
        network = new_network(shape[0], 2, name=name).eval()
    except Exception as error:  # each network has other errors
        raise ValueError(f"timm can't make {name} ({' '.join(str(error).split())}): name another network") from None
    weights: Any = network.pretrained_cfg
    if pretrained and not any(weights.get(place) for place in ("hf_hub_id", "url", "file")):
        raise ValueError(f"timm has no weights for {name}: name another network")
    try:
        with torch.no_grad():
            network(torch.zeros(1, *shape))
    except Exception as error:
        size, reason = f"{shape[1]}x{shape[2]}", " ".join(str(error).split())
        raise ValueError(f"{name} can't take images of {size} ({reason}): give another size or network") from None


class Store:
    """Finished trainings in a file, for one comparison; without a path, in memory alone.

    Attributes:
        done: accuracies by cell. plan: numbers of the schedule. seconds: time spent.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.done: dict[str, float] = {}
        self.plan: dict[str, Any] = {}
        self.seconds = self.earlier = 0.0
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in settings if found["settings"].get(name) != settings[name]]
            done = {str(key): float(value) for key, value in found["cells"].items()}
            plan, seconds = dict(found["plan"]), float(found["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # a file of something else is replaced
        if done and set(other) - {"minutes"}:
            raise FileExistsError(
                f"{path} holds another comparison ({', '.join(other)} differ): give another folder, or remove the file"
            )
        if not other:
            self.done, self.plan, self.seconds = done, plan, seconds
            self.earlier = seconds

    def spent(self, seconds: float) -> None:
        """Store everything after so many seconds of this call. A disk that is full must not end the comparison."""
        self.seconds = self.earlier + seconds
        if self.path is None:
            return
        found = {"settings": self.settings, "plan": self.plan, "seconds": self.seconds, "cells": self.done}
        try:
            write_json(self.path, found)
        except OSError as error:
            warnings.warn(f"finished trainings are not stored: {error}", stacklevel=2)
            self.path = None


class Run:
    """One comparison: the images, the network, what has been measured."""

    def __init__(
        self, comparison: Comparison, fit: ImageData, held: ImageData, train: ImageData, test: ImageData, store: Store
    ) -> None:
        self.comparison, self.store = comparison, store
        self.fit, self.held, self.train, self.test = fit, held, train, test
        self.began = time.monotonic()
        self.copy: dict[str, float] = {}  # seconds of a moved copy of one image, by kind
        self.ours: dict[str, list[Stack]] = {}
        self.deadline = math.inf

    # ---- the plan --------------------------------------------------------------------------------------------

    def planned(self, deadline: float, seeds: int, autoencoder: str | None, bar: Any) -> Schedule:
        """The schedule, from times that are measured now; of a run that is resumed, with the stored steps and cuts."""
        shown = {"pixels": "pixel modes", "autoencoder": f"{autoencoder} modes", "flow": "flow's modes"}
        comparison, plan, fitting = self.comparison, self.store.plan, dict[str, float]()
        for kind in comparison.models:
            bar.set_description(f"modes of {kind}")
            began = time.monotonic()
            model = comparison.model(kind, self.fit)
            fitting[kind] = (time.monotonic() - began) * len(self.train) / len(self.fit)
            self.copy[kind] = _seconds_per_copy(model)
            policies = [*POLICIES, ADVERSARIAL] if kind == "pixels" else POLICIES
            self.ours[kind] = list(moves(kind, shown[kind], policies))
        bar.set_description("time of a step")
        left, cuts = deadline - time.monotonic(), list(plan.get("cuts", []))
        for kind in [kind for kind in self.ours if kind != "pixels"]:  # slow on large images
            slow = len(self.train) * self.copy[kind] > COPYING * left
            if kind not in plan["kinds"] if plan else slow:
                del self.ours[kind]
                cuts += [] if plan else [f"no moves of {shown[kind]}, since a copy of each image takes too long"]
        copied = {kind: [s for s in stacks if not s.adversarial] for kind, stacks in self.ours.items()}
        once = sum((len(copied[k]) * len(self.fit) + 2 * len(self.train)) * self.copy[k] for k in copied)
        comparison.copies = int(plan.get("copies", max(1, min(COPIES, int(COPYING * left / once)))))
        usual = self.ours["pixels"][0]
        kinds = [list(ORDINARY), list(JITTER), *self.ours.values()]
        measured = [PLAIN, usual, *(stacks[-1] for stacks in kinds)]  # as many as there will be after the choice
        sizes = len(self.fit) * comparison.copies, len(self.train) * comparison.copies
        schedule = Schedule(
            trials=interleaved(kinds),
            measured=measured,
            seeds=seeds,
            deadline=deadline,
            step_seconds=self._step_seconds([PLAIN, ORDINARY[1], JITTER[0], self.ours["pixels"][-1]]),
            judge_seconds=self._judge_seconds(),
            copy_seconds={s: (sizes[0] * self.copy[k], sizes[1] * self.copy[k]) for k in copied for s in copied[k]},
            fit_seconds=fitting,
            done=self.store.done,
            cuts=cuts,
        )
        if plan:
            names = set(plan["trials"])
            schedule.steps, schedule.seeds = int(plan["steps"]), int(plan["seeds"])
            schedule.trials = [stack for stack in schedule.trials if stack.name in names]
        else:
            schedule.begin()
        self.deadline = deadline
        return schedule

    def _step_seconds(self, stacks: Sequence[Stack]) -> dict[str, float]:
        """Seconds of a step with each of the stacks, without copies."""
        found = {}
        self.comparison.trained(PLAIN, self.fit, 0, 2)  # the first step of a network takes longer
        for stack in stacks:
            began = time.monotonic()
            self.comparison.trained(stack, self.fit, 0, TRIED_STEPS)
            found[speed_of(stack)] = (time.monotonic() - began) / TRIED_STEPS
        return found

    def _judge_seconds(self) -> tuple[float, float]:
        few = self.test.subset(spread(len(self.test), min(64, len(self.test))))
        network = self.comparison.trained(PLAIN, self.fit, 0, 2)
        began = time.monotonic()
        accuracy(network, few)
        each = (time.monotonic() - began) / len(few)
        return each * len(self.held), each * len(self.test)

    # ---- the trainings ---------------------------------------------------------------------------------------

    def all_cells(self, schedule: Schedule, bar: Any) -> None:
        """Train and measure until all cells are done, or the networks learn too little. OutOfTime: the time is up."""

        def tick(step: bool) -> None:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            bar.update(int(step))

        self.comparison.steps, self.comparison.tick = schedule.steps, tick
        while True:
            schedule.cut()
            self._choose(schedule)
            cells = schedule.left()
            if not cells or self.too_little(schedule) is not None:
                return
            cell, self.store.plan = cells[0], self._plan(schedule)
            bar.total = bar.n + sum(schedule.steps * (LONGER if c.phase == "longer" else 1) for c in cells)
            schedule.note(cell, *self._accuracy(cell, schedule.steps, bar))
            self.store.spent(time.monotonic() - self.began)

    def _plan(self, schedule: Schedule) -> dict[str, Any]:
        return {
            "steps": schedule.steps, "seeds": schedule.seeds, "copies": self.comparison.copies, "cuts": schedule.cuts,
            "trials": [stack.name for stack in schedule.trials], "kinds": list(self.ours),
        }  # fmt: skip

    def _accuracy(self, cell: Cell, steps: int, bar: Any) -> tuple[float, float]:
        """Accuracy in percent, and the seconds of the training without copies."""
        measured = cell.phase == "measure"
        train, test = (self.train, self.test) if measured else (self.fit, self.held)
        if not self.comparison.has_moved(cell.stack, train):
            bar.set_description(f"moved copies: {cell.stack.name}")
            self.comparison.moved(cell.stack, train)
        bar.set_description(f"{cell.phase}: {cell.stack.name}" + f", seed {cell.seed}" * measured)
        began, steps = time.monotonic(), steps * (LONGER if cell.phase == "longer" else 1)
        value = self.comparison.accuracy(cell.stack, train, test, cell.seed, steps)
        return value, time.monotonic() - began

    def _choose(self, schedule: Schedule) -> None:
        """Once all trials are done: measure the best stack of each kind, and the usual move in any case."""
        tuned = self.tuned(schedule)
        if len(tuned) < len(schedule.trials):
            return
        usual, stacks = self.ours["pixels"][0], [PLAIN]
        for kind in ([*ORDINARY], [*JITTER], *self.ours.values()):
            tried = [stack for stack in kind if stack.name in tuned]
            stacks.append(max(tried, key=lambda stack: tuned[stack.name]) if tried else kind[0])
        schedule.measured = list(dict.fromkeys([PLAIN, usual, *stacks]))

    def tuned(self, schedule: Schedule) -> dict[str, float]:
        """Accuracies on the held-out images, of the trials that are done."""
        keys = {stack.name: Cell("choose", stack).key for stack in schedule.trials}
        return {name: schedule.done[key] for name, key in keys.items() if key in schedule.done}

    # ---- the result ------------------------------------------------------------------------------------------

    def too_little(self, schedule: Schedule) -> str | None:
        """A sentence if networks with crop + flip have learned too little for advice. None: enough, or not known."""
        keys = Cell("learn", PLAIN).key, Cell("longer", PLAIN).key
        if not all(key in schedule.done for key in keys):
            return None
        short, longer = (schedule.done[key] for key in keys)
        chance = 100 * float(np.bincount(self.held.targets).max()) / len(self.held)
        noise = 2 * math.sqrt(chance * (100 - chance) / len(self.held))
        text = (
            f"With {BASE}, {schedule.steps} steps give {short:.0f} % on held-out images, "
            f"{LONGER * schedule.steps} steps {longer:.0f} %, and guessing {chance:.0f} %"
        )
        if longer - chance <= noise:
            fix = "Check the classes, or give more images or minutes."
            return f"{text}: the networks have learned nothing, so no advice. {fix}"
        if short - chance < LEARNED * (longer - chance):
            needed = math.ceil(LONGER * self.store.settings["minutes"])
            return f"{text}: the networks have learned too little for advice. Give it about {needed} minutes."
        return None

    def step_cost(self, stack: Stack, schedule: Schedule) -> float:
        """The time of a training step, relative to crop + flip, with moves made in each step."""
        plain = schedule.step_seconds["plain"]
        moving = 0.0 if not stack.policy or stack.adversarial else BATCH / 2 * self.copy[stack.kind]
        return (schedule.step_seconds[speed_of(stack)] + moving) / plain

    def pictures(self, stacks: Sequence[Stack]) -> dict[str, Tensor]:
        """A few training images moved with each of the stacks, uint8 [n, C, H, W]; adversarial ones as noise."""
        rows = spread(len(self.train), min(SHOWN, len(self.train)))
        x, y = self.train.tensor()[rows], torch.from_numpy(self.train.targets[rows])
        found = {}
        for stack in stacks:
            assert stack.policy is not None
            policy = Noise(stack.policy.strength) if isinstance(stack.policy, Noise) else stack.policy
            model = self.comparison.model(stack.kind, self.train)
            found[stack.name] = GLEMAugment(model, policy, p=1.0, seed=0)(x, y)[0]
        return found


def _fingerprint(data: ImageData) -> str:
    """A hash of images and labels."""
    found = hashlib.sha256(json.dumps([data.classes, data.targets.tolist()]).encode())
    found.update(data.tensor().numpy().tobytes())
    return found.hexdigest()


def _seconds_per_copy(model: GLEM) -> float:
    """The time of `GLEMAugment` for an image with this model."""
    x = torch.rand(8, *model.image_shape)
    aug, y = GLEMAugment(model, USUAL, p=1.0), torch.zeros(8, dtype=torch.int64)
    aug(x, y)
    began = time.monotonic()
    aug(x, y)
    return (time.monotonic() - began) / 8


# ---- words -------------------------------------------------------------------------------------------------------


def report(measured: dict[Stack, list[float]]) -> list[dict[str, Any]]:
    """Rows of the accuracies of stacks, the first of which is crop + flip, with their gains over it."""
    rows: list[dict[str, Any]] = []
    for stack, values in measured.items():
        row: dict[str, Any] = {"name": stack.name, "kind": stack.kind, "accuracies": values}
        row |= {"mean": statistics.mean(values), "interval": interval(values)}
        rows.append(row)
        row["gain"], row["gain_interval"] = difference(row, rows[0]) if len(rows) > 1 else (0.0, 0.0)
    return rows


def advice(rows: Sequence[dict[str, Any]]) -> str:
    """One sentence from rows with name, kind and the accuracies of the same seeds; the first row is crop + flip."""
    ours = [row for row in rows if row["kind"] not in ("plain", "ordinary", "jitter")]
    others = [row for row in rows if row["kind"] in ("plain", "ordinary", "jitter")]
    strongest = max(others, key=lambda row: row["mean"])
    best = max(ours, key=lambda row: row["mean"], default=strongest)
    gain, half = difference(best, strongest)
    if best is not strongest and gain > half:
        return f"Use {best['name']}: {gain:+.1f} ± {half:.1f} points over {strongest['name']}, the best without it."
    gain, half = difference(strongest, rows[0])
    if strongest is not rows[0] and gain > half:
        return f"Use {strongest['name']}: {gain:+.1f} ± {half:.1f} points over {BASE}. Moves add nothing clear to it."
    widest = max(difference(row, rows[0])[1] for row in rows[1:])
    if widest > WIDE:
        return f"No advice: gains are uncertain by up to ± {widest:.1f} points. Give it more time and more seeds."
    return f"Nothing clearly beats {BASE} on these images: leave it out, or give it more time and more seeds."


def picture(train: ImageData, moved: dict[str, Tensor]) -> Image.Image:
    """Training images above their moves."""
    rows = spread(len(train), min(SHOWN, len(train)))
    cells = torch.stack([train.tensor()[rows], *moved.values()])
    return compose("Training images and their moves", train.name, [Section("", cells, rows=["real", *moved])])
