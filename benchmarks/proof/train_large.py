"""Train `mef_cifar` or `mef_glem` on one GPU, in resumable pieces of under ten minutes.

    until python benchmarks/proof/train_large.py --run runs/mef_cifar; do [ $? = 75 ] || break; done

Each call is one piece: `glem train --resume --max-minutes`, which goes on from the checkpoint in --run and stops, with
a checkpoint and exit code 75, at the first step after --minutes. A piece that is killed costs what it did since its
last checkpoint (one every --checkpoint-minutes). Once the flow is fitted, a last piece measures it on the test images;
the call that has done so exits with 0. Test images take no part before that; the curve is of held-out training images.

The recipe is this library's hybrid one (the paper's augmentations without jitter, a cosine, bf16 inside the subnets)
on 8-bit pixels; --objective glem --bits 5 is the paper's setting. `--preset mef_glem`, --memory reversible where the
activations do not fit, and --compile are the choices that matter on a GPU. Other settings of `glem train` can follow
after `--`, the same ones in every call.

After every piece train_large_<preset>.json has the seconds of training so far, the bits/dim and NF accuracy of every
epoch, and what each piece ran on; at the end those of the test images too.

**It has not run on a GPU so far**: it was tried on a CPU only, with --smoke (a tiny flow on the bundled images, in
pieces of a few steps), which shows that the pieces fit together, and nothing about speed or quality.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import machine, parser
from glem_augment import GLEM, open_data
from glem_augment.cli.main import main as glem
from glem_augment.evaluation.metrics import evaluate
from glem_augment.io import write_json
from glem_augment.training import EXIT_TIME_UP
from glem_augment.training.checkpoint import load_checkpoint
from glem_augment.training.logs import METRICS

BEGAN = time.monotonic()
PIECES, MEASURED, MODEL = "pieces.json", "test.json", "config.json"
RECIPE = [
    *("--objective", "hybrid", "--beta", "0.3", "--ce-scale", "0.2", "--m-rounds", "2", "--m-steps", "2"),
    *("--schedule", "cosine", "--lr", "0.01", "--min-lr", "0.0001", "--augment", "flip,crop,rotate"),
    *("--averaging", "ema", "--refit-beta", "0.1"),
]
SMOKE = ["--preset", "mef_tiny", "--flow", "depth=[1,1]", "--flow", "width=[8,8]", "--threads", "1"]


def arguments() -> argparse.Namespace:
    args = parser(__doc__)
    args.add_argument("--preset", choices=("mef_cifar", "mef_glem"), default="mef_cifar")
    args.add_argument("--data", default=None, help="training and test images (default: cifar10 in $GLEM_DATA)")
    args.add_argument("--run", type=Path, required=True, help="folder of the run: checkpoints, model, metrics")
    args.add_argument(
        "--minutes", type=float, default=8.5, help="of a piece, but for its last step and its checkpoint (%(default)s)"
    )
    args.add_argument("--checkpoint-minutes", type=float, default=2.0, help="(%(default)s)")
    args.add_argument("--epochs", type=int, default=100, help="(%(default)s)")
    args.add_argument("--batch-size", type=int, default=256, help="(%(default)s)")
    args.add_argument("--bits", type=int, default=8, help="(%(default)s)")
    args.add_argument("--memory", choices=("stored", "reversible"), default="stored", help="(%(default)s)")
    args.add_argument("--compile", action="store_true")
    args.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the subnets (%(default)s)")
    args.add_argument("--device", default=None, help="(default: CUDA, else an error)")
    args.add_argument("--smoke", action="store_true", help="a tiny flow on a few bundled images, on the CPU")
    args.add_argument("more", nargs="*", help="after --: further settings of glem train")
    result = args.parse_args()
    if result.smoke:
        result.preset, result.data, result.device = "smoke", "bundled:fashion-mnist", "cpu"
        result.epochs, result.precision = min(result.epochs, 2), "fp32"
    if result.device is None and not torch.cuda.is_available():
        args.error("there is no CUDA device here; --device cpu trains all the same, for weeks; or see --smoke")
    if result.data is None:
        folder = os.environ.get("GLEM_DATA")
        if not folder:
            args.error("give --data, or set GLEM_DATA to a folder with cifar10/train and cifar10/test")
        result.data = str(Path(folder) / "cifar10")
    return result


def command(args: argparse.Namespace) -> list[str]:
    """The same for every piece, but for the time that is left to it."""
    left = args.minutes - (time.monotonic() - BEGAN) / 60
    argv = [
        "train",
        args.data,
        "--out",
        str(args.run),
        "--resume",
        "--quiet",
        "--max-minutes",
        f"{max(0.001, left):.3f}",
    ]
    argv += ["--epochs", str(args.epochs), "--batch-size", str(args.batch_size), "--bits", str(args.bits)]
    argv += ["--memory", args.memory, "--precision", args.precision, *(["--compile"] if args.compile else [])]
    argv += ["--checkpoint-minutes", str(args.checkpoint_minutes), "--sample-every", "20", *RECIPE]
    argv += SMOKE if args.smoke else ["--preset", args.preset]
    return [*argv, *(["--device", args.device] if args.device else []), *args.more]


def read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else otherwise


def train_piece(args: argparse.Namespace) -> int:
    """Train until the time is up or the flow is fitted, and note what the piece was; the exit code of `glem train`."""
    first = step_of(args.run)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    code = glem(command(args))
    if code in (0, EXIT_TIME_UP):
        cuda = torch.cuda.is_available() and args.device != "cpu"
        piece = {
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "seconds": time.monotonic() - BEGAN,
            "from_step": first,
            "to_step": step_of(args.run),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        }
        write_json(args.run / PIECES, [*read(args.run / PIECES, []), piece])
    return code


def step_of(run: Path) -> int:
    try:
        return load_checkpoint(run).step
    except FileNotFoundError:
        return 0


def measure(args: argparse.Namespace) -> None:
    """Test images through the fitted flow; the result stays in the run's folder."""
    device = args.device or "cuda"
    model = GLEM.from_pretrained(args.run, device)
    data = open_data(args.data, "test", model.image_shape[1:], model.image_shape[0])
    write_json(args.run / MEASURED, evaluate(model, data, batch_size=args.batch_size, progress=False))


def write(args: argparse.Namespace) -> None:
    """The results so far, from the files in the run's folder."""
    lines = (args.run / METRICS).read_text(encoding="utf-8").splitlines() if (args.run / METRICS).is_file() else []
    metrics = [json.loads(line) for line in lines]
    rows = [
        {
            "epoch": row["epoch"],
            "seconds": row["seconds"],
            "bits/dim": row["val_bits_per_dim"],
            "NF accuracy": row["val_accuracy"],
            "loss": row["loss"],
            "images/s": row["images_per_second"],
        }
        for row in metrics
        if row["kind"] == "epoch"
    ]
    checkpoint, test = load_checkpoint(args.run), read(args.run / MEASURED, None)
    record = {
        "title": f"{args.preset} on {Path(args.data).name}, trained in pieces",
        "command": shlex.join(["python", "benchmarks/proof/train_large.py", *sys.argv[1:]]),
        "machine": machine(),
        "settings": checkpoint.config,
        "steps": checkpoint.step,
        "seconds": checkpoint.facts["seconds"],
        "rollbacks": checkpoint.facts["rollbacks"],
        "test": test and {key: test[key] for key in ("n", "bits_per_dim", "accuracy", "ece", "round_trip", "bits")},
        "held_out_by_epoch": rows,
        "held_out_after_refit": next((row for row in metrics if row["kind"] == "final"), None),
        "pieces": read(args.run / PIECES, []),
    }
    path = args.out / f"train_large_{args.preset}.json"
    write_json(path, record)
    now = {key: record[key] for key in ("steps", "seconds", "test")}
    print(f"{path}: {json.dumps({**now, 'held_out': rows[-1] if rows else None})}")


def main() -> int:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    fitted = (args.run / MODEL).is_file() and (args.run / PIECES).is_file() and not (args.run / MEASURED).is_file()
    if not fitted and not (args.run / MEASURED).is_file():
        code = train_piece(args)
        if code not in (0, EXIT_TIME_UP):
            return code
        write(args)
        # The flow is measured by the next call, which has all of its time for that.
        return EXIT_TIME_UP
    if fitted:
        measure(args)
    write(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
