"""The arithmetic of docs/scale.md: what a flow costs per image and per step, counted on one image without a GPU.

    python benchmarks/speed/scale.py [--preset mef_glem] [--side 32] [--classes 1000] [--per-class 1300]

FLOPs are those of convolutions and matrix products in one pass from image to latent, a multiply-add counting as two.
Activations are the bytes that a step holds for its backward, weights apart.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from glem_augment.flows import create_flow
from glem_augment.latent.modes import ClassModes

GIB = 2**30


class _Held:
    """A tensor saved for the backward. The bytes of its storage count once, for as long as anything holds it."""

    def __init__(self, tensor: Tensor, counts: dict[int, list[int]], record: dict[str, int]) -> None:
        self.tensor, self.counts, self.record = tensor, counts, record
        storage = tensor.untyped_storage()
        self.key = storage.data_ptr()
        entry = counts.setdefault(self.key, [0, storage.nbytes()])
        entry[0] += 1
        if entry[0] == 1:
            record["now"] += entry[1]
            record["peak"] = max(record["peak"], record["now"])

    def __del__(self) -> None:
        entry = self.counts[self.key]
        entry[0] -= 1
        if not entry[0]:
            self.record["now"] -= entry[1]
            del self.counts[self.key]


def held_for_backward(flow: nn.Module, train: Callable[[], None]) -> int:
    """Bytes that a training step holds for its backward at their highest, parameters apart."""
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    counts: dict[int, list[int]] = {}
    record = {"now": 0, "peak": 0}

    def pack(tensor: Tensor) -> Tensor | _Held:
        return tensor if tensor.untyped_storage().data_ptr() in weights else _Held(tensor, counts, record)

    def unpack(kept: Tensor | _Held) -> Tensor:
        return kept.tensor if isinstance(kept, _Held) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        train()  # the backward too: what it rebuilds, it holds
    return record["peak"]


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--preset", default="mef_glem")
    options.add_argument("--side", type=int, default=32, help="of RGB images")
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--per-class", type=int, default=1300)
    args = options.parse_args()
    torch.manual_seed(0)
    flow = create_flow(args.preset, (3, args.side, args.side))
    x = torch.rand(1, 3, args.side, args.side) - 0.5
    flow.initialise(torch.rand(8, *x.shape[1:]) - 0.5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        flow(x)
    flops = counter.get_total_flops()

    def train() -> None:
        z, logdet = flow(x)
        (z.square().sum() - logdet.sum()).backward()

    held = {}
    for memory in ("stored", "reversible"):
        flow.set_memory(memory)
        held[memory] = held_for_backward(flow, train)
    weights = sum(p.numel() for p in flow.parameters())
    dim, classes = x.numel(), args.classes
    modes = {rank: sum(b.nbytes for b in ClassModes(classes, rank, dim).buffers()) for rank in (16, 64)}
    rows = [
        ("parameters of the flow, millions", weights / 1e6),
        ("FLOPs of a pass, GFLOP per image", flops / 1e9),
        ("FLOPs of a training step, GFLOP per image (a backward pass is two)", 3 * flops / 1e9),
        ("the same, reversible (one more pass rebuilds)", 4 * flops / 1e9),
        ("activations, MiB per image: stored", held["stored"] / 2**20),
        ("activations, MiB per image: reversible", held["reversible"] / 2**20),
        ("weights, gradients, Adamax and average, GiB per rank", 5 * 4 * weights / GIB),
        ("gradients all-reduced per E-step, MB: of the flow", 4 * weights / 1e6),
        ("... and of means and variances learned jointly", 8 * classes * dim / 1e6),
        ("sums all-reduced per M-step round, MB", 16 * classes * dim / 1e6),
        ("Gaussians in a file, MB", 8 * classes * dim / 1e6),
        ("modes in a file, MB: 16 per class", modes[16] / 1e6),
        ("modes in a file, MB: 64 per class", modes[64] / 1e6),
        ("latents of one class, MB", 4 * args.per_class * dim / 1e6),
        ("latents of all classes, GB, of which one class at a time is held", 4 * args.per_class * dim * classes / 1e9),
        ("PFLOP to encode, or to generate, all images once", args.per_class * classes * flops / 1e15),
    ]
    table = [{"what": what, "how much": float(value)} for what, value in rows]
    with tempfile.TemporaryDirectory() as folder:  # prints the table; nothing here depends on the machine
        write_results(Path(folder), "scale", f"{args.preset} on 3x{args.side}x{args.side}", table, classes=classes)


if __name__ == "__main__":
    main()
