"""Sampling in a process that does nothing else, with and without ``glem_augment.flows.host_memory``.

Every round starts two processes, one after the other in an order that changes: one as the library comes, one in which
the C library still gives freed memory back to the kernel at once. Each draws batches from the bundled flow and tells
the median seconds, and the pages that the kernel had to provide meanwhile.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import torch
from common import parser, write_results
from tqdm import tqdm

SIDES = ("as it comes", "glibc's own limits")
# Not in this file: what it imports has the library imported, and the limits moved, by then.
CHILD = """
import json, resource, statistics, sys, time, types
side, batch, times, threads = sys.argv[1], *map(int, sys.argv[2:])
if side != "as it comes":
    stub = sys.modules["glem_augment.flows.host_memory"] = types.ModuleType("host_memory")
    stub.keep_freed_memory = lambda: None
import torch
from glem_augment import GLEM
torch.set_num_threads(threads)
model, classes, taken = GLEM.from_pretrained("bundled:fashion-mnist"), torch.arange(batch) % 10, []
for _ in range(2):
    model.sample(classes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(times):
    began = time.perf_counter()
    model.sample(classes)
    taken.append(time.perf_counter() - began)
pages = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times
print(json.dumps({"seconds": statistics.median(taken), "pages": pages}))
"""


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--batches", type=int, nargs="+", default=[32, 256], help="images per batch (%(default)s)")
    args.add_argument("--rounds", type=int, default=7, help="pairs of processes (%(default)s)")
    args.add_argument("--times", type=int, default=10, help="batches that each draws (%(default)s)")
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for batch in args.batches:
        got: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for index in tqdm(range(args.rounds), desc=f"batches of {batch}"):
            for side in SIDES if index % 2 else SIDES[::-1]:
                numbers = (batch, args.times, torch.get_num_threads())
                command = [sys.executable, "-c", CHILD, side, *map(str, numbers)]
                got[side].append(json.loads(subprocess.check_output(command, text=True)))
        ours = [run["seconds"] for run in got[SIDES[0]]]
        for side in SIDES:
            taken = [run["seconds"] for run in got[side]]
            rows.append(
                {
                    "batch": batch,
                    "side": side,
                    "median ms": 1e3 * statistics.median(taken),
                    "median ratio": statistics.median(a / b for a, b in zip(taken, ours, strict=True)),
                    "fresh pages per batch": statistics.median(run["pages"] for run in got[side]),
                }
            )
    title = "Sampling, and memory that goes back to the kernel"
    write_results(args.out, "host_memory", title, rows, rounds=args.rounds)


if __name__ == "__main__":
    main()
