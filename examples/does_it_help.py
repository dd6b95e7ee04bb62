"""Do drawn or moved images help on your images? One network of timm is trained with several stacks of augmentation.

    python examples/does_it_help.py photos/ photos-test/
    python examples/does_it_help.py photos/ --image-size 96 --steps 600 --seeds 8    # a quarter of photos/ is the test
    python examples/does_it_help.py photos/ photos-test/ --network efficientnet_lite0 --pretrained --image-size 128

All stacks crop and flip. They compete within their kind: ordinary operations, ColorJitter, half of each batch drawn
from a fit to the training images, and half of it moved along the modes of the pixels, of an autoencoder's latents or of
--model. A fifth of the training images is held out and chooses the best stack of each kind, by one training of each
stack. The chosen stacks are then measured on the test images, with several seeds. The last sentence says whether
drawing or moving helped. The plan and the time of a step are printed first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from _common import MEAN, STD, fit, interval, new_network, normalised, percent
from torch import Tensor, nn
from torchvision.transforms import v2

from glem_augment import (
    GLEM,
    Adversarial,
    GLEMAugment,
    GLEMError,
    Mixup,
    Noise,
    Policy,
    SyntheticDataset,
    open_data,
)

BATCH, COPIES = 64, 4  # images of a step, and images that are moved or drawn once for each image
LONGER, LEARNED = 4, 0.8  # enough steps give this share of the accuracy above chance of LONGER times as many
WIDE = 3.0  # points: wider intervals cannot tell that nothing helps

Images = tuple[Tensor, Tensor]  # uint8 [N, C, H, W] and labels [N]


@dataclass(frozen=True)
class Stack:
    """Operations beside crop and flip: torchvision's, of an image and of a batch, or half of the images by a model."""

    name: str
    kind: str = "ordinary"
    image: tuple[nn.Module, ...] = ()
    batch: type | None = None  # v2.MixUp or v2.CutMix
    model: str | None = None
    policy: Policy | None = None  # None: a model draws images

    @property
    def copied(self) -> bool:
        """Images are moved or drawn before the training, but for moves against the network in training."""
        return self.model is not None and not isinstance(self.policy, Adversarial)


PLAIN, USUAL = Stack("crop + flip", "plain"), Noise(0.5)


def ordinary() -> Iterator[Stack]:
    trivial, erase = v2.TrivialAugmentWide(), v2.RandomErasing()
    yield Stack("TrivialAugment", image=(trivial,))
    yield Stack("TrivialAugment, RandomErasing", image=(trivial, erase))
    yield Stack("RandAugment, RandomErasing, Mixup", image=(v2.RandAugment(), erase), batch=v2.MixUp)
    yield Stack("CutMix", batch=v2.CutMix)
    yield Stack("TrivialAugment, CutMix", image=(trivial,), batch=v2.CutMix)
    yield Stack("TrivialAugment, RandomErasing, Mixup", image=(trivial, erase), batch=v2.MixUp)
    for size in (0.2, 0.4, 0.8):  # at least as many trials as moves have
        jitter = v2.ColorJitter(size, size, size, size / 4)
        for name, batch in (("", None), (", CutMix", v2.CutMix), (", Mixup", v2.MixUp)):
            yield Stack(f"ColorJitter {size:g}{name}", "ColorJitter", (jitter,), batch)


def by_models(models: Sequence[str]) -> Iterator[Stack]:
    """Images that are drawn from the autoencoder's latents, if there is one, and moved ones."""
    of = models[min(1, len(models) - 1)]
    yield Stack("half drawn", "drawn", model=of)
    yield Stack("half drawn, ColorJitter 0.4", "drawn", (v2.ColorJitter(0.4, 0.4, 0.4, 0.1),), model=of)
    for model in models:
        for policy in (USUAL, Noise(1.0), Mixup(), *([Adversarial()] if model == "pixels" else [])):
            words = f"noise {policy.strength:g}" if type(policy) is Noise else type(policy).__name__.lower()
            yield Stack(f"{model}: {words}", model, model=model, policy=policy)


def augmentation(model: GLEM, policy: Policy, p: float = 1.0, seed: int = 0) -> GLEMAugment:
    """The transform for images with the labels to which the model was fitted."""
    return GLEMAugment(model, policy, p, class_map=range(model.num_classes), seed=seed)


class Trainings:
    """Trainings of one network with one stack after another."""

    def __init__(self, args: argparse.Namespace, classes: Sequence[str], models: dict[str, Callable[[Images], GLEM]]):
        self.args, self.classes = args, classes
        self.model = cache(lambda kind, train: models[kind](train))
        self.copies = cache(self._copies)

    def accuracy(self, stack: Stack, train: Images, test: Images, seed: int, steps: int) -> float:
        """Percent of the test images that the network recognises."""
        return percent(self.network(stack, train, seed, steps), *test)

    def network(self, stack: Stack, train: Images, seed: int, steps: int) -> nn.Module:
        args, channels = self.args, train[0].shape[1]
        network = new_network(args.network, channels, len(self.classes), seed, args.pretrained)
        return fit(network, self.batches(stack, train, seed, network), steps, 1e-3 if args.pretrained else 5e-3)

    def batches(self, stack: Stack, train: Images, seed: int, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end."""
        torch.manual_seed(seed)
        (x, y), size = train, min(BATCH, len(train[0]))
        copies = self.copies(stack.model, stack.policy, train) if stack.copied else None
        aug = self.adversary(stack, train, seed, network) if stack.policy and not stack.copied else None
        crop = v2.RandomResizedCrop(x.shape[2:], scale=(0.35, 1.0), antialias=True)
        each = v2.Compose([crop, v2.RandomHorizontalFlip(), *stack.image])
        mix = stack.batch(num_classes=len(self.classes)) if stack.batch else None
        while True:
            for rows in torch.randperm(len(x))[: len(x) // size * size].split(size):
                images, labels = x[rows], y[rows]
                if copies is not None:
                    others = copies[torch.randint(COPIES, (len(rows),)), rows]
                    images = torch.where(torch.rand(len(rows))[:, None, None, None] < 0.5, others, images)
                elif aug is not None:
                    images = aug(images, labels)[0]
                images = normalised(torch.stack([each(image) for image in images]))
                images, labels = mix(images, labels) if mix else (images, labels)
                yield images.contiguous(memory_format=torch.channels_last), labels

    def adversary(self, stack: Stack, train: Images, seed: int, network: nn.Module) -> GLEMAugment:
        """Moves half of the images against the network in training."""
        aug = augmentation(self.model(stack.model, train), stack.policy, 0.5, seed)
        return aug.attach(nn.Sequential(v2.Normalize([MEAN], [STD]), network))

    def _copies(self, name: str, policy: Policy | None, train: Images) -> Tensor:
        """Moved copies of all images, or drawn images of their classes, uint8 [COPIES, N, C, H, W]."""
        (x, y), model = train, self.model(name, train)
        out = torch.empty(COPIES, *x.shape, dtype=torch.uint8)
        if policy is None:
            drawn = SyntheticDataset(model, (COPIES * y.bincount()).tolist())
            out[:, y.argsort()] = drawn.images(range(len(drawn))).unflatten(0, (-1, COPIES)).transpose(0, 1)
            return out
        aug = augmentation(model, policy)
        for view in out:
            for rows in torch.randperm(len(x)).split(BATCH):  # partners vary
                view[rows] = aug(x[rows], y[rows])[0]
        return out


def parted(images: Images, every: int) -> tuple[Images, Images]:
    """The images in two parts; the second part has every `every`-th image of each class."""
    x, y = images
    place = torch.empty_like(y)
    for k in y.unique():
        place[y == k] = torch.arange(int((y == k).sum()))
    held = place % every == every - 1
    return (x[~held], y[~held]), (x[held], y[held])


def models_for(channels: int, autoencoder: str, flow: str | None) -> dict[str, Callable[[Images], GLEM]]:
    """By its name, a function that fits a model in one pass over images."""
    found: dict[str, Callable[[Images], GLEM]] = {"pixels": partial(GLEM.fit)}
    if autoencoder != "none":
        found[autoencoder] = partial(GLEM.fit, autoencoder=autoencoder)
    if flow:
        model = GLEM.from_pretrained(flow)

        def fitted(images: Images) -> GLEM:
            small = v2.functional.resize(images[0], list(model.image_shape[1:]), antialias=True)
            grey = channels == 3 and model.image_shape[0] == 1
            small = v2.functional.rgb_to_grayscale(small) if grey else small.expand(-1, model.image_shape[0], -1, -1)
            return GLEM.fit((small, images[1]), flow=model)

        found[flow] = fitted
    return found


def plan(run: Trainings, stacks: Sequence[Stack], kinds: Sequence[str], fitting: Images, train: Images) -> None:
    """Print what will be trained, and for how long about."""
    args, speed = run.args, []
    for stack in (PLAIN, stacks[1], next(s for s in stacks if isinstance(s.policy, Adversarial))):
        run.network(stack, fitting, 0, 1)  # the first step takes longer
        began = time.perf_counter()
        run.network(stack, fitting, 0, 3)
        speed.append((time.perf_counter() - began) / 3)
        print(f"  a step of {BATCH} images with {stack.name}: {1000 * speed[-1]:.0f} ms")
    plain, slow, against = speed
    few, copying = tuple(part[:8] for part in train), 0.0
    for kind in kinds:
        aug, began = augmentation(run.model(kind, fitting), USUAL), time.perf_counter()
        aug(*few)
        each = (time.perf_counter() - began) / len(few[0])
        copying += each * COPIES * (4 * len(fitting[0]) + 2 * len(train[0]))
        print(f"  an image moved along the modes of {kind}: {1000 * each:.1f} ms, {COPIES} copies of each image")
    costs = [slow if s.image else against if s.policy and not s.copied else plain for s in stacks]
    measured = args.seeds * (4 + len(kinds)) * statistics.mean(costs)
    seconds = args.steps * ((1 + LONGER) * plain + sum(costs) + measured) + copying
    print(
        f"{len(stacks)} stacks are tried once, and {4 + len(kinds)} are measured with {args.seeds} seeds, {args.steps} "
        f"steps each: about {seconds / 60:.1f} minutes\n",
        flush=True,
    )


def too_little(run: Trainings, fitting: Images, held: Images) -> str | None:
    """A sentence if networks with crop + flip learn too little for a conclusion."""
    steps = run.args.steps
    short, longer = (run.accuracy(PLAIN, fitting, held, 0, n) for n in (steps, LONGER * steps))
    chance = 100 * float(held[1].bincount().max()) / len(held[1])
    text = f"With crop + flip, {steps} steps give {short:.0f} % on held-out images, {LONGER * steps} steps "
    text += f"{longer:.0f} %, and guessing {chance:.0f} %"
    if longer - chance <= 2 * (chance * (100 - chance) / len(held[1])) ** 0.5:
        return f"{text}: the networks have learned nothing. Check the classes, or give more images or --steps."
    if short - chance < LEARNED * (longer - chance):
        return f"{text}: the networks have learned too little. Give --steps {LONGER * steps}."
    print(f"{text}.", flush=True)
    return None


def conclusion(found: dict[Stack, list[float]]) -> str:
    """One sentence on drawing and moving, from accuracies with the same seeds; the first stack is crop + flip."""

    def gain(one: Stack, two: Stack) -> tuple[float, float]:
        each = [a - b for a, b in zip(found[one], found[two], strict=True)]
        return statistics.mean(each), interval(each)

    mean = {stack: statistics.mean(values) for stack, values in found.items()}
    other, words, clear, halves = max((s for s in found if not s.model), key=mean.__getitem__), [], False, []
    for verb, kinds in (("drawing", ("drawn",)), ("moving", {s.kind for s in found if s.policy})):
        best = max((s for s in found if s.kind in kinds), key=mean.__getitem__)
        points, half = gain(best, other)
        verdict = "helped" if points > half else "harmed" if points < -half else "gained nothing clear"
        words.append(f"{verb} {verdict} ({best.name}: {points:+.1f} ± {half:.1f} points)")
        halves.append(half)
        clear |= points > half
    if max(halves) > WIDE and not clear:
        return f"No conclusion: gains are uncertain by up to ± {max(halves):.1f} points. Give more --seeds and --steps."
    return f"Over {other.name}, the best without a model, {' and '.join(words)}."


def table(found: dict[Stack, list[float]]) -> Iterator[str]:
    """Lines with the accuracies of stacks, the first of which is crop + flip."""
    width, plain = max(len(stack.name) for stack in found), next(iter(found.values()))
    yield f"{'stack':<{width}}  accuracy     over crop + flip"
    for stack, values in found.items():
        each = [a - b for a, b in zip(values, plain, strict=True)]
        gain = f"{statistics.mean(each):+5.1f} ± {interval(each):.1f}" if values is not plain else ""
        yield f"{stack.name:<{width}}  {statistics.mean(values):5.1f} ± {interval(values):<4.1f} {gain}"


def choose(run: Trainings, stacks: Sequence[Stack], fitting: Images, held: Images) -> list[Stack]:
    """Crop + flip, and the stack of each kind that is best on held-out images."""
    tried: dict[str, dict[Stack, float]] = {}
    for stack in stacks:
        value = run.accuracy(stack, fitting, held, 0, run.args.steps)
        tried.setdefault(stack.kind, {})[stack] = value
        print(f"tried {stack.name}: {value:.1f} % of the held-out images", flush=True)
    return [PLAIN, *(max(values, key=values.__getitem__) for values in tried.values())]


def measure(run: Trainings, chosen: Sequence[Stack], train: Images, test: Images) -> dict[Stack, list[float]]:
    """Accuracies on the test images."""
    found: dict[Stack, list[float]] = {}
    for stack in chosen:
        found[stack] = [run.accuracy(stack, train, test, seed, run.args.steps) for seed in range(run.args.seeds)]
        print(f"measured {stack.name}: {', '.join(f'{value:.1f}' for value in found[stack])} %", flush=True)
    return found


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="training images, see glem_augment.open_data")
    parser.add_argument("test", nargs="?", help="test images (default: a quarter of DATA)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), help="2 to 10 (%(default)s)")
    parser.add_argument("--network", default="test_resnet", help="of timm (%(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--autoencoder", default="taef2", help="taef2, hub:ORG/NAME or none (%(default)s)")
    parser.add_argument("--model", help="try moves in the latents of its flow, too")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's choice)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = open_data(args.data, "train", args.image_size)
    train = data.tensor(), torch.as_tensor(data.targets)
    if args.test is None:
        train, test = parted(train, 4)
    else:
        others = open_data(args.test, "test", args.image_size, data.image_shape[0])
        if others.classes != data.classes:
            raise SystemExit(
                f"{args.test} has other classes than {args.data}: {others.classes[:5]}, {data.classes[:5]}"
            )
        test = others.tensor(), torch.as_tensor(others.targets)
    if train[0].dtype != torch.uint8 or train[0].shape[1] not in (1, 3) or int(train[1].bincount().min()) < 5:
        raise SystemExit(f"{args.data} needs 8-bit grey or RGB images, and at least 5 training images of each class")
    models = models_for(train[0].shape[1], args.autoencoder, args.model)
    run, stacks = Trainings(args, data.classes, models), [*ordinary(), *by_models([*models])]
    fitting, held = parted(train, 5)
    print(f"{len(train[0])} training and {len(test[0])} test images, {len(data.classes)} classes; {args.network}")
    plan(run, stacks, [*models], fitting, train)
    refusal = too_little(run, fitting, held)
    if refusal:
        raise SystemExit(refusal)
    found = measure(run, choose(run, stacks, fitting, held), train, test)
    of = next(stack.model for stack in stacks if stack.kind == "drawn")
    right = torch.cat([run.model(of, train).predict(part) for part in test[0].split(256)]) == test[1]
    print(f"\n`predict` of the fit ({of}), without a network: {100 * float(right.double().mean()):.1f} %")
    print("\n", "\n".join([*table(found), "", conclusion(found)]), sep="")


if __name__ == "__main__":
    try:
        main()
    except GLEMError as error:
        raise SystemExit(str(error)) from None
