"""The nonlinearities of the flows as torch has them, and in the forms that the library takes on a CPU.

Float32, without gradients, one after the other in an order that changes; and decoding with the modules of the bundled
flow, whose networks have ELUs, either way. "in bits": c elu(x / c), c = log2(e), which frozen networks have.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import parser, seconds, write_results
from torch import Tensor
from tqdm import tqdm

from glem_augment import GLEM
from glem_augment.flows import activations, frozen
from glem_augment.flows.activations import LOG2_E, fast_elu, fast_elu_in_bits
from glem_augment.flows.affine_coupling import bounded

BOUND = 2.0
# what -> as torch has it, as the library computes it
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "ELU": (F.elu, fast_elu),
    "ELU in bits": (lambda x: LOG2_E * F.elu(x / LOG2_E), fast_elu_in_bits),
    "bounded log-scale": (lambda x: BOUND * torch.tanh(x / BOUND), lambda x: bounded(x, BOUND)),
}


def compare(what: str, size: str, plain: Callable[[], Any], own: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """A row: milliseconds of both, and the median over rounds of their ratio."""
    taken: list[tuple[float, float]] = []
    for index in range(rounds + 1):
        if index % 2:
            first = seconds(plain)
            taken.append((first, seconds(own)))
        else:
            second = seconds(own)
            taken.append((seconds(plain), second))
    before, after = zip(*taken[1:], strict=True)  # the first warms up
    return {
        "what": what,
        "size": size,
        "torch ms": 1e3 * statistics.median(before),
        "ours ms": 1e3 * statistics.median(after),
        "median ratio": statistics.median(a / b for a, b in zip(before, after, strict=True)),
    }


def repeated(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    """Often enough to be timed."""
    times = max(1, 4_000_000 // x.numel())

    def run() -> None:
        for _ in range(times):
            function(x)

    return run


def arguments(doc: str | None) -> Namespace:
    """The command line of a benchmark of pairs; threads and seed are set by it."""
    args = parser(doc)
    args.add_argument("--rounds", type=int, default=21, help="of every pair (%(default)s)")
    args.add_argument("--batch", type=int, default=64, help="images decoded by the bundled flow (%(default)s)")
    result = args.parse_args()
    if result.threads:
        torch.set_num_threads(result.threads)
    torch.manual_seed(0)
    return result


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__)
    shapes = [(32, 64, 7, 7), (32, 48, 14, 14), (16, 128, 32, 32)]
    rows = []
    for shape in tqdm(shapes, desc="shapes"):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        for what, (plain, own) in FORMS.items():
            row = compare(what, "x".join(map(str, shape)), repeated(plain, x), repeated(own, x), args.rounds)
            difference = float((plain(x) - own(x)).abs().max())
            rows.append({**row, "largest difference": difference})
    model = GLEM.from_pretrained("bundled:fashion-mnist")
    z = model.sample_latents(torch.arange(args.batch) % len(model.classes))

    def with_plain_elu() -> Tensor:
        with mock.patch.object(activations, "is_ordinary", lambda x: False):
            return model.decode(z)

    with mock.patch.object(frozen, "_is_plain", lambda x: False):
        row = compare(
            "decode, bundled flow", f"{args.batch} images", with_plain_elu, lambda: model.decode(z), args.rounds
        )
        rows.append({**row, "largest difference": float((with_plain_elu() - model.decode(z)).abs().max())})
    write_results(args.out, "elementwise", "Elementwise functions in the forms that a CPU computes fastest", rows)


if __name__ == "__main__":
    main()
