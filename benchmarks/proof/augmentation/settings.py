"""The settings, flows and methods that `run.py` compares, and the values over which each method is tuned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

FINAL_SEEDS = (0, 1, 2, 3, 4)  # validation rows have the seeds 1000 to 1002
FM_FIVE, CIFAR_FIVE = (0, 2, 4, 6, 8), (0, 1, 2, 3, 4)  # training classes of the flows of "other classes"
# English springer and garbage truck are similar to classes of CIFAR-10 (dog, truck).
IMAGENETTE_APART = (0, 2, 3, 4, 5, 7, 8, 9)


# Training operations under all methods except "none".
PLAIN: dict[str, tuple[str, ...]] = {"cropflip": ("flip", "crop"), "crop": ("crop",)}


@dataclass(frozen=True)
class Setting:
    """A task for a classifier.

    Attributes:
        data: a key of `augmentation.data.PLACES`; classes: indices of the used classes, None for all.
        per_class: labelled images of a class. With `imbalance`, the ratio of the largest to the smallest class, it is
            the size of the largest class, and sizes fall geometrically. All classes are then drawn equally often
            (oversampling), except for the opponent "natural".
        size, channels: of the classifier's images; flow_size: of the flows', by default the same.
        proof: flows that are trained on (a) these labelled images alone ("own") or (b) other images, and adapted.
        steps: of training, per classifier.
        flip: whether images may be mirrored; if not (digits), all stacks begin with the crop alone.
    """

    name: str
    data: str
    per_class: int
    size: int
    channels: int
    proof: tuple[str, ...]
    classes: tuple[int, ...] | None = None
    imbalance: float = 1.0
    steps: dict[str, int] = field(default_factory=lambda: {"cnn": 500, "resnet": 600})
    batch: int = 64
    flow_size: int | None = None
    flip: bool = True

    @property
    def plain(self) -> str:
        """The name in `PLAIN`."""
        return "cropflip" if self.flip else "crop"


def _rest(classes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(c for c in range(10) if c not in classes)


# Flows trained on the other training images, without labels.
UNLABELLED, CIFAR_UNLABELLED, MNIST_UNLABELLED = "fashion-unlabelled", "cifar10-unlabelled", "mnist-unlabelled"
NOTMNIST_UNLABELLED = "notmnist-unlabelled"
GREY = "cifar10-grey28"
MANY, LONG = {"cnn": 800, "resnet": 800}, {"cnn": 1000, "resnet": 1000}
_SETTINGS = (
    Setting("imagenette32-50", "imagenette", 50, 32, 3, ("cifar10",)),
    Setting("imagenette32-20", "imagenette", 20, 32, 3, ("cifar10",)),
    Setting("imagenette32-8of10-50", "imagenette", 50, 32, 3, ("cifar10",), classes=IMAGENETTE_APART),
    Setting("imagenette128-300", "imagenette", 300, 128, 3, ("cifar10-short",), steps=MANY, flow_size=32),
    Setting("fashion-5", "fashion-mnist", 5, 28, 1, (UNLABELLED,)),
    Setting("fashion-10", "fashion-mnist", 10, 28, 1, ("own", GREY, UNLABELLED)),
    Setting("fashion-20", "fashion-mnist", 20, 28, 1, (UNLABELLED,)),
    Setting("fashion-50", "fashion-mnist", 50, 28, 1, (UNLABELLED,)),
    Setting("fashion-100", "fashion-mnist", 100, 28, 1, (UNLABELLED, "own", GREY), steps=LONG),
    Setting("fashion-long-tail-100", "fashion-mnist", 500, 28, 1, (UNLABELLED,), None, 100.0),
    Setting("fashion-long-tail-10", "fashion-mnist", 50, 28, 1, (UNLABELLED,), None, 10.0),
    Setting("fashion-5of10-10", "fashion-mnist", 10, 28, 1, ("fashion-five", UNLABELLED), _rest(FM_FIVE)),
    Setting("mnist-10", "mnist", 10, 28, 1, (MNIST_UNLABELLED, "fashion-mnist"), flip=False),
    Setting("notmnist-10", "notmnist", 10, 28, 1, ("fashion-mnist", NOTMNIST_UNLABELLED), flip=False),
    Setting("cifar10-50", "cifar10", 50, 32, 3, (CIFAR_UNLABELLED, "imagenette32", "own")),
    Setting("cifar10-500", "cifar10", 500, 32, 3, ("imagenette32", CIFAR_UNLABELLED, "own"), steps=LONG),
    Setting("cifar10-5of10-50", "cifar10", 50, 32, 3, ("cifar10-five",), _rest(CIFAR_FIVE)),
    Setting("cifar10-long-tail-100", "cifar10", 500, 32, 3, ("imagenette32",), None, 100.0, LONG),
    Setting("cifar10-long-tail-10", "cifar10", 500, 32, 3, ("imagenette32",), None, 10.0, LONG),
)
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _SETTINGS}
# For a test of the script: bundled images and flow, few steps. It runs only if --settings names it.
SMOKE = Setting("smoke", "bundled", 10, 28, 1, (), steps={"cnn": 12, "resnet": 4}, batch=16)


# ---- flows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowRecipe:
    """A flow that `--train-flow` makes from the training images of some or all classes of a data set.

    Attributes:
        epochs: passes over the images; settings: of `TrainConfig` and `Research`, over `FLOW_SETTINGS`.
        labels: whether to train with labels. Without labels, validation images are left out, too.
    """

    data: str
    size: int
    channels: int
    epochs: int
    classes: tuple[int, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    labels: bool = True


FLOW_SETTINGS: dict[str, Any] = dict(
    preset="mef_tiny", objective="hybrid", joint=False, beta=0.3, ce_scale=0.2, batch_size=48, lr=0.01,
    warmup_steps=200, schedule="cosine", m_steps=20, sigma_lr_scale=5.0, augment=("flip",), precision="bf16",
    sample_every=0, val_fraction=0.02,
)  # fmt: skip
WITHOUT_LABELS: dict[str, Any] = {"objective": "mle", "beta": 0.0, "ce_scale": 1.0}
FLOWS: dict[str, FlowRecipe] = {
    "cifar10": FlowRecipe("cifar10", 32, 3, 8),
    "cifar10-short": FlowRecipe("cifar10", 32, 3, 4),
    "cifar10-five": FlowRecipe("cifar10", 32, 3, 16, CIFAR_FIVE),
    GREY: FlowRecipe("cifar10", 28, 1, 8),
    "fashion-five": FlowRecipe("fashion-mnist", 28, 1, 10, FM_FIVE),
    "fashion-unlabelled": FlowRecipe("fashion-mnist", 28, 1, 6, settings=WITHOUT_LABELS, labels=False),
    "cifar10-unlabelled": FlowRecipe("cifar10", 32, 3, 6, settings=WITHOUT_LABELS, labels=False),
    MNIST_UNLABELLED: FlowRecipe("mnist", 28, 1, 6, settings={**WITHOUT_LABELS, "augment": ()}, labels=False),
    NOTMNIST_UNLABELLED: FlowRecipe("notmnist", 28, 1, 40, settings={**WITHOUT_LABELS, "augment": ()}, labels=False),
    "imagenette32": FlowRecipe("imagenette", 32, 3, 80),
}
BUNDLED = {"fashion-mnist": "bundled:fashion-mnist"}
# Images in the training of "own" in all, shifted and flipped, for any number of different images.
OWN_IMAGES, OWN_SETTINGS = 40_000, {"val_fraction": 0.0, "beta": 0.1}


# ---- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One augmentation and the values over which it is tuned.

    Attributes:
        side: "opponent" or "ours"; every method of ours is also a control, with the identity in place of the flow.
        trials: settings to try; methods with something to tune have equally many on both sides.
        flow: whether it needs a flow. An opponent with a flow is tried with each flow that counts as proof.
    """

    side: str
    trials: tuple[dict[str, Any], ...]
    flow: bool = False


def _each(name: str, *values: Any, **others: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value, **others} for value in values)


METHODS: dict[str, Method] = {
    # Opponents; all except "none" come after crop + flip, or after the crop alone if images must not be mirrored.
    "none": Method("opponent", ({},)),
    "cropflip": Method("opponent", ({},)),
    "crop": Method("opponent", ({},)),
    "natural": Method("opponent", ({},)),  # images of a long tail without oversampling
    "jitter": Method("opponent", _each("strength", 0.2, 0.4, 0.8)),
    "mixup": Method("opponent", _each("alpha", 0.2, 0.5, 1.0)),
    "cutmix": Method("opponent", _each("p", 0.25, 0.5, 1.0, alpha=1.0)),
    "trivial": Method("opponent", _each("p", 0.5, 0.75, 1.0)),
    "erasing": Method("opponent", _each("p", 0.25, 0.5, 0.75)),
    "pixel-adversarial": Method("opponent", _each("epsilon", 2, 4, 8, p=0.5)),
    "latent-noise": Method("opponent", _each("strength", 0.1, 0.2, 0.4, p=0.5), flow=True),
    # Ours: GLEMAugment's policies, before crop + flip, and SyntheticDataset. The basis "shared" has one class.
    "adversarial": Method("ours", _each("strength", 0.25, 0.5, 1.0, policy="adversarial", p=0.5), flow=True),
    "noise": Method("ours", _each("strength", 0.5, 1.0, 2.0, policy="noise", p=0.5), flow=True),
    "mode-mixup": Method("ours", _each("alpha", 0.3, 1.0, 4.0, policy="mixup", p=0.5), flow=True),
    "synthetic": Method("ours", _each("temperature", 0.5, 0.75, 1.0, p=0.25, source="rfcm"), flow=True),
    "mode-mixup-any": Method("ours", _each("alpha", 0.3, 1.0, 4.0, policy="mixup", partner="any", p=0.5), flow=True),
    "noise-shared": Method("ours", _each("strength", 0.5, 1.0, 2.0, policy="noise", basis="shared", p=0.5), flow=True),
    "adversarial-shared": Method(
        "ours", _each("strength", 0.25, 0.5, 1.0, policy="adversarial", basis="shared", p=0.5), flow=True
    ),
}
# The moves along the pixels' modes that the pages advise: the least strengths that were tried.
RECIPES = {name: {**METHODS[name].trials[0], "flow": "identity"} for name in ("adversarial", "noise")}
# An augmented image is used this many times on average, with another crop and flip each time, because on a CPU the flow
# costs more than a small classifier. This holds for every policy and for the control.
REUSE = 4


# ---- names of arms in the store --------------------------------------------------------------------------------------


def _constant(method: str) -> dict[str, Any]:
    """Parameters that all trials of a method share; a name leaves them out."""
    trials = METHODS[method].trials
    return {k: v for k, v in trials[0].items() if len(trials) > 1 and all(trial.get(k) == v for trial in trials)}


def name_of(stack: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """The name of a stack of methods with parameters, such as "cropflip + jitter(strength=0.2)"."""
    names = []
    for method, params in stack:
        same = {**_constant(method), "flow": params.get("flow")}
        own = ",".join(f"{k}={v}" for k, v in params.items() if same.get(k) != v)
        names.append(method + f"({own})" * bool(own) + (f"@{params['flow']}" if "flow" in params else ""))
    return " + ".join(names)


def stack_of(arm: str) -> list[tuple[str, dict[str, Any]]]:
    """The methods and parameters of a name; `name_of` gives the name again.

    Raises:
        SystemExit: there is no such method.
    """
    stack = []
    for text in arm.split(" + "):
        found = re.fullmatch(r"([\w-]+)(?:\((.*)\))?(?:@(\S+))?", text)
        if found is None or found[1] not in METHODS:
            raise SystemExit(f"augmentation: no operation {text!r}; there are {', '.join(METHODS)}")
        pairs = (pair.split("=") for pair in (found[2] or "").split(",") if pair)
        own = {key: json.loads(value) if re.match(r"[-.\d]", value) else value for key, value in pairs}
        stack.append((found[1], {**_constant(found[1]), **own, **({"flow": found[3]} if found[3] else {})}))
    return stack


def split_arm(arm: str) -> tuple[str, str, str]:
    """The name below the last operation ("" if there is none), and method and flow ("") of that operation."""
    base, _, last = arm.rpartition(" + ")
    operation, _, flow = last.partition("@")
    return base, operation.partition("(")[0], flow


def fixed_move(method: str) -> str:
    """The name of the advised move of a method."""
    return name_of([(method, RECIPES[method])])
