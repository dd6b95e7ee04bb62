"""How much do images drawn from a fit to few real images help a network that is trained on them?

    python benchmarks/proof/drawn.py --part validation               # the trials, at cifar10-50
    python benchmarks/proof/drawn.py cifar10-50 cifar10-20 --seeds 3  # stored rows are skipped

A row is the accuracy in % of one arm on 5,000 test images at most. A seed draws the real images, and decides weights,
order and draws. All arms of a seed have the same real images, steps and batches of 64, and one network: the "strided
cnn" of `augmentation/train.py`, in bfloat16. All arms crop and flip. `GLEM.fit(images, autoencoder="taef2")` sees the
same real images and nothing else. 1,000 images per class are drawn from it once, and each image of a batch is replaced
by a drawn image of its class with probability 1/2. Moved images are four copies of each real image, moved by `Mixup()`,
in the place of drawn ones. ColorJitter draws once for four images of a batch.

Trials: the tuned stack was chosen among 29 stacks of other augmentations by `augmentation/run.py`, on its validation
images, with 500 steps of the "cnn": at cifar10-50 for CIFAR-10 with any number of images, at fashion-20 and fashion-50,
and at imagenette32-50 for photographs. The same validation images, which no seed draws, chose for drawn images at
cifar10-50 first, with 1,200 steps and 192 draws per class, the strength of samples' covariances, temperature and share
among 8; then steps and draws, and whether drawn images have the fit's posterior as labels (`TRIALS`). Other arms had
trials only there: "real", ColorJitter and the tuned stack gain nothing by more than 1,200 steps. The penalty of the
linear layer on the standardised latents of the real images is chosen out of five on validation images.

In "cifar10-500 to 5" the classes fall geometrically from 500 to 5 real images. Arms draw all classes equally often, but
logit adjustment takes the images as they are. "Filled up" replaces images of a class by drawn ones, as often as if the
class had been filled up to the size of the largest.

"Tiny ImageNet's network" is for those who say that the prior of `GLEM.fit` has seen Tiny ImageNet: a ResNet18 with a
quarter of the channels, trained on its 100,000 images at 32 pixels (`KNOWN_STEPS` steps of 64) until --work has it.
Its last layer alone is fitted as the linear layer is, or all of it is fine-tuned with ColorJitter, for half the steps,
at the rate that validation images chose out of `RATES`. A row has the CPU seconds of its arm, with the fit and draws if
the arm is the first of its seed that needs them. "Equal time" trains `LONGER` times as many steps.

Stored rows of "strided cnn" without a number of steps were measured by the code of commit 07f427a9.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, parser
from benchmarks.proof import few_images
from benchmarks.proof.augmentation.data import images, images_of, make_task, split_rows, train_rows
from benchmarks.proof.augmentation.ops import Pool, as_float
from benchmarks.proof.augmentation.settings import Setting, stack_of
from benchmarks.proof.augmentation.train import LR, Classifier, accuracy, train
from glem_augment import GLEM, GLEMAugment, Mixup, SyntheticDataset
from glem_augment.io import atomic_write

STUDY, TUNED_AT = "drawn", "cifar10-50"
NETWORK, KNOWN = "strided cnn", "resnet"
KNOWN_STEPS = 8000


def _setting(
    name: str, data: str, per_class: int, size: int, channels: int, steps: int, imbalance: float = 1.0
) -> Setting:
    return Setting(name, data, per_class, size, channels, (), None, imbalance, {NETWORK: steps, KNOWN: steps // 2})


SETTINGS = {
    setting.name: setting
    for setting in (
        _setting("cifar10-50", "cifar10", 50, 32, 3, 3600),
        _setting("cifar10-20", "cifar10", 20, 32, 3, 2400),
        _setting("fashion-20", "fashion-mnist", 20, 28, 1, 2400),
        _setting("fashion-50", "fashion-mnist", 50, 28, 1, 2400),
        _setting("photographs-50", "imagenette", 50, 64, 3, 2100),
        _setting("cifar10-300", "cifar10", 300, 32, 3, 3600),
        _setting("cifar10-500 to 5", "cifar10", 500, 32, 3, 3600, 100.0),
    )
}
LATENTS = {"cifar10": "cifar10", "fashion-mnist": "fashion-mnist", "imagenette": "imagenette-64"}  # of `few_images`
SEED, TRIAL_SEED = 300, 1300
TEST_IMAGES, COPIES, EACH = 5000, 4, 1000
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SHARE, RATE, LONGER = 0.5, 3e-3, 1.8
RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Arm:
    """A stack of augmentations, and which share of a batch is replaced by what.

    share: None fills every class up to the size of the largest.
    source: "drawn" images; "soft", with the fit's posterior of the image as label; "moved" images.
    longer: so many times the steps. adjust: logit adjustment. rate: of fine-tuning Tiny ImageNet's network.
    """

    stack: str
    share: float | None = 0.0
    source: str = "drawn"
    longer: float = 1.0
    adjust: bool = False
    rate: float | None = None


PLAIN, JITTER = "cropflip", "cropflip + jitter(strength=0.4,each=4)"
CIFAR_STACK = f"{JITTER} + cutmix(p=0.25)"
TUNED = {
    **dict.fromkeys(("cifar10-50", "cifar10-20", "cifar10-300", "cifar10-500 to 5"), CIFAR_STACK),
    "fashion-20": "cropflip + jitter(strength=0.8,each=4) + pixel-adversarial(epsilon=4)",
    "fashion-50": "cropflip + cutmix(p=0.5)",
    "photographs-50": "cropflip + jitter(strength=0.2,each=4) + mixup(alpha=0.5)",
}
ADVISED = "half drawn, ColorJitter"
ARMS = {
    "real": Arm(PLAIN),
    "ColorJitter": Arm(JITTER),
    "tuned stack": Arm("tuned"),
    "half drawn": Arm(PLAIN, SHARE),
    ADVISED: Arm(JITTER, SHARE),
    f"{ADVISED}, soft labels": Arm(JITTER, SHARE, "soft"),
    "half drawn, tuned stack": Arm("tuned", SHARE),
    "drawn alone": Arm(PLAIN, 1.0),
    "half moved": Arm(PLAIN, 0.5, "moved"),
    "tuned stack, equal time": Arm("tuned", longer=LONGER),
    "filled up, ColorJitter": Arm(JITTER, None),
    "logit adjustment, ColorJitter": Arm(f"natural + {JITTER}", adjust=True),
    "Tiny ImageNet's network, fine-tuned": Arm(JITTER, rate=RATE),
}
LAST_LAYER = "Tiny ImageNet's network, last layer"
OF_A_TAIL = ("filled up, ColorJitter", "logit adjustment, ColorJitter")
OF_KNOWN = (LAST_LAYER, "Tiny ImageNet's network, fine-tuned")
WITHOUT_NETWORK = ("predict", "linear layer", LAST_LAYER)
FINE_TUNED = {f"{OF_KNOWN[1]}, rate {rate:g}": replace(ARMS[OF_KNOWN[1]], rate=rate) for rate in RATES}
TRIALS = ("ColorJitter", "tuned stack", ADVISED, f"{ADVISED}, soft labels", "half drawn, tuned stack", *FINE_TUNED)


class Case:
    """The images, the fit and the draws of a setting and a seed, each made when it is first needed."""

    def __init__(self, setting: Setting, seed: int, work: Path | None) -> None:
        self.setting, self.seed, self.work = setting, seed, work
        self.model, self.pool = cache(self._model), cache(self._pool)

    @cached_property
    def task(self):  # noqa: ANN201
        task = make_task(self.setting, self.seed)
        return replace(task, test=self._fewer(*task.test))

    @staticmethod
    def _fewer(*parts: Tensor) -> tuple[Tensor, ...]:
        every = -(-len(parts[0]) // TEST_IMAGES)
        return tuple(part[::every] for part in parts)

    def _model(self) -> GLEM:
        return GLEM.fit(self.task.train, autoencoder="taef2", classes=self.task.classes)

    def _pool(self, source: str) -> tuple[Tensor, Tensor | None]:
        """Images [K, n, C, H, W] to mix into batches, and their soft labels [K, n, K] or None."""
        model, (x, y) = self.model(), self.task.train
        if source == "drawn":
            drawn = SyntheticDataset(model, EACH, seed=self.seed)
            return drawn.images(range(len(drawn))).unflatten(0, (10, EACH)), None
        if source == "moved":
            aug, copies = GLEMAugment(model, Mixup(), 1.0, class_map=range(10), seed=self.seed), []
            for copy in range(COPIES):
                moved, g = torch.empty_like(x), torch.Generator().manual_seed(self.seed + copy)
                for rows in torch.randperm(len(x), generator=g).split(64):
                    moved[rows] = aug(x[rows], y[rows])[0]
                copies.append(moved)
            return torch.stack([torch.cat([copy[y == k] for copy in copies]) for k in range(10)]), None
        images, _ = self.pool("drawn")
        return images, torch.stack([model.posterior(of_class) for of_class in images])

    def trained(self, arm: Arm, test: bool) -> dict[str, float]:
        """Accuracy in % of a network that is trained with this arm."""
        start, began = known(self.work) if arm.rate else None, time.process_time()
        task, stack = self.task, TUNED[self.setting.name] if arm.stack == "tuned" else arm.stack
        counts, change = torch.bincount(task.train[1]), None
        if arm.share != 0.0:
            images, labels = self.pool(arm.source)
            change = Pool(images, 1 - counts / counts.max() if arm.share is None else arm.share, labels)
        network = KNOWN if arm.rate else NETWORK
        found = train(
            network, task.train, len(task.classes), stack_of(stack), lambda *_: self.model(),
            round(arm.longer * self.setting.steps[network]), self.setting.batch, self.seed, True, change,
            start, arm.rate or LR, (counts / counts.sum()).log() if arm.adjust else None,
        )  # fmt: skip
        spent = time.process_time() - began
        return {"accuracy": 100 * accuracy(found, task.test if test else task.val), "CPU-s": spent}

    def last_layer(self) -> dict[str, float]:
        """Accuracy in % of a new last layer of Tiny ImageNet's network, on the test images."""
        body, task = known(self.work), self.task

        @torch.no_grad()
        def features(x: Tensor) -> Tensor:
            standard = ((as_float(part) - body.mean) / body.std for part in x.split(500))
            return torch.cat([body.body.forward_head(body.body.forward_features(s), pre_logits=True) for s in standard])

        parts = [(features(x), y) for x, y in (task.train, task.val, task.test)]
        return {"accuracy": linear(*parts)}

    def without_network(self, arm: str) -> dict[str, float]:
        """Accuracy in % of `predict`, or of a linear layer, on the test images."""
        if arm == LAST_LAYER:
            return self.last_layer()
        setting, name = self.setting, LATENTS[self.setting.data]
        h, y, _ = few_images.latents(name, "train", self.work)
        test, truth = self._fewer(*few_images.latents(name, few_images.SETTINGS[name][1], self.work)[:2])
        if not torch.equal(truth, self.task.test[1]) or not torch.equal(y, images_of(setting, "train")[1]):
            raise SystemExit(f"drawn: the latents in {self.work} are of other images: remove them")
        if arm == "predict":
            codec = self.model().codec  # the latents were made by the same autoencoder, without standardisation
            z = self.model().encode_numbers((test - codec.mean) / codec.std)[0]
            return {"accuracy": share(self.model().latent_classes.posterior(z), truth)}
        rows = torch.from_numpy(train_rows(setting, y, 10, self.seed))
        held = torch.cat([torch.from_numpy(part) for part, _ in split_rows(y, 10)])
        return {"accuracy": linear((h[rows], y[rows]), (h[held], y[held]), (test, truth))}


@cache
def known(work: Path | None) -> Classifier:
    """Tiny ImageNet's network, in the folder `work` once it is trained."""
    place = work / "tiny-imagenet-32.pt" if work else None
    if place and place.is_file():
        return torch.load(place, weights_only=False)
    x, y, classes = images("tiny-imagenet", "train", 32, 3)
    found = train(KNOWN, (x, y), len(classes), stack_of(PLAIN), lambda *_: None, KNOWN_STEPS, 64, 0, True)
    print(f"Tiny ImageNet's network: {100 * accuracy(found, images('tiny-imagenet', 'test', 32, 3)[:2]):.1f} %")
    if place:
        with atomic_write(place) as file:
            torch.save(found, file)
    return found


def linear(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy in % of a linear layer on standardised features; validation images choose the penalty."""
    std, mean = torch.std_mean(train[0].flatten(1), 0)

    def standard(part: Tensor) -> Tensor:
        return (part.flatten(1) - mean) / std.clamp_min(1e-3)

    layers = [logistic(standard(train[0]), train[1], penalty) for penalty in PENALTIES]
    best = max(layers, key=lambda layer: share(layer(standard(val[0])), val[1]))
    return share(best(standard(test[0])), test[1])


def share(scores: Tensor, y: Tensor) -> float:
    """Percent of the rows whose highest score [n, K] is of the class y."""
    return 100 * float((scores.argmax(1) == y).double().mean())


def logistic(x: Tensor, y: Tensor, penalty: float) -> torch.nn.Linear:
    """A linear layer with least cross-entropy plus penalty / 2 times the squared weights."""
    layer = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + penalty / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer.requires_grad_(False)


def main() -> None:
    arguments = parser(__doc__)
    add, every = arguments.add_argument, [*WITHOUT_NETWORK, *ARMS]
    add("settings", nargs="*", metavar="SETTING", help=f"of {', '.join(SETTINGS)} (default: all)")
    add("--part", choices=("test", "validation"), default="test", help="validation: the trials (%(default)s)")
    add("--arms", nargs="+", choices=every, metavar="ARM", default=every, help=f"of {', '.join(every)} (all)")
    add("--seeds", type=int, default=3, help="how many (%(default)s)")
    add("--work", type=Path, help="folder in which latents are kept for the next run")
    args = arguments.parse_args()
    if unknown := set(args.settings) - set(SETTINGS):
        arguments.error(f"unknown settings {sorted(unknown)}; there are {', '.join(SETTINGS)}")
    torch.set_num_threads(args.threads)
    rows, settings, seeds = Rows(STUDY, args.out), args.settings or SETTINGS, range(SEED, SEED + args.seeds)
    if args.part == "validation":
        settings, seeds = [TUNED_AT], range(TRIAL_SEED, TRIAL_SEED + 1)
    for name in settings:
        for seed in seeds:
            case = Case(SETTINGS[name], seed, args.work)
            absent = OF_A_TAIL * (case.setting.imbalance == 1) + OF_KNOWN * (case.setting.data != "cifar10")
            for arm in TRIALS if args.part == "validation" else args.arms:
                if arm in absent:
                    continue
                if arm in WITHOUT_NETWORK:
                    rows.once(f"{name}/no network", arm, seed, args.part, partial(case.without_network, arm))
                else:
                    how = {**ARMS, **FINE_TUNED}[arm]
                    network, measure = KNOWN if how.rate else NETWORK, partial(case.trained, how, args.part == "test")
                    where = f"{name}/{network}, {case.setting.steps[network]} steps"
                    rows.once(where, arm, seed, args.part, measure)


if __name__ == "__main__":
    main()
