"""The arithmetic of docs/scale.md: costs of a flow per image and per step, counted on one image without a GPU.

    python benchmarks/speed/scale.py [--preset mef_glem] [--side 32] [--classes 1000] [--per-class 1300]

FLOPs count convolutions and matrix products in one pass from image to latent; a multiply-add counts as two. Activations
are the bytes that a step holds for the backward pass, without the weights.
"""

from __future__ import annotations

import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from glem_augment.classes.modes import ClassModes
from glem_augment.flows import create_flow


class _Held:
    """A tensor saved for the backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held_for_backward(flow: nn.Module, train: Callable[[], None]) -> int:
    """Peak bytes that a training step holds for the backward pass, without parameters; a storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    counts: Counter[int] = Counter()
    now = peak = 0

    def release(key: int, size: int) -> None:
        nonlocal now
        counts[key] -= 1
        now -= 0 if counts[key] else size

    def pack(tensor: Tensor) -> Tensor | _Held:
        nonlocal now, peak
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if key in weights:
            return tensor
        now += 0 if counts[key] else size
        counts[key] += 1
        peak = max(peak, now)
        held = _Held(tensor)
        weakref.finalize(held, release, key, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: getattr(kept, "tensor", kept)):
        train()
    return peak


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

    held = held_for_backward(flow, train)
    weights, numbers = sum(p.numel() for p in flow.parameters()), args.classes * x.numel()
    modes = {rank: sum(b.nbytes for b in ClassModes(args.classes, rank, x.numel()).buffers()) for rank in (16, 64)}
    rows = {
        "parameters of the flow, millions": weights / 1e6,
        "FLOPs of a pass, GFLOP per image": flops / 1e9,
        "FLOPs of a training step, GFLOP per image (a backward pass is two)": 3 * flops / 1e9,
        "activations, MiB per image": held / 2**20,
        "weights, gradients, Adamax and average, GiB per rank": 5 * 4 * weights / 2**30,
        "gradients all-reduced per E-step, MB: of the flow": 4 * weights / 1e6,
        "... and of means and variances learned jointly": 8 * numbers / 1e6,
        "sums all-reduced per M-step round, MB": 16 * numbers / 1e6,
        "Gaussians in a file, MB": 8 * numbers / 1e6,
        "modes in a file, MB: 16 per class": modes[16] / 1e6,
        "modes in a file, MB: 64 per class": modes[64] / 1e6,
        "latents of one class, MB": 4 * args.per_class * x.numel() / 1e6,
        "latents of all classes, GB, of which one class at a time is held": 4 * args.per_class * numbers / 1e9,
        "PFLOP to encode, or to generate, all images once": args.per_class * args.classes * flops / 1e15,
    }
    table = [{"what": what, "how much": float(value)} for what, value in rows.items()]
    with tempfile.TemporaryDirectory() as folder:  # prints the table; nothing here depends on the machine
        title = f"{args.preset} on 3x{args.side}x{args.side}"
        write_results(Path(folder), "scale", title, table, classes=args.classes)


if __name__ == "__main__":
    main()
