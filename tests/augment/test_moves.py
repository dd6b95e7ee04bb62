"""Moves along the modes, partners, and the rows that must be encoded for them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from augment_cases import images, labels

from glem_augment import GLEM, GLEMAugment, Mixup, Noise, Policy


@pytest.mark.parametrize(("partner", "modes"), [("same", 64), ("same", 5), ("any", 5)])
def test_mixup_is_interpolation_along_the_modes(model: GLEM, partner: str, modes: int) -> None:
    x, y = images(12).double() / 255, labels(12)
    exact = copy.deepcopy(model).double()
    aug = GLEMAugment(exact, Mixup(partner=partner), p=1.0, modes=modes, seed=0)
    params = aug.draw(x, y)
    out, _ = aug.replay(x, y, params)
    z, keep, partners = exact.encode(x)[0], params.drawn["keep"], params.drawn["partner"]
    for i in range(12):
        v = exact.modes.directions[y[i]][:modes]
        moved = z[i] + (1 - keep[i]) * (v.T @ (v @ (z[partners[i]] - z[i])))
        assert torch.allclose(out[i], exact.decode(moved[None])[0], atol=1e-6)
        if modes == 64:  # all directions: plain interpolation of the latents
            assert torch.allclose(moved, keep[i] * z[i] + (1 - keep[i]) * z[partners[i]], atol=1e-6)


def test_noise_has_strength_standard_deviations_along_each_mode(model: GLEM) -> None:
    n, strength = 6000, 0.2
    x, y = (images(1) / 255).expand(n, -1, -1, -1), torch.full((n,), 1)
    aug = GLEMAugment(model, Noise(strength), p=1.0, modes=6, seed=0)
    params = aug.draw(x, y)
    moved = model.encode(aug.replay(x, y, params)[0])[0] - model.encode(x)[0]
    v, s = model.modes.directions[1], model.modes.scales[1]
    c, eps = moved @ v.T, params.drawn["eps"]
    assert torch.allclose(c[:, :6], strength * s[:6] * eps, atol=1e-5) and c[:, 6:].abs().max() < 1e-5
    assert torch.allclose(eps.std(0), torch.ones(6), rtol=0.06) and eps.mean(0).abs().max() < 0.07


@pytest.mark.parametrize("alpha", [1e-6, 1.0, 50.0])
def test_keep_follows_the_folded_beta_distribution(model: GLEM, alpha: float) -> None:
    aug = GLEMAugment(model, Mixup(alpha), p=1.0, seed=0)
    keep = torch.cat([aug.draw((200, 1, 8, 8), labels(200)).drawn["keep"] for _ in range(100)])
    assert keep.dtype == torch.float32 and keep.min() >= 0.5 and keep.max() <= 1.0
    law = np.random.default_rng(1).beta(alpha, alpha, 20_000)
    law = np.sort(np.maximum(law, 1 - law))
    assert np.abs(np.sort(keep.numpy()) - law)[100:-100].max() < 0.02


@pytest.mark.parametrize("partner", ["same", "any"])
def test_changed_rows_are_partners_first_and_all_rows_equally_likely(model: GLEM, partner: str) -> None:
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    aug = GLEMAugment(model, Mixup(partner=partner), p=0.4, seed=0)
    allowed = y[:, None] == y if partner == "same" else torch.ones(10, 10, dtype=torch.bool)
    allowed = allowed & ~torch.eye(10, dtype=torch.bool)
    seen = torch.zeros(10, 10)
    for _ in range(400):
        params = aug.draw((10, 1, 8, 8), y)
        picked = torch.zeros(10, dtype=torch.bool)
        picked[params.rows] = True
        partners, partner_cls = params.drawn["partner"], params.drawn["partner_cls"]
        found = partners >= 0
        assert torch.equal(found, allowed[params.rows].any(1))
        assert torch.equal(partner_cls[found], y[partners[found]])
        assert partner == "any" or torch.equal(partner_cls, y[params.rows])
        rows, chosen = params.rows[found], partners[found]
        assert torch.equal(picked[chosen], (allowed[rows] & picked).any(1))
        seen[rows, chosen] += 1
    assert torch.equal(seen > 0, allowed)
    share = seen / seen.sum(1, keepdim=True).clamp(min=1)
    expected = allowed / allowed.sum(1, keepdim=True).clamp(min=1)
    # 160 partners per row; five standard deviations of their share.
    assert (share - expected).abs().max() < 5 * (0.25 / 160) ** 0.5


def test_a_row_without_a_partner_moves_towards_a_draw_of_its_class(
    model: GLEM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glem_augment.codec.pixel_range.MARGIN", 9.0)
    x, y = images(3) / 255, torch.tensor([2, 0, 1])
    aug = GLEMAugment(model, Mixup(alpha=1e6), p=1.0, modes=64, seed=0)  # keep = 1/2
    params = aug.draw(x, y)
    assert params.drawn["partner"].tolist() == [-1, -1, -1]
    z, out = model.encode(x)[0], aug.replay(x, y, params)[0]
    noise = torch.stack(
        [torch.randn(128, generator=torch.Generator().manual_seed(s)) for s in params.drawn["seeds"].tolist()]
    )
    wanted = (z + model.modes.sample_from_noise(y, noise)) / 2
    assert torch.allclose(model.encode(out)[0], wanted, atol=3e-3)
    # It is the same draw when the other rows of the batch are left alone.
    alone = aug.replay(x, y, params.where(params.rows == 1))[0]
    assert torch.equal(alone[1], out[1]) and torch.equal(alone[0], x[0])


def test_only_selected_rows_and_their_partners_are_encoded_once(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(model)
    sizes: list[tuple[str, int]] = []
    for part, name in ((model.codec, "encode"), (model.flow, "forward"), (model.flow, "inverse")):
        kept = getattr(part, name)
        counted = lambda v, *a, kept=kept, name=name: sizes.append((name, len(v))) or kept(v, *a)  # noqa: E731
        monkeypatch.setattr(part, name, counted)
    x, y = images(64), labels(64)
    policies: list[Policy] = [Mixup(), Mixup(partner="any"), Noise(0.1)]
    for policy in policies:
        aug = GLEMAugment(model, policy, p=0.2, seed=0)
        for _ in range(10):
            params = aug.draw(x, y)
            sizes.clear()
            aug.replay(x, y, params)
            partner = params.drawn.get("partner", params.rows)
            needed = torch.cat([params.rows, partner[partner >= 0]]).unique()
            n = len(params.rows)
            assert sizes == [("encode", len(needed)), ("forward", len(needed)), ("inverse", n), ("inverse", n)]
            # Partners are nearly always among the rows that are changed anyway.
            assert len(needed) <= n + 4
