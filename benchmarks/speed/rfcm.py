"""Exact and truncated class covariances at ImageNet's size: measured on a slice of the classes, extrapolated.

    python benchmarks/speed/rfcm.py [--classes 1000] [--images 1300] [--dim 12288] [--slice 2]

Latents are random numbers of the right size: neither time nor storage depends on their values. Times and storage
per class are measured on `--slice` classes; the columns "all" are those times `--classes`. Images are not encoded
here, so a flow's own time comes on top.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import parser, write_results
from benchmarks.paper.rfcm import ThinCovariances, fit_covariances
from glem_augment.latent.fit import fit_class_modes


def truncated(latents: Callable[[int], torch.Tensor], classes: int, dim: int) -> ThinCovariances:
    """64 modes and a variance per dimension, as `ClassModes` has them."""
    modes = fit_class_modes(latents, classes, 64, dim)
    return ThinCovariances(modes.mean, modes.rest, list(modes.scales[..., None] * modes.directions), modes.counts)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--images", type=int, default=1300, help="per class (%(default)s)")
    options.add_argument("--dim", type=int, default=12_288, help="3x64x64 (%(default)s)")
    options.add_argument("--slice", type=int, default=2, help="classes that are measured (%(default)s)")
    options.add_argument("--samples", type=int, default=32, help="latents drawn and scored (%(default)s)")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    def latents(y: int) -> torch.Tensor:
        return torch.randn(args.images, args.dim, generator=torch.Generator().manual_seed(y))

    rows = []
    for name in ("exact", "64 modes + diagonal"):
        began = time.perf_counter()
        for y in range(args.slice):
            latents(y)
        drawing = time.perf_counter() - began
        began = time.perf_counter()
        exact = name == "exact"
        thin = fit_covariances(latents, args.slice) if exact else truncated(latents, args.slice, args.dim)
        fit = time.perf_counter() - began - drawing
        labels = torch.arange(args.samples) % args.slice
        began = time.perf_counter()
        z = thin.sample(labels, generator=torch.Generator().manual_seed(0))
        sample = time.perf_counter() - began
        began = time.perf_counter()
        thin.log_prob(z)
        score = time.perf_counter() - began
        size = sum(tensor.nbytes for tensor in (thin.mean, thin.diagonal, thin.counts, *thin.factors))
        scale = args.classes / args.slice
        rows.append(
            {
                "form": name,
                "fit s/class": fit / args.slice,
                "fit min, all": fit * scale / 60,
                f"score {args.samples} latents, s/class": score / args.slice,
                "score min, all": score * scale / 60,
                "sample ms/latent": 1000 * sample / args.samples,
                "file MB/class": size / args.slice / 1e6,
                "file GB, all": size * scale / 1e9,
                "peak memory so far MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
            }
        )
    write_results(
        args.out,
        "rfcm",
        f"RFCM at {args.classes} classes x {args.images} images x d = {args.dim}",
        rows,
        measured_classes=args.slice,
        dense_covariances_GB=args.classes * args.dim**2 * 4 / 1e9,
    )


if __name__ == "__main__":
    main()
