"""Samples of the bundled flow of Fashion-MNIST, judged by a classifier of real images.

    python benchmarks/proof/bundled_flow.py [--data IDX_FOLDER] [--model bundled:fashion-mnist]

The judge is a small convolutional network of timm. It is trained here on the 60,000 real training images, without the
flow, and its accuracy on the real test images is reported. There is one row per sampling source and temperature: the
share of samples that the judge assigns to their intended class, with the 95 % interval of the mean over the seeds.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import interval, parser, write_results
from glem_augment import GLEM, open_data
from glem_augment.images.dataset import ImageData


def prepare(x: Tensor) -> Tensor:
    """uint8, or float in [0,1], to the judge's input."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return ((x - 0.286) / 0.353).contiguous(memory_format=torch.channels_last)


def train_judge(data: ImageData, epochs: int, seed: int) -> nn.Module:
    """A resnet10t without the pooling stem, since the images are 28 pixels wide."""
    torch.manual_seed(seed)
    net = timm.create_model("resnet10t", num_classes=len(data.classes), in_chans=data.image_shape[0])
    net.maxpool = nn.Identity()
    net = net.to(memory_format=torch.channels_last)
    batch = 128
    steps = len(data) // batch
    optimizer = create_optimizer_v2(net, opt="adamw", lr=2e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(
        optimizer, t_initial=epochs * steps, warmup_t=steps // 2, warmup_lr_init=1e-5, t_in_epochs=False
    )
    generator = torch.Generator().manual_seed(seed)
    x, y = data.tensor(), torch.from_numpy(data.targets)
    net.train()
    bar = tqdm(total=epochs * steps, desc="judge", unit="step")
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=generator)[: steps * batch].view(steps, batch)
        for index, rows in enumerate(order):
            with torch.autocast("cpu", torch.bfloat16):
                scores = net(prepare(x[rows]))
            loss = F.cross_entropy(scores.float(), y[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step_update(epoch * steps + index + 1)
            bar.update()
    bar.close()
    return net.eval()


@torch.no_grad()
def judge(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(prepare(part)).argmax(1) for part in x.split(500)])


@torch.no_grad()
def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="the four idx files (%(default)s)")
    args.add_argument("--model", default="bundled:fashion-mnist", help="model folder (%(default)s)")
    args.add_argument("--epochs", type=int, default=6, help="of the judge (%(default)s)")
    args.add_argument("--per-class", type=int, default=300, help="samples per class and seed (%(default)s)")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.8, 1.0])
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train, test = open_data(args.data, "train"), open_data(args.data, "test")
    model = GLEM.from_pretrained(args.model)
    x, y = test.tensor(), torch.from_numpy(test.targets)

    with torch.enable_grad():
        net = train_judge(train, args.epochs, seed=0)
    judge_accuracy = float((judge(net, x) == y).float().mean())

    rows = []
    intended = torch.arange(model.num_classes).repeat_interleave(args.per_class)
    for source in ("gaussian", "rfcm"):
        for temperature in args.temperatures:
            shares = []
            for seed in tqdm(range(args.seeds), desc=f"{source} {temperature}"):
                images = model.sample(intended, temperature, torch.Generator().manual_seed(seed), source)
                shares.append(float((judge(net, (images * 255).round() / 255) == intended).float().mean()))
            rows.append(
                {
                    "samples": source,
                    "temperature": temperature,
                    "judged as intended": statistics.mean(shares),
                    "half the 95 % interval": interval(shares).half,
                }
            )
    write_results(
        args.out,
        "bundled_flow",
        "Samples of the bundled flow of Fashion-MNIST, judged by a classifier",
        rows,
        model=str(args.model),
        judge_accuracy=judge_accuracy,
        samples_per_row=f"{args.per_class} per class, {args.seeds} seeds",
    )


if __name__ == "__main__":
    main()
