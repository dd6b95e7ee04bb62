"""The proof benchmark: who sees which images, what each method does to a batch, which stacks are compared."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import Interval, Rows
from benchmarks.proof.augmentation import choice
from benchmarks.proof.augmentation import data as data
from benchmarks.proof.augmentation import settings as settings
from benchmarks.proof.augmentation.ops import Stack
from glem_augment import GLEM

# ---- images ----------------------------------------------------------------------------------------------------------


def test_seeds_draw_other_images_and_never_those_of_validation() -> None:
    setting = replace(settings.SMOKE, imbalance=4.0, per_class=40)
    first, again, other = (data.make_task(setting, seed) for seed in (0, 0, 1))

    def seen(part: tuple[Tensor, Tensor]) -> set[bytes]:
        return {row.tobytes() for row in part[0].numpy()}

    assert torch.equal(first.train[0], again.train[0]) and seen(first.train) != seen(other.train)
    assert torch.equal(first.val[0], other.val[0]) and torch.equal(first.test[0], other.test[0])
    for task in (first, other):
        assert not seen(task.train) & seen(task.val) and not (seen(task.train) | seen(task.val)) & seen(task.test)
    counts = torch.bincount(first.train[1]).tolist()
    assert counts == data.counts(setting, 10) == [40, 34, 29, 25, 22, 19, 16, 14, 12, 10]


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", settings.METHODS)
def test_every_operation_of_a_stack_changes_or_keeps_images_and_labels(name: str) -> None:
    """Also the models that the operations move images along: they are built from parts of GLEM."""
    torch.manual_seed(1)
    x, y = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def flow(_: str, pooled: bool) -> GLEM:
        return GLEM.fit((x, y * 0 if pooled else y), rank=4)

    method = settings.METHODS[name]
    params = {**method.trials[-1], **({"flow": "identity"} if method.flow else {})}
    params |= {"p": 1.0} if "p" in params else {}
    moved, labels = Stack([(name, params)], flow, network, 20, 2, seed=0)(torch.arange(20), x, y)
    assert moved.shape == x.shape and moved.dtype == torch.float32 and bool(moved.isfinite().all())
    assert labels.shape in ((20,), (20, 2))
    assert torch.equal(moved, x / 255) == (name in ("none", "natural"))


# ---- arms and their roles -------------------------------------------------------------------------------------------


def test_names_of_arms_are_read_back() -> None:
    for arm in ("crop", "cropflip + mode-mixup-any(alpha=1.0)@own + cutmix(p=0.5)"):
        assert settings.name_of(settings.stack_of(arm)) == arm
    assert settings.stack_of("cutmix(p=0.5)") == [("cutmix", {"p": 0.5, "alpha": 1.0})]
    with pytest.raises(SystemExit, match="no operation 'sharpen'"):
        settings.stack_of("cropflip + sharpen")


def test_validation_chooses_moves_and_the_test_favours_the_opponent(tmp_path: Path) -> None:
    rows, base = Rows("augmentation", tmp_path), "cropflip + jitter(strength=0.2)"
    strong, weak = (f"{base} + noise(strength={s})@cifar10-unlabelled" for s in (0.5, 1.0))
    control = f"{base} + adversarial(strength=0.25)@identity"
    for seed, more in enumerate((0.0, 0.02, 0.04)):
        put = partial(rows.add, "cifar10-50/cnn", seed=seed, split="test: final")
        put("cropflip", found={"accuracy": 0.55 + more})  # better than what validation chose
        put(base, found={"accuracy": 0.50 + more})
        put(strong, found={"accuracy": 0.58 + more})
        put(weak, found={"accuracy": 0.70 + more})
        put(control, found={"accuracy": 0.56 + 2 * more})
    for arm, value in ((strong, 0.6), (weak, 0.5), (control, 0.4)):
        rows.add("cifar10-50/cnn", arm, 1000, "validation: ours", {"accuracy": value})
    task = choice.Task("cifar10-50/cnn", rows)
    assert task.base == base and task.best(["cifar10-unlabelled"]) == strong and task.tuned() == control
    assert task.strongest(task.final[strong])[0] == "cropflip"
    found = choice.comparisons([task])
    over = found["flow of unlabelled images, over the best other stack"]["cifar10-50/cnn/cifar10-unlabelled"]
    assert (round(over.mean, 9), round(over.half, 9), over.seeds) == (3.0, 0.0, 3)
    fixed = found["`Adversarial(strength=0.25)` of pixels, over the best other stack"]
    assert fixed["cifar10-50/cnn"].verdict == "no difference found"


def test_many_settings_of_one_data_set_weigh_as_much_as_one_of_another() -> None:
    gains = {
        "fashion-5/cnn": 1.0,
        "fashion-10/cnn": 1.0,
        "fashion-20/cnn": 1.0,
        "mnist-10/cnn": 3.0,
        "cifar10-50/cnn": 5.0,
    }
    means = choice.family_means({name: Interval(gain, 0.1, 5) for name, gain in gains.items()})
    assert means == {"grey images": 2.0, "CIFAR-10": 5.0}
