"""ClassModes against explicit covariances."""

from __future__ import annotations

import pytest
import torch

from glem_augment.errors import DataError
from glem_augment.latent.modes import REST_FLOOR, ClassModes, fit_class_modes, nearest_classes


def make_latents(counts: list[int], dim: int, seed: int = 0) -> list[torch.Tensor]:
    """Correlated latents with a decaying spectrum, another one for every class."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for n in counts:
        mix = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
        scale = 0.8 ** torch.arange(dim, dtype=torch.float64)
        out.append(
            torch.randn(n, dim, generator=g, dtype=torch.float64) * scale @ mix + torch.randn(1, dim, generator=g)
        )
    return out


def covariance(modes: ClassModes, y: int) -> torch.Tensor:
    v, s = modes.directions[y].double(), modes.scales[y].double()
    return v.T @ torch.diag(s**2) @ v


@pytest.mark.parametrize("count", [9, 60])  # fewer and more images than dimensions: both Grams
def test_modes_equal_the_eigenvectors_of_the_covariance(count: int) -> None:
    latents = make_latents([count, count], dim=24)
    modes = fit_class_modes(lambda y: latents[y], num_classes=2, rank=6, dim=24)
    for y, z in enumerate(latents):
        cov = torch.cov(z.T)
        values, vectors = torch.linalg.eigh(cov)
        top, v = values.flip(0)[:6], vectors.flip(1).T[:6]
        assert torch.allclose(modes.mean[y].double(), z.mean(0), atol=1e-6)
        assert torch.allclose(modes.scales[y].double() ** 2, top, rtol=1e-5, atol=1e-7)
        assert torch.allclose((modes.directions[y].double() * v).sum(1).abs(), torch.ones(6).double(), atol=1e-5)
        # mean + V diag(s^2) V^T + diag(rest) has the exact variance of every dimension
        total = covariance(modes, y).diagonal() + modes.rest[y].double()
        assert torch.allclose(total, cov.diagonal(), rtol=1e-4, atol=2 * REST_FLOOR)


def test_all_modes_give_the_whole_covariance() -> None:
    latents = make_latents([7], dim=12)
    modes = fit_class_modes(lambda y: latents[y], num_classes=1, rank=12, dim=12)
    assert torch.allclose(covariance(modes, 0), torch.cov(latents[0].T), atol=1e-5)
    assert torch.all(modes.rest == REST_FLOOR)
    assert modes.scales[0, 6:].eq(0).all() and modes.directions[0, 6:].eq(0).all()  # n - 1 = 6 modes exist
    assert torch.allclose(modes.directions[0, :6] @ modes.directions[0, :6].T, torch.eye(6), atol=1e-6)


def test_weak_modes_stay_orthonormal() -> None:
    g = torch.Generator().manual_seed(0)
    scale = 10.0 ** -torch.arange(5, dtype=torch.float64)  # eigenvalues over eight decades
    z = torch.randn(40, 5, generator=g, dtype=torch.float64) * scale
    z = torch.nn.functional.pad(z, (0, 45)) @ torch.linalg.qr(torch.randn(50, 50, generator=g).double()).Q
    modes = fit_class_modes(lambda y: z, 1, rank=5, dim=50)
    assert torch.allclose(modes.directions[0] @ modes.directions[0].T, torch.eye(5), atol=1e-6)


def test_constant_dimensions_and_identical_images() -> None:
    z = torch.full((5, 8), 0.25)
    modes = fit_class_modes(lambda y: z, 1, rank=4, dim=8)
    assert modes.scales.eq(0).all() and modes.directions.eq(0).all() and modes.rest.eq(REST_FLOOR).all()
    assert torch.isfinite(modes.sample(torch.zeros(3, dtype=torch.int64))).all()


@pytest.mark.parametrize("dim", [20, 300])
def test_shared_modes_are_those_of_the_pooled_covariance(dim: int) -> None:
    counts = [30, 12, 50, 25]
    latents = make_latents(counts, dim)
    modes = fit_class_modes(lambda y: latents[y], 4, rank=5, dim=dim)
    pooled = sum((n - 1) * torch.cov(z.T) for n, z in zip(counts, latents, strict=True)) / (sum(counts) - 4)
    top = torch.linalg.eigvalsh(pooled).flip(0)[:5]
    assert torch.allclose(modes.shared_scales.double() ** 2, top, rtol=1e-4)
    v = modes.shared_directions.double()
    assert torch.allclose(v @ pooled @ v.T, torch.diag(top), atol=1e-4 * float(top[0]))


def test_merging_many_classes_keeps_the_shared_modes() -> None:
    latents = make_latents([40] * 30, dim=200)  # enough rows for the pooled factor to be cut several times
    modes = fit_class_modes(lambda y: latents[y], 30, rank=4, dim=200)
    pooled = sum(torch.cov(z.T) for z in latents) / 30
    assert torch.allclose(modes.shared_scales.double() ** 2, torch.linalg.eigvalsh(pooled).flip(0)[:4], rtol=1e-3)


def test_large_problems_use_subspace_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = make_latents([80], dim=70)
    exact = fit_class_modes(lambda y: latents[y], 1, rank=5, dim=70)
    monkeypatch.setattr("glem_augment.latent.modes.MAX_EIGH", 40)
    near = fit_class_modes(lambda y: latents[y], 1, rank=5, dim=70)
    assert torch.allclose(near.scales, exact.scales, rtol=1e-4)
    assert torch.allclose(near.directions, exact.directions, atol=1e-3)


def test_sampling_has_the_moments_of_the_class() -> None:
    latents = make_latents([6, 200], dim=8)
    modes = fit_class_modes(lambda y: latents[y], 2, rank=3, dim=8)
    g = torch.Generator().manual_seed(1)
    n = 40_000
    z = modes.sample(torch.ones(n, dtype=torch.int64), temperature=0.5, generator=g).double()
    expected = (covariance(modes, 1) + torch.diag(modes.rest[1].double())) * 0.25
    error = expected.diagonal().sqrt()
    assert torch.all((z.mean(0) - modes.mean[1]).abs() < 5 * error / n**0.5)
    assert torch.allclose(torch.cov(z.T), expected, atol=0.04 * float(expected.max()))
    mixed = torch.tensor([0, 1, 0])
    again = [modes.sample(mixed, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    assert torch.equal(modes.sample(mixed, temperature=0.0), modes.mean[mixed])


def test_chunked_gathering_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = make_latents([10, 12, 14], dim=16)
    modes = fit_class_modes(lambda y: latents[y], 3, rank=4, dim=16)
    y, c = torch.tensor([2, 0, 1, 1, 2]), torch.randn(5, 4)
    kld = torch.rand(3, 3)
    whole, (pooled, _) = modes.along(y, c), modes.near(kld, 1)
    monkeypatch.setattr("glem_augment.latent.modes.GATHER_FLOATS", 100)
    assert torch.allclose(modes.along(y, c), whole, atol=1e-6)
    assert torch.allclose(modes.near(kld, 1)[0], pooled, atol=1e-6)


def test_near_pools_a_class_with_its_closest() -> None:
    counts = [5, 40, 40, 40]
    latents = make_latents(counts, dim=16)
    modes = fit_class_modes(lambda y: latents[y], 4, rank=16, dim=16)
    line = torch.tensor([0.0, 1.0, 3.0, 10.0])
    kld = (line[:, None] - line).square()
    kld[0, 1] += 9.0  # one-sided: the symmetrised value still has class 1 closest to class 0, but not 0 to 1
    assert nearest_classes(kld, 2).tolist() == [[1, 2], [2, 0], [1, 0], [2, 1]]
    directions, scales = modes.near(kld, neighbours=1)
    pooled = ((5 - 1) * torch.cov(latents[0].T) + 39 * torch.cov(latents[1].T)) / 43
    got = directions[0].double().T @ torch.diag(scales[0].double() ** 2) @ directions[0].double()
    assert torch.allclose(got, pooled, atol=1e-5)
    # the rare class alone has 4 modes, with its neighbour all 16
    assert int((modes.scales[0] > 0).sum()) == 4 and int((scales[0] > 0).sum()) == 16
    alone, own_scales = modes.near(kld, neighbours=0)
    assert torch.allclose(own_scales, modes.scales, atol=1e-6)
    assert modes.near(kld, neighbours=99)[0].shape == directions.shape


def test_neighbours_can_be_restricted() -> None:
    kld = (torch.arange(4.0)[:, None] - torch.arange(4.0)).square()
    near = nearest_classes(kld, 3, allowed=torch.tensor([True, False, False, True]))
    assert near.shape == (4, 1) and near[0].tolist() == [3] and near[3].tolist() == [0]
    assert nearest_classes(kld[:1, :1]).shape == (1, 0)


def test_state_dict_round_trip() -> None:
    latents = make_latents([4, 9], dim=6)
    modes = fit_class_modes(lambda y: latents[y], 2, rank=3, dim=6)
    other = ClassModes.empty(2, 3, 6)
    other.load_state_dict(modes.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(modes.buffers(), other.buffers(), strict=True))
    assert (other.num_classes, other.rank, other.dim) == (2, 3, 6) and other.counts.tolist() == [4, 9]
    assert not list(other.parameters())


def test_errors_name_the_class() -> None:
    good = torch.randn(4, 5)
    with pytest.raises(DataError, match="class 1 has 1 images"):
        fit_class_modes(lambda y: good[: 4 - 3 * y], 2, rank=2, dim=5)
    with pytest.raises(DataError, match="class 0 .*not finite"):
        fit_class_modes(lambda y: good * float("nan"), 1, rank=2, dim=5)
    with pytest.raises(ValueError, match=r"\[n, 6\]"):
        fit_class_modes(lambda y: good, 1, rank=2, dim=6)
    with pytest.raises(ValueError, match="rank"):
        fit_class_modes(lambda y: good, 1, rank=0, dim=5)
    modes = fit_class_modes(lambda y: good, 1, rank=99, dim=5)
    assert modes.rank == 5  # never more than d
    with pytest.raises(ValueError, match="kld_matrix"):
        modes.near(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="noise"):
        modes.sample_from_noise(torch.tensor([0]), torch.zeros(1, 3))
