"""What a user would pick in place of a private set: a classifier of the real images alone, with the same promise.

    pip install '.[opponents]'
    GLEM_DATA=... python benchmarks/proof/private_opponents.py --method probe
    GLEM_DATA=... python benchmarks/proof/private_opponents.py --data fashion-mnist --method dp-sgd --epsilon 1 10

Each has the promise (epsilon, delta), and makes one classifier. Nothing else may be made from the real images
afterwards, whereas private images can be given away and serve every network.

    dp-sgd      the small network with tanh of Papernot et al. 2021, trained by Opacus
    probe       a linear classifier on the latents of private.py, trained by Opacus

Trials are judged on every tenth training image, which then is no private image; the best trial is measured on all real
test images. The choice costs no privacy here, which favours these methods. Stored rows are not measured again. The
stored rows of DP-MERF, which makes images, were measured by the code of commit 309e287.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, Rows, parser
from benchmarks.proof.private import Images, encoded

# Learning rate, epochs, and images of a step; gradients are clipped to the norm 0.1 (Tramèr & Boneh 2021) or 1 (probe).
TRIALS = {
    "dp-sgd": [(2.0, 5, 2048), (2.0, 10, 2048), (4.0, 10, 2048)],
    "probe": [(1.0, 5, 4096), (4.0, 5, 4096), (16.0, 5, 4096), (4.0, 20, 4096)],
}
CLIP = {"dp-sgd": 0.1, "probe": 1.0}


def network(method: str, shape: tuple[int, ...]) -> nn.Module:
    """The network of a method, for images or latents of this shape."""
    if method == "probe":
        return nn.Linear(shape[0], 10)
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], 16, 8, 2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.LazyLinear(32), nn.Tanh(),
        nn.Linear(32, 10),
    ]  # fmt: skip
    net = nn.Sequential(*layers)
    net(torch.zeros(2, *shape))
    return net


def train(
    method: str, x: Tensor, y: Tensor, trial: tuple[float, int, int], promise: tuple[float, float], seed: int
) -> Callable[[Tensor], Tensor]:
    """Train with the promise; the result gives the classes of images or latents."""
    from opacus import PrivacyEngine

    torch.manual_seed(seed)
    lr, epochs, batch = trial
    net = network(method, tuple(x.shape[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus: noise without a secure generator
        engine = PrivacyEngine(accountant="prv")
        net, optimizer, loader = engine.make_private_with_epsilon(
            module=net, optimizer=torch.optim.SGD(net.parameters(), lr, momentum=0.9),
            data_loader=DataLoader(TensorDataset(x, y), batch), target_epsilon=promise[0], target_delta=promise[1],
            epochs=epochs, max_grad_norm=CLIP[method], poisson_sampling=True,
        )  # fmt: skip
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                if len(images):
                    F.cross_entropy(net(images), labels).backward()
                    optimizer.step()
    net = net.eval()

    @torch.no_grad()
    def classes(x: Tensor) -> Tensor:
        return torch.cat([net(part).argmax(1) for part in x.split(1000)])

    return classes


class Task:
    """The private and the judged examples of one data set for one method."""

    def __init__(self, data: str, method: str, work: Path) -> None:
        self.images = Images(data, "taef2", work)
        self.method = method
        y = torch.from_numpy(self.images.train.targets)
        if method == "probe":
            x, y = self.images.latents()
            test = encoded(self.images.base, self.images.judged)
        else:
            x, test = self.images.train.tensor(), self.images.judged.tensor()
        self.x, self.y = self._prepared(x), y
        self.test, self.test_y = self._prepared(test), torch.from_numpy(self.images.judged.targets)

    def _prepared(self, x: Tensor) -> Tensor:
        if self.method == "probe":  # public coordinates with public variance 1, of norm 1
            return F.normalize(x.float() / self.images.prior.sqrt().float())
        return (x.float() / 255 - 0.5) / 0.5 if self.images.name == "cifar10" else (x.float() / 255 - 0.3) / 0.35

    def accuracy(self, trial: Any, promise: tuple[float, float], seed: int, validation: bool) -> float:
        held = torch.arange(len(self.y)) % 10 == 9
        x, y, judged, judged_y = self.x, self.y, self.test, self.test_y
        if validation:
            x, y, judged, judged_y = x[~held], y[~held], x[held], y[held]
        classes = train(self.method, x, y, trial, promise, seed)
        return 100 * float((classes(judged) == judged_y).float().mean())


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", nargs="+", default=["fashion-mnist", "cifar10"], help="of ten classes (%(default)s)")
    args.add_argument("--method", nargs="+", default=["dp-sgd", "probe"], choices=tuple(TRIALS))
    args.add_argument("--epsilon", nargs="+", type=float, default=[0.2, 1, 10])
    args.add_argument("--delta", type=float, default=1e-5)
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="test seeds; trials have seed 100")
    args.add_argument("--work", type=Path, default=ROOT / "runs" / "private", help="folder for latents (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("private", args.out)
    for data, method in itertools.product(args.data, args.method):
        task = Task(data, method, args.work)
        for epsilon in args.epsilon:

            def measured(trial: Any, split: str, seed: int, task: Task = task, epsilon: float = epsilon) -> float:
                setting = f"{task.images.name} epsilon={epsilon:g} delta={args.delta:g}"
                arm, validation = f"{task.method}({','.join(f'{v:g}' for v in trial)})", split == "validation"
                measure = partial(task.accuracy, trial, (epsilon, args.delta), seed, validation)
                return rows.once(setting, arm, seed, split, lambda: {"accuracy": measure()})["accuracy"]

            best = max(TRIALS[method], key=lambda trial: measured(trial, "validation", 100))  # noqa: B023
            for seed in args.seeds:
                measured(best, "test", seed)


if __name__ == "__main__":
    main()
