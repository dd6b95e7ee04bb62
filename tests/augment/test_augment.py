"""GLEMAugment: what it keeps, what it moves, and the labels that follow."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glem_augment.augment.labels import is_pure, smoothing_floor
from glem_augment.augment.moves import _fixed_set, drawn_partners, rows_to_encode
from glem_augment.augment.params import AugmentParams
from glem_augment.augment.transform import GLEMAugment
from glem_augment.model.glem import GLEM
from glem_augment.synthetic.dataset import SyntheticDataset

SHAPE = (1, 8, 8)
CLASSES = ["ant", "bee", "cat", "dog"]


def images(n: int, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, channels, size, size), generator=g, dtype=torch.uint8)


def make_model(shape: tuple[int, int, int] = SHAPE, classes: list[str] = CLASSES, per_class: int = 80) -> GLEM:
    """The linear control (z = x - 1/2) with modes of random images; class means 0.1 to 0.7 apart."""
    model = GLEM.create("identity", shape, classes=classes)
    y = torch.arange(len(classes)).repeat_interleave(per_class)
    model.fit_modes((images(len(y), shape[0], shape[1]), y), rank=min(64, model.dim))
    with torch.no_grad():
        model.gaussians.mu.copy_(
            0.1 * torch.tensor([0.0, 1.0, 3.0, 7.0])[: len(classes), None].expand_as(model.gaussians.mu)
        )
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GLEM:
    return make_model()


def labels(n: int, classes: int = 4) -> Tensor:
    return torch.arange(n) % classes


ALL = [
    {"policy": policy, "partner": partner, "basis": basis}
    for policy, partner in [("mixup", p) for p in ("same", "near", "any", "gaussian")] + [("noise", "same")]
    for basis in ("class", "near", "shared")
]


# ---- what must not change -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "mix", "posterior", "hard"])
def test_p_zero_gives_back_the_same_images_with_labels_of_the_usual_form(model: GLEM, kind: str) -> None:
    x, y = images(6), labels(6)
    aug = GLEMAugment(model, p=0.0, labels=kind, partner="any")
    out, target = aug(x, y)
    assert out is x and torch.equal(target, aug.target(y)) and torch.equal(target, aug.apply(x, y, aug.draw(x, y))[1])
    # as at any other p: a loop must not meet hard labels in one epoch and soft ones in the next
    aug.p = 1.0
    assert aug(x, y)[1].shape == target.shape
    assert target is y if kind == "hard" else torch.equal(target, torch.eye(4)[y])


@pytest.mark.parametrize("settings", ALL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_unselected_rows_are_bit_for_bit_the_originals(
    model: GLEM, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    x, y = images(32), labels(32)
    x = x if dtype == torch.uint8 else (x / 255).to(dtype)
    before_x, before_y = x.clone(), y.clone()
    aug = GLEMAugment(model, p=0.5, seed=1, **settings)
    params = aug.draw(x, y)
    out, _ = aug.apply(x, y, params)
    assert torch.equal(x, before_x) and torch.equal(y, before_y), "the input was changed"
    rest = torch.ones(32, dtype=torch.bool)
    rest[params.rows] = False
    assert 4 < int(rest.sum()) < 28
    assert torch.equal(out[rest], x[rest])
    moved = (out[params.rows] != x[params.rows]).flatten(1).any(1)
    assert moved.float().mean() > 0.8 and out.dtype == dtype and out.shape == x.shape
    assert aug.stats == {"selected": len(params.rows), "replaced": 0, "unmapped": 0, "invalid": 0}


def test_memory_format_autocast_and_gradients(model: GLEM) -> None:
    big = make_model((3, 8, 8))
    x = (images(8, 3) / 255).contiguous(memory_format=torch.channels_last)
    out, _ = GLEMAugment(big, p=1.0, seed=0)(x, labels(8))
    assert out.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = GLEMAugment(big, p=1.0, seed=0)(x.clone().requires_grad_(True), labels(8))
    assert torch.equal(out, again) and not again.requires_grad


def test_the_flow_is_not_part_of_the_transform(model: GLEM) -> None:
    aug = GLEMAugment(model)
    assert not list(aug.parameters()) and not list(aug.buffers())
    assert list(aug.state_dict()) == ["_extra_state"]  # the random state
    assert list(aug.modules()) == [aug]
    seen: list[torch.nn.Module] = []
    torch.nn.Sequential(aug).apply(seen.append)  # nn.Module's own apply still works
    assert seen[0] is aug
    with pytest.raises(TypeError, match="aug.draw"):
        aug.apply(images(4), labels(4))
    model.train()
    try:
        aug.eval()(images(4), labels(4))
        assert model.training  # left as it was
    finally:
        model.eval()


# ---- randomness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ALL)
def test_a_call_can_be_replayed(model: GLEM, settings: dict[str, Any]) -> None:
    x, y = images(16), labels(16)
    aug = GLEMAugment(model, p=0.7, seed=3, **settings)
    params = aug.draw(x.shape, y)
    first, second = aug.apply(x, y, params), aug.apply(x, y, params)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    same = GLEMAugment(model, p=0.7, seed=3, **settings)(x, y)
    assert torch.equal(same[0], first[0])
    assert not torch.equal(aug(x, y)[0], first[0])
    assert not torch.equal(GLEMAugment(model, p=0.7, seed=4, **settings)(x, y)[0], first[0])


def test_seed_none_follows_the_global_seed(model: GLEM) -> None:
    x, y = images(16), labels(16)
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(GLEMAugment(model)(x, y)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_given_generator_leaves_the_own_one_alone(model: GLEM) -> None:
    x, y = images(16), labels(16)
    aug, other = GLEMAugment(model, seed=0), GLEMAugment(model, seed=0)
    a = aug.draw(x, y, generator=torch.Generator().manual_seed(9))
    b = aug.draw(x, y, generator=torch.Generator().manual_seed(9))
    assert torch.equal(a.rows, b.rows) and torch.equal(a.eps, b.eps) and torch.equal(a.l, b.l)
    assert torch.equal(aug(x, y)[0], other(x, y)[0])


def test_copies_carry_the_random_state_and_the_counts(model: GLEM) -> None:
    x, y = images(8), labels(8)
    aug = GLEMAugment(model, p=1.0, seed=0)
    aug(x, y)
    for other in (pickle.loads(pickle.dumps(aug)), copy.deepcopy(aug)):
        assert other.stats == aug.stats and other.stats["selected"] == 8
        assert torch.equal(other(x, y)[0], copy.deepcopy(aug)(x, y)[0])


class _Loaded(torch.utils.data.Dataset):
    """Draws inside a worker."""

    def __init__(self, aug: GLEMAugment) -> None:
        self.aug = aug

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        return self.aug(images(4) / 255, labels(4))[0]


def test_workers_draw_differently(model: GLEM) -> None:
    data = _Loaded(GLEMAugment(model, p=1.0, seed=0))
    a, b = torch.utils.data.DataLoader(data, batch_size=1, num_workers=2)
    assert not torch.equal(a, b)


@pytest.mark.parametrize(("batch", "p"), [(1, 0.3), (7, 0.5), (10, 0.3), (64, 0.5), (5, 1.0)])
def test_every_row_is_as_likely_and_their_number_nearly_fixed(model: GLEM, batch: int, p: float) -> None:
    """What prepares itself for the shapes it meets (oneDNN, cuDNN's benchmark mode) then meets two of them."""
    y = labels(batch)
    aug = GLEMAugment(model, p=p, policy="noise", seed=0)
    times, counts = torch.zeros(batch), []
    for _ in range(1000):
        rows = aug.draw((batch, *SHAPE), y).rows
        assert torch.equal(rows, rows.unique())
        times[rows] += 1
        counts.append(len(rows))
    assert set(counts) == {math.floor(p * batch), math.ceil(p * batch)}
    # five standard deviations of a share of 1000 draws
    assert (times / 1000 - p).abs().max() <= 5 * (p * (1 - p) / 1000) ** 0.5


def test_selection_and_mixing_weights_follow_their_laws(model: GLEM) -> None:
    y = torch.zeros(20_000, dtype=torch.int64)
    aug = GLEMAugment(model, p=0.3, policy="mixup", partner="gaussian", alpha=1.0, modes=1, seed=0)
    params = aug.draw((len(y), *SHAPE), y)
    assert abs(len(params.rows) / len(y) - 0.3) < 0.02
    assert params.l.min() >= 0.5 and params.l.max() <= 1.0
    assert abs(float(params.l.mean()) - 0.75) < 0.01  # uniform on [1/2, 1]
    for alpha in (1e-6, 0.4, 50.0):
        lam = GLEMAugment(model, p=1.0, partner="gaussian", alpha=alpha, seed=0).draw((2000, *SHAPE), y[:2000]).l
        law = torch.distributions.Beta(alpha, alpha).sample((20_000,)) if alpha > 1e-3 else torch.ones(1)
        assert abs(float(lam.mean() - torch.maximum(law, 1 - law).mean())) < 0.01


# ---- partners -----------------------------------------------------------------------------------------


def test_partner_same(model: GLEM) -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    aug = GLEMAugment(model, p=1.0, partner="same", seed=0)
    seen = torch.zeros(6, 6)
    for _ in range(300):
        params = aug.draw((6, *SHAPE), y)
        found = params.partner >= 0
        assert found.tolist() == [True] * 5 + [False] and params.source.tolist() == [0] * 5 + [1]
        assert params.partner_cls.tolist() == y.tolist()
        seen[params.rows[found], params.partner[found]] += 1
    assert torch.equal(seen > 0, (y[:, None] == y) & ~torch.eye(6, dtype=torch.bool))
    assert 100 < seen[0, 1] < 200  # one of two, evenly


def test_partner_near_any_and_gaussian(model: GLEM) -> None:
    y = torch.tensor([0, 1, 2, 3, 3])
    aug = GLEMAugment(model, p=1.0, partner="near", seed=0)  # with 4 classes, the 3 nearest are all others
    for _ in range(50):
        params = aug.draw((5, *SHAPE), y)
        assert (params.partner >= 0).all() and (y[params.partner] != y).all()
    alone = aug.draw((2, *SHAPE), torch.tensor([1, 1]))
    assert alone.partner.tolist() == [-1, -1] and (alone.partner_cls != 1).all()
    aug = GLEMAugment(model, p=1.0, partner="any", seed=0)
    for _ in range(50):
        params = aug.draw((5, *SHAPE), y)
        assert (params.partner >= 0).all() and (params.partner != torch.arange(5)).all()
    one = aug.draw((1, *SHAPE), y[:1])
    assert one.partner.tolist() == [-1] and one.source.tolist() == [1]
    params = GLEMAugment(model, p=1.0, partner="gaussian", seed=0).draw((5, *SHAPE), y)
    assert params.source.eq(2).all() and params.partner.eq(-1).all()


@pytest.mark.parametrize("partner", ["same", "near", "any"])
def test_changed_rows_are_partners_first_and_all_rows_equally_likely(model: GLEM, partner: str) -> None:
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    aug = GLEMAugment(model, p=0.4, partner=partner, seed=0)
    allowed = {"same": y[:, None] == y, "near": y[:, None] != y, "any": torch.ones(10, 10, dtype=torch.bool)}[partner]
    allowed = allowed & ~torch.eye(10, dtype=torch.bool)
    seen = torch.zeros(10, 10)
    for _ in range(4000):
        params = aug.draw((10, *SHAPE), y)
        picked = torch.zeros(10, dtype=torch.bool)
        picked[params.rows] = True
        found = params.partner >= 0
        assert torch.equal(found, allowed[params.rows].any(1))
        rows, chosen = params.rows[found], params.partner[found]
        assert torch.equal(picked[chosen], (allowed[rows] & picked).any(1))
        seen[rows, chosen] += 1
    assert torch.equal(seen > 0, allowed)
    share = seen / seen.sum(1, keepdim=True).clamp(min=1)
    expected = allowed / allowed.sum(1, keepdim=True).clamp(min=1)
    # 1600 partners per row; five standard deviations of their share
    assert (share - expected).abs().max() < 5 * (0.25 / 1600) ** 0.5


def test_a_batch_costs_little_more_than_its_changed_rows(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = GLEM.encode
    monkeypatch.setattr(GLEM, "encode", lambda m, x, *a: encoded.append(len(x)) or encode(m, x, *a))
    y = torch.randint(4, (64,), generator=torch.Generator().manual_seed(0))
    for partner in ("same", "near", "any", "gaussian"):
        aug = GLEMAugment(model, p=0.5, partner=partner, seed=0)
        encoded.clear()
        for _ in range(20):
            aug(images(64), y)
        assert sum(encoded) <= 1.02 * aug.stats["selected"]


def test_a_thousand_classes_in_a_batch_of_64() -> None:
    names = [f"c{i}" for i in range(1000)]
    many = GLEM.create("identity", (1, 4, 4), classes=names)
    y = torch.arange(1000).repeat_interleave(3)
    many.fit_modes((images(3000, 1, 4), y), rank=2)
    x, target = images(64, 1, 4), torch.arange(64) * 15
    for settings in ALL:
        kind = "mix" if settings["policy"] == "mixup" else "auto"
        out, new = GLEMAugment(many, p=1.0, modes=2, seed=0, labels=kind, **settings)(x, target)
        assert not torch.equal(out, x)
        if kind == "mix":
            assert new.shape == (64, 1000) and torch.allclose(new.sum(1), torch.ones(64), atol=1e-5)


# ---- the move -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["class", "near", "shared"])
def test_with_all_modes_mixup_is_latent_interpolation(model: GLEM, basis: str) -> None:
    x, y = images(12).double() / 255, labels(12)
    exact = copy.deepcopy(model).double()
    aug = GLEMAugment(exact, p=1.0, partner="same", modes=64, basis=basis, seed=0)
    params = aug.draw(x, y)
    out, target = aug.apply(x, y, params)
    z = exact.encode(x)[0]
    expected = exact.decode(params.l[:, None] * z + (1 - params.l[:, None]) * z[params.partner])
    assert torch.allclose(out, expected, atol=1e-6) and target is y


def test_mixup_moves_only_along_the_modes(model: GLEM) -> None:
    x, y = images(12).double() / 255, labels(12)
    exact = copy.deepcopy(model).double()
    aug = GLEMAugment(exact, p=1.0, modes=5, seed=0)
    params = aug.draw(x, y)
    z, moved = exact.encode(x)[0], exact.encode(aug.apply(x, y, params)[0])[0] - exact.encode(x)[0]
    for i in range(12):
        v = exact.modes.directions[y[i], :5]
        expected = (1 - params.l[i]) * (v.T @ (v @ (z[params.partner[i]] - z[i])))
        assert torch.allclose(moved[i], expected, atol=1e-6)


@pytest.mark.parametrize("partner", ["same", "gaussian"])
def test_drawn_partners_come_from_their_law(model: GLEM, partner: str) -> None:
    n = 4000
    y = torch.tensor([2])
    x = images(1) / 255
    aug = GLEMAugment(model, p=1.0, partner=partner, modes=64, alpha=1e6, seed=0, margin=9.0)  # l = 1/2
    z = model.encode(x)[0]
    params = [aug.draw(x, y) for _ in range(n)]
    flow = aug._held.flow(x.device)
    stacked = copy.copy(params[0])
    for name in ("rows", "cls", "partner", "partner_cls", "source", "l", "eps"):
        setattr(stacked, name, torch.cat([getattr(p, name) for p in params]))
    drawn = drawn_partners(flow, stacked)
    if partner == "gaussian":
        mean, variance = model.gaussians.mu[2].detach(), model.gaussians.variance()[2].detach()
    else:
        mean = model.modes.mean[2]
        variance = (model.modes.scales[2, :, None] * model.modes.directions[2]).square().sum(0) + model.modes.rest[2]
    assert torch.allclose(drawn.mean(0), mean, atol=6 * float(variance.max() / n) ** 0.5)
    assert torch.allclose(drawn.var(0) / variance, torch.ones(64), atol=0.15)
    out = model.encode(aug.apply(x, y, params[0])[0])[0]
    assert torch.allclose(out, ((z + drawn[:1]) / 2).clamp(-0.5, 0.5), atol=3e-3) or partner == "gaussian"


@pytest.mark.parametrize("basis", ["class", "near", "shared"])
def test_noise_has_strength_standard_deviations_along_each_mode(model: GLEM, basis: str) -> None:
    n, strength = 6000, 0.2
    x, y = (images(1) / 255).expand(n, -1, -1, -1), torch.full((n,), 1)
    aug = GLEMAugment(model, p=1.0, policy="noise", strength=strength, modes=6, basis=basis, seed=0)
    moved = model.encode(aug(x, y)[0])[0] - model.encode(x)[0]
    modes = model.modes
    v, s = modes.directions[1], modes.scales[1]
    if basis == "near":
        pooled = modes.near(model.gaussians.kld_matrix().detach())
        v, s = pooled[0][1], pooled[1][1]
    elif basis == "shared":
        v, s = modes.shared_directions, modes.shared_scales
    c = moved @ v.T
    assert torch.allclose(c[:, :6].std(0), strength * s[:6], rtol=0.06)
    assert c[:, 6:].abs().max() < 1e-5 and torch.allclose(c[:, :6].mean(0), torch.zeros(6), atol=0.01)
    correlation = torch.corrcoef(c[:, :6].T) - torch.eye(6)
    assert correlation.abs().max() < 0.07


def test_the_rows_to_encode_hold_every_row_and_partner() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (0, 1, 5, 15, 16, 31, 32):
        rows = torch.randperm(32, generator=g)[:n]
        partner = torch.randint(32, (n,), generator=g)
        params = AugmentParams(rows, *([torch.zeros(n)] * 6))
        params.partner = torch.where(torch.rand(n, generator=g) < 0.2, -1, partner)
        wanted = torch.where(params.partner < 0, rows, params.partner)
        index, place = rows_to_encode(params, 32)
        assert torch.equal(index[:n], rows) and torch.equal(index[place], wanted)
        assert len(index) == len(torch.cat([rows, wanted]).unique())
        index, place = _fixed_set(rows, wanted, 32)
        assert torch.equal(index[:n], rows) and torch.equal(index[place], wanted)
        assert len(index) == min(2 * n, 32)


def test_only_selected_rows_and_their_partners_are_encoded(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}
    encode, decode = GLEM.encode, GLEM.decode
    monkeypatch.setattr(GLEM, "encode", lambda m, x, *a: sizes.update(encode=len(x)) or encode(m, x, *a))
    monkeypatch.setattr(GLEM, "decode", lambda m, z, **k: sizes.update(decode=len(z)) or decode(m, z, **k))
    x, y = images(64), labels(64)
    for settings in ALL:
        aug = GLEMAugment(model, p=0.2, seed=0, **settings)
        params = aug.draw(x, y)
        aug.apply(x, y, params)
        needed = torch.cat([params.rows, params.partner[params.partner >= 0]]).unique()
        assert sizes == {"encode": len(needed), "decode": len(params.rows)}


# ---- labels -------------------------------------------------------------------------------------------


def test_auto_keeps_hard_labels_where_the_class_stays(model: GLEM) -> None:
    x, y = images(8), labels(8)
    for settings in ({"policy": "noise"}, {"partner": "same"}, {"partner": "gaussian"}):
        assert GLEMAugment(model, p=1.0, **settings)(x, y)[1] is y
    for partner in ("near", "any"):
        target = GLEMAugment(model, p=1.0, partner=partner)(x, y)[1]
        assert target.shape == (8, 4) and target.dtype == torch.float32
        assert GLEMAugment(model, p=1.0, partner=partner, labels="hard")(x, y)[1] is y


@pytest.mark.parametrize("partner", ["near", "any"])
@pytest.mark.parametrize("modes", [7, 64])
def test_mix_weighs_by_the_share_that_the_projection_keeps(model: GLEM, partner: str, modes: int) -> None:
    x, y = images(10) / 255, labels(10)
    aug = GLEMAugment(model, p=0.6, partner=partner, modes=modes, seed=0)
    params = aug.draw(x, y)
    _, target = aug.apply(x, y, params)
    hot = torch.eye(4)[y]
    expected = hot.clone()
    z = model.encode(x)[0]
    for r, j, lam in zip(params.rows.tolist(), params.partner.tolist(), params.l.tolist(), strict=True):
        v = model.modes.directions[y[r], :modes]
        delta = z[j] - z[r]
        share = float((v @ delta).square().sum() / delta.square().sum())
        assert modes < 64 or share == pytest.approx(1.0, abs=1e-4)
        w = 1 - (1 - lam) * share
        expected[r] = w * hot[r] + (1 - w) * hot[j]
    assert torch.allclose(target, expected, atol=1e-5)


def test_soft_labels_stay_soft_and_are_mixed(model: GLEM) -> None:
    x, y = images(8) / 255, labels(8)
    smooth = torch.eye(4)[y] * 0.9 + 0.025
    aug = GLEMAugment(model, p=1.0, partner="any", modes=64, seed=0)
    params = aug.draw(x, smooth)
    assert torch.equal(params.cls, y)
    target = aug.apply(x, smooth, params)[1]
    l = params.l[:, None]  # noqa: E741
    assert torch.allclose(target, l * smooth + (1 - l) * smooth[params.partner], atol=1e-4)
    for settings in ({"policy": "noise"}, {"partner": "gaussian"}):
        for kind in ("auto", "mix", "hard"):
            out = GLEMAugment(model, p=1.0, labels=kind, **settings)(x, smooth.double())[1]
            assert torch.allclose(out, smooth.double(), atol=1e-7)
    # no partner of the class in the batch: the draw is of the own class, and the label does not change
    out = GLEMAugment(model, p=1.0, partner="same")(x[:4], smooth[:4])[1]
    assert torch.allclose(out, smooth[:4], atol=1e-6)
    # a draw from another class has that class's label, smoothed in the same way
    aug = GLEMAugment(model, p=1.0, partner="near", modes=64, seed=0)
    params = aug.draw(x[:1], smooth[:1])
    out = aug.apply(x[:1], smooth[:1], params)[1]
    other = torch.eye(4)[params.partner_cls] * 0.9 + 0.025
    assert torch.allclose(out, params.l[0] * smooth[:1] + (1 - params.l[0]) * other, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_drawn_partner_brings_the_label_of_its_class_alone(model: GLEM, smoothing: float) -> None:
    """Mixed rows, as Mixup makes them: a draw of class c has none of the row's other class."""
    hot = torch.eye(4)
    own = 0.6 * hot[[0, 1, 2, 3]] + 0.4 * hot[[1, 2, 3, 0]]
    mixed = own * (1 - smoothing) + smoothing / 4
    aug = GLEMAugment(model, p=1.0, partner="gaussian", modes=64, seed=3)
    params = aug.draw(images(4), mixed)
    target = aug.apply(images(4) / 255, mixed, params)[1]
    drawn = hot[params.partner_cls] * (1 - smoothing) + smoothing / 4
    w = ((target - mixed) * (drawn - mixed)).sum(1) / (drawn - mixed).square().sum(1)  # how much of the draw
    assert ((w > 0.01) & (w <= 1 - params.l + 1e-5)).all()
    assert torch.allclose(target, mixed + w[:, None] * (drawn - mixed), atol=1e-5)


def test_the_bank_takes_no_mixtures(model: GLEM) -> None:
    x, y = images(8) / 255, labels(8)
    aug = GLEMAugment(model, p=1.0, bank=4, seed=0)
    hot = torch.eye(4)[y]
    aug(x, 0.55 * hot + 0.45 * hot.roll(1, 0))
    assert aug._held.latents is not None and aug._held.latents.counts.sum() == 0
    aug(x, hot * 0.9 + 0.025)  # smoothed is not mixed
    assert aug._held.latents.counts.tolist() == torch.bincount(y, minlength=4).tolist()


def test_mix_of_hard_labels_without_a_partner_is_one_hot(model: GLEM) -> None:
    y = labels(6)
    out = GLEMAugment(model, policy="noise", labels="mix", p=0.5)(images(6), y)[1]
    assert torch.equal(out, torch.eye(4)[y])


def test_posterior_labels_are_those_of_the_moved_latents(model: GLEM) -> None:
    x, y = images(10) / 255, labels(10)
    aug = GLEMAugment(model, p=0.5, policy="noise", strength=0.3, labels="posterior", seed=0)
    params = aug.draw(x, y)
    out, target = aug.apply(x, y, params)
    expected = torch.eye(4)[y]
    expected[params.rows] = model.posterior(out[params.rows]).detach()
    assert torch.allclose(target, expected, atol=1e-3)
    assert torch.allclose(target.sum(1), torch.ones(10), atol=1e-5)


# ---- safety -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.5, -1.5])
def test_implausible_images_are_replaced_with_their_labels(
    model: GLEM, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = GLEM.decode

    def broken(self: GLEM, z: Tensor, clamp: bool = True) -> Tensor:
        out = decode(self, z, clamp)
        out[0, 0, 3, 3] = bad
        return out

    x, y = images(6) / 255, labels(6)
    aug = GLEMAugment(model, p=1.0, partner="any", seed=0)
    params = aug.draw(x, y)
    fine, soft = aug.apply(x, y, params)
    monkeypatch.setattr(GLEM, "decode", broken)
    out, target = aug.apply(x, y, params)
    assert torch.equal(out[0], x[0]) and torch.equal(out[1:], fine[1:])
    assert torch.equal(target[0], torch.eye(4)[y[0]]) and torch.equal(target[1:], soft[1:])
    assert aug.stats["replaced"] == 1
    inside = GLEMAugment(model, p=1.0, partner="any", seed=0, margin=2.5)
    inside.apply(x, y, params)
    assert inside.stats["replaced"] == int(not abs(bad) < 3)


def test_new_modes_are_picked_up(model: GLEM) -> None:
    own = make_model()
    aug = GLEMAugment(own, p=1.0, policy="noise", seed=0)
    x, y = images(4) / 255, labels(4)
    params = aug.draw(x, y)
    before = aug.apply(x, y, params)[0]
    own.fit_modes((images(40, seed=5) // 8 + 100, labels(40)), rank=64)
    after = aug.apply(x, y, params)[0]
    assert (after - x).abs().mean() < 0.3 * (before - x).abs().mean()
    own.fit_modes((images(40), labels(40)), rank=8)
    with pytest.raises(ValueError, match="from 1 to 8"):
        aug(x, y)


# ---- class maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[2, -1, 0, None, 3], {0: 2, 2: 0, 4: 3, 3: None}])
def test_partial_class_map(model: GLEM, given: Any) -> None:
    x, y = images(20) / 255, labels(20, 5)
    aug = GLEMAugment(model, p=1.0, partner="near", class_map=given, seed=0)
    assert aug.num_classes == 5
    params = aug.draw(x, y)
    assert params.cls[:5].tolist() == [2, -1, 0, -1, 3]
    out, target = aug.apply(x, y, params)
    absent = (y == 1) | (y == 3)
    assert torch.equal(out[absent], x[absent]) and torch.equal(target[absent], torch.eye(5)[y[absent]])
    assert (out[~absent] != x[~absent]).flatten(1).any(1).all()
    assert target[~absent][:, [1, 3]].eq(0).all() and torch.allclose(target.sum(1), torch.ones(20))
    assert aug.stats == {"selected": 20, "replaced": 0, "unmapped": 8, "invalid": 0}
    posterior = GLEMAugment(model, p=1.0, policy="noise", labels="posterior", class_map=given, seed=0)(x, y)[1]
    assert torch.allclose(posterior.sum(1), torch.ones(20), atol=1e-5)
    assert posterior[~absent][:, [1, 3]].eq(0).all()


def test_a_posterior_on_classes_that_the_data_lacks_leaves_the_label() -> None:
    own = make_model()
    with torch.no_grad():
        own.gaussians.mu.fill_(9.0)
        own.gaussians.mu[1] = 0.0
    aug = GLEMAugment(own, p=1.0, policy="noise", labels="posterior", class_map=[0, None, 2, 3], seed=0)
    x, y = images(4) / 255, torch.tensor([0, 2, 3, 0])
    out, target = aug(x, y)
    assert (out != x).flatten(1).any(1).all() and torch.equal(target, torch.eye(4)[y])


def test_data_classes_that_share_a_flow_class_share_its_probability(model: GLEM) -> None:
    aug = GLEMAugment(model, p=1.0, policy="noise", labels="posterior", class_map=[0, 1, 2, 3, 3], seed=0)
    x = images(5) / 255
    target = aug(x, torch.arange(5))[1]
    assert torch.allclose(target[:, 3], target[:, 4]) and torch.allclose(target.sum(1), torch.ones(5), atol=1e-5)
    assert aug.draw(x, torch.arange(5)).cls.tolist() == [0, 1, 2, 3, 3]


# ---- sizes, channels, normalisation -------------------------------------------------------------------


def smooth_images(n: int, channels: int, size: int) -> Tensor:
    return torch.nn.functional.interpolate(images(n, channels, 4) / 255, size=(size, size), mode="bilinear")


@pytest.mark.parametrize("size", [8, 24, (20, 36), 5])
@pytest.mark.parametrize(("flow", "channels"), [(1, 1), (3, 3), (1, 3), (3, 1)])
@pytest.mark.parametrize("detail", ["keep", "mix", "none"])
def test_other_sizes_and_channels(size: Any, flow: int, channels: int, detail: str) -> None:
    own = make_model((flow, 8, 8))
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.nn.functional.interpolate(images(8, channels, 40) / 255, size=(height, width))
    aug = GLEMAugment(own, p=1.0, detail=detail, modes=64, seed=0)
    params = aug.draw(x, labels(8))
    out, _ = aug.apply(x, labels(8), params)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert (out - x).abs().mean() > 0.003
    still = copy.copy(params)
    still.l = torch.ones_like(params.l)  # a move of nothing
    same, _ = aug.apply(x, labels(8), still)
    if detail != "none" or (height, width) == (8, 8):
        assert torch.allclose(same, x, atol=1e-5)
    assert aug.stats["replaced"] == 0


def test_keep_adds_the_upsampled_change_and_mix_the_partners_detail() -> None:
    own = make_model((1, 8, 8))
    x, y = images(6, 1, 32) / 255, labels(6, 2)
    resize = torch.nn.functional.interpolate
    down = resize(x, size=(8, 8), mode="bilinear", antialias=True)
    results = {}
    for detail in ("keep", "mix", "none"):
        aug = GLEMAugment(own, p=1.0, detail=detail, seed=0)
        params = aug.draw(x, y)
        results[detail] = aug.apply(x, y, params)[0]
    changed = GLEMAugment(own, p=1.0, seed=0).apply(down, y, params)[0]
    up = {"mode": "bilinear", "size": (32, 32)}
    keep = x + resize(changed - down, **up)
    fine = x - resize(down, **up)
    mix = keep + (1 - params.l)[:, None, None, None] * (fine[params.partner] - fine)
    assert torch.allclose(results["keep"], keep.clamp(0, 1), atol=1e-5)
    assert torch.allclose(results["mix"], mix.clamp(0, 1), atol=1e-5)
    assert torch.allclose(results["none"], resize(changed, **up), atol=1e-5)


def test_grey_flow_moves_the_luminance_of_rgb() -> None:
    own = make_model((1, 8, 8))
    x = images(6, 3, 8) / 255
    out, _ = GLEMAugment(own, p=1.0, policy="noise", strength=0.05, seed=0)(x, labels(6))
    change = out - x
    assert torch.allclose(change[:, 0], change[:, 1], atol=1e-6) and change.abs().max() > 1e-3


def test_channels_are_weighed_as_pil_does_and_averaged_on_the_way_back() -> None:
    settings: dict[str, Any] = {"p": 1.0, "policy": "noise", "strength": 0.05, "seed": 0}
    x, y, grey = images(6, 3, 8) / 255, labels(6), GLEMAugment(make_model((1, 8, 8)), partner="any", p=1.0, seed=0)
    luma = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    params = grey.draw(x, y)
    change = grey.apply(luma, y, params)[0] - luma
    assert torch.allclose(grey.apply(x, y, params)[0], (x + change).clamp(0, 1), atol=1e-5)
    coloured = GLEMAugment(make_model((3, 8, 8)), **settings)
    x = images(6, 1, 8) / 255
    params = coloured.draw(x, y)
    three = x.expand(-1, 3, -1, -1)
    change = (coloured.apply(three, y, params)[0] - three).mean(1, keepdim=True)
    assert torch.allclose(coloured.apply(x, y, params)[0], x + change, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_input(dtype: torch.dtype) -> None:
    own = make_model((3, 8, 8))
    x, y = images(8, 3) / 255, labels(8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    m, s = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    plain, _ = GLEMAugment(own, p=1.0, seed=0)(x, y)
    out, _ = GLEMAugment(own, p=1.0, seed=0, mean=mean, std=std)(((x - m) / s).to(dtype), y)
    assert out.dtype == dtype
    assert torch.allclose(out.float() * s + m, plain, atol={torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 2e-2))
    scalar, _ = GLEMAugment(own, p=1.0, seed=0, mean=0.5, std=0.5)(x * 2 - 1, y)
    assert torch.allclose(scalar / 2 + 0.5, plain, atol=1e-5)


@pytest.mark.parametrize("size", [8, 20])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_the_input_is_never_written_to(size: int, normalised: bool, dtype: torch.dtype) -> None:
    own = make_model((3, 8, 8))
    x = images(6, 3, size)
    if dtype != torch.uint8:
        x = (x / 255).to(dtype)
    elif normalised:
        return
    before = x.clone()
    stats = {"mean": 0.1, "std": 0.9} if normalised else {}
    for detail in ("keep", "mix", "none"):
        out, _ = GLEMAugment(own, p=1.0, seed=0, detail=detail, **stats)(x, labels(6, 2))
        assert torch.equal(x, before) and not torch.equal(out, x)
        assert out.data_ptr() != x.data_ptr()


def test_erased_pixels_outside_the_range_stay_in_large_images() -> None:
    own = make_model((3, 8, 8))
    x = (images(4, 3, 16) / 255 - 0.5) / 0.25
    x[:, :, :4, :4] = 5.0  # RandomErasing after normalisation
    out, _ = GLEMAugment(own, p=1.0, seed=0, mean=0.5, std=0.25, strength=0.05, policy="noise")(x, labels(4))
    assert torch.isfinite(out).all() and out[:, :, :4, :4].max() > 4.5


def test_uint8_is_rounded(model: GLEM) -> None:
    x, y = images(16), labels(16)
    eight, _ = GLEMAugment(model, p=1.0, seed=0)(x, y)
    real, _ = GLEMAugment(model, p=1.0, seed=0)(x / 255, y)
    assert torch.equal(eight, (real * 255).round().to(torch.uint8))


def test_five_bit_flow_does_not_posterise() -> None:
    own = GLEM.create("identity", SHAPE, classes=CLASSES, bits=5)
    own.fit_modes((images(80), labels(80)), rank=10)
    x = images(8)
    out, _ = GLEMAugment(own, p=1.0, policy="noise", strength=0.0, modes=10)(x, labels(8))
    assert torch.equal(out, x)


# ---- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "cutmix"}, "'mixup', 'noise', 'adversarial'; got 'cutmix'"),
        ({"basis": "all"}, "'class', 'near', 'shared'"),
        ({"partner": "other"}, "'same', 'near', 'any', 'gaussian'"),
        ({"labels": "soft"}, "'auto', 'hard', 'mix', 'posterior'"),
        ({"detail": "drop"}, "'keep', 'mix', 'none'"),
        ({"detail": "mix", "policy": "noise"}, "needs a partner"),
        ({"p": 1.5}, "p must be from 0 to 1, got 1.5"),
        ({"p": float("nan")}, "p must be"),
        ({"p": "half"}, "p must be a number"),
        ({"alpha": 0.0}, "alpha must be finite and above 0"),
        ({"strength": -1}, "strength must be finite and at least 0"),
        ({"modes": 65}, "from 1 to 64.*got 65"),
        ({"modes": 0}, "from 1 to 64"),
        ({"mean": 0.5}, "mean and std together"),
        ({"mean": 0.5, "std": 0.0}, "std must be positive"),
        ({"mean": "x", "std": "y"}, "must be a number"),
        ({"num_classes": 7}, "num_classes=7, but the flow has 4"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"class_map": [0, 4]}, "flow class 4"),
        ({"class_map": {0: 0, -2: 1}}, "data class -2"),
        ({"class_map": [None, -1]}, "no class"),
        ({"class_map": []}, "empty"),
        ({"class_map": ["ant"]}, "ints"),
        ({"class_map": 3}, "dict or a sequence"),
        ({"class_map": [0, 1], "num_classes": 3}, "2 entries"),
        ({"seed": 0.5}, "seed must be an int"),
    ],
)
def test_arguments_are_checked(model: GLEM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GLEMAugment(model, **settings)


def test_models_are_checked() -> None:
    with pytest.raises(ValueError, match=r"model\.fit_modes\(data\)"):
        GLEMAugment(GLEM.create("identity", SHAPE, classes=CLASSES))
    with pytest.raises(TypeError, match="must be a GLEM"):
        GLEMAugment(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 classes"):
        GLEMAugment(make_model(classes=["one"]), partner="near")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (images(4)[0], labels(4), r"\[B, C, H, W\]"),
        (images(4, 2), labels(4), "2 channels"),
        (images(4).int(), labels(4), "uint8 or floating"),
        (images(4).float(), labels(4), "must be in .*mean and std"),
        (images(4) / 255 * float("nan"), labels(4), "must be in"),
        (images(4), labels(3), r"int64 \[4\]"),
        (images(4), labels(4).float(), "integers"),
        (images(4), torch.zeros(4, 5), "soft labels have 5 classes, not 4"),
        (images(4), torch.zeros(4, 4, dtype=torch.int64), "floating point"),
        (images(4), torch.tensor([0, 1, 4, 0]), "label 4 is out of range.*0 to 3"),
        (images(4), torch.tensor([0, -1, 2, 0]), "label -1 is out of range"),
        (images(4), [0, 1, 2, 3], "must be a tensor"),
    ],
)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_batches_are_checked(model: GLEM, x: Tensor, y: Tensor, message: str, p: float) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GLEMAugment(model, p=p)(x, y)


def test_mean_and_std_must_fit_the_images(model: GLEM) -> None:
    with pytest.raises(ValueError, match="mean has 2 values, the images 1"):
        GLEMAugment(model, mean=(0.1, 0.2), std=(1, 1))(images(4) / 255, labels(4))
    with pytest.raises(TypeError, match="uint8"):
        GLEMAugment(model, mean=0.5, std=0.5)(images(4), labels(4))


def test_empty_and_single_batches(model: GLEM) -> None:
    for settings in ALL:
        aug = GLEMAugment(model, p=1.0, seed=0, **settings)
        out, y = aug(images(0), labels(0))
        assert out.shape == (0, *SHAPE) and len(y) == 0
        assert aug(images(1), labels(1))[0].shape == (1, *SHAPE)


def test_repr_shows_every_setting(model: GLEM) -> None:
    text = repr(GLEMAugment(model, p=0.25, seed=7, mean=0.5, std=0.25, class_map=[0, None]))
    for part in ("p=0.25", "'mixup'", "alpha=1.0", "strength=0.5", "modes=64", "'class'", "'same'", "'auto'"):
        assert part in text
    for part in (
        "mean=(0.5,)",
        "std=(0.25,)",
        "num_classes=2",
        "class_map=(0, -1)",
        "'keep'",
        "seed=7",
        "margin=1.0",
    ):
        assert part in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", ALL)
def test_cuda_gives_what_the_cpu_gives_without_waiting(model: GLEM, settings: dict[str, Any]) -> None:
    x, y = images(32) / 255, labels(32)
    host, _ = GLEMAugment(model, p=0.6, seed=0, **settings)(x, y)
    aug = GLEMAugment(model, p=0.6, seed=0, **settings)
    xd, yd = x.cuda(), y.cuda()
    out, _ = aug(xd, yd)
    assert torch.allclose(out.cpu(), host, atol=1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        aug(xd, yd)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_neighbours_follow_the_gaussians() -> None:
    """They are looked up once, and again after more training."""
    model = GLEM.create("identity", (1, 4, 4), classes=["a", "b", "c", "d", "e", "f"])
    x, y = torch.randint(60, 196, (120, 1, 4, 4), dtype=torch.uint8), torch.arange(120) % 6
    model.fit_modes((x, y), rank=4)
    model.eval().requires_grad_(False)
    aug = GLEMAugment(model, p=1.0, partner="near", seed=0)
    device = torch.device("cpu")
    with torch.no_grad():
        model.gaussians.mu.copy_(torch.arange(6.0)[:, None].expand_as(model.gaussians.mu))
        before = aug._held.tables(device).neighbours
        assert aug._held.tables(device) is aug._held.tables(device)
        model.gaussians.mu.copy_(model.gaussians.mu[[0, 3, 1, 4, 2, 5]])
    assert not torch.equal(aug._held.tables(device).neighbours, before)


def test_a_flow_copied_to_another_device_follows_its_original() -> None:
    model = GLEM.create("identity", (1, 4, 4), classes=["a", "b"])
    x, y = torch.randint(60, 196, (40, 1, 4, 4), dtype=torch.uint8), torch.arange(40) % 2
    model.fit_modes((x, y), rank=4)
    aug = GLEMAugment(model.eval(), p=1.0, seed=0)
    there = torch.device("meta")  # a copy like that on an accelerator, whose values nobody asks for
    found = aug._held.flow(there)
    assert aug._held.flow(there) is found and found.model is not model
    with torch.no_grad():
        model.gaussians.s.add_(0.1)
    assert aug._held.flow(there) is not found


@pytest.mark.parametrize("soft", [False, True])
def test_partners_of_the_same_class_are_of_the_same_data_class(model: GLEM, soft: bool) -> None:
    aug = GLEMAugment(model, p=1.0, class_map=[0, 0, 2], seed=0)
    y = torch.tensor([0, 1] * 8)
    given = torch.nn.functional.one_hot(y, 3).float() if soft else y
    for _ in range(5):
        params = aug.draw(images(16) / 255, given)
        assert torch.equal(y[params.partner], y[params.rows])
        labels_after = aug.apply(images(16) / 255, given, params)[1]
        assert torch.allclose(labels_after.float(), given.float())


@pytest.mark.parametrize("settings", [{"bank": 4}, {"policy": "adversarial"}, {"partner": "near"}])
def test_a_first_call_under_inference_mode_leaves_nothing_behind(settings: dict[str, Any]) -> None:
    aug = GLEMAugment(make_model((1, 8, 8)), p=1.0, seed=0, mean=0.5, std=0.25, **settings)
    if aug.policy == "adversarial":
        aug.attach(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)))
    x, y = (images(8) / 255 - 0.5) / 0.25, labels(8)
    with torch.inference_mode():
        if aug.policy != "adversarial":  # whose gradient can't be taken there
            aug(x, y)
        if aug.bank:
            aug.fill_bank(x, y)
        aug.pixels.to_unit(x.clone())
        aug._held.flow(x.device), aug._held.tables(y.device)
    out, _ = aug(x, y)
    assert out.shape == x.shape and sum(aug.stats.values()) >= 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_in_half_precision_is_refused(model: GLEM, dtype: torch.dtype) -> None:
    aug = GLEMAugment(copy.deepcopy(model).to(dtype), p=1.0, modes=4)
    with pytest.raises(TypeError, match=r"the flow's weights are .*16, in which it is not invertible: use flow.float"):
        aug(images(4), labels(4))


def test_a_flow_in_double_precision(model: GLEM, tmp_path: Path) -> None:
    wide = copy.deepcopy(model).double()
    x, y = images(12), labels(12)
    wide.fit_modes((x, y), rank=2)
    adapted = wide.adapt((x, y), rank=2, progress=False)
    model.save(tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        loaded = GLEM.from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    for flow in (wide, adapted, loaded):
        assert flow.modes is not None and flow.modes.directions.dtype == flow.dtype
        for settings in ({"policy": "noise"}, {"partner": "gaussian"}, {"basis": "near"}):
            GLEMAugment(flow, p=1.0, modes=2, **settings)(x, y)
        SyntheticDataset(flow, per_class=1, source="rfcm").images(range(2))


def test_modes_written_in_place_are_noticed(model: GLEM) -> None:
    mine = copy.deepcopy(model)
    aug = GLEMAugment(mine, p=1.0, policy="noise", basis="near", modes=4, seed=0)
    x, y = images(4), labels(4)
    assert not torch.equal(aug(x, y)[0], x)
    assert mine.modes is not None
    mine.modes.scales.zero_()
    mine.modes.rest.zero_()
    assert torch.equal(aug(x, y)[0], x)


def test_labels_beyond_a_class_map_ask_for_num_classes(model: GLEM) -> None:
    aug = GLEMAugment(model, class_map={0: 0, 2: 1})
    assert aug.num_classes == 3
    with pytest.raises(ValueError, match="label 3 is out of range: .* give num_classes if the data has more classes$"):
        aug(images(4), torch.tensor([0, 1, 2, 3]))


def test_mixtures_of_two_classes_are_not_taken_for_smoothing() -> None:
    mixed = torch.tensor([[0.7, 0.3], [0.3, 0.7]])
    assert float(smoothing_floor(mixed)) == 0.0 and not is_pure(mixed).any()
    smoothed = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert float(smoothing_floor(smoothed)) == pytest.approx(0.1) and is_pure(smoothed).all()
    assert smoothing_floor(torch.tensor([[1.1, -0.1], [0.0, 1.0]])) == 0  # nobody smooths by less than nothing
