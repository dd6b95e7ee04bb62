"""Public coordinates in which private latents are released: where photographs' class means vary most comes first.

In the coordinates v of `flows.public`, images vary by the identity within a class. A public covariance of class means
couples the frequencies, too: half of it is diag(e), and half U^T diag(b) U, of the leading directions U of the means of
public classes. The coordinates u are an orthonormal rotation of v that makes it diagonal, sorted, about the public
centre of latents. The noise on a sum falls on all numbers alike, and a number of small variance carries little. So sums
are of w u, w_j = (e_j / max e)^(1/4), clipped to the median of |w u| of public images.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from glem_augment.flows.public import PublicFlow, nearest_side

_LEAST, _POWER = 1e-3, 0.25  # added to the variances in weights, and their power


class ReleaseCoordinates:
    """h [n, C, H, W] -> u [n, d], see above; d = C H W.

    Attributes:
        public: v. between: the public variances [d] of class means along u, descending. weights: w [d].
        norm: the public norm to which w u is clipped.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], grey: bool) -> None:
        channels, height, width = shape
        self.public = PublicFlow.from_file(path, shape, grey, torch.ones(channels))
        stored = load_file(path)
        kind, side = nearest_side(stored, shape, grey)
        read = {
            name: stored[f"{kind}.{side}.{name}"].double() for name in ("centre", "directions", "variances", "norm")
        }
        self.centre = read["centre"].float()[:, None, None]
        # The frequencies of the measured grid, as indices of v, and the measured directions there.
        high, wide = min(height, side), min(width, side)
        places = torch.arange(height * width * channels).view(height, width, channels)
        self._inside = places[:high, :wide].flatten()
        outside = torch.ones(places.numel(), dtype=torch.bool).index_fill_(0, self._inside, False)
        self._outside = outside.nonzero()[:, 0]
        known = read["directions"].unflatten(1, (side, side, channels))[:, :high, :wide].flatten(1)
        e = self.public.between.double()
        covariance = (e[self._inside].diag() + (known.T * read["variances"]) @ known) / 2
        values, self._rotation = torch.linalg.eigh(covariance)
        values = torch.cat([values, e[self._outside] / 2]).clamp_min(_LEAST / 10)
        self.between, self._order = values.sort(descending=True, stable=True)
        self.weights = ((self.between + _LEAST) / (self.between[0] + _LEAST)) ** _POWER
        self.norm = float(read["norm"]) * math.sqrt(float((self.weights.square() * (1 + self.between)).sum()))

    def __call__(self, h: Tensor) -> Tensor:
        """Latents h [n, C, H, W] or [n, d] in the coordinates u [n, d]."""
        v = self.public(h.reshape(-1, *self.public.image_shape) - self.centre.to(h))[0]
        return torch.cat([v[:, self._inside] @ self._rotation.to(v), v[:, self._outside]], 1)[:, self._order]

    def to_public(self, u: Tensor) -> Tensor:
        """Directions or differences u [n, d] as directions v [n, d]."""
        x, v = torch.empty_like(u), torch.empty_like(u)
        x[:, self._order] = u
        v[:, self._inside] = x[:, : len(self._inside)] @ self._rotation.to(u).T
        v[:, self._outside] = x[:, len(self._inside) :]
        return v

    def centre_in_public(self) -> Tensor:
        """The public centre as v [d] float64."""
        return self.public.double()(self.centre.double().expand(1, *self.public.image_shape))[0][0]
