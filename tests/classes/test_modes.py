"""Principal modes and moves along them, against explicit covariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glem_augment.classes import statistics
from glem_augment.classes.fit import REST_FLOOR, fit_modes
from glem_augment.classes.modes import ClassModes, combine_modes, project_on_modes
from glem_augment.classes.statistics import class_statistics, leading_rows, orthonormal
from glem_augment.errors import DataError


def make_latents(counts: list[int], dim: int, seed: int = 0) -> list[Tensor]:
    """Correlated latents with a decaying spectrum and a mean of their own, another one for every class."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in counts:
        mix = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
        scale = 0.8 ** torch.arange(dim, dtype=torch.float64)
        z = torch.randn(n, dim, generator=g, dtype=torch.float64) * scale @ mix
        out.append(z + torch.randn(1, dim, generator=g, dtype=torch.float64))
    return out


def fit(latents: list[Tensor], rank: int) -> ClassModes:
    return fit_modes(class_statistics(latents.__getitem__, range(len(latents)), latents[0].shape[1], rank), rank)


def covariance(directions: Tensor, scales: Tensor) -> Tensor:
    rows = directions.double() * scales.double()[:, None]
    return rows.T @ rows


def variance(modes: ClassModes) -> Tensor:
    """The variance of every dimension, along the modes and outside them."""
    return (modes.scales[..., None] * modes.directions).square().sum(1) + modes.rest


@pytest.mark.parametrize(("count", "rank"), [(9, 99), (60, 6)])  # both Gram matrices
def test_modes_are_the_eigenvectors_of_the_covariance(count: int, rank: int) -> None:
    latents = make_latents([count, count + 1], dim=24)
    modes = fit(latents, rank)
    # Never more modes than dimensions, or than the larger class has.
    assert (modes.rank, modes.dim, modes.num_classes) == (min(rank, 24, count), 24, 2)
    kept = [min(modes.rank, len(z) - 1) for z in latents]  # of n images there are n - 1 modes
    assert modes.fewest_and_most == tuple(kept) and modes.counts.tolist() == [count, count + 1]
    for y, (z, k) in enumerate(zip(latents, kept, strict=True)):
        cov, v = torch.cov(z.T), modes.directions[y]
        values, vectors = (part.flip(-1)[..., :k] for part in torch.linalg.eigh(cov))
        torch.testing.assert_close(modes.mean[y].double(), z.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(modes.scales[y, :k].double() ** 2, values, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(covariance(v, modes.scales[y]), vectors * values @ vectors.T, atol=1e-5, rtol=0)
        torch.testing.assert_close(v[:k] @ v[:k].T, torch.eye(k), atol=1e-6, rtol=0)
        assert not modes.scales[y, k:].any() and not v[k:].any()
        assert (v[:k].gather(1, v[:k].abs().argmax(1, keepdim=True)) > 0).all()  # the sign is fixed
        torch.testing.assert_close(variance(modes)[y].double(), cov.diagonal(), rtol=1e-4, atol=2 * REST_FLOOR)
    names = ["mean", "directions", "scales", "rest", "counts", "shared_directions", "shared_scales"]
    assert list(modes.state_dict()) == names  # of saved models


def test_weak_modes_stay_orthonormal() -> None:
    scale = 10.0 ** -torch.arange(5, dtype=torch.float64)  # eigenvalues over eight decades
    z = torch.randn(40, 5, dtype=torch.float64) * scale
    z = torch.nn.functional.pad(z, (0, 45)) @ torch.linalg.qr(torch.randn(50, 50).double()).Q
    v = fit([z], rank=5).directions[0]
    torch.testing.assert_close(v @ v.T, torch.eye(5), atol=1e-6, rtol=0)


def test_rank_deficient_latents() -> None:
    """Two images, duplicates, constant dimensions, or nothing but one image over and over."""
    one, other = torch.randn(2, 1, 30).double().unbind()
    pairs = [torch.cat([one, other]), torch.cat([one, other] * 20), torch.cat([one] * 5), torch.full((5, 30), 0.25)]
    modes = fit(pairs, rank=4)
    assert (modes.scales > 0).sum(1).tolist() == [1, 1, 0, 0]
    along = (other - one)[0] / (other - one).norm()
    for y in (0, 1):
        torch.testing.assert_close((modes.directions[y, 0] @ along.float()).abs().item(), 1.0)
    torch.testing.assert_close(modes.scales[0, 0].item(), float((other - one).norm()) / math.sqrt(2))
    assert (modes.rest[2:] == REST_FLOOR).all()
    assert torch.isfinite(modes.sample(torch.arange(4))).all()


def test_two_images_per_class_whose_eigenvalues_repeat(monkeypatch: pytest.MonkeyPatch, scale: float = 1e-20) -> None:
    """Unit vectors as latents, one class of one image twice (zero rows), and `eigh` that does not converge."""
    latents = list(torch.eye(40).double().mul_(scale).unflatten(0, (20, 2)))
    latents[3] = latents[3][:1].repeat(2, 1)
    want = fit(latents, rank=6)
    torch.testing.assert_close(want.scales[:, 0], torch.tensor([scale] * 3 + [0] + [scale] * 16))

    def fails(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = fit(latents, rank=6)
    torch.testing.assert_close(found.scales, want.scales)
    for modes in (want, found):
        assert modes.fewest_and_most == (0, 1)
        torch.testing.assert_close(modes.directions[0, 0].abs(), torch.eye(40)[:2].sum(0) * 2**-0.5)
        v = modes.shared_directions
        torch.testing.assert_close(v @ v.T, torch.eye(1), atol=1e-6, rtol=0)
        torch.testing.assert_close(modes.shared_scales, torch.full((1,), scale * 20**-0.5))


@pytest.mark.parametrize(("counts", "dim"), [([30, 12, 50, 25], 20), ([40] * 20, 140)])
def test_shared_modes_are_those_of_the_pooled_covariance(counts: list[int], dim: int) -> None:
    """In the last case there are enough rows for the pooled factor to be cut several times."""
    latents = make_latents(counts, dim)
    modes = fit(latents, rank=4)
    pooled = sum((n - 1) * torch.cov(z.T) for n, z in zip(counts, latents, strict=True)) / (sum(counts) - len(counts))
    top = torch.linalg.eigvalsh(pooled).flip(0)[:4]
    torch.testing.assert_close(modes.shared_scales.double() ** 2, top, rtol=1e-3, atol=0)
    v = modes.shared_directions.double()
    torch.testing.assert_close(v @ pooled @ v.T, torch.diag(top), atol=1e-3 * float(top[0]), rtol=0)


def test_a_class_of_one_image_borrows_what_all_have() -> None:
    latents = make_latents([1, 9, 2], dim=12)
    modes = fit(latents, rank=3)
    assert torch.equal(modes.directions[0], modes.shared_directions)
    assert torch.equal(modes.scales[0], modes.shared_scales)
    assert torch.equal(modes.mean[0], latents[0][0].float()) and modes.counts.tolist() == [1, 9, 2]
    pooled = (8 * torch.cov(latents[1].T) + torch.cov(latents[2].T)) / 9
    torch.testing.assert_close(variance(modes)[0].double(), pooled.diagonal(), rtol=1e-5, atol=2 * REST_FLOOR)
    assert torch.equal(fit(latents[1:], rank=3).directions, modes.directions[1:])


def test_large_problems_are_decomposed_by_subspace_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = make_latents([80], dim=70)
    exact = fit(latents, rank=5)
    monkeypatch.setattr(statistics, "MAX_EIGH", 40)
    state = torch.get_rng_state()
    near, again = fit(latents, rank=5), fit(latents, rank=5)
    assert torch.equal(near.directions, again.directions) and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(near.scales, exact.scales, rtol=1e-4, atol=0)
    torch.testing.assert_close(near.directions, exact.directions, atol=1e-3, rtol=0)


def test_errors_name_the_class() -> None:
    good = torch.randn(4, 5)
    for latents, message in (
        ([good, good[:0]], "class 1"),
        ([good[:1], good[1:2]], "no class has two images"),
        ([good * math.nan], "class 0"),
    ):
        with pytest.raises(DataError, match=message):
            fit(latents, 2)
    assert fit([good], rank=1).rank == 1


def test_leading_modes_keep_what_is_real_and_no_more() -> None:
    """The least singular value that counts is 1e-5 of the largest."""
    rows = torch.diag(torch.tensor([1.0, 1.1e-5, 0.9e-5, 0.0], dtype=torch.float64))
    directions, values = orthonormal(leading_rows(rows, 4))
    assert values.tolist() == pytest.approx([1.0, 1.1e-5])
    assert torch.equal(directions, torch.eye(4, dtype=torch.float64)[:2])
    directions, values = orthonormal(leading_rows(torch.zeros(3, 4), 2))
    assert directions.shape == (0, 4) and values.shape == (0,)


def test_moves_use_the_modes_of_each_rows_class() -> None:
    v = fit(make_latents([10, 12, 14], dim=16), rank=4).directions
    y, c, delta = torch.tensor([2, 0, 1, 1, 2]), torch.randn(5, 4), torch.randn(5, 16)
    moved = torch.einsum("nk,nkd->nd", c, v[y])
    kept = torch.einsum("nkd,nke,ne->nd", v[y], v[y], delta)
    for alone in (False, True):
        torch.testing.assert_close(combine_modes(c, y, v, alone), moved)
        torch.testing.assert_close(project_on_modes(delta, y, v, alone), kept)
        assert combine_modes(c[:0], y[:0], v, alone).shape == (0, 16)
    assert torch.equal(project_on_modes(delta[3:4], y[3:4], v)[0], project_on_modes(delta, y, v, alone=True)[3])


def test_samples_are_their_formula() -> None:
    modes = fit(make_latents([6, 200], dim=8), rank=3)
    mixed = torch.tensor([0, 1, 0])
    noise = torch.randn(3, 11, generator=torch.Generator().manual_seed(3))
    found = modes.sample(mixed, 0.5, torch.Generator().manual_seed(3))
    for z, e, y in zip(found, noise, mixed.tolist(), strict=True):
        along = (e[:3] * modes.scales[y]) @ modes.directions[y]
        torch.testing.assert_close(z, modes.mean[y] + 0.5 * (along + e[3:] * modes.rest[y].sqrt()))
    assert torch.equal(found, modes.sample_from_noise(mixed, noise, 0.5))
    assert torch.equal(modes.sample(mixed, temperature=0.0), modes.mean[mixed])
