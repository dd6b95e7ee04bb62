"""Groups of similar latents within a class, by k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from glem_augment.errors import DataError

_ROUNDS = 30


@torch.no_grad()
def k_means(z: Tensor, groups: int) -> Tensor:
    """The group of each latent z [n, d], int64 [n], a function of z; no group has fewer than two.

    It starts as k-means++ does (Arthur & Vassilvitskii 2007). Groups that end with fewer than two latents are
    dissolved, so there may be fewer than `groups`. DataError: fewer than two latents for each group.
    """
    if len(z) < 2 * groups:
        raise DataError(
            f"{groups} parts need at least {2 * groups} images of each class, one has {len(z)}: lower parts"
        )
    generator, z = torch.Generator().manual_seed(0), z.float()
    centres = z[torch.randint(len(z), (1,), generator=generator)]
    for _ in range(groups - 1):
        far = torch.cdist(z, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, z[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(_ROUNDS):
        group = torch.cdist(z, centres).argmin(1)
        count = torch.bincount(group, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, group, z)
        centres, before = sums[count > 1] / count[count > 1, None], centres
        if centres.shape == before.shape and torch.equal(centres, before):
            break
    while True:  # the last round may have left a group of one
        group = torch.cdist(z, centres).argmin(1)
        enough = torch.bincount(group, minlength=len(centres)) > 1
        if bool(enough.all()):
            return group
        centres = centres[enough]
