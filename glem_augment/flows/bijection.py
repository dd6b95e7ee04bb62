"""The contract every layer of the flow keeps, and how layers are chained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Bijection(nn.Module):
    """An invertible map with a tractable log-determinant.

    ``forward(x)`` returns ``(z, logdet)`` and ``inverse(z)`` returns ``(x, logdet)``. Both log-determinants are
    in nats, of shape ``[B]``, and belong to the direction that was computed, so the two of a round trip cancel.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Sequence(Bijection):
    """``z = f_n(... f_2(f_1(x)))``; log-determinants add up.

    Args:
        layers: bijections, applied in order by ``forward`` and in reverse order by ``inverse``.
    """

    def __init__(self, layers: Iterable[Bijection]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for layer in reversed(self.layers):
            z, logdet = layer.inverse(z)
            total = total + logdet
        return z, total


class FlatIdentity(Bijection):
    """``z = flatten(x)``: the linear control that every learned flow has to beat.

    Args:
        image_shape: (C, H, W) of the images.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.reshape(z.shape[0], *self.image_shape), z.new_zeros(z.shape[0])
