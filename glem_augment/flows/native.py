"""C++ kernels of this package, built by the machine's own compiler when they are first needed.

torch's operations pass over memory once each. Where a formula has many of them for a few numbers per pixel, a kernel
that takes a few pixels through all of it, in the processor's first cache, is several times faster. Building one takes a
third of a second, once per machine. Where there is no compiler, and with ``GLEM_NATIVE=0`` in the environment, torch's
operations do the same work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

# What torch has found out about this processor, so that ATEN_CPU_CAPABILITY holds here, too.
_ARCHITECTURE = {
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512".split(),
    "AVX2": "-mavx2 -mfma".split(),
}
_FLAGS = "-std=c++17 -O3 -fPIC -fno-math-errno -fno-trapping-math".split()
_SECONDS = 120


@cache
def library(source: str, **constants: int) -> ctypes.CDLL | None:
    """A kernel's library.

    Args:
        source: file beside this module.
        constants: for the preprocessor.

    Returns:
        None where it cannot be had, after one warning if there is a compiler.
    """
    compiler = _compiler()
    if os.environ.get("GLEM_NATIVE") == "0" or compiler is None:
        return None
    code = Path(__file__).with_name(source).read_bytes()
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*_FLAGS, *_ARCHITECTURE.get(capability, []), *(f"-D{k}={v}" for k, v in sorted(constants.items()))]
    problem = ""
    with tempfile.TemporaryDirectory(prefix="glem-native-") as elsewhere:
        folder = _folder() or Path(elsewhere)
        for parallel in (["-fopenmp"], []):
            command = [*compiler, *flags, *parallel]
            key = hashlib.sha256(repr((command, code)).encode()).hexdigest()[:16]
            target = folder / f"{Path(source).stem}-{key}.so"
            try:
                if not target.exists():
                    _build(command, compiler, code, target)
                return ctypes.CDLL(str(target))
            except (OSError, subprocess.SubprocessError) as error:
                # Without OpenMP on the second try: not every compiler's is the one that torch has brought.
                problem = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0]
    warnings.warn(
        f"{source} could not be built with {shlex.join(compiler)} ({problem}); torch's own operations do the same work, "
        "slower. Another compiler can be named in the environment variable CXX; GLEM_NATIVE=0 does without",
        stacklevel=2,
    )
    return None


def _compiler() -> list[str] | None:
    if os.name == "nt":
        return None  # its compiler has other flags and lacks the vectors
    named = shlex.split(os.environ.get("CXX", ""))
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


def _build(command: list[str], compiler: list[str], code: bytes, target: Path) -> None:
    """Compile to ``target``, which other processes may do at the same time."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as name:
        source, compiled, linked = (Path(name) / f"kernel.{suffix}" for suffix in ("cpp", "o", "so"))
        source.write_bytes(code)
        # Linked without -fopenmp: that would bring a second OpenMP runtime, with threads of its own, beside torch's.
        compile_it = [*command, "-c", str(source), "-o", str(compiled)]
        link_it = [*compiler, "-shared", str(compiled), "-o", str(linked)]
        for part in (compile_it, link_it):
            subprocess.run(part, check=True, capture_output=True, text=True, timeout=_SECONDS)
        os.replace(linked, target)
