"""DP-MERF: what one image changes, how much noise there is, and that the network learns what was released."""

from __future__ import annotations

import pytest
import torch

from benchmarks.proof import merf
from glem_augment.classes.privacy import Privacy


def released(x: torch.Tensor, y: torch.Tensor, privacy: Privacy) -> torch.Tensor:
    """A release of grey images of 8x8 pixels in two classes, always with the same frequencies and noise."""
    g = torch.Generator().manual_seed(0)
    return merf.release(x, y, merf.frequencies(64, 2000, g), 2, privacy, g)


@pytest.mark.parametrize("image", [torch.zeros(64), torch.full((64,), 255), torch.arange(64) * 4])
def test_one_image_changes_the_sum_by_one(image: torch.Tensor) -> None:
    x = torch.cat([torch.arange(1200 * 64).view(1200, 64) * 37 % 256, image[None]]).to(torch.uint8).view(-1, 1, 8, 8)
    y, privacy = torch.arange(len(x)) % 2, Privacy(10, 1e-5, images=10**5)
    change = released(x, y, privacy) - released(x[:-1], y[:-1], privacy)
    assert float(change.norm()) == pytest.approx(1, abs=1e-3)
    assert float(change[1 - y[-1]].norm()) == 0


def test_noise_has_the_deviation_of_the_promise() -> None:
    nothing, labels = torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    for epsilon, sd in ((0.2, 16.30), (1, 3.731), (10, 0.4999)):  # 1 / mu at delta 1e-5
        assert float(released(nothing, labels, Privacy(epsilon, 1e-5, images=10**5)).std()) == pytest.approx(
            sd, rel=0.05
        )


def test_the_network_learns_bright_and_dark_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merf, "FEATURES", 200)
    y = torch.arange(400) % 2
    x = (40 + 170 * y)[:, None, None, None].expand(-1, 1, 8, 8).to(torch.uint8)
    images, labels = merf.private_images(x, y, 2, (0.03, 4, 20), Privacy(50, 1e-5, images=10**5), seed=0, per_class=8)
    dark, bright = (float(images[labels == k].float().mean()) for k in (0, 1))
    assert images.shape == (16, 1, 8, 8) and images.dtype == torch.uint8
    assert dark < 100 and bright > 150
