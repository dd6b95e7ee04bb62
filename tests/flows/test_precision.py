"""Float32 inside the bijection whatever the caller has set: TF32 switches old and new, autocast, threads."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glem_augment import GLEM, GLEMAugment
from glem_augment.flows import Bijection, create_flow
from glem_augment.flows.precision import callers_precision, full_precision
from glem_augment.latent.gaussians import ClassGaussians

BACKENDS = torch.backends
NEW = hasattr(BACKENDS.cuda.matmul, "fp32_precision")  # torch 2.9
SWITCHES = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv]


def set_to(switch: str, value: str) -> Callable[[], None]:
    owner = BACKENDS
    for name in switch.split("."):
        owner = getattr(owner, name)
    return lambda: setattr(owner, "fp32_precision", value)


OLD_WAYS: dict[str, Callable[[], Any]] = {
    "as torch comes": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no tf32": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
}
NEW_WAYS: dict[str, Callable[[], Any]] = {
    "cuda products": set_to("cuda.matmul", "tf32"),
    "cudnn": set_to("cudnn", "tf32"),
    "rnn": set_to("cudnn.rnn", "ieee"),
    "mkldnn": set_to("mkldnn.matmul", "bf16"),
    "old, then new": lambda: (torch.set_float32_matmul_precision("medium"), set_to("mkldnn.matmul", "ieee")()),
}


def seen() -> list[Any]:
    """What every switch says, asked in the new way and in the old one."""
    found: list[Any] = [switch.fp32_precision for switch in SWITCHES] if NEW else []
    for read in (torch.get_float32_matmul_precision, lambda: BACKENDS.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("at odds")
    return found


def in_child(check: Callable[[], None]) -> None:
    """Run it in a forked process: some settings of torch cannot be taken back."""
    pid = os.fork()
    if not pid:
        try:
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@needs_fork
@pytest.mark.parametrize("way", [*OLD_WAYS, *(NEW_WAYS if NEW else ())])
def test_every_way_to_ask_for_less_is_overridden_and_put_back(way: str) -> None:
    in_child(lambda: check_override({**OLD_WAYS, **NEW_WAYS}[way]))


def check_override(set_way: Callable[[], Any]) -> None:
    set_way()
    before = seen()

    def check_exact() -> None:
        if NEW:
            assert {switch.fp32_precision for switch in SWITCHES} <= {"ieee", "none"}
        if "at odds" not in before:  # Code that asks in the old way is answered inside, too.
            assert torch.get_float32_matmul_precision() == "highest" and not BACKENDS.cudnn.allow_tf32

    with full_precision("cpu"):
        check_exact()
        with full_precision("cuda"):
            check_exact()
            with callers_precision():
                assert seen() == before
            check_exact()
        check_exact()
    assert seen() == before
    with pytest.raises(KeyError), full_precision("cpu"):
        raise KeyError
    assert seen() == before


@needs_fork
def test_threads_share_one_change() -> None:
    in_child(check_threads)


def check_threads() -> None:
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
        with callers_precision():
            assert torch.get_float32_matmul_precision() == "highest"  # the other thread is still inside
    assert torch.get_float32_matmul_precision() == "highest"
    leave.set()
    thread.join(10)
    assert found == ["highest"] and torch.get_float32_matmul_precision() == "medium"


def flow_and_images() -> tuple[Bijection, Tensor]:
    """n = 8 and 16 with two segments: batched products in the hand-written backward."""
    torch.manual_seed(0)
    flow = create_flow("mef_tiny", (4, 8, 8), depth=[2, 1], blocks=[1, 1], width=[8, 8], bound=2.0)
    x = torch.rand(64, 4, 8, 8) - 0.5
    flow.initialise(x)
    for parameter in flow.parameters():
        if parameter.dim() == 4 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return flow, x[:6]


def test_autocast_of_the_caller_changes_nothing() -> None:
    flow, x = flow_and_images()
    want, want_logdet = flow(x)
    want_back, _ = flow.inverse(want)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = flow(x)
        back, _ = flow.inverse(z)
        assert (x.flatten(1) @ x.flatten(1).T).dtype == torch.bfloat16  # still on for the caller
    assert torch.equal(z, want) and torch.equal(logdet, want_logdet) and torch.equal(back, want_back)


@pytest.mark.parametrize("memory", ["stored", "reversible"])
def test_a_backward_pass_under_autocast_is_that_of_float32(memory: str) -> None:
    flow, x = flow_and_images()
    flow.set_memory(memory)
    tails = [p for name, p in flow.named_parameters() if ".tail." in name]

    def gradients(autocast: bool) -> list[Tensor]:
        z, logdet = flow(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return list(torch.autograd.grad(z.square().sum() - logdet.sum(), tails))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        # Torch's own parts of the pass run in bfloat16 there. This library's do not, and do not fail.
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 0.05


def test_autocast_of_the_subnets_is_a_switch() -> None:
    flow, x = flow_and_images()
    full = flow(x)[0]
    flow.set_autocast(torch.bfloat16)
    z, _ = flow(x)
    assert z.dtype == torch.float32 and flow.autocast == torch.bfloat16 and not torch.equal(z, full)
    torch.testing.assert_close(z, full, rtol=0, atol=0.3)
    # The subnets are reduced in the same way in both directions, so the map itself stays nearly exact.
    assert (flow.inverse(z)[0] - x).abs().max() < 0.05
    flow.set_autocast(None)
    assert torch.equal(flow(x)[0], full)


def test_adversarial_moves_through_matrix_exponentials_under_amp() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(60, 196, (32, 3, 8, 8), dtype=torch.uint8), torch.arange(32) % 2
    model = GLEM.create("mef_tiny", (3, 8, 8), ["a", "b"], depth=[2, 1], blocks=[1, 1], width=[8, 8], bound=2.0)
    model.flow.initialise(x.float() / 256 - 0.5)
    for parameter in model.flow.parameters():
        if parameter.dim() == 4 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    model.fit_modes((x, y), rank=8)
    model.eval().requires_grad_(False)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    moves = []
    for autocast in (None, torch.bfloat16):
        augment = GLEMAugment(model, policy="adversarial", p=1.0, modes=8, seed=0).attach(network, autocast=autocast)
        moves.append((augment(x.float() / 255, y)[0] - x.float() / 255).flatten(1))
    # Half precision in the classifier turns the step a little, and nothing else.
    assert float(torch.cosine_similarity(*moves).min()) > 0.95
    assert float(moves[0].norm(dim=1).min()) > 0


def test_a_compiled_program_may_go_through_it() -> None:
    torch.manual_seed(0)
    gaussians, z = ClassGaussians(3, 5), torch.randn(4, 5)
    compiled = torch.compile(lambda latents: gaussians.log_prob(latents).exp(), backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(z), gaussians.log_prob(z).exp())
