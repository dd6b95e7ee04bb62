"""How far reversible training is from the ordinary path: activations rebuilt through the inverse drift with depth.

    python benchmarks/speed/reversible.py [--steps 8 16 32 64]

One level of mef_tiny on 28x28 grey images, whose S and shifts are random rather than zero. For each
number of steps: the norm of the gradients' difference to the ordinary path, over the norm of the gradients, of all
weights together and of the tensor where it is largest; and the largest error of the inputs rebuilt from the outputs (a
pixel is 1 wide, a uint8 step 1/255). Once with subnets in float32, once in bfloat16 (`precision="bf16"`), whose
rounding turns a small error of their input into one of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from glem_augment.flows import Flow, create_flow
from glem_augment.flows.subnets import Subnet


def trained_like(steps: int, image_shape: tuple[int, int, int], width: int, seed: int) -> tuple[Flow, Tensor]:
    """A flow of one level whose couplings do something, and a batch of images in [-1/2, 1/2)."""
    torch.manual_seed(seed)
    flow = create_flow("mef_tiny", image_shape, depth=[steps], blocks=[1], width=[width])
    for module in flow.modules():
        if isinstance(module, Subnet):
            nn.init.normal_(module.tail.weight, std=0.005)
    x = torch.rand(256, *image_shape) - 0.5
    flow.initialise(x)  # afterwards: so that every step's input has unit variance, as in a trained flow
    return flow, x


def gradients(flow: Flow, x: Tensor, memory: str) -> list[Tensor]:
    flow.set_memory(memory)
    flow.zero_grad()
    z, logdet = flow(x)
    (0.5 * z.square().sum() - logdet.sum()).backward()
    return [p.grad.clone() for p in flow.parameters() if p.grad is not None]


def measure(
    depths: list[int], batch: int, image_shape: tuple[int, int, int], width: int, seed: int
) -> list[dict[str, Any]]:
    """A row for every number of steps and precision of the subnets."""
    rows = []
    for steps in depths:
        flow, x = trained_like(steps, image_shape, width, seed)
        x = x[:batch]
        for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            for module in flow.modules():
                if isinstance(module, Subnet):
                    module.autocast = dtype
            stored, rebuilt = (gradients(flow, x, memory) for memory in ("stored", "reversible"))
            errors = [(a - b).norm() for a, b in zip(rebuilt, stored, strict=True)]
            norms = [b.norm() for b in stored]
            worst = max(float(e / n) for e, n in zip(errors, norms, strict=True) if n > 0)
            with torch.no_grad():
                back = flow.inverse(flow(x)[0])[0]
            rows.append(
                {
                    "steps": steps,
                    "subnets": precision,
                    "gradients, relative": float(torch.stack(errors).norm() / torch.stack(norms).norm()),
                    "worst tensor's": worst,
                    "input, largest error": float((back - x).abs().max()),
                }
            )
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64], help="(%(default)s)")
    arguments.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(args.steps, args.batch, (1, 28, 28), 48, seed=0)
    write_results(args.out, "reversible", "Reversible training against the ordinary path", rows, seed=0)


if __name__ == "__main__":
    main()
