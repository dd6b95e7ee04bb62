"""Long tails: is it better to fill up rare classes with samples of a flow, or to draw them more often?

    GLEM_DATA=... python benchmarks/proof/long_tails.py

The largest class has 500 labelled images. Other classes have geometrically fewer, down to a hundredth or a tenth. A
flow is trained on these images alone. A small CNN is trained for the same number of steps

    re-sampled  on the real images, with all classes drawn equally often
    identity    on the real images, filled up to the largest class by samples along the modes of the pixels
    flow        on the real images, filled up to the largest class by samples of the flow

each with crop and flip, and with the best of some stacks on top. Validation images with seed 1000 choose the stack
(with re-sampling) and the fill (RFCM at three temperatures, or real images mixed). Each seed then draws other training
images, and is measured on the test images once. Test classes are balanced, so accuracy is balanced accuracy. Stored
rows and flows are not made again.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, Named, Rows, by_seed, interval, parser, processors, publish, table, usage
from benchmarks.proof.augmentation.data import Task, make_task
from benchmarks.proof.augmentation.ops import Component
from benchmarks.proof.augmentation.settings import Setting
from benchmarks.proof.augmentation.train import accuracy, train
from glem_augment import GLEM, SyntheticDataset
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig, Trainer

NAME, LARGEST, TUNING_SEED = "long_tails", 500, 1000
SHAPES = {"fashion-mnist": (28, 1), "cifar10": (32, 3), "imagenette": (32, 3)}
PLAIN = "crop + flip"
# The best single stacks of `augmentation/run.py` on such data, at their best values, and pairs of these stacks.
JITTER, MIXUP, CUTMIX = ("jitter", {"strength": 0.4}), ("mixup", {"alpha": 1.0}), ("cutmix", {"alpha": 1.0, "p": 0.5})
TRIVIAL = ("trivial", {"p": 0.75})
STACKS: dict[str, tuple[Component, ...]] = {
    " + ".join([PLAIN, *(name for name, _ in extra)]): (("cropflip", {}), *extra)
    for extra in [(), (JITTER,), (MIXUP,), (CUTMIX,), (TRIVIAL,), (JITTER, MIXUP), (JITTER, CUTMIX), (TRIVIAL, MIXUP)]
}
FILLS: dict[str, dict[str, Any]] = {
    **{f"rfcm T={t}": {"source": "rfcm", "temperature": t} for t in (0.5, 0.75, 1.0)},
    "mixup": {"source": "mixup"},
}
SOURCES, BATCH, FLOW_IMAGES = ("identity", "flow"), 64, 30_000


class LongTail:
    """One data set and imbalance; flows stay in `work`."""

    def __init__(self, data: str, imbalance: int, work: Path) -> None:
        size, channels = SHAPES[data]
        name = f"{data}-long-tail-{imbalance}"
        self.setting = Setting(name, data, LARGEST, size, channels, (), imbalance=imbalance)
        self.work = work

    def flow(self, source: str, task: Task, seed: int) -> GLEM:
        """The pixels or a flow, with the RFCM of the task's training images."""
        images = ImageData.from_tensors(*task.train, task.classes, name=self.setting.name)
        if source == "identity":
            return GLEM.create("identity", images.image_shape, task.classes).adapt(images)
        place = self.work / f"{self.setting.name}-{seed}"
        if not (place / "model.safetensors").is_file():
            config = TrainConfig(
                preset="glow_fast", epochs=FLOW_IMAGES // len(images), batch_size=32, lr=0.005,
                schedule="cosine", augment=("flip", "crop"), val_fraction=0.0, sample_every=0, threads=1, seed=seed,
            )  # fmt: skip
            Trainer(images, config, place, resume=place.is_dir(), device="cpu").fit()
        return GLEM.from_pretrained(place)

    def measure(self, source: str, fill: str, stack: str, seed: int) -> float:
        """Accuracy in percent on the test images, or on the validation images with the tuning seed."""
        task = make_task(self.setting, seed)
        x, y = task.train
        if source != "re-sampled":
            real = ImageData.from_tensors(x, y, task.classes)
            model = self.flow(source, task, seed)
            made = SyntheticDataset(model, "balance", seed=seed, real=real, **FILLS[fill])
            x = torch.cat([x, made.images(range(len(made)))])
            y = torch.cat([y, torch.tensor(made.targets)])
        steps, components = self.setting.steps["cnn"], list(STACKS[stack])
        network = train("cnn", (x, y), len(task.classes), components, _no_flow, steps, BATCH, seed, bf16=False)[0]
        return 100 * accuracy(network, task.val if seed == TUNING_SEED else task.test)


def _no_flow(name: str, pooled: bool) -> GLEM:
    raise AssertionError("no stack here goes through a flow")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and gains over the best stack with re-sampling and over the pixels' samples, paired by seed."""
    lines = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name and row["seed"] != TUNING_SEED]
        found: dict[tuple[str, str], dict[int, float]] = {}
        for row in own:
            found.setdefault((row["source"], row["stack"]), {})[row["seed"]] = row["value"]
        best = found.get(("re-sampled", next((s for _, s in found if s != PLAIN), PLAIN)), {})
        for (source, stack), values in found.items():
            line: dict[str, Any] = {"setting": name, "training images": source, "stack": stack, "seeds": len(values)}
            line["fill"] = next(row["fill"] for row in own if row["source"] == source)
            line["balanced accuracy %"] = str(interval(values.values()))
            pixels = found.get(("identity", stack), {}) if source == "flow" else {}
            for heading, other in (("over the best re-sampled", best), ("over identity", pixels)):
                gains = [values[seed] - other[seed] for seed in values if seed in other and other is not values]
                line[heading] = interval(gains).text(2, sign=True) if gains else ""
            lines.append(line)
    return lines


def numbers(rows: list[dict[str, Any]]) -> Named:
    """The table of the documentation: each side with its better stack."""
    found, lines = by_seed([row for row in rows if row["seed"] != TUNING_SEED], "setting", "source", "stack"), []
    for setting in dict.fromkeys(setting for setting, *_ in found):
        line = [setting.replace("-long-tail-", ", ") + " to 1"]
        for source in ("re-sampled", "identity", "flow"):
            own = [v for (s, o, _), v in found.items() if (s, o) == (setting, source)]
            best = max((interval(v.values()) for v in own), key=lambda i: i.mean)
            line.append(f"{best.text()} %")
        lines.append([*line, str(best.seeds)])
    yield (
        "long tails",
        table("data | drawn equally often | filled up by the pixels' modes | filled up by a flow | seeds", lines),
    )


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The page of the rows."""
    return {
        "title": "Long tails, filled up or re-sampled",
        "command": usage(__doc__),
        "measured on": processors(rows),
        "rows": summary(rows),
        "Choices, on validation images": [row for row in rows if row["seed"] == TUNING_SEED],
    }


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--data", nargs="+", choices=SHAPES, default=["fashion-mnist", "cifar10"])
    args.add_argument("--imbalance", nargs="+", type=int, default=[100, 10])
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    args.add_argument("--work", type=Path, default=ROOT / "runs" / NAME, help="folder for flows (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows(args.out / f"{NAME}.json")
    for data, imbalance in itertools.product(args.data, args.imbalance):
        task = LongTail(data, imbalance, args.work)

        def value(source: str, fill: str, stack: str, seed: int, task: LongTail = task) -> float:
            known = {"setting": task.setting.name, "source": source, "fill": fill, "stack": stack, "seed": seed}
            return rows.row(known, lambda: {"value": task.measure(source, fill, stack, seed)})["value"]

        best = max(STACKS, key=lambda stack: value("re-sampled", "", stack, TUNING_SEED))  # noqa: B023
        fills = {"re-sampled": ""}
        for source in SOURCES:
            fills[source] = max(FILLS, key=lambda fill: value(source, fill, PLAIN, TUNING_SEED))  # noqa: B023
        for seed, (source, fill), stack in itertools.product(args.seeds, fills.items(), dict.fromkeys((PLAIN, best))):
            value(source, fill, stack, seed)
    publish(args.out, NAME, report(rows.all()), rows.all())


if __name__ == "__main__":
    main()
