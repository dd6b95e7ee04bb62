"""Log-densities of every latent under every class, and their gradients, by two matrix products each.

With diagonal Gaussians ``log N(z; mu, var) = z (mu / var)^T - 1/2 z^2 (1 / var)^T + constant``. What goes into the
products, K x d numbers twice, is made from the parameters for some dimensions at a time and used while it is in the
processor's caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glem_augment.flows.host_memory import empty_of_huge_pages
from glem_augment.flows.precision import full_precision
from glem_augment.latent import densities_native

# Numbers of a K x d tensor that are worked on at a time on the CPU: few enough to stay in its cache, enough for matrix
# products at full speed.
_BLOCK = 512 * 1024
_LINE = 64
# Products of so many classes are made in shares, of so many at least: below, a batch of products takes longer to begin
# than it saves (measured on two cores).
_MANY, _SHARE = 200, 32

Terms = tuple[Tensor, Tensor, Tensor]


class Parametrisation(NamedTuple):
    """How the variances follow from free parameters s.

    Attributes:
        psi: (a, b, c) of ``a * sigmoid(b * s) + c`` (GLEM, Eq. 6); None: the variances are s.
        low: their lower bound where there is no psi.
    """

    psi: tuple[float, float, float] | None
    low: float = 0.0

    def variance(self, s: Tensor) -> Tensor:
        """sigma^2, a new tensor. No gradient."""
        if self.psi is None:
            return s.clamp_min(self.low)
        a, b, c = self.psi
        return (b * s).sigmoid_().mul_(a).add_(c)

    def slope(self, s: Tensor, variance: Tensor) -> Tensor:
        """d sigma^2 / ds, a new tensor: ``psi' = b (psi - c) (1 - (psi - c) / a)``. ``s`` counts without psi only."""
        if self.psi is None:
            return (s >= self.low).to(s.dtype)
        a, b, c = self.psi
        above = variance - c
        return torch.addcmul(above, above, above, value=-1 / a).mul_(b)


class Products(NamedTuple):
    """What gradients of mu and s are made of: g [K], C [K, n] and A of ``LogProb``; without A there is none of s."""

    sums: Tensor
    linear: Tensor
    curved: Tensor | None


class Psi(torch.autograd.Function):
    """``a * sigmoid(b * s) + c``, keeping nothing but its result: K x d is the large tensor here."""

    @staticmethod
    def forward(ctx, s: Tensor, a: float, b: float, c: float) -> Tensor:
        ctx.how = Parametrisation((a, b, c))
        variance = ctx.how.variance(s)
        ctx.save_for_backward(variance)
        return variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (variance,) = ctx.saved_tensors
        result = empty_of_huge_pages(variance)
        # In blocks, so that no second K x d temporary is made.
        for out, value, upstream in _columns(result, variance, grad):
            torch.mul(ctx.how.slope(value, value), upstream, out=out)
        return result, None, None, None


def density_terms(mu: Tensor, s: Tensor, how: Parametrisation) -> Terms:
    """1/sigma^2 [K, d], mu/sigma^2 [K, d] and constants [K] of the Gaussians with means and free parameters [K, d].

    No gradient.
    """
    inverse, scaled, totals = empty_of_huge_pages(mu), empty_of_huge_pages(mu), _no_totals(mu)
    if densities_native.serves(mu, s):
        densities_native.terms(mu, s, how, inverse, scaled, totals)
    else:
        for mean, free, *out in _columns(mu, s, inverse, scaled):
            _terms(mean, free, how, *out, totals)
    return inverse, scaled, _constants(totals, mu)


def two_products(z: Tensor, terms: Terms) -> Tensor:
    """Log-densities [B, K] of z [B, d] from ``density_terms``."""
    inverse, scaled, constant = terms
    return torch.addmm(torch.addmm(constant, z, scaled.T), z * z, inverse.T, alpha=-0.5)


class LogProb(torch.autograd.Function):
    """All-class log-densities straight from mu and s, for parameters that may change at any time.

    ``terms`` are what is kept of parameters that have not changed, and ``forget`` drops it. Without terms neither
    direction holds a K x d tensor beyond its results: the terms of some dimensions are made, used in the products and
    dropped, and the backward makes them again. With G the gradient of the result [B, K] and g = sum_b G, A = G^T z^2
    and C = G^T z are the products behind all gradients: ``dmu = (C - g mu) / var``,
    ``dvar = ((A - 2 mu C + g mu^2) / var - g) / (2 var)``, ``dz = G (mu / var) - z * G (1 / var)``.
    """

    @staticmethod
    def forward(
        ctx,
        z: Tensor,
        mu: Tensor,
        s: Tensor,
        how: Parametrisation,
        terms: Terms | None,
        forget: Callable[[], None],
    ) -> Tensor:
        ctx.save_for_backward(z, mu, s)
        ctx.how, ctx.forget = how, forget
        if terms is not None:
            return two_products(z, terms)
        make = densities_native.terms if densities_native.serves(mu, s) else _terms
        totals, shares = _no_totals(mu), _Shares(mu)
        result = shares.no_result(z)
        for some, mean, free in _columns(z, mu, s):
            inverse, scaled = rooms = shares.rooms(mean)
            make(mean, free, how, *shares.classes_of(rooms), totals)
            shares.add_product(result, some, scaled)
            shares.add_product(result, some * some, inverse, -0.5)
        # A new tensor: of a view of what was made here, autograd would let nobody change anything.
        return shares.joined(result) + _constants(totals, mu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        z, mu, s = ctx.saved_tensors
        needs_z, needs_mu, needs_s, *_ = ctx.needs_input_grad
        ctx.forget()  # an optimizer is about to move the parameters, and may leave no trace
        native = densities_native.serves(mu, s)
        make, gradients = (densities_native.terms, densities_native.gradients) if native else (_terms, _gradients)
        # What is not asked for has no room of its own.
        needs = (needs_z, needs_mu or needs_s, needs_s)
        d_z, d_mu, d_s = (empty_of_huge_pages(t) if n else t for t, n in zip((z, mu, s), needs, strict=True))
        with full_precision(z.device.type):
            sums, unwanted, shares = grad.sum(0), _no_totals(mu), _Shares(mu)
            grads = shares.split(grad)
            for some, mean, free, to_z, *to_parameters in _columns(z, mu, s, d_z, d_mu, d_s):
                one, two = rooms = shares.rooms(mean)
                if needs_z:
                    make(mean, free, ctx.how, *shares.classes_of(rooms), unwanted)
                    torch.mul(shares.product(grads, one), some, out=to_z)
                    torch.sub(shares.product(grads, two), to_z, out=to_z)
                if needs_mu or needs_s:
                    shares.transposed_product(grads, some, one)
                    if needs_s:
                        shares.transposed_product(grads, some * some, two)
                    linear, curved = shares.classes_of(rooms)
                    products = Products(sums, linear, curved if needs_s else None)
                    gradients(products, mean, free, ctx.how, *to_parameters)
        return d_z if needs_z else None, d_mu if needs_mu else None, d_s if needs_s else None, None, None, None


def _terms(mu: Tensor, s: Tensor, how: Parametrisation, inverse: Tensor, scaled: Tensor, totals: Tensor) -> None:
    """1/sigma^2 and mu/sigma^2 into the tensors for them; ``sum(log sigma^2 + mu^2/sigma^2)`` is added to
    ``totals``."""
    variance = how.variance(s)
    torch.reciprocal(variance, out=inverse)
    torch.mul(mu, inverse, out=scaled)
    totals += variance.log_().addcmul_(mu, scaled).sum(1, dtype=torch.float64)


def _gradients(products: Products, mu: Tensor, s: Tensor, how: Parametrisation, d_mu: Tensor, d_s: Tensor) -> None:
    """Gradients of mu and s; ``products`` are overwritten."""
    sums, linear, curved = products
    variance, total = how.variance(s), sums[:, None]
    inverse = 1 / variance
    pull = torch.addcmul(linear, total, mu, value=-1)
    torch.mul(pull, inverse, out=d_mu)
    if curved is not None:
        # A - mu (C + pull), pull = C - g mu
        spread = curved.addcmul_(mu, linear.add_(pull), value=-1).mul_(inverse).sub_(total).mul_(inverse).mul_(0.5)
        torch.mul(spread, how.slope(s, variance), out=d_s)


def _no_totals(mu: Tensor) -> Tensor:
    return mu.new_zeros(len(mu), dtype=torch.float64)


def _constants(totals: Tensor, mu: Tensor) -> Tensor:
    return (-0.5 * (totals + mu.shape[1] * math.log(2 * math.pi))).to(mu.dtype)


def _width(mu: Tensor) -> int:
    """Dimensions at a time; on an accelerator all: a launch costs more than a pass.

    Whole cache lines, an odd number of times ``_LINE``: of rows that are a power of two apart, only few fit in a cache.
    """
    if mu.device.type != "cpu":
        return max(1, mu.shape[1])
    lines = _BLOCK // max(1, len(mu)) // _LINE
    return max(1, (lines - 1) | 1) * _LINE  # the largest odd number up to lines


def _columns(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of dimensions of tensors [.., d], the last of them K x d."""
    width = _width(tensors[-1])
    return zip(*(t.split(width, 1) for t in tensors), strict=True)


class _Shares:
    """One share of the classes for every thread, and room for two numbers for each of a block's parameters.

    A batch of products, one for each share, has a thread read, but for a few classes, what it has written itself. In
    one product for all classes each reads what the other threads have written, which takes longer than writing it where
    processor cores have no cache in common.

    Numbers of the classes are [K', n] for K' >= K classes, all shares of the same size. Of few classes, without MKL,
    whose batches are what the threads divide among themselves, and on an accelerator, there is one share, and the
    products are ordinary ones.
    """

    def __init__(self, mu: Tensor) -> None:
        batches = mu.device.type == "cpu" and torch.backends.mkl.is_available()
        threads = torch.get_num_threads() if batches else 1
        self._classes = len(mu)
        self._number = threads if self._classes >= max(_MANY, _SHARE * threads) else 1
        self._each = -(-self._classes // self._number)
        self._rows = self._number * self._each
        self._missing = self._rows - self._classes
        size = self._rows * min(_width(mu), mu.shape[1])
        self._rooms = mu.new_empty(size), mu.new_empty(size)

    def rooms(self, block: Tensor) -> list[Tensor]:
        """Two tensors [K', n] for numbers of a block [K, n]."""
        n = block.shape[1]
        rooms = [room[: self._rows * n].view(self._rows, n) for room in self._rooms]
        if self._missing:
            for room in rooms:
                # What is no class's is multiplied with zero, and must be a number.
                room[self._classes :].zero_()
        return rooms

    def classes_of(self, rooms: list[Tensor]) -> list[Tensor]:
        """The parts of them [K, n] that there are classes for."""
        return [room[: self._classes] for room in rooms] if self._missing else rooms

    def no_result(self, z: Tensor) -> Tensor:
        """What ``add_product`` adds to."""
        shape = (len(z), self._each)
        return z.new_zeros(shape if self._number == 1 else (self._number, *shape))

    def add_product(self, result: Tensor, some: Tensor, numbers: Tensor, factor: float = 1) -> None:
        """To ``result`` that of some [B, n] and numbers [K', n], transposed."""
        if self._number == 1:
            result.addmm_(some, numbers.T, alpha=factor)
        else:
            result.baddbmm_(self._to_all(some), self._by_share(numbers).mT, alpha=factor)

    def joined(self, result: Tensor) -> Tensor:
        """[B, K]."""
        if self._number == 1:
            return result
        return result.transpose(0, 1).flatten(1)[:, : self._classes]

    def split(self, grad: Tensor) -> Tensor:
        """[B, K] as the products take it; zero where there is no class."""
        if self._number == 1:
            return grad
        grad = nn.functional.pad(grad, (0, self._missing)) if self._missing else grad
        return grad.unflatten(1, (self._number, self._each)).transpose(0, 1)

    def product(self, grads: Tensor, numbers: Tensor) -> Tensor:
        """[B, n], of ``split`` gradients and numbers [K', n]."""
        return grads @ numbers if self._number == 1 else (grads @ self._by_share(numbers)).sum(0)

    def transposed_product(self, grads: Tensor, some: Tensor, out: Tensor) -> None:
        """Into out [K', n], of ``split`` gradients, transposed, and some [B, n]."""
        if self._number == 1:
            torch.mm(grads.T, some, out=out)
        else:
            torch.bmm(grads.mT, self._to_all(some), out=self._by_share(out))

    def _by_share(self, numbers: Tensor) -> Tensor:
        return numbers.view(self._number, self._each, -1)

    def _to_all(self, some: Tensor) -> Tensor:
        return some.expand(self._number, *some.shape)
