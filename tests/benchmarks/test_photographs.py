"""The benchmark of photographs: who sees which images, and the controls of the directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_cases import photos
from torch import Tensor

from benchmarks.proof import photographs
from glem_augment import GLEMAugment, Noise, Policy
from glem_augment.images.dataset import ImageData


def test_drawn_images_and_the_rest_are_disjoint() -> None:
    data = ImageData.from_tensors(*photos(40), ["a", "b"])
    held, pool = photographs.few(data, 5, 100)
    drawn = [photographs.few(pool, 3, seed)[0] for seed in (0, 0, 1)]
    seen = [{image.numpy().tobytes() for image in part.tensor()} for part in (held, *drawn)]
    assert [np.bincount(part.targets).tolist() for part in (held, *drawn)] == [[5, 5], *[[3, 3]] * 3]
    assert not seen[0] & (seen[1] | seen[3]) and seen[1] == seen[2] != seen[3]


def test_smooth_noise_keeps_energy_spectrum_and_colours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 8
    monkeypatch.setattr(photographs, "SIZE", size)
    x, y = photos(24, size)
    data = ImageData.from_tensors(x, y, ["a", "b"])
    model = photographs.fit_pooled(data, rank=11)
    image = torch.full((1, 3, size, size), 0.5).expand(4000, -1, -1, -1)

    def moves(policy: Policy) -> Tensor:
        aug = GLEMAugment(model, policy, p=1.0, seed=0)
        return aug(image, torch.arange(4000) % 2)[0] - image

    noise, pooled, smooth = map(moves, (Noise(0.1), photographs.Pooled(0.1), photographs.Pooled(0.1, smooth=True)))
    power = [torch.fft.rfft2(m).abs().square().mean(0) for m in (noise, pooled, smooth)]
    assert all(float((other - power[1]).norm() / power[1].norm()) < 0.05 for other in power)
    colours = [torch.corrcoef(m.transpose(0, 1).flatten(1)) for m in (pooled, smooth)]
    assert torch.allclose(*colours, atol=0.03) and float(colours[0].fill_diagonal_(0).max()) > 0.1
    varied = [float((m.std(0).flatten(1).std(1) / m.std(0).flatten(1).mean(1)).min()) for m in (pooled, smooth)]
    assert varied[0] > 0.1 > 3 * varied[1]  # smooth noise is as strong everywhere
