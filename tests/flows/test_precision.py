"""Float32 inside the bijection whatever the caller has set: TF32 switches old and new, autocast, threads."""

from __future__ import annotations

import functools
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glem_augment.flows import create_flow
from glem_augment.precision import full_precision

CUDA, CUDNN, MKLDNN = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
NEW = hasattr(CUDA.matmul, "fp32_precision")  # torch 2.9
SWITCHES = [CUDA.matmul, CUDNN.conv, CUDNN.rnn, MKLDNN.matmul, MKLDNN.conv] if NEW else []
OLD_WAYS: dict[str, Callable[[], Any]] = {
    "as torch comes": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "no tf32": lambda: setattr(CUDNN, "allow_tf32", False),
}
NEW_WAYS: dict[str, Callable[[], Any]] = {
    "cuda products": lambda: setattr(CUDA.matmul, "fp32_precision", "tf32"),
    "cudnn": lambda: setattr(CUDNN, "fp32_precision", "tf32"),
    "mkldnn": lambda: setattr(MKLDNN.matmul, "fp32_precision", "bf16"),
    "old, then new": lambda: (
        torch.set_float32_matmul_precision("medium"),
        setattr(MKLDNN.matmul, "fp32_precision", "ieee"),
    ),
}


def seen() -> list[Any]:
    """What every switch says, asked in the new way and in the old one."""
    found: list[Any] = [switch.fp32_precision for switch in SWITCHES]
    for read in (torch.get_float32_matmul_precision, lambda: CUDNN.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("at odds")
    return found


def in_child(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a forked process: some settings of torch cannot be taken back."""

    @functools.wraps(test)
    def forked(*args: Any, **kwargs: Any) -> None:
        pid = os.fork()
        if not pid:
            try:
                test(*args, **kwargs)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    return pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")(forked)


@in_child
@pytest.mark.parametrize("way", [*OLD_WAYS, *(NEW_WAYS if NEW else ())])
def test_every_way_to_ask_for_less_is_overridden_and_put_back(way: str) -> None:
    {**OLD_WAYS, **NEW_WAYS}[way]()
    before = seen()

    def check_exact() -> None:
        if NEW:
            assert {switch.fp32_precision for switch in SWITCHES} <= {"ieee", "none"}
        if "at odds" not in before:  # Code that asks in the old way is answered inside, too.
            assert torch.get_float32_matmul_precision() == "highest" and not CUDNN.allow_tf32

    with full_precision("cpu"):
        check_exact()
        with full_precision("cuda"):
            check_exact()
            check_exact()
        check_exact()
    assert seen() == before
    with pytest.raises(KeyError), full_precision("cpu"):
        raise KeyError
    assert seen() == before


@in_child
def test_threads_share_one_change() -> None:
    torch.set_float32_matmul_precision("medium")
    entered, leave, found = threading.Event(), threading.Event(), []

    def other() -> None:
        with full_precision("cpu"):
            entered.set()
            leave.wait(10)
            found.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=other)
    with full_precision("cpu"):
        thread.start()
        assert entered.wait(10)
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"
    leave.set()
    thread.join(10)
    assert found == ["highest"] and torch.get_float32_matmul_precision() == "medium"


def test_a_backward_pass_under_autocast_is_that_of_float32() -> None:
    torch.manual_seed(0)
    # n = 8 and 16 with two segments: batched products in the hand-written backward.
    flow = create_flow("mef_tiny", (4, 8, 8), width=[8, 8], depth=[2, 2], bound=2.0)
    flow.initialise(torch.rand(128, 4, 8, 8) - 0.5)
    for parameter in flow.parameters():
        if parameter.ndim == 4:  # the last convolutions start at zero, and a coupling that does nothing proves nothing
            torch.nn.init.normal_(parameter, std=0.04)
    x = torch.rand(5, 4, 8, 8) - 0.5
    tails = [p for name, p in flow.named_parameters() if ".tail." in name]

    def gradients(autocast: bool) -> list[Tensor]:
        z, logdet = flow(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return list(torch.autograd.grad(z.square().sum() - logdet.sum(), tails))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        # Torch's own parts of the pass run in bfloat16 there. This library's do not, and do not fail.
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 0.05
