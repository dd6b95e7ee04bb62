"""The C++ kernel of ``affine_joint``, for float32 on a CPU.

Between the networks of two steps there is little to compute, and the networks have emptied the caches: most of the time
goes into finding the way through a dozen of torch's operations and of autograd's nodes. So it is one of each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from glem_augment.flows.kernel_shapes import images_like
from glem_augment.flows.native import Kernel, declare, library, threads_for

# Beyond so many channels a library's matrix products are faster than the kernel's loops.
_LARGEST = 48
# Pixels whose sums are made by the same thread.
_CHUNK = 1024
# Of gradients of x, params, matrix and shift.
_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.contiguous_format, torch.contiguous_format)


@cache
def _kernel(n: int) -> Kernel | None:
    made = library("affine_joint.cpp", N=n) if 2 * n <= _LARGEST and n % 2 == 0 else None
    if made is None:
        return None
    size, integer = ctypes.c_int64, ctypes.c_int32
    last = [ctypes.c_float, integer, integer]
    return Kernel(
        declare(made.glem_affine_joint, 7, [size, size, *last]),
        declare(made.glem_affine_joint_backward, 12, [size, size, size, *last]),
    )


def has_kernel(n: int) -> bool:
    """Whether there is a kernel for n mapped channels."""
    return _kernel(n) is not None


class Planes(ctypes.Structure):
    """As the kernel takes them."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("channel", ctypes.c_int64),
        ("image", ctypes.c_int64),
        ("side", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


def in_rows(x: Tensor) -> Tensor:
    """[C, B, H, W] as ``planes`` takes it: x itself if the pixels of every plane lie row by row, else a copy."""
    (height, width), (row, pixel) = x.shape[2:], x.stride()[2:]
    return x if (pixel == 1 or width == 1) and (row == width or height == 1) else x.contiguous()


def planes(x: Tensor, side: int = 1) -> Planes:
    """Where x [C, B, H, W] lies, or its squeeze [side^2 C, B, H / side, W / side].

    It holds an address: x must be kept, and be what ``in_rows`` returned.
    """
    return Planes(x.data_ptr(), x.stride(0), x.stride(1), side, x.shape[3] // side)


def planes_at(address: int, batch: int, height: int, width: int) -> Planes:
    """Where a contiguous [C, B, H, W] lies."""
    return Planes(address, batch * height * width, height * width, 1, width)


class Joints:
    """The kernel for one batch.

    Args:
        channels, batch, height, width: of the planes.
    """

    def __init__(self, channels: int, batch: int, height: int, width: int) -> None:
        self.shape = (channels, batch, height, width)
        self._size = (batch, height * width)
        self._each = max(1, _CHUNK // max(1, height * width))
        work = channels * batch * height * width * (channels + 20)  # multiply-adds, about
        self._threads, self._threads_backward = threads_for(work), threads_for(3 * work)
        kernel = _kernel(channels // 2)
        assert kernel is not None
        self._kernel = kernel

    def parts(self) -> int:
        """How many numbers ``backward`` needs for sums."""
        channels, batch, _, _ = self.shape
        return -(-batch // self._each) * channels * (channels + 2)

    def forward(
        self,
        x: Planes,
        y: Planes | None,
        params: int | None,
        matrix: int | None,
        shift: int | None,
        images: int | None,
        logdet: int | None,
        bound: float,
        inverse: bool,
    ) -> None:
        """From x to y, which may be the same, images and logdet, to which that of the coupling is added.

        Args:
            x, y: of the shape that all are made for; y is None where only images are wanted.
            params: address of [B, 2n, H, W], channels last; None: no coupling.
            matrix, shift: those of contiguous [2n, 2n] and [2n, 1]; None: no mixing.
            images: that of [B, n, H, W], channels last, or None.
            logdet: that of [B]; None without a coupling.
        """
        rest = (params, matrix, shift, images, logdet)
        self._kernel.forward(_place(x), _place(y), *rest, *self._size, bound, inverse, self._threads)

    def backward(
        self,
        x: Planes,
        g: Planes,
        g_x: Planes | None,
        params: int | None,
        matrix: int | None,
        g_images: int | None,
        g_logdet: int | None,
        g_params: int | None,
        g_bias: int | None,
        g_matrix: int | None,
        g_shift: int | None,
        parts: int | None,
        bound: float,
        inverse: bool,
    ) -> None:
        """From the gradients g (of y), g_images and g_logdet to the others, as far as they are not None.

        Args:
            g, g_x: may be the same.
            params, matrix, and gradients: addresses, as above.
            g_images, g_logdet: None without images and without a coupling.
            g_bias: address of [2n], the sums of g_params by channel; None without a coupling.
            parts: address of ``parts()`` numbers, for the gradients of matrix and shift, and for g_bias.
        """
        rest = (params, matrix, g_images, g_logdet, g_params, g_bias, g_matrix, g_shift, parts)
        size = (*self._size, self._each, bound, inverse, self._threads_backward)
        self._kernel.backward(_place(x), _place(g), _place(g_x), *rest, *size)


def _place(p: Planes | None) -> int | None:
    return None if p is None else ctypes.addressof(p)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _checked(x: Tensor, params: Tensor | None, matrix: Tensor | None, shift: Tensor | None) -> list[Tensor | None]:
    """All as the kernel takes them: it believes in shapes, so whatever comes here is held to them."""
    channels = len(x)
    if params is not None:
        params = images_like(x, params, channels)
    if matrix is None or shift is None:
        return [in_rows(x), params, None, None]
    if matrix.shape != (channels, channels) or shift.shape != (channels, 1):
        raise ValueError(
            f"matrix {tuple(matrix.shape)} and shift {tuple(shift.shape)} are not those of {tuple(x.shape)}"
        )
    return [in_rows(x), params, matrix.contiguous(), shift.contiguous()]


def joint(
    x: Tensor, params: Tensor | None, matrix: Tensor | None, shift: Tensor | None, bound: float, inverse: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``affine_joint.joint`` without a graph."""
    x, *rest = _checked(x, params, matrix, shift)
    channels, batch, height, width = x.shape
    y = x.new_empty(x.shape)
    images = None if matrix is None else x.new_empty(batch, height, width, channels // 2).permute(0, 3, 1, 2)
    logdet = None if params is None else x.new_zeros(batch)
    addresses = _addresses(*rest, images, logdet)
    Joints(*x.shape).forward(planes(x), planes(y), *addresses, bound, inverse)
    return y, images, logdet


def joint_backward(
    upstream: Sequence[Tensor | None],
    needed: Sequence[bool],
    x: Tensor,
    params: Tensor | None,
    matrix: Tensor | None,
    shift: Tensor | None,
    bound: float,
    inverse: bool,
) -> list[Tensor | None]:
    """Gradients of ``joint``'s first four arguments, as far as they are ``needed``, from those of its results."""
    x, params, matrix, shift = _checked(x, params, matrix, shift)
    channels, batch, _, _ = x.shape
    g, g_images, g_logdet = upstream
    assert g is not None and (g_images is None) == (matrix is None) and (g_logdet is None) == (params is None)
    found = [tuple(t.shape) for t in (g, g_logdet) if t is not None]
    if found != [tuple(x.shape), (batch,)][: len(found)]:
        raise ValueError(f"gradients {', '.join(map(str, found))} are not those of x {tuple(x.shape)}")
    # Each keeps its name until the kernel is done: it is handed nothing but addresses.
    g = in_rows(g)
    if g_images is not None:
        g_images = images_like(x, g_images, channels // 2)
    if g_logdet is not None:
        g_logdet = g_logdet.contiguous()
    weights = needed[2] or needed[3]
    # The network that made the parameters needs their gradient wherever anything before it needs one.
    wanted = (needed[0], params is not None, weights, weights)
    made = [
        torch.empty_like(t, memory_format=layout) if w else None
        for t, w, layout in zip((x, params, matrix, shift), wanted, _LAYOUTS, strict=True)
    ]
    joints = Joints(*x.shape)
    parts = x.new_empty(joints.parts()) if weights else None
    g_x, g_params, *rest = made
    where = None if g_x is None else planes(g_x)
    addresses = _addresses(params, matrix, g_images, g_logdet, g_params, None, *rest, parts)
    joints.backward(planes(x), planes(g), where, *addresses, bound, inverse)
    return made
