"""Public coordinates: exact, uncorrelated for a stationary field, and the same model on a grid of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.flows.stationary import POWER, StationaryFlow, cosines


def field(n: int, side: int, g: torch.Generator) -> Tensor:
    """Three mixed channels, correlated 0.8, 0.5 and 0 per pixel along rows as along columns: [n, 3, side, side]."""
    place = torch.arange(side, dtype=torch.float64)
    h = torch.randn(n, 3, side, side, generator=g, dtype=torch.float64)
    for channel, (rho, spread) in enumerate(((0.8, 3.0), (0.5, 1.0), (0.0, 0.5))):
        root = torch.linalg.cholesky(torch.tensor(rho) ** (place[:, None] - place).abs())
        h[:, channel] = spread * root @ h[:, channel] @ root.mT
    mix = torch.linalg.qr(torch.tensor([[1.0, 2, 0], [0, 1, 1], [2, 0, -1]]).double()).Q
    return (torch.einsum("ac,nchw->nahw", mix, h) + torch.tensor([1.0, -2.0, 0.5])[:, None, None]).float()


def test_it_is_exact_and_its_determinant_is_that_of_the_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    flow = StationaryFlow((3, 4, 6))
    flow.fit(field(400, 6, g))
    h = torch.randn(5, 3, 4, 6, generator=g)
    z, logdet = flow(h)
    back, undone = flow.inverse(z)
    assert torch.allclose(back, h, atol=1e-4) and torch.allclose(logdet, -undone)
    matrix = torch.stack([(flow(h[:1] + e.view(1, 3, 4, 6))[0] - z[:1])[0] for e in torch.eye(72)], 1)
    assert torch.allclose(torch.linalg.slogdet(matrix.double()).logabsdet.float(), logdet[0], atol=1e-2)


def test_a_stationary_field_is_nearly_uncorrelated_on_other_grids() -> None:
    g = torch.Generator().manual_seed(1)
    fitted = StationaryFlow((3, 8, 8))
    fitted.fit(field(3000, 8, g))
    for side in (4, 12):
        flow = StationaryFlow((3, side, side))
        flow.load_state_dict(fitted.state_dict())
        z = flow(field(4000, side, g))[0].double()
        # Variances are z's; under the model they are s^(1 - 2p).
        variance, prior = z.var(0), flow.prior()
        assert (prior.diff() <= 0).all() and 0.8 < float((variance / prior).median()) < 1.25
        assert float((variance / prior).log().abs().max()) < 0.7
        correlation = torch.corrcoef(z.T) - torch.eye(len(prior))
        assert float(correlation.square().sum(1).max()) < 0.6
        assert torch.allclose(prior, flow.spectrum().sort(descending=True).values ** (1 - 2 * POWER))


def test_the_cosines_are_orthonormal() -> None:
    for n in (1, 2, 7):
        assert torch.allclose(cosines(n) @ cosines(n).T, torch.eye(n).double(), atol=1e-12)
