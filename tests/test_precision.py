"""Float32 inside the bijection whatever the caller has set: TF32 switches old and new, autocast, threads."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

from glem_augment import GLEM, GLEMAugment
from glem_augment.flows import Bijection, create_flow
from glem_augment.flows.precision import Standing, full_precision, now, restore, standing

# One process each: what is set here is set for good.
SETTINGS = (
    "pass",  # TF32 in convolutions, as torch comes
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
)
SCRIPT = """
import torch
from glem_augment.flows.precision import full_precision, standing

new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
if not new and "fp32_precision" in {setting!r}:
    raise SystemExit(0)
{setting}

def seen():
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: [standing(device) for device in ("cpu", "cuda")],
        lambda: new and [getattr(torch.backends, kind).fp32_precision for kind in ("cuda", "cudnn", "mkldnn")],
        lambda: new and (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision),
    ):
        try:
            found.append(read())
        except (RuntimeError, AttributeError):
            found.append("at odds")
    return found

before = seen()
for device in ("cpu", "cuda"):
    with full_precision(device), full_precision(device):
        assert {{value for _, value in standing(device)}} <= {{"ieee", "none"}}, standing(device)
        if new and device == "cuda":
            conv, product = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
            assert {{conv, product}} <= {{"ieee", "none"}}, (conv, product)
        if device == "cuda" and "fp32_precision" not in {setting!r}:
            torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()  # who asks in the old way is answered
assert before == seen(), (before, seen())
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_way_to_ask_for_less_is_overridden_and_put_back(setting: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(setting=setting)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_thread_that_leaves_does_not_take_the_precision_of_another() -> None:
    before = standing("cpu")
    entered, left = threading.Event(), threading.Event()
    seen: list[Standing] = []

    def other() -> None:
        with full_precision("cpu"):
            entered.set()
            assert left.wait(10)
            seen.append(now(before))

    try:
        restore([(switch, "tf32" if value in ("ieee", "none") else value) for switch, value in before])
        asked = now(before)
        thread = threading.Thread(target=other)
        with full_precision("cpu"):
            thread.start()
            assert entered.wait(10)
        left.set()
        thread.join(10)
        assert {value for _, value in seen[0]} <= {"ieee", "none"}
        assert now(before) == asked
    finally:
        restore(before)


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
