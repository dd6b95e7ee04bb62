"""What a transform remembers and how it is tuned: random state, settings, the bank of latents, rescaling, searches."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from glem_augment import GLEM, GLEMAugment
from glem_augment.augment.bank import LatentBank
from glem_augment.augment.params import FROM_BANK, FROM_BATCH, FROM_RFCM
from glem_augment.evaluation.tuning import choose_strength, search
from glem_augment.random_state import RandomState

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
    with torch.no_grad():
        model.gaussians.mu.copy_(0.1 * torch.arange(4.0)[:, None].expand_as(model.gaussians.mu))
    return model.eval().requires_grad_(False)


# ---- random state -------------------------------------------------------------------------------------


def test_a_run_is_resumed_where_it_was(model: GLEM, tmp_path: Path) -> None:
    x, y = images(8), labels(8)
    aug = GLEMAugment(model, seed=3)
    for _ in range(3):
        aug(x, y)
    torch.save(aug.state_dict(), tmp_path / "state.pt")
    wanted = [aug(x, y)[0] for _ in range(2)]
    later = GLEMAugment(model, seed=99)
    later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert later.seed == 3 and all(torch.equal(later(x, y)[0], w) for w in wanted)
    with pytest.raises(ValueError, match="'seed' and 'calls'"):
        later.load_state_dict({"_extra_state": {"seed": 1}})


def test_ranks_and_workers_draw_differently_and_resume_from_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(rank: int, worker: int | None, state: dict[str, int] | None = None) -> Tensor:
        monkeypatch.setattr("glem_augment.random_state.rank", lambda otherwise=0: rank)
        info = None if worker is None else type("Info", (), {"seed": 0, "id": worker})()
        monkeypatch.setattr("glem_augment.random_state.get_worker_info", lambda: info)
        random = RandomState(5)
        if state is not None:
            random.restore(state)
        return torch.cat([torch.rand(4, generator=random.generator()) for _ in range(4)])

    streams = [draws(r, w) for r in (0, 1, 7) for w in (None, 0, 1)]
    for i, a in enumerate(streams):
        assert len(a.unique()) == 16 and all(not torch.isin(a, b).any() for b in streams[:i])
    assert torch.equal(draws(1, None, {"seed": 5, "calls": 2})[:8], streams[3][8:])
    signs = [torch.rand(4, generator=RandomState(seed).generator()) for seed in (5, -5)]
    assert not torch.isin(*signs).any()


def test_the_rank_travels_with_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    here = RandomState(0)
    monkeypatch.setattr("glem_augment.random_state.rank", lambda otherwise=0: 3)
    sent = pickle.dumps(here)
    wanted = torch.rand(3, generator=here.generator())
    monkeypatch.undo()  # a process that was started anew knows no rank
    assert torch.equal(torch.rand(3, generator=pickle.loads(sent).generator()), wanted)


# ---- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"p": 0.25, "policy": "noise", "strength": 0.3, "modes": 7, "basis": "near", "labels": "posterior"},
        {"partner": "any", "alpha": 0.4, "rescale": True, "bank": 4, "mean": 0.5, "std": [0.25], "seed": -5},
        {"policy": "adversarial", "class_map": {0: 2, 3: 1}, "margin": 2.0},
        {"class_map": [0, None, 3], "detail": "none"},
    ],
)
def test_settings_go_through_json(model: GLEM, settings: dict[str, Any]) -> None:
    aug = GLEMAugment(model, **settings)
    config = json.loads(json.dumps(aug.to_config()))
    again = GLEMAugment.from_config(config, model)
    assert repr(again) == repr(aug) and again.to_config() == aug.to_config()
    if settings.get("policy") != "adversarial":
        n = again.num_classes
        x, y = images(8) / 255, torch.arange(8) % n
        x = x if aug.pixels.mean is None else (x - 0.5) / 0.25
        assert torch.equal(aug(x, y)[0], again(x, y)[0])


def test_settings_name_the_model(model: GLEM) -> None:
    named = {"model": "bundled:fashion-mnist", "modes": 8}
    assert GLEMAugment.from_config(named).modes == 8
    with pytest.raises(ValueError, match="unknown settings .'mode'."):
        GLEMAugment.from_config({"mode": 3}, model)
    with pytest.raises(ValueError, match="names no model"):
        GLEMAugment.from_config(GLEMAugment(model).to_config())


# ---- bank ---------------------------------------------------------------------------------------------


def test_the_bank_keeps_the_last_latents_of_each_class() -> None:
    bank = LatentBank(3, capacity=2, dim=1, device=torch.device("cpu"))
    z, there = bank.pick(torch.tensor([0, 2, -1]), torch.rand(3))
    assert not there.any()
    bank.add(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([0, 0, 2, 0, -1]))
    assert bank.counts.tolist() == [3, 0, 1]

    def held(c: int) -> set[float]:
        u = torch.linspace(0, 0.999, 50)
        z, there = bank.pick(torch.full((50,), c), u)
        return set(z[there].flatten().tolist())

    assert held(0) == {2.0, 4.0} and held(1) == set() and held(2) == {3.0}
    bank.add(torch.tensor([[6.0]]), torch.tensor([0]))
    assert held(0) == {4.0, 6.0}
    assert bank.pick(torch.tensor([0, 1, 2, -1]), torch.rand(4))[1].tolist() == [True, False, True, False]
    counts = torch.bincount((bank.pick(torch.zeros(1000).long(), torch.rand(1000))[0][:, 0] == 6).long())
    assert 400 < counts[1] < 600


def test_partners_come_from_the_bank_where_the_batch_has_none(model: GLEM) -> None:
    x, y = images(12) / 255, labels(12)
    aug = GLEMAugment(model, p=1.0, bank=2, seed=0)
    assert (aug.draw(x[:4], y[:4]).source == FROM_RFCM).all()  # nothing is stored yet
    aug.fill_bank(x, y)
    z = model.encode(x)[0]
    params = aug.draw(x[:5], y[:5])  # classes 0 1 2 3 0: rows 0 and 4 have each other
    assert params.source.tolist() == [FROM_BATCH, *[FROM_BANK] * 3, FROM_BATCH]
    out, target = aug.apply(x[:5], y[:5], params)
    for i in (1, 2, 3):  # the last two of the class, out of rows i, i + 4 and i + 8
        partner = params.stored[i]
        assert min((partner - z[j]).abs().max() for j in (i + 4, i + 8)) < 1e-5
        expected = model.decode((params.l[i] * z[i] + (1 - params.l[i]) * partner)[None])[0]
        assert torch.allclose(out[i], expected, atol=1e-4)
    assert target is y[:5] or torch.equal(target, y[:5])
    again = aug.apply(x[:5], y[:5], params)[0]  # the bank has moved on, the parameters have not
    assert torch.equal(again, out)
    assert torch.equal(copy.deepcopy(aug)(x[:4], y[:4])[0], aug(x[:4], y[:4])[0])


@pytest.mark.parametrize("partner", ["near", "any"])
def test_bank_partners_of_other_classes_have_their_labels(model: GLEM, partner: str) -> None:
    aug = GLEMAugment(model, p=1.0, bank=3, partner=partner, seed=0)
    aug.fill_bank(images(24) / 255, labels(24))
    x, y = images(1, seed=4) / 255, torch.tensor([2])
    params = aug.draw(x, y)
    assert params.source.tolist() == [FROM_BANK]
    target = aug.apply(x, y, params)[1]
    other = torch.eye(4)[params.partner_cls]
    weight = (1 - params.l)[:, None]
    assert torch.allclose(target, (1 - weight) * torch.eye(4)[y] + weight * other, atol=1e-4)


def test_batches_fill_the_bank_by_themselves(model: GLEM) -> None:
    aug = GLEMAugment(model, p=1.0, bank=2, class_map=[1, None, 0], seed=0)
    x, y = images(3) / 255, torch.tensor([0, 1, 2])
    aug(x, y)
    params = aug.draw(x, y)
    assert params.source[params.cls >= 0].tolist() == [FROM_BANK, FROM_BANK]
    assert aug._held.latents is not None and aug._held.latents.counts.tolist() == [1, 0, 1]  # by data class


def test_bank_partners_have_the_data_class_where_a_flow_class_holds_two(model: GLEM) -> None:
    aug = GLEMAugment(model, p=1.0, bank=4, class_map=[2, 2, 0], seed=0)
    aug.fill_bank(torch.full((4, *images(1).shape[1:]), 0.25), torch.zeros(4, dtype=torch.int64))
    aug.fill_bank(torch.full((4, *images(1).shape[1:]), 0.75), torch.ones(4, dtype=torch.int64))
    for data_class, grey in ((0, 0.25), (1, 0.75)):
        params = aug.draw(images(1) / 255, torch.tensor([data_class]))
        assert params.source.tolist() == [FROM_BANK] and params.stored is not None
        torch.testing.assert_close(params.stored, torch.full_like(params.stored, grey - 0.5), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank": -1}, "bank must be"),
        ({"bank": 1.5}, "bank must be"),
        ({"bank": 2, "policy": "noise"}, "policy='mixup'"),
        ({"bank": 2, "partner": "gaussian"}, "partner='gaussian'"),
        ({"rescale": 1}, "rescale must be True or False"),
        ({"rescale": True, "policy": "noise"}, "policy='mixup'"),
    ],
)
def test_bad_settings(model: GLEM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GLEMAugment(model, **settings)


def test_a_bank_must_have_been_asked_for(model: GLEM) -> None:
    with pytest.raises(ValueError, match="bank=16"):
        GLEMAugment(model).fill_bank(images(4), labels(4))


# ---- rescaling ----------------------------------------------------------------------------------------


def test_rescaled_mixup_keeps_the_variance_that_mixup_loses(model: GLEM) -> None:
    n, k = 4000, 12
    g = torch.Generator().manual_seed(1)
    y = torch.zeros(n, dtype=torch.int64)
    small = copy.deepcopy(model)
    small.modes.scales.mul_(0.3)  # so that nothing is cut off at 0 and 1
    z = small.modes.sample(y, 1.0, g)
    x = small.decode(z)
    ratio = {}
    for rescale in (False, True):
        aug = GLEMAugment(small, p=1.0, modes=k, alpha=1e6, rescale=rescale, seed=0)  # l = 1/2
        moved = small.encode(aug(x, y)[0])[0]
        v = small.modes.directions[0, :k]
        a, b = (moved - small.modes.mean[0]) @ v.T, (z - small.modes.mean[0]) @ v.T
        ratio[rescale] = float((a.var(0) / b.var(0)).mean())
        assert torch.allclose(a.mean(0), b.mean(0), atol=0.02)
        out = moved - z
        assert torch.allclose(out, out @ v.T @ v, atol=2e-3)  # only along the modes
    assert ratio[False] == pytest.approx(0.5, abs=0.03) and ratio[True] == pytest.approx(1.0, abs=0.05)


def test_rescaling_is_exact_for_two_classes_and_changes_no_label(model: GLEM) -> None:
    x, y = images(6).double() / 255, labels(6)
    exact = copy.deepcopy(model).double()
    settings: dict[str, Any] = {"p": 1.0, "partner": "any", "modes": 64, "seed": 0}
    plain, aug = GLEMAugment(exact, **settings), GLEMAugment(exact, rescale=True, **settings)
    params = aug.draw(x, y)
    out, target = aug.apply(x, y, params)
    z, mean = exact.encode(x)[0], exact.modes.mean
    assert torch.equal(params.partner_cls, y[params.partner])
    l, j = params.l[:, None].double(), params.partner  # noqa: E741
    mixed = l * mean[y] + (1 - l) * mean[y[j]]
    deviation = l * (z - mean[y]) + (1 - l) * (z[j] - mean[y[j]])
    expected = exact.decode(mixed + deviation / (l**2 + (1 - l) ** 2).sqrt())
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.equal(target, plain.apply(x, y, params)[1])


def test_rescaling_takes_a_drawn_partners_deviation_from_the_mean_of_its_own_law() -> None:
    """Class Gaussians need not have the means of the images, from which the modes were fitted."""
    exact = GLEM.create("identity", (1, 8, 8), classes=CLASSES)
    exact.fit_modes((images(320), labels(320)), rank=64)
    with torch.no_grad():
        exact.gaussians.mu.copy_(0.05 + 0.01 * torch.arange(4.0)[:, None].expand_as(exact.gaussians.mu))
    exact = exact.double().eval().requires_grad_(False)
    x, y = images(4).double() / 255, labels(4)
    aug = GLEMAugment(exact, p=1.0, partner="gaussian", modes=64, rescale=True, seed=0)
    params = aug.draw(x, y)
    z, own, drawn = exact.encode(x)[0], exact.modes.mean[y], exact.gaussians.mu[y]
    partner = drawn + exact.gaussians.variance()[y].sqrt() * params.eps
    l = params.l[:, None].double()  # noqa: E741
    deviation = l * (z - own) + (1 - l) * (partner - drawn)
    expected = exact.decode(l * own + (1 - l) * drawn + deviation / (l**2 + (1 - l) ** 2).sqrt())
    assert torch.allclose(aug.apply(x, y, params)[0], expected, atol=1e-6)


# ---- tuning -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_calls_and_counts_of_workers_reach_the_main_process(model: GLEM, context: str) -> None:
    """A run that is resumed meets the images that it would have met, and not those of its first epoch again."""
    x, y = images(12), labels(12)

    def epoch(aug: GLEMAugment) -> Tensor:
        torch.manual_seed(7)
        loader = DataLoader(
            list(zip(x, y.tolist(), strict=True)), 4, num_workers=2, collate_fn=aug.collate_fn(),
            multiprocessing_context=context,
        )  # fmt: skip
        return torch.cat([batch for batch, _ in loader])

    settings: dict[str, Any] = {"p": 1.0, "policy": "noise", "modes": 4, "seed": 3, "class_map": [0, 1, None, 2]}
    aug = GLEMAugment(model, **settings)
    first = epoch(aug)
    assert aug.stats["selected"] == 12 and aug.stats["unmapped"] == int((y == 2).sum())
    state = aug.state_dict()
    assert state["_extra_state"] == {"seed": 3, "calls": 0, "workers": [2, 1]}
    second, moved = epoch(aug), y != 2
    assert not (second[moved] == first[moved]).flatten(1).all(1).any()
    later = GLEMAugment(model, **{**settings, "seed": 8})
    assert torch.equal(epoch(GLEMAugment(model, **settings)), first)
    later.load_state_dict(state)
    assert torch.equal(epoch(later), second)
