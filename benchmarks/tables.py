"""The tables of README.md, docs/ and benchmarks/results, each a few lines on the stored rows.

Verdicts are the words of an interval (`common.Interval.verdict`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

from benchmarks.common import Interval, Rows, holm, interval, paired
from benchmarks.paper.tables import CLAIMS, ROLES, TITLES, cells_of
from benchmarks.proof.augmentation.choice import FAMILIES, KINDS, Task, comparisons, family_means, over
from benchmarks.proof.augmentation.settings import fixed_move
from glem_augment import GLEM
from glem_augment.hub.cards import table_row
from glem_augment.model.files import bundled_models

Lines = Iterator[Iterable[str]]
TABLES: dict[str, tuple[str, str, Callable[[], Lines]]] = {}  # title, head, and a function that gives the lines
rows = cache(Rows)


def table(name: str, title: str, head: str) -> Callable[[Callable[[], Lines]], Callable[[], Lines]]:
    """Register a table; `head` has the columns, with | between them."""

    def register(make: Callable[[], Lines]) -> Callable[[], Lines]:
        TABLES[name] = title, head, make
        return make

    return register


def mean(values: dict[str, float], digits: int = 1, factor: float = 1.0, seeds: Iterable[str] | None = None) -> str:
    """Mean and half its 95 % interval, or the only value; empty without values. `seeds`: of these alone."""
    found = [factor * value for seed, value in values.items() if seeds is None or seed in seeds]
    return f"{found[0]:.{digits}f}" if list(values) == [""] else interval(found).text(digits) if found else ""


def cell(study: str, setting: str, arm: str, metric: str, split: str = "test", digits: int = 1, factor: int = 1) -> str:
    return mean(rows(study).values(setting, arm, metric, split), digits, factor)


def gained(gain: Interval | None) -> str:
    """A difference, bold if its interval is above zero."""
    text = gain.text(sign=True) if gain else ""
    return f"**{text}**" if gain and gain.clear else text


# ---- models ----------------------------------------------------------------------------------------------------------


@cache
def bundled() -> list[dict[str, str]]:
    found = [{"name": f"`bundled:{n}`", **table_row(GLEM.from_pretrained(f"bundled:{n}"))} for n in bundled_models()]
    return [row | {"made by": f"`{row['made by']}`"} for row in found]


@table("models/brief", "Models in the package", "name | size | flow | accuracy | licence")
def _() -> Lines:
    yield from ([row[name] for name in ("name", "size", "flow", "accuracy", "licence")] for row in bundled())


@table("models/files", "All facts of the models in the package", " | ".join(bundled()[0]))
def _() -> Lines:
    yield from (row.values() for row in bundled())


@table("models/measured", "On test images", "images | model | accuracy, % | nats per number | bits/dim | ECE | decoded")
def _() -> Lines:
    columns = (("accuracy", 1, 100), ("nats_per_number", 3, 1), ("bits_per_dim", 3, 1), ("ece", 3, 1))
    for images in rows("models").settings():
        for arm in dict.fromkeys(arm for arm, split, *_ in rows("models").arms(images) if split == "test"):
            values = (cell("models", images, arm, metric, "test", *more) for metric, *more in columns)
            psnr, most = (cell("models", images, arm, f"round trip: {m}", "test", 3) for m in ("psnr", "max_error"))
            error = f"PSNR {float(psnr):.1f} dB" if psnr else f"at most {most} levels off" if most else ""
            yield [images, f"`{arm}`" if ":" in arm else arm, *values, error]


# ---- classes from few images -----------------------------------------------------------------------------------------

FEW = (5, 20, 50, 100, 300, 1000)


@table("fit/few", "Accuracy by images of each class", "test images | " + " | ".join(f"{n:,} per class" for n in FEW))
def _() -> Lines:
    for setting in rows("fit").settings():
        yield [setting, *(cell("fit", setting, f"{n:,} per class", "accuracy") for n in FEW)]


@table(
    "fit/flow", "Accuracy on ten other classes (Imagenette at 64 pixels), in %", "latents | 20 per class | 50 per class"
)
def _() -> Lines:
    for words, flow in (("TAEF2 with the public prior", ""), ("`bundled:tiny-imagenet`", "bundled:tiny-imagenet ")):
        arms = (f"{flow}{n} per class" for n in (20, 50))
        yield [words, *(cell("fit", "imagenette-64", arm, "accuracy") for arm in arms)]


# ---- private sets ----------------------------------------------------------------------------------------------------

SETS = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "imagenette128": "Imagenette, 64 pixels",
        "pneumoniamnist": "PneumoniaMNIST"}  # fmt: skip
EPSILONS = ("1", "3", "10")
PROMISES = "ε = 1 | ε = 3 | ε = 10"
SIZES = {"fashion-mnist": (100, 300, 2000, 6000), "cifar10": (100, 300, 2000, 5000),
         "pneumoniamnist": (100, 300, 1200)}  # fmt: skip
USUAL = "fashion-mnist", "cifar10"  # as published
METHODS = {"predict": "ours", "linear layer": "linear layer"}


def private(arm: str, data: str, size: int, epsilon: str) -> str:
    """Accuracy of an arm; of a linear layer, whose name has its trial in brackets, the trial with test rows."""
    for name, split, metric, values in rows("private").arms(f"{data} images={size} epsilon={epsilon} delta=1e-05"):
        if (name.partition("(")[0], split, metric) == (arm, "test", "accuracy"):
            return mean(values)
    return ""


@table("private/brief", "`predict` of private models: accuracy on real test images in %, δ = 1e-5; not private: "
       "`predict` of models of as many images without a promise",
       f"images | of each class | {PROMISES} | not private, as many images")  # fmt: skip
def _() -> Lines:
    for data, size in ((each, size) for each in USUAL for size in (SIZES[each][1], SIZES[each][-1])):
        own = (private("predict", data, size, epsilon) for epsilon in EPSILONS)
        yield [SETS[data], f"{size:,}", *own, cell("private", f"{data} images={size}", "not private", "accuracy")]


@table("private/methods", "Ours, `predict`, beside a linear layer, trained with the same promise on the same latents, "
       "δ = 1e-5: accuracy on real test images in %", "images | of each class | " + " | ".join(
           f"{words}, ε = {epsilon}" for epsilon in EPSILONS for words in METHODS.values()))  # fmt: skip
def _() -> Lines:
    for data, size in ((data, size) for data, sizes in SIZES.items() for size in sizes):
        yield [SETS[data], f"{size:,}", *(private(arm, data, size, e) for e in EPSILONS for arm in METHODS)]


@table("private/published", "All training images, δ = 1e-5: ours beside published methods, accuracy in %",
       f"images | method | {PROMISES}")  # fmt: skip
def _() -> Lines:
    for data in USUAL:
        yield [SETS[data], "ours: `predict`", *(private("predict", data, SIZES[data][-1], e) for e in EPSILONS)]
        found = [rows("private").arms(f"{data} epsilon={epsilon}") for epsilon in EPSILONS]
        names = [{arm: mean(values) for arm, split, _, values in arms if split == "published"} for arms in found]
        for arm in dict.fromkeys(arm for each in names for arm in each):
            yield [SETS[data], arm, *(each.get(arm, "") for each in names)]


@table("private/audit", "What attacks prove: ε is at least so much with 95 % confidence, for the worst of the canaries",
       "attacked | images of a class | promised ε | of any mechanism | of Gaussian noise")  # fmt: skip
def _() -> Lines:
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in (row for row in rows("private").all if row["split"] == "audit" and ":" in row["metric"]):
        images, _, epsilon = row["setting"].partition(" delta")[0].partition(" epsilon=")
        least = found.setdefault((row["arm"], images.removeprefix("images="), epsilon), {})
        kind = row["metric"].partition(":")[0]
        least[kind] = max(least.get(kind, 0.0), float(row["value"]))
    for key, least in found.items():
        yield [*key, f"{least['any mechanism']:.2f}", f"{least['Gaussian']:.2f}"]


# ---- drawn beside real images ----------------------------------------------------------------------------------------

DRAWN = {"cifar10": "CIFAR-10", "fashion": "Fashion-MNIST", "photographs": "photographs, 64 pixels"}
WITHOUT_MODEL = ("real", "ColorJitter", "tuned stack", "tuned stack, equal time", "logit adjustment, ColorJitter")
ADVISED, SHORT = "half drawn, ColorJitter", ", a third of the steps"
LAST_LAYER = "Tiny ImageNet's network, last layer"


@cache
def drawn(metric: str = "accuracy") -> dict[str, dict[str, dict[str, float]]]:
    """Test rows by data with images per class, arm and seed; without a number of steps, the older, short runs."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in rows("drawn").settings():
        data, per_class = name.partition("/")[0].split("-")
        arms = {arm: values for arm, *what, values in rows("drawn").arms(name) if what == ["test", metric]}
        short = name.endswith("cnn")
        found.setdefault(f"{DRAWN[data]}, {per_class}{SHORT if short else ''}", {}).update(arms)
    return {name: found[name] for name in sorted(found, key=lambda n: SHORT in n) if ADVISED in found[name]}


def best_without_model(arms: dict[str, dict[str, float]]) -> str:
    """The other stack that is best on the test images, which favours it."""
    return max((arm for arm in WITHOUT_MODEL if arm in arms), key=lambda arm: over(arms[arm], arms[ADVISED]))


@table("drawn/brief", "Half of each batch drawn from a fit to the real images, with ColorJitter: accuracy of a small "
       "network in %, gains in points",
       "real images, of each class | best other stack | half drawn | gain | `predict`, no network | "
       "Tiny ImageNet's network, last layer")  # fmt: skip
def _() -> Lines:
    for name, arms in drawn().items():
        if SHORT not in name:
            ours, best = arms[ADVISED], arms[best_without_model(arms)]
            others = (arms.get(arm, {}) for arm in ("predict", LAST_LAYER))
            yield [name, mean(best), mean(ours), gained(paired(ours, best)), *map(mean, others)]


@table("drawn/arms", "Accuracy on real test images in %, by data and real images of each class",
       " | ".join(["arm", *drawn()]))  # fmt: skip
def _() -> Lines:
    for arm in dict.fromkeys(arm for arms in drawn().values() for arm in arms):
        yield [arm, *(mean(arms.get(arm, {})) for arms in drawn().values())]


@table("drawn/seconds", "CPU seconds of an arm, with the fit and the draws if it is the first that needs them",
       " | ".join(["arm", *drawn("CPU-s")]))  # fmt: skip
def _() -> Lines:
    found = drawn("CPU-s").values()
    for arm in dict.fromkeys(arm for arms in found for arm in arms):
        yield [arm, *(mean(arms.get(arm, {}), 0) for arms in found)]


@table("drawn/gains", "Gains of drawn images with ColorJitter in points, bold if clear",
       "real images, of each class | over crop + flip | over ColorJitter | over the tuned stack | over equal time | "
       "over logit adjustment | over linear layer | over `predict` | over Tiny ImageNet's last layer")  # fmt: skip
def _() -> Lines:
    for name, arms in drawn().items():
        others = (*WITHOUT_MODEL, "linear layer", "predict", LAST_LAYER)
        yield [name, *(gained(paired(arms[ADVISED], arms.get(other, {}))) for other in others)]


@table("drawn/trials", "Trials on validation images, CIFAR-10, 50 images of each class, one seed: accuracy in %",
       "trial, of half drawn if no network is named | accuracy")  # fmt: skip
def _() -> Lines:
    for setting in rows("drawn").settings():
        found = rows("drawn").arms(setting)
        yield from ([arm, mean(values)] for arm, *what, values in found if what == ["validation", "accuracy"])


# ---- samples and augmentation ----------------------------------------------------------------------------------------

SHOWN = {"real": "the real images", "real images=5000": "5,000 real images", "real images=1000": "1,000 real images",
         "bundled rfcm T=0.85 parts=32": "the bundled flow, 32 parts", "identity rfcm T=1 parts=64": "pixels, 64 parts",
         "bundled rfcm T=0.9": "the bundled flow", "taef2 rfcm rank=full T=1": "TAEF2's latents"}  # fmt: skip


@table("samples/alone", "A ResNet trained on samples alone for 8 epochs of 20,000: accuracy on real test images in %",
       "data | trained on | accuracy | of the real images'")  # fmt: skip
def _() -> Lines:
    for data, arm in ((data, arm) for data in rows("samples").settings() for arm in SHOWN):
        values, real = (rows("samples").values(data, each, "CNN-A") for each in (arm, "real"))
        if values and (arm, data) != ("bundled rfcm T=0.9", "fashion-mnist"):
            share = interval(values.values()).mean / interval(real.values()).mean
            yield [SETS[data], SHOWN[arm], mean(values), f"{share:.2f}"]


@table("samples/recognised", "Drawn images to which a classifier of all real training images gives the class that was "
       "asked for, in %", "data | drawn from | drawn images | its accuracy on real images")  # fmt: skip
def _() -> Lines:
    for data in rows("samples").settings():
        for arm in dict.fromkeys(arm for arm, _, metric, _ in rows("samples").arms(data) if metric == "recognised"):
            values = (cell("samples", data, arm, metric) for metric in ("recognised", "judge"))
            yield [SETS[data], f"`{arm.removesuffix(' judged')}`", *values]


@cache
def tasks() -> list[Task]:
    names = [name for name in rows("augmentation").settings() if name.endswith(("/cnn", "/resnet"))]
    found = (Task(name, rows("augmentation")) for name in names)
    return [task for task in found if task.base]


compared = cache(lambda: comparisons(tasks()))
VERDICTS = "comparison | settings | above zero | clear | clear after Holm | mean over families | verdict"


@table("augmentation/verdicts", "Gains in points of test accuracy; a family's mean is over its data sets", VERDICTS)
def _() -> Lines:
    for name, gains in compared().items():
        found = list(gains.values())
        sure = [p < 0.05 and g.mean > 0 for p, g in zip(holm([g.chance for g in found]), found, strict=True)]
        counts = len(found), sum(g.mean > 0 for g in found), sum(g.clear for g in found), sum(sure)
        over_all = interval(family_means(gains).values())
        if over_all.seeds > 1:  # families: one alone tells nothing of others
            yield [name, *map(str, counts), over_all.text(2, sign=True), over_all.verdict]


THREE = list(dict.fromkeys(FAMILIES.values()))


@table("augmentation/brief", "Moves of pixels over the best tuned stack of other augmentations, gain in points",
       " | ".join(["moves", *THREE, "mean of the three", "verdict", "clear settings"]))  # fmt: skip
def _() -> Lines:
    for name, gains in compared().items():
        if name.startswith("`"):
            families, clear = family_means(gains), sum(gain.clear for gain in gains.values())
            over_all, each = interval(families.values()), (f"{families[n]:+.1f}" for n in THREE)
            yield [name.split(" of ")[0], *each, over_all.text(sign=True), over_all.verdict, f"{clear} of {len(gains)}"]


def short(arm: str) -> str:
    return re.sub(r"\([^)]*\)|@\S+", "", arm).replace("cropflip + ", "").replace("cropflip", "crop + flip")


@table("augmentation/rows", "Each setting: gains over the best other stack in points, bold if clear",
       " | ".join(["setting", "best other stack, %", *(f"flow of {kind}" for kind in KINDS.values()),
                   "pixels' modes, tuned", "Adversarial 0.25", "Noise 0.5", "seeds"]))  # fmt: skip
def _() -> Lines:
    for task in tasks():
        moved = task.final[task.tuned() or task.base]
        stack, values = task.strongest(moved)
        found = [compared().get(f"flow of {kind}, over the best other stack", {}) for kind in KINDS.values()]
        flows = ("; ".join(gained(g) for w, g in gains.items() if w.startswith(f"{task.name}/")) for gains in found)
        own = task.gain(task.tuned()), task.fixed("adversarial"), task.fixed("noise")
        base = f"{over(values, moved):.1f} ({short(stack)})"
        yield [f"`{task.name}`", base, *flows, *map(gained, own), str(len(moved))]


@table("augmentation/no_network", "Few labels without a network beside the small CNN: accuracy in %, gains in points",
       "setting | HOG + ridge | label spreading | best stack | moves | moves over ridge | over spreading")  # fmt: skip
def _() -> Lines:
    for task in (task for task in tasks() if task.classifier == "cnn"):
        arms = rows("augmentation").arms(f"{task.setting.name}/no network")
        found = [{seed: 100 * value for seed, value in values.items()} for *_, values in arms]
        unlabelled = [flow for flow in task.setting.proof if flow.endswith("unlabelled")]
        arm = task.best(unlabelled) or task.best(task.setting.proof) or task.tuned()
        if found and arm:
            ours, sides = task.final[arm], (*found, task.strongest(task.final[arm])[1], task.final[arm])
            texts = (mean(side, seeds=found[0]) for side in sides)
            yield [f"`{task.setting.name}`", *texts, *(gained(paired(ours, other)) for other in found)]


@table("augmentation/longer", "`Adversarial(strength=0.25)` of pixels beside 1.4 times the steps without moves. The "
       "settings were chosen by test gains; the longer training is in float32, the other arms in bfloat16",
       "setting | best stack | its accuracy, % | 1.4 times the steps | moves | over more steps | verdict")  # fmt: skip
def _() -> Lines:
    for task in tasks():
        for arm, values in task.longer.items():
            known, fixed = {**task.final, **task.recipe}, f" + {fixed_move('adversarial')}"
            moved = next(v for name, v in known.items() if name.endswith(fixed) and set(values) <= set(v))
            sides = (mean(side, seeds=values) for side in (known[arm], values, moved))
            gain = interval(moved[seed] - values[seed] for seed in values)
            yield [f"`{task.setting.name}`", short(arm), *sides, gained(gain), gain.verdict]


@table("augmentation/pretrained", "A pretrained EfficientNet-Lite0 as linear probe, CIFAR-10 at 128x128: accuracy in %",
       "images of each class | image | flip | ordinary views | pixels' modes | TAEF2's modes | flow")  # fmt: skip
def _() -> Lines:
    for name in (name for name in rows("augmentation").settings() if name.endswith("/linear probe")):
        values = [mean(values, factor=100) for *_, values in rows("augmentation").arms(name)]
        yield [name.removeprefix("cifar10-").partition("/")[0], *values]


@table("augmentation/photographs", "Imagenette at 64 pixels, 20 images of each class, a small ResNet: accuracy in %",
       "stack | accuracy | over crop + flip | over ColorJitter 0.2 | over ColorJitter 0.4 | verdict")  # fmt: skip
def _() -> Lines:
    found = rows("augmentation").arms("imagenette64-20/small resnet")
    arms = {arm: values for arm, split, _, values in found if split == "test"}
    for arm, values in arms.items():
        bases = (
            "crop + flip",
            "ColorJitter 0.2",
            "ColorJitter 0.4",
        )  # validation chose 0.2; 0.4 was best on test images
        gains = [None if arm == base else paired(values, arms[base]) for base in bases]
        yield [arm, mean(values), *map(gained, gains), gains[2].verdict if gains[2] else ""]


# ---- speed and the paper ---------------------------------------------------------------------------------------------

WIDTHS = [name for name in rows("speed").settings() if name.endswith("px")]


def limit_of(what: str) -> float:
    """The limit of a ratio, such as "train / its networks": of another library 1, of the published flow 1 / 1.1."""
    operation, other = what.split(" / ")
    own = {"train": 1.4, "decode": 1.25}
    return own.get(operation, math.inf) if other == "its networks" else 1 / 1.1 if "published" in other else 1.0


@table("speed/limits", "CPU time of our flow over another with the same networks, with half the ratio's 95 % interval",
       "case | time of ours over | ratio | noise | limit | met")  # fmt: skip
def _() -> Lines:
    for row in (row for row in rows("speed").all if row["split"] == "flow" and row["metric"] == "ratio"):
        case, arm, ratio = row["setting"], row["arm"], float(row["value"])
        noise, limit = rows("speed").values(case, arm, "noise", "flow")[""], limit_of(arm)
        met = "yes" if ratio - noise <= limit else "**no**"
        yield [f"`{case}`", arm, f"{ratio:.2f}", f"{noise:.2f}", f"{limit:.2f}", met]


@table("speed/step", "What a move adds to a training step (resnet18, batch 32, p = 0.5), in % of the step's CPU time",
       "modes of | mixup | noise | adversarial")  # fmt: skip
def _() -> Lines:
    for size in WIDTHS:
        for codec in ("pixels", "taef2", "flow"):
            arms = (f"{codec}, {policy}" for policy in ("mixup", "noise", "adversarial"))
            cells = [cell("speed", size, arm, "% of the step", "step") for arm in arms]
            yield from [[f"{codec}, {size}", *cells]] * any(cells)


def of_paper(number: int, role: str, arm: str, metric: str) -> dict[str, float]:
    return rows("paper").values(f"table {number}, {role}", arm, metric, "cpu")


def metrics_of(number: int) -> list[str]:
    return list(dict.fromkeys(metric for each in cells_of(number, (1,)) for metric in each.metrics))


def of_table(number: int) -> Lines:
    digits = {"BPD": 2, "FID": 2, "rho-distance": 2, "rho-confusion": 2}
    for each in sorted(cells_of(number, (1, 2, 4, 8)), key=lambda each: each.data):
        values = (mean(of_paper(number, each.data, each.arm, m), digits.get(m, 1)) for m in metrics_of(number))
        yield [ROLES[each.data], each.arm, *values, ", ".join(f"{m} {v:g}" for m, v in each.paper.items())]


for _number, _title in TITLES.items():
    _head = " | ".join(["data", "method", *metrics_of(_number), "printed"])
    table(f"paper/table{_number}", f"Table {_number}: {_title}", _head)(partial(of_table, _number))


@table("paper/claims", "Claims of the paper as differences at this scale, paired over three seeds",
       "claim | data | metric | difference | verdict")  # fmt: skip
def _() -> Lines:
    for claim, number, role, arm, other, metric in CLAIMS:
        ours, others = (of_paper(number, role, name, metric) for name in (arm, other))
        gain, less = interval(value - others[seed] for seed, value in ours.items()), metric == "FID"  # less is better
        better = Interval(-gain.mean, gain.half, gain.seeds) if less else gain
        yield [claim, ROLES[role], metric, gain.text(1 + less, sign=True), better.verdict]
