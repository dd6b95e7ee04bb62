"""Policies: names, arguments, and a policy of a user's own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from augment_cases import images, labels
from torch import Tensor

from glem_augment import GLEM, Adversarial, GLEMAugment, Mixup, Noise, Policy
from glem_augment.augment.policies import Batch, Selected, as_policy


class Towards(Policy):
    """Half of the way to the next row of the batch, whose label counts for half."""

    def __init__(self, half: float = 0.5) -> None:
        self.half = half

    def softens(self, soft_in: bool) -> bool:
        return True

    def draw(self, selected: Selected, generator: torch.Generator) -> dict[str, Tensor]:
        return {"partner": (selected.rows + 1) % len(selected.data_cls)}

    def move(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.soft is not None
        mine, other = batch.soft[batch.params.rows], batch.soft[batch.drawn["partner"]]
        return torch.lerp(batch.z, batch.partner, self.half), torch.lerp(mine, other, self.half)


class ToTheMean(Policy):
    def draw(self, selected: Selected, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def move(self, batch: Batch) -> Tensor:
        basis = batch.basis()
        return batch.z + basis.project(basis.mean - batch.z)


class Uphill(Policy):
    """Along the gradient of the classifier's loss in the latents."""

    wants_classifier = True

    def draw(self, selected: Selected, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def move(self, batch: Batch) -> Tensor:
        return batch.z + 0.1 * batch.loss_gradient(lambda z: z, batch.z).sign()


def test_a_policy_of_the_users_own_moves_images_and_labels(model: GLEM) -> None:
    x, y = images(6) / 255, labels(6)
    aug = GLEMAugment(model, Towards(), p=0.5, seed=0)
    params = aug.draw(x, y)
    out, target = aug.replay(x, y, params)
    rows, after, hot = params.rows, (params.rows + 1) % 6, torch.eye(4)[y]
    assert torch.allclose(out[rows], (x[rows] + x[after]) / 2, atol=1e-5)
    assert torch.equal(target[rows], (hot[rows] + hot[after]) / 2) and target.shape == (6, 4)
    rest = torch.ones(6, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(out[rest], x[rest]) and torch.equal(target[rest], hot[rest])
    # It travels as the library's policies do.
    assert GLEMAugment(model, "towards").policy == Towards(0.5)  # type: ignore[arg-type]
    assert GLEMAugment(model, {"name": "towards", "half": 0.4}).policy == Towards(0.4) != Towards(0.5)
    for twin in (copy.deepcopy(aug), pickle.loads(pickle.dumps(aug))):
        assert torch.equal(twin.replay(x, y, params)[0], out)


def test_a_policy_of_the_users_own_may_want_a_classifier(model: GLEM) -> None:
    x, y, net = images(6) / 255, labels(6), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    aug = GLEMAugment(model, Uphill(), p=1.0, seed=0)
    with pytest.raises(ValueError, match="Uphill"):
        aug(x, y)
    out, _ = aug.attach(net)(x, y)
    before, after = (torch.nn.functional.cross_entropy(net(v), y, reduction="none") for v in (x, out))
    assert (after > before).all()


def test_results_of_the_wrong_size_are_named(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    aug = GLEMAugment(model, Towards(), p=1.0)
    monkeypatch.setattr(Towards, "move", lambda self, batch: batch.z[:2])
    with pytest.raises(ValueError, match=r"\[2, 64\]"):
        aug(images(6), labels(6))
    monkeypatch.setattr(Towards, "draw", lambda self, selected, generator: {"partner": torch.zeros(1)})
    with pytest.raises(ValueError, match="partner"):
        aug(images(6), labels(6))
    monkeypatch.setattr(Towards, "draw", lambda self, selected, generator: torch.zeros(len(selected.rows)))
    with pytest.raises(TypeError, match="Towards"):
        aug(images(6), labels(6))


def test_names_stand_for_the_defaults_and_may_be_set_anew(model: GLEM) -> None:
    for name, policy in {"mixup": Mixup(), "noise": Noise(0.5), "adversarial": Adversarial(0.25)}.items():
        assert as_policy(name) == as_policy({"name": name}) == policy and policy.name == name
        assert eval(repr(policy)) == policy and len({policy, as_policy(name)}) == 1
    assert as_policy({"name": "noise", "strength": 1}) == Noise(1.0) != Noise(0.5)
    assert Noise(0.25) != Adversarial(0.25)
    x, y = images(6), labels(6)
    aug, other = GLEMAugment(model, "noise", p=1.0, seed=0), GLEMAugment(model, Noise(1.0), p=1.0, seed=0)
    aug.policy = Noise(1.0)
    assert torch.equal(aug(x, y)[0], other(x, y)[0])
    aug.policy = "adversarial"
    assert aug.policy == Adversarial(0.25)


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: Noise(alpha=1.0), TypeError, "alpha"),  # type: ignore[call-arg]
        (lambda: as_policy({"name": "mixup", "strength": 0.5}), TypeError, "strength"),
        (lambda: as_policy("nois"), ValueError, "did you mean noise"),
        (lambda: Noise(-1.0), ValueError, "strength"),
        (lambda: Mixup(0.0), ValueError, "alpha"),
        (lambda: Mixup(partner="near"), ValueError, "partner"),  # type: ignore[arg-type]
        (lambda: type("Noise", (Policy,), {}), ValueError, "Noise"),
    ],
)
def test_arguments_are_checked(make: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        make()
