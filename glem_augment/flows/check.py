"""A check of a user's flow on random images: shapes, inverse and log-determinant."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from glem_augment.flows.flow import Flow

# Tolerances: of an inverse relative to the images, of a log-determinant in nats per number, and of a pass under
# autocast relative to z. A Jacobian of more numbers takes seconds.
_WRONG_INVERSE, _WRONG_LOGDET, _WRONG_PRECISION, _MOST_NUMBERS = 0.01, 0.01, 1e-4, 1024


def check_flow(flow: Flow, image_shape: tuple[int, int, int]) -> None:
    """Test whether `flow` keeps the contract of `Flow` on two random images of values in [-1/4, 1/4].

    A copy in eval mode is tested, so the flow itself stays as it is.

    Args:
        flow: a subclass of `Flow`, of any floating-point dtype.
        image_shape: (C, H, W).

    Raises:
        TypeError: no `Flow`.
        ValueError: results of wrong shapes, values that are not finite, a wrong inverse or log-determinant, or a pass
            that autocast changes. The log-determinant is compared with the Jacobian for up to 1024 numbers.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"{type(flow).__name__} is no Flow: derive the class from glem_augment.flows.Flow")
    name, dim = type(flow).__name__, math.prod(image_shape)
    if tuple(flow.image_shape) != tuple(image_shape):
        raise ValueError(f"{name} is for images {list(flow.image_shape)}, not {list(image_shape)}")
    flow = copy.deepcopy(flow).eval()
    like = next((t for t in flow.parameters() if t.is_floating_point()), torch.zeros((), device="cpu"))
    x = (torch.rand(2, *image_shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu") - 0.5) / 2
    x = x.to(like)
    with torch.no_grad():
        z, logdet = _results(name, "forward", flow(x), (2, dim))
        back, back_logdet = _results(name, "inverse", flow.inverse(z), tuple(x.shape))
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            again = flow(x)[0]
    # A flow may lose some pixels of an image that is unlike its training data, but not half of them.
    if not float((back - x).abs().median()) < _WRONG_INVERSE * float(x.abs().median()):
        raise ValueError(f"the inverse of {name} does not give random images back")
    if not float((logdet + back_logdet).abs().max()) < _WRONG_LOGDET * dim:
        both = f"forward gives {float(logdet[0]):.4g} nats and inverse {float(back_logdet[0]):.4g}"
        raise ValueError(f"the log-determinants of {name} do not cancel: {both} for the same image")
    if dim <= _MOST_NUMBERS:
        exact, found = float(torch.linalg.slogdet(_jacobian(flow, x[:1]))[1]), float(logdet[0])
        if not abs(found - exact) < _WRONG_LOGDET * dim:
            raise ValueError(
                f"the log-determinant of {name} is {found:.4g} nats for a random image, and {exact:.4g} by its "
                "Jacobian: it must be log|det dz/dx|, with the sign of the way from images to latents"
            )
    if not float((again - z).abs().max()) <= _WRONG_PRECISION * float(z.abs().max()):
        raise ValueError(
            f"autocast changes the latents of {name}: put forward and inverse into "
            "`with glem_augment.precision.full_precision(x.device.type):`"
        )


def _results(name: str, method: str, found: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The two results of a pass. ValueError: other types or shapes, or values that are not finite."""
    values = list(found) if isinstance(found, tuple) else [found]
    shapes = [list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values]
    if shapes != [list(shape), [shape[0]]]:
        raise ValueError(
            f"{method} of {name} must return a tensor {list(shape)} and log-determinants [{shape[0]}] for two images, "
            f"got {shapes}"
        )
    first, logdet = values
    if not bool(first.isfinite().all() and logdet.isfinite().all()):
        raise ValueError(f"{method} of {name} gives values that are not finite for random images")
    return first, logdet


def _jacobian(flow: Flow, x: Tensor) -> Tensor:
    """dz/dx at an image x [1,C,H,W]: float64 [d, d], one row per image of a batch."""
    rows = []
    for chosen in torch.arange(x.numel(), device=x.device).split(128):
        many = x.expand(len(chosen), *x.shape[1:]).clone().requires_grad_(True)
        with torch.enable_grad():
            each = flow(many)[0].gather(1, chosen[:, None]).sum()
        rows.append(torch.autograd.grad(each, many)[0].flatten(1).double())
    return torch.cat(rows)
