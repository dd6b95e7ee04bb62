"""Somebody else's bijection as a flow of this library."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.checks import Memory
from glem_augment.devices import evaluating
from glem_augment.flows.layers import Flow
from glem_augment.flows.precision import full_precision


class CustomFlow(Flow):
    """A module that maps images to latents and back.

    Args:
        module: it sees images as numbers in [-1/2, 1/2), float32 [B,C,H,W]. Three kinds are understood:
            `module(x) -> (z, logdet)` with `module.inverse(z) -> x` or `(x, logdet)`; FrEIA's `GraphINN`, which
            inverts with `rev=True`; and normflows' flows, with `inverse_and_log_det(x)` from the image to the latent
            and `forward_and_log_det(z)` back. z is a tensor, or several that are concatenated.
        image_shape: (C, H, W).

    Raises:
        TypeError: a module of none of these kinds. ValueError: it gives z of another size, or no logdet per image.
    """

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        if hasattr(module, "inverse_and_log_det") and hasattr(module, "forward_and_log_det"):
            self.kind = "normflows"
        elif hasattr(module, "inverse"):
            self.kind = "inverse"
        elif hasattr(module, "module_list") and hasattr(module, "global_out_shapes"):
            self.kind = "FrEIA"
        else:
            raise TypeError(f"{type(module).__name__} has no `inverse`, and is no flow of FrEIA or normflows")
        self.module: Any = module
        reference = next((t for t in module.parameters() if t.is_floating_point()), torch.zeros((), device="cpu"))
        with torch.no_grad(), evaluating(module):  # in training mode, BatchNorm would learn from these images
            z, logdet = self._encode(torch.zeros(2, *image_shape, dtype=reference.dtype, device=reference.device))
        self.single, parts = isinstance(z, Tensor), self._parts(z)
        self.shapes = [tuple(part.shape[1:]) for part in parts]
        size, wanted = sum(part[0].numel() for part in parts), math.prod(image_shape)
        if size != wanted or not isinstance(logdet, Tensor) or logdet.shape != (2,):
            raise ValueError(
                f"two images of {wanted} numbers must give z of as many numbers each and logdet of shape [2]; "
                f"{type(module).__name__} gives {size} numbers and {getattr(logdet, 'shape', logdet)}"
            )

    def _encode(self, x: Tensor) -> Any:
        if self.kind == "normflows":
            return self.module.inverse_and_log_det(x)
        return self.module(x)

    def _decode(self, z: Any) -> Any:
        if self.kind == "normflows":
            return self.module.forward_and_log_det(z)
        return self.module(z, rev=True) if self.kind == "FrEIA" else self.module.inverse(z)

    @staticmethod
    def _parts(z: Any) -> list[Tensor]:
        return [z] if isinstance(z, Tensor) else list(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x.device.type):
            z, logdet = self._encode(x)
            return torch.cat([part.flatten(1) for part in self._parts(z)], 1), logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(z.device.type):
            sizes = [math.prod(shape) for shape in self.shapes]
            parts = [part.unflatten(1, shape) for part, shape in zip(z.split(sizes, 1), self.shapes, strict=True)]
            found = self._decode(parts[0] if self.single else parts)
            x, logdet = (found, None) if isinstance(found, Tensor) else found
            x = self._parts(x)[0]
            # If the inverse gives no log-determinant, take minus that of encoding its result.
            return x, -self._encode(x)[1] if logdet is None else logdet

    def set_memory(self, memory: Memory) -> None:
        if memory != "stored":
            raise ValueError(f"a module of the user's keeps its activations; leave out memory={memory!r}")

    def set_autocast(self, dtype: torch.dtype | None) -> None:
        if dtype is not None:
            raise ValueError(f"a module of the user's runs in its own precision; leave out {dtype} (precision)")
