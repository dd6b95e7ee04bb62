"""The transfer of a change to images of other sizes, channels and value ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from augment_cases import CLASSES, images, labels
from torch import Tensor

from glem_augment import GLEM, GLEMAugment, Mixup, Noise

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize(
    ("flow", "channels", "size"), [(1, 1, (20, 36)), (3, 3, (5, 5)), (1, 3, (8, 8)), (3, 1, (24, 24))]
)
def test_other_sizes_and_channels(model: GLEM, rgb: GLEM, flow: int, channels: int, size: tuple[int, int]) -> None:
    x = F.interpolate(images(8, channels, 40) / 255, size=size)
    aug = GLEMAugment(model if flow == 1 else rgb, "mixup", p=1.0, seed=0)
    params = aug.draw(x, labels(8))
    out, _ = aug.replay(x, labels(8), params)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert (out - x).abs().mean() > 0.002
    still = params.having(keep=torch.ones(8))  # a move of nothing
    same, _ = aug.replay(x, labels(8), still)
    assert torch.allclose(same, x, atol=1e-5)
    assert aug.stats["rejected"] == 0


def test_large_images_receive_the_upsampled_change(model: GLEM) -> None:
    x, y = images(6, 1, 32) / 255, labels(6, 2)
    down = F.interpolate(x, size=(8, 8), mode="bilinear", antialias=True)
    aug = GLEMAugment(model, p=1.0, seed=0)
    params = aug.draw(x, y)
    changed = aug.replay(down, y, params)[0]
    up: dict[str, Any] = {"mode": "bilinear", "size": (32, 32)}
    assert torch.allclose(aug.replay(x, y, params)[0], (x + F.interpolate(changed - down, **up)).clamp(0, 1), atol=1e-5)


def test_channels_are_weighed_as_pil_does_and_averaged_on_the_way_back(model: GLEM, rgb: GLEM) -> None:
    x, y = images(6, 3, 8) / 255, labels(6)
    grey = GLEMAugment(model, Mixup(partner="any"), p=1.0, seed=0)
    luma = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    params = grey.draw(x, y)
    change = grey.replay(luma, y, params)[0] - luma
    assert torch.allclose(grey.replay(x, y, params)[0], (x + change).clamp(0, 1), atol=1e-5)
    coloured = GLEMAugment(rgb, Noise(0.05), p=1.0, seed=0)
    x = images(6, 1, 8) / 255
    params = coloured.draw(x, y)
    three = x.expand(-1, 3, -1, -1)
    change = (coloured.replay(three, y, params)[0] - three).mean(1, keepdim=True)
    assert torch.allclose(coloured.replay(x, y, params)[0], x + change, atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8), (torch.float64, 20), (torch.bfloat16, 8)])
def test_normalised_input(rgb: GLEM, dtype: torch.dtype, size: int) -> None:
    x, y = images(8, 3, size) / 255, labels(8)
    plain, _ = GLEMAugment(rgb, p=1.0, seed=0)(x, y)
    given = normalised(x).to(dtype)
    before = given.clone()
    out, _ = GLEMAugment(rgb, p=1.0, seed=0, mean=MEAN, std=STD)(given, y)
    assert out.dtype == dtype and torch.equal(given, before) and out.data_ptr() != given.data_ptr()
    atol = {torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    assert torch.allclose(out.double(), normalised(plain).double(), atol=atol / 0.26)
    one, _ = GLEMAugment(rgb, p=1.0, seed=0, mean=0.5, std=0.5)(x * 2 - 1, y)
    assert torch.allclose(one / 2 + 0.5, plain, atol=1e-5)
    # Grey images have the average of the three numbers, as in timm.
    mean, std, grey = sum(MEAN) / 3, sum(STD) / 3, images(8, 1, size) / 255
    plain, _ = GLEMAugment(rgb, p=1.0, seed=0)(grey, y)
    out, _ = GLEMAugment(rgb, p=1.0, seed=0, mean=MEAN, std=STD)((grey - mean) / std, y)
    assert torch.allclose(out * std + mean, plain, atol=1e-5)


def test_uint8_is_rounded_and_a_flow_of_5_bits_does_not_posterise(model: GLEM) -> None:
    x, y = images(16), labels(16)
    eight, _ = GLEMAugment(model, p=1.0, seed=0)(x, y)
    real, _ = GLEMAugment(model, p=1.0, seed=0)(x / 255, y)
    assert torch.equal(eight, (real * 255).round().to(torch.uint8))
    five = GLEM.create("identity", (1, 8, 8), classes=CLASSES, bits=5)
    five.fit_modes((images(80), labels(80)), rank=10)
    assert torch.equal(GLEMAugment(five, Noise(0.0), p=1.0, modes=10)(x, y)[0], x)


@pytest.mark.parametrize("size", [8, 16])
def test_erased_pixels_stay_outside_the_range(rgb: GLEM, size: int) -> None:
    """timm's RandomErasing fills with N(0, 1) after normalisation, far out of what a flow takes."""
    x = normalised(images(4, 3, size) / 255)
    x[:, :, :4, :4] = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, :2] = torch.tensor([-4.0, 4.0])
    settings: dict[str, Any] = {"p": 1.0, "mean": MEAN, "std": STD}
    out = GLEMAugment(rgb, Noise(1e-3), **settings)(x, labels(4))[0]
    assert torch.allclose(out, x, atol=1e-2) and not torch.equal(out, x)


def test_wrong_ranges_are_noticed_in_the_first_batch(rgb: GLEM, recwarn: pytest.WarningsRecorder) -> None:
    settings: dict[str, Any] = {"p": 1.0, "policy": "noise", "mean": MEAN, "std": STD}
    for x, given, message in (
        (images(4, 3) / 255, {"mean": (0.1, 0.2), "std": (1, 1)}, "mean has 2"),
        (images(4, 3), {}, "uint8"),
        (images(8, 3).float(), {}, "uint8"),
        # Mean and std of images in 0 to 255.
        (normalised(images(8, 3) / 255), {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "123.7"),
        (normalised(torch.rand(8, 3, 8, 8)), {"mean": 0.5, "std": 0.5}, "mean and std"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            GLEMAugment(rgb, **{**settings, **given})(x, labels(len(x)))
    with pytest.warns(UserWarning, match="mean and std"):
        GLEMAugment(rgb, **settings)(images(8, 3) / 255, labels(8))
    recwarn.clear()
    # Some timm models have mean 0 and std 1; RandomErasing's N(0, 1) reaches 4 and more.
    x = images(8, 3) / 255
    x[0, :, :4, :4] = torch.linspace(-4.8, 4.8, 48).view(3, 4, 4)
    GLEMAugment(rgb, **{**settings, "mean": 0.0, "std": 1.0})(x, labels(8))
    assert not [w for w in recwarn if "mean and std" in str(w.message)]
