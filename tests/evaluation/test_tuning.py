"""Which moves are put back, and the largest strength that keeps labels right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from augment_cases import images, labels, make_model
from torch import Tensor, nn

from glem_augment import GLEM, GLEMAugment, ImageData
from glem_augment.evaluation.tuning import choose_strength, moves_put_back


class ByBrightness(nn.Module):
    """Right as long as an image's brightness stays near that of its class."""

    def forward(self, x: Tensor) -> Tensor:
        return -(x.flatten(1).mean(1, keepdim=True) - torch.tensor([0.2, 0.4, 0.6, 0.8])).abs()


def test_shares_of_moves_that_are_put_back_are_those_of_the_transform() -> None:
    own = make_model()
    own.modes.scales.mul_(20.0)  # the stronger moves leave the range
    data = ImageData.from_tensors(images(400, seed=1), labels(400), own.classes)
    found = moves_put_back(own, data, images=300)
    assert found["images"] == 300 and found["mixup"] == 0.0 and found["strength"] == 0.125
    x, y = data.tensor(), torch.from_numpy(data.targets)
    for strength, share in found["noise"].items():
        aug = GLEMAugment(own, p=1.0, policy="noise", strength=strength, seed=0)
        aug(x, y)
        assert share == pytest.approx(aug.stats["replaced"] / 400, abs=0.1)
    assert found["noise"][0.5] > 0.9 > 0.05 >= found["noise"][0.125]


def test_the_largest_strength_that_keeps_the_labels() -> None:
    y = labels(200)
    g = torch.Generator().manual_seed(0)
    level = 0.2 + 0.2 * y[:, None, None, None] + 0.02 * torch.randn(200, 1, 1, 1, generator=g)
    x = (level + 0.02 * torch.randn(200, 1, 8, 8, generator=g)).clamp(0, 1)
    flow = GLEM.create("identity", (1, 8, 8), classes=["ant", "bee", "cat", "dog"])
    flow.fit_modes(((x * 255).to(torch.uint8), y), rank=8)
    aug = GLEMAugment(flow, policy="noise", seed=0)
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 200, 50)]
    net = ByBrightness().train()
    report = choose_strength(aug, net, batches, strengths=(0.5, 1.0, 2.0, 4.0, 8.0), max_drop=0.02)
    assert net.training and aug.strength == "auto" and aug.stats["selected"] == 0 and aug._random.calls == 0
    assert report.accuracy == 1.0 and list(report.moved) == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert report.moved[0.5] > 0.98 and report.moved[8.0] < 0.7
    assert report.strength == max(strength for strength, kept in report.moved.items() if kept >= 0.98) < 8.0
    eight = choose_strength(aug, net, [((v * 255).round().to(torch.uint8), t) for v, t in batches], strengths=(0.5,))
    assert eight.moved[0.5] == pytest.approx(report.moved[0.5], abs=0.02)


def test_choose_strength_judges_what_was_moved() -> None:
    model = make_model()
    x, y = images(400, seed=3).float() / 255, labels(400)

    class Nearest(nn.Module):
        """Right on the very images it knows, so that any move may fool it."""

        def forward(self, batch: Tensor) -> Tensor:
            return F.one_hot(y[torch.cdist(batch.flatten(1), x.flatten(1)).argmin(1)], 4).float()

    def strongest(aug: GLEMAugment, rows: Tensor) -> float:
        return choose_strength(aug, Nearest(), [(x[rows], y[rows])], (0.25, 1.0, 4.0, 16.0), max_drop=0.1).strength

    everything, mapped = torch.arange(400), (y == 2).nonzero()[:, 0]
    partial = GLEMAugment(model, policy="noise", seed=0, class_map=[None, None, 2, None], margin=100.0)
    # Images of other classes, which nothing moves, say nothing.
    assert 0 < strongest(partial, everything) == strongest(partial, mapped) < 16
    with pytest.raises(ValueError, match="no image of a class"):
        strongest(partial, (y != 2).nonzero()[:, 0])
    # Where no moved image is plausible, all come out as they were, and count as not recognised.
    never = GLEMAugment(model, policy="noise", seed=0, margin=0.0)
    with pytest.warns(UserWarning, match="were not plausible"):
        report = choose_strength(never, Nearest(), [(x, y)], strengths=(50.0,))
    assert report == (1.0, {50.0: 0.0}, 0.0)


def test_a_strength_beyond_one_that_is_too_strong_is_not_chosen() -> None:
    x, y = images(8) / 255, labels(8)
    answers = iter([True, True, True, False, True])  # as the images are, and then moved at each strength

    class Scripted(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return F.one_hot(y if next(answers) else (y + 1) % 4, 4).float()

    model = make_model()
    report = choose_strength(GLEMAugment(model, policy="noise"), Scripted(), [(x, y)], (0.5, 0.1, 0.2, 0.05))
    assert report == (1.0, {0.05: 1.0, 0.1: 1.0, 0.2: 0.0, 0.5: 1.0}, 0.1)
    with pytest.raises(ValueError, match="policy='noise'"):
        choose_strength(GLEMAugment(model), ByBrightness(), [(x, y)])
