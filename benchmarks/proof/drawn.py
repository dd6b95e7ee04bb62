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

Stored rows of "strided cnn" without a number of steps were measured by the code of commit 07f427a9.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import Rows, parser
from benchmarks.proof import few_images
from benchmarks.proof.augmentation.data import images_of, make_task, split_rows, train_rows
from benchmarks.proof.augmentation.ops import Pool
from benchmarks.proof.augmentation.settings import Setting, stack_of
from benchmarks.proof.augmentation.train import accuracy, train
from glem_augment import GLEM, GLEMAugment, Mixup, SyntheticDataset

STUDY, TUNED_AT = "drawn", "cifar10-50"
NETWORK = "strided cnn"


def _setting(name: str, data: str, per_class: int, size: int, channels: int, steps: int) -> Setting:
    return Setting(name, data, per_class, size, channels, (), steps={NETWORK: steps})


SETTINGS = {
    setting.name: setting
    for setting in (
        _setting("cifar10-50", "cifar10", 50, 32, 3, 3600),
        _setting("cifar10-20", "cifar10", 20, 32, 3, 2400),
        _setting("fashion-20", "fashion-mnist", 20, 28, 1, 2400),
        _setting("fashion-50", "fashion-mnist", 50, 28, 1, 2400),
        _setting("photographs-50", "imagenette", 50, 64, 3, 2100),
        _setting("cifar10-300", "cifar10", 300, 32, 3, 3600),
    )
}
LATENTS = {"cifar10": "cifar10", "fashion-mnist": "fashion-mnist", "imagenette": "imagenette-64"}  # of `few_images`
SEED, TRIAL_SEED = 300, 1300
TEST_IMAGES, COPIES, EACH = 5000, 4, 1000
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SHARE = 0.5


@dataclass(frozen=True)
class Arm:
    """A stack of augmentations, and which share of a batch is replaced by what.

    source: "drawn" images; "soft", with the fit's posterior of the image as label; "moved" images.
    """

    stack: str
    share: float = 0.0
    source: str = "drawn"


PLAIN, JITTER = "cropflip", "cropflip + jitter(strength=0.4,each=4)"
CIFAR_STACK = f"{JITTER} + cutmix(p=0.25)"
TUNED = {
    **dict.fromkeys(("cifar10-50", "cifar10-20", "cifar10-300"), CIFAR_STACK),
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
}
WITHOUT_NETWORK = ("predict", "linear layer")
TRIALS = ("ColorJitter", "tuned stack", ADVISED, f"{ADVISED}, soft labels", "half drawn, tuned stack")


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
        task, stack = self.task, TUNED[self.setting.name] if arm.stack == "tuned" else arm.stack
        change = None
        if arm.share:
            images, labels = self.pool(arm.source)
            change = Pool(images, arm.share, labels)
        found = train(
            NETWORK, task.train, len(task.classes), stack_of(stack), lambda *_: self.model(),
            self.setting.steps[NETWORK], self.setting.batch, self.seed, True, change,
        )  # fmt: skip
        return {"accuracy": 100 * accuracy(found, task.test if test else task.val)}

    def without_network(self, arm: str) -> dict[str, float]:
        """Accuracy in % of `predict`, or of a linear layer on the latents, on the test images."""
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
        std, mean = torch.std_mean(h[rows].flatten(1), 0)

        def features(part: Tensor) -> Tensor:
            return (part.flatten(1) - mean) / std.clamp_min(1e-3)

        layers = [logistic(features(h[rows]), y[rows], penalty) for penalty in PENALTIES]
        best = max(layers, key=lambda layer: share(layer(features(h[held])), y[held]))
        return {"accuracy": share(best(features(test)), truth)}


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
            trained = f"{name}/{NETWORK}, {case.setting.steps[NETWORK]} steps"
            for arm in TRIALS if args.part == "validation" else args.arms:
                if arm in WITHOUT_NETWORK:
                    rows.once(f"{name}/no network", arm, seed, args.part, partial(case.without_network, arm))
                else:
                    measure = partial(case.trained, ARMS[arm], test=args.part == "test")
                    rows.once(trained, arm, seed, args.part, measure)


if __name__ == "__main__":
    main()
