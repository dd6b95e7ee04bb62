"""GLEMAugment: what it keeps, what it draws, what becomes of labels, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from augment_cases import CLASSES, images, labels, make_model
from torch import Tensor
from torch.utils.data import DataLoader

from glem_augment import GLEM, GLEMAugment, Mixup, Noise, Policy

ALL: list[Policy] = [Mixup(), Mixup(partner="any"), Noise()]


@pytest.mark.parametrize("partner", ["same", "any"])
def test_p_zero_gives_back_the_same_images_with_labels_of_the_usual_form(model: GLEM, partner: Any) -> None:
    x, y = images(6), labels(6)
    aug = GLEMAugment(model, Mixup(partner=partner), p=0.0)
    out, target = aug(x, y)
    assert out is x and torch.equal(target, aug.target(y))
    # A loop must not meet hard labels in one epoch and soft ones in the next.
    aug.p = 1.0
    assert aug(x, y)[1].shape == target.shape
    assert target is y if partner == "same" else torch.equal(target, torch.eye(4)[y])


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [(ALL[0], torch.uint8), (ALL[0], torch.float32), (ALL[1], torch.uint8), (ALL[2], torch.float16)],
)
def test_unselected_rows_are_the_originals_and_calls_can_be_replayed(
    model: GLEM, policy: Policy, dtype: torch.dtype
) -> None:
    x, y = images(32), labels(32)
    x = x if dtype == torch.uint8 else (x / 255).to(dtype)
    before_x, before_y = x.clone(), y.clone()
    aug = GLEMAugment(model, policy, p=0.5, seed=1)
    params = aug.draw(x.shape, y)
    out, target = aug.replay(x, y, params)
    assert torch.equal(x, before_x) and torch.equal(y, before_y), "the input was changed"
    rest = torch.ones(32, dtype=torch.bool)
    rest[params.rows] = False
    assert len(params.rows) == 16 and torch.equal(out[rest], x[rest])
    moved = (out[params.rows] != x[params.rows]).flatten(1).any(1)
    assert moved.float().mean() > 0.8 and out.dtype == dtype and out.shape == x.shape
    assert aug.stats == {"selected": 16, "rejected": 0, "unmapped": 0}
    again = aug.replay(x, y, params)
    assert torch.equal(again[0], out) and torch.equal(again[1], target)
    assert torch.equal(GLEMAugment(model, policy, p=0.5, seed=1)(x, y)[0], out)
    assert not torch.equal(GLEMAugment(model, policy, p=0.5, seed=2)(x, y)[0], out)
    assert not torch.equal(aug(x, y)[0], aug(x, y)[0])


def test_memory_format_autocast_gradients_and_inference_mode(rgb: GLEM) -> None:
    x = (images(8, 3) / 255).contiguous(memory_format=torch.channels_last)
    out, _ = GLEMAugment(rgb, p=1.0, seed=0)(x, labels(8))
    assert out.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = GLEMAugment(rgb, p=1.0, seed=0)(x, labels(8))
    assert torch.equal(out, again)
    with torch.inference_mode():
        aug = GLEMAugment(rgb, p=1.0, seed=0)
        assert torch.equal(aug(x, labels(8))[0], out)
    assert aug(x, labels(8))[0].shape == x.shape and aug.stats["selected"] == 16
    aug.load_state_dict(aug.state_dict())


def test_the_flow_is_not_part_of_the_transform() -> None:
    model = make_model().train()
    aug = GLEMAugment(model)
    assert list(aug.state_dict()) == ["_extra_state"] and list(aug.modules()) == [aug] and not list(aug.parameters())
    model.flow.eval()
    aug.eval()(images(4), labels(4))
    assert model.training and not model.flow.training  # left as they were


def test_seeds_generators_copies_and_state(model: GLEM, tmp_path: Path) -> None:
    x, y = images(16), labels(16)
    aug, other = GLEMAugment(model, "mixup", seed=0), GLEMAugment(model, "mixup", seed=0)
    assert torch.equal(aug(x, y)[0], other(x, y)[0])
    for twin in (pickle.loads(pickle.dumps(aug)), copy.deepcopy(aug)):
        assert twin.stats == aug.stats and twin.stats["selected"] == 8
        assert torch.equal(twin(x, y)[0], copy.deepcopy(aug)(x, y)[0]) and aug.stats["selected"] == 8
    torch.save(aug.state_dict(), tmp_path / "state.pt")
    wanted = [aug(x, y)[0] for _ in range(2)]
    later = GLEMAugment(model, "mixup", seed=99)
    later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert later.seed == 0 and all(torch.equal(later(x, y)[0], w) for w in wanted)


def test_ranks_and_seeds_draw_differently_and_resume_from_rank_0(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(rank: int, seed: int = 5, calls: int = 0) -> Tensor:
        monkeypatch.setattr("glem_augment.augment.transform.rank", lambda: rank)
        aug = GLEMAugment(model, seed=0)
        aug.load_state_dict({"_extra_state": {"seed": seed, "calls": calls}})
        return torch.stack([aug.draw((4, 1, 8, 8), labels(4)).drawn["seeds"] for _ in range(4)])

    assert len(torch.stack([draws(0), draws(1), draws(7), draws(0, -5)]).unique()) == 4 * 4 * 2
    assert torch.equal(draws(1, calls=2)[:2], draws(1)[2:])
    monkeypatch.undo()
    aug = GLEMAugment(model, Noise(), p=1.0, modes=1, seed=3)  # the draws of earlier versions
    assert aug.draw((1, 1, 8, 8), labels(1)).drawn["eps"].item() == pytest.approx(-0.369753, abs=1e-5)
    torch.manual_seed(0)
    first, second = GLEMAugment(model).seed, GLEMAugment(model).seed
    torch.manual_seed(0)
    assert first == GLEMAugment(model).seed != second


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_draw_by_torchs_seeds(model: GLEM, context: str) -> None:
    twice = [(image, int(y)) for image, y in zip(images(4).repeat(2, 1, 1, 1), labels(4).repeat(2), strict=True)]
    aug = GLEMAugment(model, Noise(), p=1.0, modes=4, class_map=[0, 1, None, 2], seed=3)
    loader = DataLoader(twice, 4, num_workers=2, collate_fn=aug.collate_fn(), multiprocessing_context=context)

    def epoch(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([x for x, _ in loader])

    first, moved = epoch(7), labels(8) != 2
    assert torch.equal(first.view(2, 4, 1, 8, 8)[:, 2], images(4)[2].expand(2, 1, 8, 8))  # the model lacks its class
    if context == "fork":  # a spawned worker starts in seconds
        assert not (first[:4] == first[4:])[moved[:4]].flatten(1).all(1).any()
        assert torch.equal(epoch(7), first) and not torch.equal(epoch(8), first)


@pytest.mark.parametrize(("batch", "p"), [(1, 0.3), (7, 0.5), (5, 1.0)])
def test_every_row_is_as_likely_and_their_number_nearly_fixed(model: GLEM, batch: int, p: float) -> None:
    y = labels(batch)
    aug = GLEMAugment(model, "noise", p=p, modes=1, seed=0)
    times, counts = torch.zeros(batch), []
    for _ in range(600):
        rows = aug.draw((batch, 1, 8, 8), y).rows
        assert torch.equal(rows, rows.unique())
        times[rows] += 1
        counts.append(len(rows))
    assert set(counts) == {math.floor(p * batch), math.ceil(p * batch)}
    # Five standard deviations of a share of 600 draws.
    assert (times / 600 - p).abs().max() <= 5 * (p * (1 - p) / 600) ** 0.5


def test_hard_labels_stay_hard_where_the_class_stays_and_soft_ones_soft(model: GLEM) -> None:
    x, y = images(8), labels(8)
    smooth = (torch.eye(4)[y] * 0.9 + 0.025).double()
    for policy in (Noise(), Mixup()):
        assert GLEMAugment(model, policy, p=1.0)(x, y)[1] is y
    for policy in (Noise(), Mixup()):
        # Partners of the class change no label, and neither do draws when the batch holds each class once.
        out = GLEMAugment(model, policy, p=1.0)(x[:4], smooth[:4])[1]
        assert out.dtype == torch.float64 and torch.allclose(out, smooth[:4], atol=1e-7)
    target = GLEMAugment(model, Mixup(partner="any"), p=1.0)(x, y)[1]
    assert target.shape == (8, 4) and target.dtype == torch.float32


@pytest.mark.parametrize(("modes", "soft"), [(7, False), (64, True)])
def test_mix_weighs_by_how_much_of_the_move_the_projection_keeps(model: GLEM, modes: int, soft: bool) -> None:
    x, y = images(10) / 255, labels(10)
    before = torch.eye(4)[y] * (0.9 if soft else 1.0) + (0.025 if soft else 0.0)
    aug = GLEMAugment(model, Mixup(partner="any"), p=0.6, modes=modes, seed=0)
    params = aug.draw(x, y)
    target = aug.replay(x, before if soft else y, params)[1]
    expected, z = before.clone(), model.encode(x)[0]
    for r, j, keep in zip(params.rows.tolist(), *(params.drawn[n].tolist() for n in ("partner", "keep")), strict=True):
        v = model.modes.directions[y[r], :modes]
        delta = z[j] - z[r]
        along = float((v @ delta).square().sum() / delta.square().sum())
        w = 1 - (1 - keep) * along
        expected[r] = w * before[r] + (1 - w) * before[j]
    assert torch.allclose(target, expected, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_drawn_partner_brings_the_label_of_its_class_alone(model: GLEM, smoothing: float) -> None:
    """Mixed rows, as timm's Mixup makes them: a draw of class c has nothing of the row's other class."""
    hot = torch.eye(4)
    own = 0.6 * hot[[0, 1, 2, 3]] + 0.4 * hot[[1, 2, 3, 0]]
    mixed = own * (1 - smoothing) + smoothing / 4
    aug = GLEMAugment(model, "mixup", p=1.0, modes=64, seed=3)
    params = aug.draw(images(4), mixed)
    target = aug.replay(images(4) / 255, mixed, params)[1]
    drawn = hot[params.drawn["partner_cls"]] * (1 - smoothing) + smoothing / 4
    w = ((target - mixed) * (drawn - mixed)).sum(1) / (drawn - mixed).square().sum(1)  # how much of the draw
    assert ((w > 0.01) & (w <= 1 - params.drawn["keep"] + 1e-5)).all()
    assert torch.allclose(target, mixed + w[:, None] * (drawn - mixed), atol=1e-5)


def test_partial_class_map(model: GLEM) -> None:
    given = [2, -1, 0, None, 3]
    x, y = images(20) / 255, labels(20, 5)
    aug = GLEMAugment(model, Mixup(), p=1.0, class_map=given, seed=0)
    assert aug.num_classes == 5
    params = aug.draw(x, y)
    assert params.cls[:5].tolist() == [2, -1, 0, -1, 3]
    out, target = aug.replay(x, torch.eye(5)[y], params)
    absent = (y == 1) | (y == 3)
    assert torch.equal(out[absent], x[absent]) and torch.equal(target, torch.eye(5)[y])
    assert (out[~absent] != x[~absent]).flatten(1).any(1).all()
    assert aug.stats == {"selected": 20, "rejected": 0, "unmapped": 8}
    # A batch of one has no other row: its partner is then drawn, from any of the classes that the data has.
    aug = GLEMAugment(model, Mixup(partner="any"), p=1.0, class_map=given, seed=0)
    assert {int(aug.draw(x[:1], y[:1]).drawn["partner_cls"]) for _ in range(40)} == {0, 2, 3}


def test_data_classes_of_the_same_class_of_the_model() -> None:
    own = make_model()
    x, y = images(16) / 255, labels(16, 2)
    aug = GLEMAugment(own, Mixup(), p=1.0, class_map=[0, 0, 2], seed=0)
    for n in (16, 2):  # partners, from the batch or drawn, are of the row's own data class
        params = aug.draw(x[:n], y[:n])
        assert (params.drawn["partner"] >= 0).all() == (n == 16)
        assert torch.allclose(aug.replay(x[:n], torch.eye(3)[y[:n]], params)[1], torch.eye(3)[y[:n]])


@pytest.mark.parametrize(
    ("moved", "bad"), [(True, math.nan), (True, 2.5), (True, -1.5), (False, math.inf), (False, 0.1)]
)
def test_bad_moves_are_rejected_with_their_labels(
    model: GLEM, moved: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 0 of six is out of range after its move, or does not come back without one."""
    decode, inverse = GLEM.decode, GLEM.inverse

    def broken(self: GLEM, z: Tensor, clamp: bool = True) -> Tensor:
        out = decode(self, z, clamp)
        out[0, 0, 3, 3] = bad
        return out

    def lost(self: GLEM, z: Tensor) -> Tensor:
        h = inverse(self, z)
        h[0, 0, 3, 3] += bad
        return h

    x, y = images(6) / 255, labels(6)
    aug = GLEMAugment(model, Mixup(partner="any"), p=1.0, seed=0)
    params = aug.draw(x, y)
    fine, soft = aug.replay(x, y, params)
    monkeypatch.setattr(*((GLEM, "decode", broken) if moved else (GLEM, "inverse", lost)))
    out, target = aug.replay(x, y, params)
    assert torch.equal(out[0], x[0]) and torch.equal(out[1:], fine[1:])
    assert torch.equal(target[0], torch.eye(4)[y[0]]) and torch.equal(target[1:], soft[1:])
    assert aug.stats["rejected"] == 1


def test_strength_zero_lets_no_wrong_pixel_out(bundled_test: Any) -> None:
    """Images unlike those that a flow was trained on are not always given back by its inverse."""
    flow = GLEM.from_pretrained("bundled:fashion-mnist")
    noise = torch.randint(0, 256, (24, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = torch.cat([noise, 255 - bundled_test.tensor()[::100]])
    aug = GLEMAugment(flow, Noise(strength=0.0), p=1.0, seed=0)
    assert torch.equal(aug(x, labels(len(x), 10))[0], x)


@pytest.mark.parametrize(
    ("strength", "class_map", "reason"),
    [
        (1000.0, range(4), "128"),
        (0.5, [0, None, None, None], "96"),
        (0.1, range(4), None),
    ],
)
def test_one_warning_where_most_are_lost(
    model: GLEM, strength: float, class_map: Any, reason: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    aug = GLEMAugment(model, Noise(strength), p=1.0, class_map=class_map)
    aug(images(64), labels(64))
    assert not recwarn.list  # 64 rows are too few to tell
    for _ in range(2):
        aug(images(64), labels(64))
    assert [reason in str(w.message) for w in recwarn] == ([] if reason is None else [True])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"p": 1.5}, "p must"),
        ({"policy": 0.5}, "policy"),
        ({"modes": 65}, "65"),
        ({"mean": 0.5}, "std"),
        ({"class_map": [0, 4]}, "classes"),
    ],
)
def test_arguments_are_checked(model: GLEM, settings: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        GLEMAugment(model, **settings)
    with pytest.raises(ValueError, match="fit_modes"):
        GLEMAugment(GLEM.create("identity", (1, 8, 8), classes=CLASSES))
    with pytest.raises(TypeError):
        GLEMAugment(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "y", "named"),
    [
        (images(4)[0], labels(4), "as_transform"),
        (images(4, 2), labels(4), "2 channels"),
        (images(4, 3).permute(0, 2, 3, 1), labels(4), "permute"),
        (images(4).float(), labels(4), "255"),
        (images(4) / 255 * float("nan"), labels(4), "finite"),
        (images(4), labels(3), "\\[4\\]"),
        (images(4), None, "call aug"),
        (images(4), torch.eye(4, dtype=torch.int64), "argmax"),
        (images(4), torch.zeros(4, 5), "classes="),
        (images(4), torch.tensor([0, 1, 4, 0]), "label 4"),
    ],
)
def test_batches_are_checked(model: GLEM, x: Tensor, y: Any, named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        GLEMAugment(model, p=0.0)(x, y)


@pytest.mark.parametrize("policy", ALL)
def test_empty_and_single_batches_and_rows_of_no_class(model: GLEM, policy: Policy) -> None:
    aug = GLEMAugment(model, policy, p=1.0, seed=0)
    for y in (labels(0), torch.zeros(0, 4)):
        out, target = aug(images(0), y)
        assert out.shape == (0, 1, 8, 8) and len(target) == 0
    soft = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    out, _ = aug(images(2), soft)
    assert torch.equal(out[1], images(2)[1]) and not torch.equal(out[0], images(2)[0])
    assert aug(images(1), labels(1))[0].shape == (1, 1, 8, 8)


def test_a_users_compiled_step_gives_what_the_plain_one_gives(model: GLEM) -> None:
    x, y = images(6) / 255, labels(6)
    plain, inside = (GLEMAugment(model, "noise", seed=0) for _ in range(2))
    compiled = torch.compile(lambda x, y: (inside(x * 1.0, y)[0] + 0.0, y), backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x, y)[0], plain(x, y)[0])
