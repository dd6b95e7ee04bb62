"""A bijection of another library, or of the user, as a flow of this library."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from glem_augment.checks import Memory
from glem_augment.flows.layers import Flow
from glem_augment.precision import full_precision

# Tolerances of an inverse, as a share of the numbers, and of a log-determinant, in nats per number. Log-determinants
# are compared with Jacobians up to the third, the dimension at which a Jacobian takes seconds.
_WRONG_SHARE, _WRONG_LOGDET, _MOST_NUMBERS = 0.01, 0.01, 1024


class CustomFlow(Flow):
    """A module that maps images to latents and back.

    Args:
        module: it sees images as numbers in [-1/2, 1/2), float32 [B,C,H,W]. There are three kinds:
            `module(x) -> (z, logdet)` with `module.inverse(z) -> x` or `(x, logdet)`; FrEIA's `GraphINN` and
            `SequenceINN`, which invert with `rev=True`; and normflows' flows, with `inverse_and_log_det(x)` from the
            image to the latent and `forward_and_log_det(z)` back. z is a tensor, or several that are concatenated.
        image_shape: (C, H, W).

    A copy of the module is tried on random images first. So a module that initialises itself in its first call does so
    on the first images of the model.

    Raises:
        TypeError: a module of no such kind. ValueError: z of another size, no logdet per image, numbers that are not
            finite, a wrong inverse, or a wrong log-determinant. Log-determinants are compared with
            the Jacobian for up to 1024 numbers, and not checked for more.
    """

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        if hasattr(module, "inverse_and_log_det") and hasattr(module, "forward_and_log_det"):
            self.kind = "normflows"
        elif hasattr(module, "inverse"):
            self.kind = "inverse"
        elif any(parent.__module__.startswith("FrEIA.framework") for parent in type(module).__mro__):
            self.kind = "FrEIA"
        else:
            raise TypeError(f"{type(module).__name__} has no `inverse`, and is no flow of FrEIA or normflows")
        self.module: Any = copy.deepcopy(module).eval()
        some = next((t for t in module.parameters() if t.is_floating_point()), torch.zeros((), device="cpu"))
        generator = torch.Generator("cpu").manual_seed(0)
        x = (torch.rand(2, *image_shape, generator=generator, device="cpu") / 2 - 0.25).to(some)
        with torch.no_grad():
            z, logdet = self._encode(x)
        self.single, parts = isinstance(z, Tensor), self._parts(z)
        self.shapes = [tuple(part.shape[1:]) for part in parts]
        size, wanted = sum(part[0].numel() for part in parts), math.prod(image_shape)
        if size != wanted or not isinstance(logdet, Tensor) or logdet.shape != (2,):
            raise ValueError(
                f"two images of {wanted} numbers must give z of as many numbers each and logdet of shape [2]; "
                f"{type(module).__name__} gives {size} numbers and {getattr(logdet, 'shape', logdet)}"
            )
        with torch.no_grad():
            self._check(type(module).__name__, x)
        self.module = module

    def _check(self, name: str, x: Tensor) -> None:
        """ValueError unless the inverse and the log-determinant fit the map, at images x [2,C,H,W]."""
        z, logdet = self(x)
        back = self.inverse(z)[0]
        if not bool(z.isfinite().all() and logdet.isfinite().all()):
            raise ValueError(f"{name} gives latents or log-determinants that are not finite for random images")
        # A flow may lose some pixels of an image that is unlike its training data, but not half of them.
        if not float((back - x).abs().median()) < _WRONG_SHARE * float(x.abs().median()):
            raise ValueError(f"the inverse of {name} does not give random images back")
        if z.shape[1] <= _MOST_NUMBERS:
            exact, found = float(torch.linalg.slogdet(self._jacobian(x[:1]))[1]), float(logdet[0])
            if not abs(found - exact) < _WRONG_LOGDET * z.shape[1]:
                raise ValueError(
                    f"the log-determinant of {name} is {found:.4g} nats for a random image, and {exact:.4g} by its "
                    "Jacobian: it must be log|det dz/dx|, with the sign of the way from images to latents"
                )

    def _jacobian(self, x: Tensor) -> Tensor:
        """dz/dx at an image x [1,C,H,W]: float64 [d, d], one row per image of a batch."""
        rows = []
        for chosen in torch.arange(x.numel(), device=x.device).split(128):
            many = x.expand(len(chosen), *x.shape[1:]).clone().requires_grad_(True)
            with torch.enable_grad():
                each = self(many)[0].gather(1, chosen[:, None]).sum()
            rows.append(torch.autograd.grad(each, many)[0].flatten(1).double())
        return torch.cat(rows)

    def set_memory(self, memory: Memory) -> None:
        if memory == "reversible":
            raise ValueError("the activations of a user's module can't be rebuilt: leave memory at 'stored'")
        super().set_memory(memory)

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
            # An inverse without a log-determinant: encode its result, and take minus that log-determinant.
            return x, -self._encode(x)[1] if logdet is None else logdet
