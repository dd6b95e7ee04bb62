"""The Triton kernel, without a GPU: its numbers in Triton's interpreter, and that Triton's compiler takes it.

For these tests: ``pip install -e ".[triton]"``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_native import arguments, close, results

from glem_augment.flows import expm_triton

pytest.importorskip("triton", minversion="3.3", reason="wants Triton: pip install triton")


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The kernel is."""
    expm_triton._programs.cache_clear()
    monkeypatch.setenv("GLEM_TRITON", "1")
    yield monkeypatch
    expm_triton._programs.cache_clear()


def test_in_the_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "triton_interpreted.py")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here.parent, env=env)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 6, 12, 24])
def test_on_a_gpu(asked_for: pytest.MonkeyPatch, n: int, inverse: bool) -> None:
    for bound in (1.0, 2.5):
        x2, params = (t.detach().cuda().requires_grad_() for t in arguments(n, 40))
        assert expm_triton.serves(x2, params, bound)
        got = results(x2, params, bound, inverse)
        wanted = results(*(t.detach().double().requires_grad_() for t in (x2, params)), bound, inverse)
        close(got, wanted, 2e-5)
        assert all(torch.equal(a, b) for a, b in zip(got, results(x2, params, bound, inverse), strict=True))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("n", "pixels"), [(2, 1000), (6, 1), (24, 1000)])
def test_triton_compiles_it(asked_for: pytest.MonkeyPatch, n: int, pixels: int, capability: int) -> None:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    programs = expm_triton._programs()
    assert programs is not None
    names = {
        "forward": ("x2", "params", "y2", "trace"),
        "backward": ("g", "g_logdet", "x2", "params", "g_x2", "g_params"),
    }
    for name, pointers in names.items():
        _, numbers = expm_triton._plan(n, pixels, 1.0, inverse=name == "backward")
        options = {name: numbers.pop(name) for name in expm_triton._OPTIONS}
        sizes = dict.fromkeys(("pixels",) if name == "forward" else ("pixels", "area"), pixels)
        # As it is when it is launched: a size of 1 is a constant.
        constants = {**numbers, **{k: v for k, v in sizes.items() if v == 1}}
        kinds = {**dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(sizes, "i32"), "bound": "fp32"}
        signature = {**kinds, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=getattr(programs, name), signature=signature, constexprs=constants)
        made = triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
