"""Decoding with frozen networks run as ``flows/frozen.py`` does, against the modules themselves.

Float32, without gradients, both ways in one process in an order that changes: the bundled flow, and the levels of
``mef_cifar``.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from common import write_results
from elementwise import arguments, compare
from speed import CASES, make_flow
from torch import Tensor, nn
from tqdm import tqdm

from glem_augment import GLEM
from glem_augment.flows import frozen


def flows(batch: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """name -> frozen flow and latents for it."""
    bundled = GLEM.from_pretrained("bundled:fashion-mnist")
    latents = bundled.sample_latents(torch.arange(batch) % len(bundled.classes))
    result: dict[str, tuple[nn.Module, Tensor]] = {"bundled flow": (bundled.flow, latents)}
    for case in ("mef_cifar_0", "mef_cifar_1", "mef_cifar_2"):
        flow, x = make_flow(CASES[case], torch.device("cpu"))
        flow = copy.deepcopy(flow).eval().requires_grad_(False)
        result[case] = flow, flow(x)[0]
    return result


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__)
    if not frozen._is_supported():
        raise SystemExit("frozen: this torch has no oneDNN convolutions that take weights in blocks")
    rows: list[dict[str, Any]] = []
    for name, (flow, z) in tqdm(flows(args.batch).items(), desc="flows"):

        def modules(flow: nn.Module = flow, z: Tensor = z) -> Tensor:
            with mock.patch.object(frozen, "_is_plain", lambda x: False):
                return flow.inverse(z)[0]

        def ours(flow: nn.Module = flow, z: Tensor = z) -> Tensor:
            return flow.inverse(z)[0]

        row = compare(f"decode, {name}", f"{len(z)} images", modules, ours, args.rounds)
        rows.append({**row, "largest difference": float((modules() - ours()).abs().max())})
    write_results(args.out, "frozen", "Frozen networks run in fewer passes", rows)


if __name__ == "__main__":
    main()
