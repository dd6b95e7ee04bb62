"""The C++ kernels in ``kernels``, built by the machine's own compiler when they are first needed.

torch's operations pass over memory once each. Where a formula has many of them for a few numbers per pixel, a kernel
that takes a few pixels through all of it, in the processor's caches, is several times faster. Building one takes a
third of a second, once per machine. Where there is no compiler, and with ``GLEM_NATIVE=0`` in the environment, torch's
operations do the same work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

# What torch has found out about this processor, so that ATEN_CPU_CAPABILITY holds here, too.
_ARCHITECTURE = {
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512".split(),
    "AVX2": "-mavx2 -mfma".split(),
}
_FLAGS = "-std=c++17 -O3 -fPIC -fno-math-errno -fno-trapping-math".split()
_SECONDS = 120
# Operations that are worth a thread of their own.
_WORK = 200_000
_SOURCES = Path(__file__).with_name("kernels")


class Kernel(NamedTuple):
    """The two functions of most libraries."""

    forward: Any
    backward: Any


@cache
def library(source: str, **constants: int) -> ctypes.CDLL | None:
    """A kernel's library.

    Args:
        source: file in ``kernels``.
        constants: for the preprocessor.

    Returns:
        None where it cannot be had, after one warning if there is a compiler.
    """
    compiler = _compiler()
    if os.environ.get("GLEM_NATIVE") == "0" or compiler is None:
        return None
    code = [path.read_bytes() for path in (_SOURCES / source, *sorted(_SOURCES.glob("*.h")))]
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*_FLAGS, *_ARCHITECTURE.get(capability, []), *(f"-D{k}={v}" for k, v in sorted(constants.items()))]
    key = hashlib.sha256(repr((compiler, flags, code)).encode()).hexdigest()[:16]
    try:
        with tempfile.TemporaryDirectory(prefix="glem-native-") as elsewhere:
            target = (_folder() or Path(elsewhere)) / f"{Path(source).stem}-{key}.so"
            if target.exists():
                try:
                    return ctypes.CDLL(str(target))
                except OSError:
                    pass  # damaged: made anew
            return _build(compiler, [*flags, "-c", str(_SOURCES / source)], target)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0]
    warnings.warn(
        f"{source} could not be built with {' '.join(compiler)} ({reason}); torch's own operations do the same work, "
        "slower. Another compiler can be named in the environment variable CXX; GLEM_NATIVE=0 does without",
        stacklevel=2,
    )
    return None


def declare(function: Any, pointers: int, rest: list[Any]) -> Any:
    """A function of a library that takes so many pointers to tensors, then ``rest``, and returns nothing."""
    function.argtypes, function.restype = [ctypes.c_void_p] * pointers + rest, None
    return function


def threads_for(operations: int) -> int:
    """How many threads that much work is worth, at most torch's own number."""
    return max(1, min(torch.get_num_threads(), operations // _WORK))


def _compiler() -> list[str] | None:
    if os.name == "nt":
        return None  # its compiler has other flags and lacks the vectors
    named = os.environ.get("CXX", "").split()
    if named:
        return named
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def _folder() -> Path | None:
    """Where libraries are kept from one process to the next; None where nobody else can be kept from writing there."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glem_augment" / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
        return folder if ours and os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):
        return None


def _build(compiler: list[str], compiling: list[str], target: Path) -> ctypes.CDLL:
    """Compile, link and load; then ``target`` is there, though other processes may do the same at the same time."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as name:
        compiled, linked = (str(Path(name) / f"kernel.{suffix}") for suffix in ("o", "so"))
        for openmp in (["-fopenmp"], []):
            try:
                # Linked without it: that would bring a second OpenMP runtime, with threads of its own, beside torch's.
                for command in ([*compiling, *openmp, "-o", compiled], ["-shared", compiled, "-o", linked]):
                    subprocess.run([*compiler, *command], check=True, capture_output=True, text=True, timeout=_SECONDS)
                made = ctypes.CDLL(linked)
            except (OSError, subprocess.SubprocessError):
                if not openmp:
                    raise
                continue  # not every compiler's OpenMP is the one that torch has brought
            os.replace(linked, target)
            return made
    raise AssertionError
