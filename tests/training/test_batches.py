"""Who sees which images, in which order, and under which augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glem_augment.codec.levels import draw_noise, to_levels
from glem_augment.distributed import Share
from glem_augment.training.augmentation import augment_batch
from glem_augment.training.batches import epoch_order, stratified_split


def test_stratified_split_keeps_every_class_in_proportion() -> None:
    counts = [400, 200, 100, 20]
    targets = np.random.default_rng(1).permutation(np.repeat(np.arange(4), counts))
    split = stratified_split(targets, 4, 0.05, seed=3)
    everything = np.concatenate([split.nf, split.g, split.val])
    assert np.array_equal(np.sort(everything), np.arange(720))  # disjoint, and nothing lost
    for part in (split.nf, split.g, split.val):
        assert part.dtype == np.int64 and np.array_equal(part, np.sort(part))
    for k, n in enumerate(counts):
        assert np.sum(targets[split.val] == k) == round(0.05 * n)
        assert np.sum(targets[split.g] == k) == pytest.approx(0.1 * 0.95 * n, abs=0.51)
    again, other = stratified_split(targets, 4, 0.05, seed=3), stratified_split(targets, 4, 0.05, seed=4)
    assert all(np.array_equal(getattr(split, p), getattr(again, p)) for p in ("nf", "g", "val"))
    assert not np.array_equal(split.g, other.g)
    assert len(stratified_split(np.repeat(np.arange(5), 4000), 5, 0.2, 0).val) == 2000  # the most


@pytest.mark.parametrize("val_fraction", [0.0, 0.05, 0.95])
def test_small_classes_keep_images_in_nf_and_g(val_fraction: float) -> None:
    targets = np.repeat(np.arange(6), [2, 3, 4, 5, 10, 40])
    split = stratified_split(targets, 6, val_fraction, 0)
    for part in (split.nf, split.g):
        assert set(targets[part]) == set(range(6))
    assert set(targets[split.val]) == (set(range(1, 6)) if val_fraction else set())


def test_epoch_order_is_a_function_of_seed_and_epoch() -> None:
    indices = np.arange(100, 205)
    order = epoch_order(indices, 10, seed=1, epoch=2)
    assert order.shape == (10, 10) and len(np.unique(order)) == 100 and set(order.flat) <= set(indices)
    assert np.array_equal(order, epoch_order(indices, 10, 1, 2))
    assert not np.array_equal(order, epoch_order(indices, 10, 1, 3))
    assert not np.array_equal(order, epoch_order(indices, 10, 2, 2))
    assert epoch_order(indices, 1000, 1, 2).shape == (1, 105)


# ---- augmentations ---------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_is_exact_and_hits_half_of_the_images() -> None:
    x = torch.randint(0, 256, (400, 3, 5, 8), dtype=torch.uint8)
    out = augment_batch(x, ["flip"], generator())
    flipped = (out == x.flip(3)).flatten(1).all(1)
    assert (flipped | (out == x).flatten(1).all(1)).all()
    assert 150 < int(flipped.sum()) < 250


def test_crop_is_a_shift_that_repeats_the_edge() -> None:
    height, width = 16, 24
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    x = torch.stack([rows, columns]).to(torch.uint8)[None].repeat(300, 1, 1, 1)
    out = augment_batch(x, ["crop"], generator()).long()
    shifts = set()
    for image in out:
        dy, dx = int(image[0, 8, 0]) - 8, int(image[1, 0, 12]) - 12
        assert torch.equal(image[0], (rows + dy).clamp(0, height - 1))
        assert torch.equal(image[1], (columns + dx).clamp(0, width - 1))
        shifts.add((dy, dx))
    assert {dy for dy, _ in shifts} == set(range(-2, 3)) and {dx for _, dx in shifts} == set(range(-3, 4))


def test_rotation_keeps_the_centre_and_turns_by_up_to_twelve_degrees() -> None:
    """A bright dot on the horizontal axis moves along a circle of pixels, whatever the aspect of the image."""
    for height, width in ((41, 41), (41, 81)):
        x = torch.zeros(60, 1, height, width, dtype=torch.uint8)
        x[:, :, height // 2 - 1 : height // 2 + 2, width // 2 + 13 : width // 2 + 16] = 255
        out = augment_batch(x, ["rotate"], generator()).double()[:, 0]
        mass = out.sum((1, 2))
        dy = (out.sum(2) * torch.arange(height)).sum(1) / mass - height // 2
        dx = (out.sum(1) * torch.arange(width)).sum(1) / mass - width // 2
        torch.testing.assert_close(torch.hypot(dy, dx), torch.full_like(dy, 14.0), rtol=0.02, atol=0)
        angle = torch.rad2deg(torch.atan2(dy, dx))
        assert angle.abs().max() < 12.5 and angle.max() > 9 and angle.min() < -9


def test_jitter_changes_little() -> None:
    x = torch.randint(60, 180, (50, 3, 6, 6), dtype=torch.uint8)
    out = augment_batch(x, ["jitter"], generator())
    change = (out.float() - x.float()).abs()
    assert 1 < change.mean() < 20 and change.max() < 60
    flat = torch.full((50, 1, 6, 6), 100, dtype=torch.uint8)
    values = augment_batch(flat, ["jitter"], generator()).flatten(1)
    assert (values == values[:, :1]).all() and values.min() >= 89 and values.max() <= 111


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 8, 12), (1, 5, 6, 4)])
def test_augmentation_is_deterministic_uint8_and_pure(shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    before, shares = x.clone(), [Share(i, i + 1, len(x)) for i in range(len(x))]
    for names in ([], ["flip"], ["crop"], ["rotate"], ["jitter"], ["flip", "crop", "rotate", "jitter"]):
        out = augment_batch(x, names, generator(1))
        assert torch.equal(x, before) and (names or torch.equal(out, x))
        assert out.dtype == torch.uint8 and out.shape == x.shape and out.is_contiguous()
        assert torch.equal(out, augment_batch(x, names, generator(1)))
        parts = [augment_batch(x[part.rows], names, generator(1), part) for part in shares]
        assert torch.equal(torch.cat(parts), out)
    noise = [draw_noise(x[part.rows], generator(1), part) for part in shares]
    wanted = to_levels(x, 256, torch.float32, generator(1))
    assert torch.equal(to_levels(x, 256, torch.float32, torch.cat(noise)), wanted)
