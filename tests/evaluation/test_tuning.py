"""Choosing strength and p: the largest strength that keeps labels right, and a search over training runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glem_augment import GLEM, GLEMAugment
from glem_augment.evaluation.tuning import Trial, choose_strength, search

CLASSES = ["ant", "bee", "cat", "dog"]


def images(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, 1, 8, 8), generator=g, dtype=torch.uint8)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 4


@pytest.fixture(scope="module")
def model() -> GLEM:
    model = GLEM.create("identity", (1, 8, 8), classes=CLASSES)
    model.fit_modes((images(320), labels(320)), rank=64)
    return model.eval().requires_grad_(False)


class ByBrightness(nn.Module):
    """Right as long as an image's brightness stays near that of its class."""

    def forward(self, x: Tensor) -> Tensor:
        return -(x.flatten(1).mean(1, keepdim=True) - torch.tensor([0.2, 0.4, 0.6, 0.8])).abs()


def test_the_largest_strength_that_keeps_the_labels() -> None:
    y = labels(200)
    g = torch.Generator().manual_seed(0)
    level = 0.2 + 0.2 * y[:, None, None, None] + 0.02 * torch.randn(200, 1, 1, 1, generator=g)
    x = (level + 0.02 * torch.randn(200, 1, 8, 8, generator=g)).clamp(0, 1)
    model = GLEM.create("identity", (1, 8, 8), classes=CLASSES)
    model.fit_modes(((x * 255).to(torch.uint8), y), rank=8)
    aug = GLEMAugment(model, policy="noise", modes=8, seed=0)
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 200, 50)]
    net = ByBrightness().train()
    report = choose_strength(aug, net, batches, strengths=(0.5, 1.0, 2.0, 4.0, 8.0), max_drop=0.02)
    assert net.training and aug.strength == 0.5 and aug.stats["selected"] == 0 and aug._random.calls == 0
    assert report.accuracy == 1.0 and [row.strength for row in report.rows] == [0.5, 1.0, 2.0, 4.0, 8.0]
    accuracies, changes = [r.accuracy for r in report.rows], [r.change for r in report.rows]
    assert accuracies[0] > 0.98 and accuracies[-1] < 0.7 and changes == sorted(changes)
    kept = [row.strength for row in report.rows if row.accuracy >= 0.98]
    assert report.strength == max(kept) and report.strength < 8.0
    # the noise has standard deviations of about 0.02 in brightness and pixels: a few uint8 steps
    assert 1 < changes[0] < 10
    eight = choose_strength(aug, net, [((v * 255).round().to(torch.uint8), t) for v, t in batches], strengths=(0.5,))
    assert eight.rows[0].change == pytest.approx(changes[0], rel=0.1)


def test_choose_strength_judges_what_was_moved(model: GLEM) -> None:
    x, y = images(400, seed=3).float() / 255, labels(400)

    class Nearest(nn.Module):
        """Right on the very images it knows, so that any move may fool it."""

        def forward(self, batch: Tensor) -> Tensor:
            return F.one_hot(y[torch.cdist(batch.flatten(1), x.flatten(1)).argmin(1)], 4).float()

    def strongest(aug: GLEMAugment, rows: Tensor, strengths: tuple[float, ...] = (0.25, 1.0, 4.0, 16.0)) -> float:
        return choose_strength(aug, Nearest(), [(x[rows], y[rows])], strengths, max_drop=0.1).strength

    everything, mapped = torch.arange(400), (y == 2).nonzero()[:, 0]
    partial = GLEMAugment(model, policy="noise", seed=0, class_map=[None, None, 2, None], margin=100.0)
    # Images of other classes, which nothing moves, say nothing.
    assert 0 < strongest(partial, everything) == strongest(partial, mapped) < 16
    with pytest.raises(ValueError, match="no image of a class"):
        strongest(partial, (y != 2).nonzero()[:, 0])
    # Where no moved image is plausible, all come out as they were, and are recognised.
    never = GLEMAugment(model, policy="noise", seed=0, margin=0.0)
    with pytest.warns(UserWarning, match="were not plausible"):
        report = choose_strength(never, Nearest(), [(x, y)], strengths=(50.0,))
    assert report.rows[0].replaced == 1.0 and report.rows[0].accuracy == report.accuracy and report.strength == 0
    # One that is kept and not recognised is lost once, not twice.
    half = torch.where(torch.arange(400) < 200, y, (y + 1) % 4)
    with pytest.warns(UserWarning, match="were not plausible"):
        report = choose_strength(never, Nearest(), [(x, half)], strengths=(50.0,), max_drop=0.5)
    assert report.accuracy == report.rows[0].kept_right == 0.5 and report.strength == 50.0


def test_a_strength_beyond_one_that_is_too_strong_is_not_chosen(model: GLEM) -> None:
    x, y = images(8) / 255, labels(8)
    answers = iter([True, True, True, False, True])  # as the images are, and then moved at each strength

    class Scripted(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return F.one_hot(y if next(answers) else (y + 1) % 4, 4).float()

    report = choose_strength(GLEMAugment(model, policy="noise"), Scripted(), [(x, y)], (0.5, 0.1, 0.2, 0.05))
    assert [row.accuracy for row in report.rows] == [1.0, 1.0, 0.0, 1.0] and report.strength == 0.1


def test_changes_of_normalised_images_are_in_steps_of_uint8(model: GLEM) -> None:
    x, y = images(16) / 255, labels(16)
    plain = GLEMAugment(model, policy="noise", seed=0)
    normalised = GLEMAugment(model, policy="noise", seed=0, mean=0.4, std=0.2)
    (a,), (b,) = (
        choose_strength(aug, ByBrightness(), [(batch, y)], (0.1,), max_drop=1.0).rows
        for aug, batch in ((plain, x), (normalised, (x - 0.4) / 0.2))
    )
    moved = GLEMAugment(model, p=1.0, policy="noise", strength=0.1, seed=0)(x, y)[0]
    assert a.change == pytest.approx(float((moved - x).abs().mean()) * 255, rel=1e-4)
    assert b.change == pytest.approx(a.change, rel=1e-3)


def test_choose_strength_arguments(model: GLEM) -> None:
    batches = [(images(4) / 255, labels(4))]
    with pytest.raises(ValueError, match="policy='noise'"):
        choose_strength(GLEMAugment(model), ByBrightness(), batches)
    aug = GLEMAugment(model, policy="noise")
    with pytest.raises(ValueError, match="no image of a class"):
        choose_strength(aug, ByBrightness(), [])
    wrong = [(batches[0][0], torch.zeros(4, dtype=torch.int64))]
    with pytest.warns(UserWarning, match="little more than chance"):
        choose_strength(aug, ByBrightness(), wrong, strengths=(0.5,))
    with pytest.raises(ValueError, match="empty"):
        choose_strength(aug, ByBrightness(), batches, strengths=())
    with pytest.raises(ValueError, match="max_drop"):
        choose_strength(aug, ByBrightness(), batches, max_drop=-0.1)


def test_search_finds_the_best_and_admits_that_nothing_helps() -> None:
    seen = []

    def score(strength: float, p: float, seed: int) -> float:
        seen.append((strength, p, seed))
        return 0.8 + p * (strength - strength**2) + 0.01 * seed

    done = []
    result = search(score, strengths=(0.0, 0.25, 0.5, 1.5), ps=(0.0, 0.5, 1.0), seeds=2, on_trial=done.append)
    assert seen[:2] == [(0.0, 0.0, 0), (0.0, 0.0, 1)] and len(seen) == 2 * 7 and len(done) == 7
    assert (result.best.strength, result.best.p) == (0.5, 1.0) and result.best.mean == pytest.approx(1.055)
    gain, error = result.best.gain(result.baseline)
    assert gain == pytest.approx(0.25) and error == pytest.approx(0.0, abs=1e-9)
    assert result.table().splitlines()[2].startswith("| 0.5 | 1 | 1.0550 | +0.2500")
    worse = search(lambda s, p, seed: 1.0 - p, strengths=(1.0,), ps=(0.5,))
    assert worse.best is worse.baseline and worse.best.p == 0.0
    with pytest.raises(ValueError, match="finite"):
        search(lambda s, p, seed: float("nan"))
    seen.clear()
    for grid in ({"strengths": ()}, {"strengths": (0.0,)}, {"ps": (0,)}):
        with pytest.raises(ValueError, match="nothing to try"):
            search(score, **grid)
    for grid in ({"ps": (0.5, 1.5)}, {"ps": (0.5, -1)}, {"strengths": (0.5, -0.5)}, {"strengths": (float("nan"),)}):
        with pytest.raises(ValueError, match=f"{next(iter(grid))} must be"):
            search(score, **grid)
    assert not seen


def test_modules_that_sleep_are_not_woken(model: GLEM) -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4))
    net[1].eval()
    choose_strength(GLEMAugment(model, policy="noise"), net, [(images(8) / 255, labels(8))], strengths=(0.5,))
    assert net.training and net[2].training and not net[1].training


def test_the_error_of_a_gain_is_that_of_a_mean_of_pairs() -> None:
    gain, error = Trial(0.5, 1.0, (0.5, 0.7, 0.9)).gain(Trial(0.0, 0.0, (0.4, 0.4, 0.8)))
    assert gain == pytest.approx(0.5 / 3) and error == pytest.approx(0.11547 / 3**0.5, rel=1e-4)
