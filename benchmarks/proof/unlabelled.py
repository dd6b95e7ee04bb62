"""The same unlabelled images for pseudo-labels, Mean Teacher and FixMatch, each alone and with our moves.

    GLEM_DATA=... python benchmarks/proof/unlabelled.py
    GLEM_DATA=... python benchmarks/proof/unlabelled.py --settings fashion-10 --methods fixmatch --seeds 0 1

Settings, labelled images, validation images, test images, seeds, small CNN, optimizer and number of steps are the same
as in `augmentation/run.py`. All other training images that are not for validation are used without their labels.

    labelled       the best other stack of `augmentation/run.py` on the labelled images alone
    pseudo-labels  the same stack; half of a batch has the confident labels of that network (Lee 2013). A class has at
                   most as many labels as are drawn, and the classes are drawn equally often
    mean-teacher   two views by crop + flip, and a mean of the weights as the teacher (Tarvainen & Valpola 2017)
    fixmatch       labels of the weak view for the strong view, RandAugment and RandomErasing (Sohn et al. 2020)

The last two methods get 32 labelled and 64 unlabelled images per step. The published FixMatch has 64 and 448, and a
million steps. Each method runs alone, and with moves along the modes of the pixels before the method's own operations.
Moves apply to all images with pseudo-labels, to the student's unlabelled views with Mean Teacher, and to the strong
views with FixMatch. Modes are fitted to the labelled images, and to images with pseudo-labels. An unlabelled image
moves along the modes of its predicted class.

Tuning uses fashion-10, one tuning seed and validation images: three values of each method's number (`VALUES`). FixMatch
has a fourth value, because the lowest of three was best. Mean Teacher has a second, quicker teacher (`KEEP` 0.95),
because 0.99 was worse. A method that is then more than `HOPELESS` points below the best method is dropped. Of the rest,
the best value is tried with two kinds of moves (`MOVES`), so moves have two trials more than the method alone. The
choice holds for all settings. Further seeds are measured on test images, each method with its chosen value, with and
without moves. Rows are stored at once, and are not measured again. The test results of `augmentation/run.py` were known
before.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import RESULTS, command, interval, machine, parser, processors, publish
from benchmarks.proof.augmentation.data import Task, images_of, make_task, split_rows
from benchmarks.proof.augmentation.ops import Component, as_float
from benchmarks.proof.augmentation.plan import Store
from benchmarks.proof.augmentation.report import results_of
from benchmarks.proof.augmentation.settings import FINAL_SEEDS, PLAIN, SETTINGS, TUNING_SEED
from benchmarks.proof.augmentation.train import (
    LR,
    WARM_UP,
    WEIGHT_DECAY,
    Classifier,
    accuracy,
    make_body,
    order_of,
    train,
)
from glem_augment import GLEM, Adversarial, GLEMAugment, Noise
from glem_augment.io import write_json
from glem_augment.training.augmentation import augment_batch

NAME = "unlabelled"
TUNED_ON, NAMES = "fashion-10", ("fashion-10", "cifar10-50", "fashion-50")
# The lowest confidence of a pseudo-label, and the weight of Mean Teacher's squared difference.
VALUES: dict[str, tuple[float | None, ...]] = {
    "labelled": (None,),
    "pseudo-labels": (0.5, 0.8, 0.95),
    "mean-teacher": (1.0, 10.0, 30.0),
    "fixmatch": (0.7, 0.85, 0.95, 0.5),
}
MOVES = (("noise", 1.0), ("adversarial", 0.25))  # policy and strength, of half the images
HOPELESS = 2.0
LABELLED, UNLABELLED = 32, 64  # of a step
KEEP, RAMP = 0.95, 0.4  # of the teacher's weights per step; share of the steps in which the weight grows
Moves = tuple[str, float] | None


@lru_cache(maxsize=2)
def task_of(name: str, seed: int) -> Task:
    return make_task(SETTINGS[name], seed)


@lru_cache(maxsize=2)
def unlabelled(name: str) -> Tensor:
    """The training images that are not for validation, uint8 [N,C,H,W]."""
    x, y, classes = images_of(SETTINGS[name], "train")
    return x[torch.from_numpy(np.sort(np.concatenate([rest for _, rest in split_rows(y, len(classes))])))]


def modes_of(images: tuple[Tensor, Tensor], classes: list[str]) -> GLEM:
    """Modes of the pixels."""
    return GLEM.create("identity", tuple(images[0].shape[1:]), classes).eval().adapt(images, rank=64, progress=False)


def best_stack(name: str) -> list[Component]:
    """The opponent that was best on the validation images of `augmentation/run.py`."""
    (result,) = (r for r in results_of(Store(RESULTS)) if (r.setting, r.classifier) == (name, "cnn"))
    return [(method, params) for method, params in result.base]


def supervised(name: str, images: tuple[Tensor, Tensor], moves: Moves, seed: int) -> Classifier:
    """The best other stack on these images, after the moves."""
    setting, stack, classes = SETTINGS[name], best_stack(name), task_of(name, seed).classes
    if moves:
        policy, strength = moves
        stack.append((policy, {"policy": policy, "strength": strength, "p": 0.5, "flow": "identity"}))
    steps, batch = setting.steps["cnn"], setting.batch

    def flow(name: str, pooled: bool) -> GLEM:
        return modes_of(images, classes)

    return train("cnn", images, len(classes), stack, flow, steps, batch, seed, bf16=True)[0]


@lru_cache(maxsize=1)
def labelled_alone(name: str, seed: int) -> tuple[Classifier, Tensor]:
    """The network of the labelled images, and its confidences for the unlabelled images, [N, K]."""
    network = supervised(name, task_of(name, seed).train, None, seed)
    with torch.no_grad():
        return network, torch.cat([network(as_float(x)).softmax(1) for x in unlabelled(name).split(500)])


def pseudo_labels(name: str, threshold: float, moves: Moves, seed: int) -> Classifier:
    (x, y), setting = task_of(name, seed).train, SETTINGS[name]
    sure, label = labelled_alone(name, seed)[1].max(1)
    drawn, parts = setting.steps["cnn"] * setting.batch // 2 // (int(y.max()) + 1), []
    for index in range(int(y.max()) + 1):
        rows = ((sure >= threshold) & (label == index)).nonzero()[:, 0]
        parts.append(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:drawn]])
    rows = torch.cat(parts)
    times = max(1, len(rows) // len(y))  # half of a batch
    images = torch.cat([x.repeat(times, 1, 1, 1), unlabelled(name)[rows]]), torch.cat([y.repeat(times), label[rows]])
    return supervised(name, images, moves, seed)


def two_views(name: str, method: str, value: float, moves: Moves, seed: int) -> Classifier:
    """Mean Teacher, whose teacher is returned, or FixMatch."""
    task, others, steps = task_of(name, seed), unlabelled(name), SETTINGS[name].steps["cnn"]
    (x, y), fixmatch = task.train, method == "fixmatch"
    torch.manual_seed(seed)
    random.seed(seed)  # timm's RandomErasing
    pixels = as_float(x).transpose(0, 1).flatten(1)
    body = make_body("cnn", x.shape[1], len(task.classes), x.shape[2]).to(memory_format=torch.channels_last)
    network = Classifier(body, pixels.mean(1), pixels.std(1).clamp_min(1e-3), True).train()
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=WARM_UP)
    g = torch.Generator().manual_seed(seed)
    rows, more = order_of(y, LABELLED, steps, seed), torch.randint(len(others), (steps, UNLABELLED), generator=g)
    move = None
    if moves:
        policy, strength = moves
        kind = {"noise": Noise, "adversarial": Adversarial}[policy]
        move = GLEMAugment(modes_of(task.train, task.classes), kind(strength), seed=seed)
        if kind.wants_classifier:
            move.attach(network)
    randaugment, erase = v2.RandAugment(), RandomErasing(probability=1.0, mode="const", device="cpu")
    for step in range(steps):
        u = others[more[step]]
        with torch.no_grad():
            guess = (network if fixmatch else teacher)(as_float(augment_batch(u, PLAIN["cropflip"], g))).softmax(1)
        sure, label = guess.max(1)
        view = augment_batch(move(u, label)[0] if move else u, PLAIN["cropflip"], g)
        if fixmatch:
            middle = pixels.mean(1)[:, None, None]  # erased pixels are grey, as in Cutout
            view = erase(as_float(torch.stack([randaugment(image) for image in view])) - middle) + middle
        seen = as_float(augment_batch(x[rows[step]], PLAIN["cropflip"], g))
        logits = network(torch.cat([seen, as_float(view)]))
        loss = F.cross_entropy(logits[:LABELLED], y[rows[step]])
        if fixmatch:
            loss = loss + (F.cross_entropy(logits[LABELLED:], label, reduction="none") * (sure >= value)).mean()
        else:
            grown = min(1.0, step / (RAMP * steps))
            loss = loss + value * grown * F.mse_loss(logits[LABELLED:].softmax(1), guess)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        for mean, new in zip(teacher.parameters(), network.parameters(), strict=True):
            mean.lerp_(new.detach(), 1 - KEEP)
        for mean, new in zip(teacher.buffers(), network.buffers(), strict=True):
            mean.copy_(new)
    return network.eval() if fixmatch else teacher


def run(name: str, method: str, value: float | None, moves: Moves, seed: int) -> Classifier:
    if value is None:
        return labelled_alone(name, seed)[0]
    if method == "pseudo-labels":
        return pseudo_labels(name, value, moves, seed)
    return two_views(name, method, value, moves, seed)


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The page of the rows on test images, with the command that measures all rows."""
    found: dict[tuple[Any, ...], list[float]] = {}
    tested = [row for row in rows if row["seed"] != TUNING_SEED]
    for row in tested:
        key = (row["setting"], row["method"], row["tuned"], row["moves"] and " ".join(map(str, row["moves"])))
        found.setdefault(key, []).append(100 * row["accuracy"])
    settings, seeds = (list(dict.fromkeys(row[name] for row in tested)) for name in ("setting", "seed"))
    return {
        "title": "Methods that use unlabelled images, with and without our moves",
        "command": command(f"benchmarks/proof/{NAME}.py", "--settings", *settings, "--seeds", *sorted(seeds)),
        "measured on": processors(rows),
        "rows": [
            dict(zip(("setting", "method", "tuned", "moves"), key, strict=True))
            | {"test accuracy %": str(interval(values)), "seeds": len(values)}
            for key, values in found.items()
        ],
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(threads=1)
    add = arguments.add_argument
    add("--settings", nargs="+", choices=NAMES, default=list(NAMES), metavar="SETTING", help="(%(default)s)")
    add("--methods", nargs="+", choices=VALUES, default=list(VALUES), metavar="METHOD", help="(%(default)s)")
    add("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS), help="of the test images (%(default)s)")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    path, processor = args.out / f"{NAME}.json", machine()["processor"]
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def measure(name: str, method: str, value: float | None, moves: Moves, seed: int) -> float:
        """Accuracy in %, on validation images with the tuning seed."""
        metric = "val_accuracy" if seed == TUNING_SEED else "accuracy"
        known = {"setting": name, "method": method, "tuned": value, "moves": moves and list(moves), "seed": seed}
        for row in rows:
            if known.items() <= row.items():
                return 100 * float(row[metric])
        began, task = time.process_time(), task_of(name, seed)
        share = accuracy(run(name, method, value, moves, seed), task.val if seed == TUNING_SEED else task.test)
        rows.append(known | {metric: share, "seconds": time.process_time() - began, "processor": processor})
        write_json(path, rows)
        print(*rows[-1].values(), flush=True)
        return 100 * share

    tried = {m: {v: measure(TUNED_ON, m, v, None, TUNING_SEED) for v in VALUES[m]} for m in args.methods}
    least, arms = max(max(found.values()) for found in tried.values()) - HOPELESS, []
    for method, found in tried.items():
        value = max(found, key=found.__getitem__)
        if method == "labelled":
            arms.append((method, value, None))
        elif found[value] >= least:
            moved = {moves: measure(TUNED_ON, method, value, moves, TUNING_SEED) for moves in MOVES}
            arms += [(method, value, None), (method, value, max(moved, key=moved.__getitem__))]
    for setting in args.settings:
        for seed in args.seeds:
            for arm in arms:
                measure(setting, *arm, seed)
    publish(args.out, NAME, report(rows), rows)


if __name__ == "__main__":
    main()
