"""Float32 inside the bijection whatever the caller has set: TF32 switches old and new, autocast, threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from glem_augment import GLEM, GLEMAugment
from glem_augment.flows import Bijection, create_flow
from glem_augment.latent.gaussians import ClassGaussians

# What is set here is set for good.
SETTINGS = (
    "pass",  # TF32 in convolutions, as torch comes
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    # Old and new ones together, where torch allows it
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('medium'); torch.backends.mkldnn.matmul.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
)
SCRIPT = """
import threading
import torch
from glem_augment.flows.precision import callers_precision, full_precision

new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
if not new and "fp32_precision" in setting:
    raise SystemExit(0)
exec(setting)
KINDS = [(b, k) for b in ("cuda", "mkldnn") for k in ("all", "matmul", "conv", "rnn")] if new else []
stands = torch._C._get_fp32_precision_getter if new else None

def seen():
    found = [stands(*kind) for kind in KINDS]
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("at odds")
    return found

def check_exact(*devices):
    # For what runs on these devices; the switches of others may stand as they like.
    backends = {"cpu": {"mkldnn"}, "cuda": {"cuda"}}
    own = set().union(*(backends[device] for device in devices))
    found = {stands(b, k) for b, k in KINDS if b in own and k in ("matmul", "conv")}
    assert found <= {"ieee", "none"}, (devices, seen())
    if "cuda" in devices or not new:
        if "at odds" not in before:
            assert "at odds" not in seen()  # who asks in the old way is answered
            assert torch.get_float32_matmul_precision() == "highest"
            assert "cuda" not in devices or not torch.backends.cudnn.allow_tf32

before = seen()
for outer, inner in (("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cpu")):
    with full_precision(outer):
        check_exact(outer)
        with full_precision(inner):
            check_exact(outer, inner)
            with callers_precision():
                assert seen() == before
            check_exact(outer, inner)
        check_exact(outer)
    assert before == seen(), (before, seen())

# A thread that is inside meanwhile stays exact; another device's does not end it, nor does this one's network.
entered, leave = threading.Event(), threading.Event()
failed = []
def other():
    try:
        with full_precision("cuda"):
            entered.set()
            leave.wait(10)
            check_exact("cuda")
    except BaseException as error:
        failed.append(error)
thread = threading.Thread(target=other)
with full_precision("cpu"):
    thread.start()
    assert entered.wait(10)
    with callers_precision():
        check_exact("cpu", "cuda")
    check_exact("cpu", "cuda")
check_exact("cuda")
leave.set()
thread.join(10)
assert not failed and before == seen(), (failed, before, seen())

"""


# One process for all, which has imported everything; a child each.
EACH = """
import os, sys, traceback
import torch, glem_augment.flows.precision
settings, script = sys.argv[1].split("|"), sys.argv[2]
for setting in settings:
    pid = os.fork()
    if not pid:
        try:
            exec(script, {"setting": setting})
        except Exception:
            print(setting, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        except SystemExit:
            pass
        os._exit(0)
    print(setting, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sep="|")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_way_to_ask_for_less_is_overridden_and_put_back() -> None:
    command = [sys.executable, "-c", EACH, "|".join(SETTINGS), SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    codes = dict(line.split("|") for line in done.stdout.splitlines())
    assert set(codes) == set(SETTINGS) and set(codes.values()) == {"0"}, done.stderr


def _flow(width: int = 8) -> tuple[Bijection, Tensor]:
    """n = 8 and 16 with two segments: batched products in the hand-written backward."""
    torch.manual_seed(0)
    flow = create_flow("mef_tiny", (4, 8, 8), depth=[2, 1], blocks=[1, 1], width=[width, width], bound=2.0)
    x = torch.rand(64, 4, 8, 8) - 0.5
    flow.initialise(x)
    for parameter in flow.parameters():
        if parameter.dim() == 4 and not parameter.abs().sum():
            nn.init.normal_(parameter, std=0.05)
    return flow, x[:6]


@pytest.mark.parametrize("memory", ["stored", "reversible"])
def test_a_backward_pass_under_autocast_is_that_of_float32(memory: str) -> None:
    flow, x = _flow()
    flow.set_memory(memory)
    couplings = {name: p for name, p in flow.named_parameters() if ".tail." in name}

    def gradients(autocast: bool) -> list[Tensor]:
        flow.zero_grad()
        z, logdet = flow(x)
        loss = z.square().sum() - logdet.sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss.backward()
        return [p.grad.clone() for p in couplings.values()]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        # Torch's own parts of the pass run in bfloat16 there; what is this library's does not, and does not fail.
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 0.05


def test_adversarial_moves_through_matrix_exponentials_under_amp() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(60, 196, (64, 3, 8, 8), dtype=torch.uint8), torch.arange(64) % 2
    model = GLEM.create("mef_tiny", (3, 8, 8), ["a", "b"], depth=[2, 1], blocks=[1, 1], width=[8, 8], bound=2.0)
    model.flow.initialise(x.float() / 256 - 0.5)
    for parameter in model.flow.parameters():
        if parameter.dim() == 4 and not parameter.abs().sum():
            nn.init.normal_(parameter, std=0.05)
    model.fit_modes((x, y), rank=8)
    model.eval().requires_grad_(False)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    results = []
    for autocast in (None, torch.bfloat16):
        augment = GLEMAugment(model, policy="adversarial", p=1.0, modes=8, seed=0).attach(network, autocast=autocast)
        moved, _ = augment(x.float() / 255, y)
        results.append(moved - x.float() / 255)
    plain, amp = (r.flatten(1) for r in results)
    # Half precision in the classifier turns the step a little, and nothing else.
    assert float(torch.cosine_similarity(plain, amp).min()) > 0.95
    assert float(plain.norm(dim=1).min()) > 0


@pytest.mark.filterwarnings("error:Dynamo does not know")
def test_a_compiled_program_may_go_through_it() -> None:
    torch.manual_seed(0)
    gaussians, z = ClassGaussians(3, 5), torch.randn(4, 5)
    compiled = torch.compile(lambda latents: gaussians.log_prob(latents).exp(), backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(z), gaussians.log_prob(z).exp())
