"""The comparison of stacks of augmentation: what it trains on, what it says, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import photos
from PIL import Image
from scipy import stats

from glem_augment import GLEMAugment, ImageData
from glem_augment.cli import main
from glem_augment.errors import DataError
from glem_augment.evaluation import compare as module
from glem_augment.evaluation import interval, schedule, trainings
from glem_augment.evaluation.compare import CELLS, Run, advice, check_network, compare, parted, report
from glem_augment.evaluation.schedule import interleaved
from glem_augment.evaluation.stacks import ADVERSARIAL, JITTER, ORDINARY, PLAIN, POLICIES, USUAL, Stack, moves
from glem_augment.evaluation.trainings import Comparison, models_for


def images(count: int, seed: int = 0) -> ImageData:
    return ImageData.from_tensors(*photos(count, 32, seed), ["a", "b"])


def test_intervals_are_students() -> None:
    for n in range(2, 11):
        values = np.random.default_rng(n).normal(size=n).tolist()
        low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
        assert interval(values) == pytest.approx((high - low) / 2, rel=1e-3)


def test_parts_are_disjoint_and_of_all_classes() -> None:
    data = images(40)
    fit, held = parted(data, 5)
    assert (len(fit), len(held)) == (32, 8) and np.bincount(held.targets).tolist() == [4, 4]
    pixels = {image.numpy().tobytes() for image in fit.tensor()}
    assert not any(image.numpy().tobytes() in pixels for image in held.tensor())


def test_half_of_the_images_are_moved_ones_of_the_same_class() -> None:
    data = images(32)
    comparison = Comparison(models_for(data, "taef2", None), steps=1, copies=1)
    for kind in ("pixels", "autoencoder"):
        stack = moves(kind, kind)[0]
        moved = comparison.moved(stack, data)
        assert moved.shape == (1, *data.tensor().shape)
        change = (moved[0].float() - data.tensor().float()).abs().mean((1, 2, 3))
        assert float(change.min()) > 0.3 and float(change.max()) < 80
        assert comparison.moved(stack, data) is moved  # made once
    plain, again = (next(comparison.batches(PLAIN, data, 3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))  # a function of the seed
    mixed = next(comparison.batches(ORDINARY[3], data, 3))
    assert mixed[1].shape == (32, 2) and torch.allclose(mixed[1].sum(1), torch.ones(32))


def row_values(*gains: float) -> dict[Stack, list[float]]:
    stacks = (PLAIN, Stack("other", "ordinary"), Stack("ours", "pixels"))
    return {s: [50 + g + d for d in (-0.2, 0.0, 0.2)] for s, g in zip(stacks, gains, strict=True)}


def test_advice_is_about_what_is_clear() -> None:
    assert advice(report(row_values(0, 2, 5))).startswith("Use ours: +3.0 ± 0.0 points over other")
    assert advice(report(row_values(0, 2, 1))).startswith("Use other: +2.0")
    assert "leave it out" in advice(report(row_values(0, -1, 0)))
    noisy = row_values(0, 0, 0) | {Stack("ours", "pixels"): [48.0, 52.0, 56.0]}
    assert advice(report(noisy)).startswith("No advice: gains are uncertain by up to ± 9.")


def test_jitter_has_as_many_trials_as_moves_of_pixels_and_latents() -> None:
    ours = len(POLICIES) + 1 + len(POLICIES)
    assert len(JITTER) >= ours and len({stack.name for stack in JITTER}) == len(JITTER)
    assert {(stack.image, stack.batch) for stack in JITTER} == {
        ((f"ColorJitter {size}",), batch) for size in (0.2, 0.4, 0.8) for batch in ("", "CutMix", "MixUp")
    }
    data, found = images(16), []
    for stack in (PLAIN, JITTER[0]):
        found.append(next(Comparison({}, steps=1).batches(stack, data, 0))[0])
    assert found[0].shape == found[1].shape and not torch.equal(*found)


def test_a_magnitude_stands_after_the_name_of_an_operation() -> None:
    data = images(16)
    changes = []
    for name in ("RandAugment 0", "RandAugment 25"):
        torch.manual_seed(0)
        found = next(Comparison({}, steps=1).batches(Stack(name, "ordinary", (name,)), data, 0))[0]
        changes.append(found - next(Comparison({}, steps=1).batches(PLAIN, data, 0))[0])
    assert not torch.equal(*changes)
    jitter: Any = trainings._operation("ColorJitter", "0.4")
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4) and jitter.hue == (-0.1, 0.1)


def test_adversarial_moves_are_against_the_network_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    data, attached = images(16), []
    attach = GLEMAugment.attach
    monkeypatch.setattr(GLEMAugment, "attach", lambda aug, net: attached.append(net) or attach(aug, net))
    comparison = Comparison(models_for(data, None, None), steps=3)
    stack = moves("pixels", "pixel modes", [ADVERSARIAL])[0]
    network, again = comparison.trained(stack, data, 0), comparison.trained(stack, data, 0)
    assert attached[0][1] is network
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


class Clock:
    """Trainings without work: an accuracy, and seconds of a clock for every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds, self.stop_after = 0.0, 0.01, 10**9
        self.asked: list[tuple[Stack, int, int]] = []
        clock = self

        def trained(self: Comparison, stack: Stack, train: ImageData, seed: int, steps: int | None = None) -> None:
            for _ in range(steps or self.steps):
                self.tick(True)
                clock.now += clock.seconds

        def accuracy(self: Comparison, stack: Stack, *images: Any) -> float:
            seed, steps = images[2:]
            if len(clock.asked) >= clock.stop_after:
                raise KeyboardInterrupt
            trained(self, stack, images[0], seed, steps)
            clock.asked.append((stack, seed, steps))
            return clock.value(stack, seed, steps)

        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr(Comparison, "trained", trained)
        monkeypatch.setattr(module, "accuracy", lambda *_: 50.0)
        monkeypatch.setattr(Comparison, "accuracy", accuracy)
        monkeypatch.setattr(Comparison, "model", lambda *_: None)
        monkeypatch.setattr(Comparison, "moved", lambda *_: None)
        monkeypatch.setattr(Run, "pictures", lambda *_: {})
        monkeypatch.setattr(module, "_seconds_per_copy", lambda model: 1e-4)

    def value(self, stack: Stack, seed: int, steps: int) -> float:
        return 90.0 + (stack.policy is not None) + 0.1 * seed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_usual_move_is_measured_and_all_fits_into_the_time(clock: Clock) -> None:
    found = compare(images(60), images(60), minutes=10, seeds=4, progress=False)
    assert clock.now <= 600 and not found["cut"] and found["seeds"] == 4 and found["steps"] > 200
    assert moves("pixels", "pixel modes")[0].policy == USUAL
    names = [row["name"] for row in found["rows"]]
    assert names[0] == "crop + flip" and "pixel modes: noise 0.5" in names and len(found["tuning"]) == 6 + 9 + 4 + 3
    assert {row["kind"] for row in found["rows"]} == {"plain", "ordinary", "jitter", "pixels", "autoencoder"}
    assert all(row["step_cost"] > 0.999 for row in found["rows"])


def test_a_machine_that_becomes_slow_costs_seeds_and_trials_and_no_time(clock: Clock) -> None:
    value = clock.value

    def slower(*cell: Any) -> float:
        clock.seconds *= 3 if len(clock.asked) == 6 else 1
        return value(*cell)

    clock.value = slower  # type: ignore[method-assign]
    found = compare(images(60), images(60), minutes=10, seeds=5, progress=False)
    assert clock.now <= 601 and found["seeds"] >= 2 and found["rows"]
    assert any("seeds" in cut for cut in found["cut"]) and any("trials" in cut for cut in found["cut"])
    assert len({steps for *_, steps in clock.asked}) == 2  # the usual steps, and the longer training


def test_a_machine_that_stands_still_gives_no_advice_but_the_minutes(clock: Clock) -> None:
    value = clock.value

    def stuck(*cell: Any) -> float:
        clock.seconds = 1.0 if len(clock.asked) > 3 else clock.seconds
        return value(*cell)

    clock.value = stuck  # type: ignore[method-assign]
    found = compare(images(60), images(60), minutes=2, seeds=5, progress=False)
    assert clock.now <= 122 and not found["rows"] and "Time ran out" in found["advice"]
    assert int(found["advice"].split("about ")[1].split()[0]) > 2


@pytest.mark.parametrize(
    ("short", "longer", "words"), [(55, 90, "too little.*about 40 min"), (50, 52, "nothing.*or minutes")]
)
def test_networks_that_have_learned_too_little_give_no_advice(
    clock: Clock, short: float, longer: float, words: str
) -> None:
    values = iter((short, longer))
    clock.value = lambda *cell: next(values)  # type: ignore[method-assign]
    found = compare(images(60), images(60), minutes=10, progress=False)
    assert len(clock.asked) == 2 and clock.asked[1][2] == 4 * clock.asked[0][2] and not found["rows"]
    assert re.search(words, found["advice"]), found["advice"]


def test_a_stopped_comparison_resumes(clock: Clock, tmp_path: Path) -> None:
    data = images(60)
    options: dict[str, Any] = dict(minutes=10, seeds=3, progress=False, folder=tmp_path)
    clock.stop_after = 9
    with pytest.raises(KeyboardInterrupt):
        compare(data, data, **options)
    clock.stop_after, before = 10**9, list(clock.asked)
    assert len(json.loads((tmp_path / CELLS).read_text())["cells"]) == 9 and clock.now > 10
    found = compare(data, data, **options)
    # The first crop + flip is of another phase than the measured one.
    assert not set(before[2:]) & {cell for cell in clock.asked[9:] if cell[0] != PLAIN and cell[1] > 0}
    assert len(found["tuning"]) == 22 and clock.now <= 602
    asked = len(clock.asked)
    assert asked == 2 + 22 + 3 * len(found["rows"])
    again = compare(data, data, **options)  # nothing is left to do
    assert len(clock.asked) == asked and again["rows"] == found["rows"]
    compare(data, data, **{**options, "minutes": 9})  # another comparison
    assert len(clock.asked) > asked
    for other in ({"network": "resnet26"}, {"seeds": 2}):
        with pytest.raises(FileExistsError, match=f"another comparison .*{min(other)} differ"):
            compare(data, data, **{**options, **other})
    (tmp_path / CELLS).write_text("[]")
    assert compare(data, data, **options)["rows"]


def test_a_disk_that_is_full_does_not_end_a_comparison(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.warns(UserWarning, match="not stored: no space left"):
        assert compare(images(60), images(60), progress=False, folder=tmp_path)["rows"]


def test_cuts_treat_kinds_alike() -> None:
    a, b = ([Stack(f"{kind}{i}", kind) for i in range(count)] for kind, count in (("a", 3), ("b", 1)))
    assert [stack.name for stack in interleaved([a, b])] == ["a0", "b0", "a1", "a2"]


def test_unknown_networks_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean resnet18"):
        compare(images(60), images(60), network="resnet_18", progress=False)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 can't take images of .* match model"):
        compare(images(60), images(60), network="vit_tiny_patch16_224", progress=False)
    with pytest.raises(ValueError, match="no weights for coatnet_0_224"):
        compare(images(60), images(60), network="coatnet_0_224", pretrained=True, progress=False)
    with pytest.raises(ValueError, match="can't make resnet18.nobody .*tag"):
        compare(images(60), images(60), network="resnet18.nobody", progress=False)
    check_network("tv_resnet34", True, (3, 64, 64))  # an older name, which timm maps to weights


def test_classes_must_agree_and_be_large_enough() -> None:
    data = images(40)
    with pytest.raises(DataError, match="classes"):
        compare(data, data.with_targets(data.targets, ["a", "c"]), progress=False)
    with pytest.raises(DataError, match="5"):
        compare(images(8), images(8), progress=False)


def test_many_channels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torchvision's augmentations take grey and RGB images."""
    for split in ("train", "test"):
        for i in range(10):
            file = tmp_path / split / "ab"[i % 2] / f"{i}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.full((4, 16, 16), i, np.uint8))
    options = ["--image-size", "16", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["compare", str(tmp_path), *options]) == 2
    assert "a comparison needs 8-bit grey or RGB images, and these are uint8" in capsys.readouterr().err


def test_the_command_writes_a_report_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FEWEST_STEPS", "MOST_STEPS", "ENOUGH_STEPS"):
        monkeypatch.setattr(schedule, name, 2)
    monkeypatch.setattr(Run, "too_little", lambda *_: None)
    data = images(48)
    for i, (x, y) in enumerate(zip(data.tensor(), data.targets, strict=True)):
        (tmp_path / "photos" / "ab"[y]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / "ab"[y] / f"{i}.png")
    options = ["--image-size", "16", "--minutes", "600", "--seeds", "2", "--threads", "1", "--quiet"]
    assert main(["compare", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), *options]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (found["train"], found["test"], len(found["rows"])) == (36, 12, len(found["rows"]))
    assert found["advice"] in out and all(row["name"] in out for row in found["rows"])
    assert {row["kind"] for row in found["rows"]} == {"plain", "ordinary", "jitter", "pixels", "autoencoder"}
    assert "time of a step" in out and len(found["tuning"]) == 22
    assert Image.open(tmp_path / "out" / "moves.png").width > 200
