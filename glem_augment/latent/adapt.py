"""Class Gaussians and modes for new images, in closed form from their latents; nothing is trained.

With n_y latents of class y, SS_y the summed squared deviations from the class's own mean, and v the pooled within-class
variance, per dimension,

    v  =  sum_y SS_y / sum_y (n_y - 1),        sigma_y^2  =  (SS_y + k v) / (n_y - 1 + k),

so a class of one image gets the pooled variance, and a class of many its own. k (`shrinkage`) counts as k more images
whose spread is v: sigma_y^2 is the posterior mode under a conjugate prior at v, up to a constant in k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glem_augment.checks import INITIAL_VARIANCE, LOWEST_SHARE
from glem_augment.errors import DataError
from glem_augment.latent.gaussians import INNER, ClassGaussians
from glem_augment.latent.modes import ClassModes, fit_class_modes

# config.json holds numbers of psi up to 1e6; a flow can't invert latents of that size anyway.
_LARGEST_VARIANCE = 1e5

Psi = tuple[float, float, float] | None


@torch.no_grad()
def adapt_classes(
    latents_of_class: Callable[[int], Tensor], num_classes: int, dim: int, rank: int, shrinkage: float, psi: Psi
) -> tuple[ClassGaussians, ClassModes]:
    """The Gaussians and the modes of new classes. A class of one image borrows what all classes have together.

    Args:
        latents_of_class: gives the latents [n, d] of class y = 0 .. K - 1; called once for each.
        num_classes, dim: K and d.
        rank: modes per class.
        shrinkage: k, in images, >= 0.
        psi: of the flow's own Gaussians; the new ones get a wider psi where this one can't hold their variances.

    Returns:
        Both on the CPU.

    Raises:
        DataError: a class has no image, no class has two, latents are not finite, or their variances exceed 1e5.
    """
    modes = fit_class_modes(latents_of_class, num_classes, rank, dim, borrow=True)
    variance = shrunk_variance(modes.variance().double(), modes.counts, shrinkage)
    gaussians = ClassGaussians(num_classes, dim, psi=psi_that_holds(variance, psi))
    gaussians.mu.copy_(modes.mean)
    gaussians.set_variance(variance, inner=(0.0, 1.0))
    return gaussians, modes


def shrunk_variance(variance: Tensor, counts: Tensor, shrinkage: float) -> Tensor:
    """sigma_y^2 [K, d] from the unbiased variances [K, d] of classes of `counts` [K] latents, see above."""
    freedom = (counts - 1)[:, None].double()
    pooled = (freedom * variance).sum(0) / freedom.sum()
    # Without shrinkage the quotient is 0 / 0 for a class of one image.
    return torch.where(
        freedom + shrinkage > 0, (freedom * variance + shrinkage * pooled) / (freedom + shrinkage), pooled
    )


def psi_that_holds(variance: Tensor, psi: Psi) -> Psi:
    """`psi` itself where its range holds all of `variance` [K, d], otherwise a wider (a, b, c).

    The flow was trained towards the range of its own psi, but images of another kind need not stay in it, and cutting
    their variances off would change densities silently.

    Raises:
        DataError: variances beyond 1e5.
    """
    low, high = float(variance.min()), float(variance.max())
    if not high <= _LARGEST_VARIANCE:
        raise DataError(
            f"the latents of these images have variances up to {high:.3g}: they are off the scale of what the flow was "
            "trained on; check it with model.check_invertibility, or train it on them"
        )
    if psi is None:  # plain variances have a lower bound only
        return None if low >= LOWEST_SHARE * INITIAL_VARIANCE else (2 * high, 0.2, low / 2)
    a, b, c = psi
    holds = c + INNER[0] * a <= low and high <= c + INNER[1] * a
    return psi if holds else (2 * high, b, low / 2)
