"""Trainings of one network of timm with stacks of augmentation, for the benchmarks of photographs and of directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.common import descend
from glem_augment import GLEM, GLEMAugment, Noise, Policy
from glem_augment.images.dataset import ImageData

BATCH, MEAN, STD = 64, 0.5, 0.25  # images per step; by which images are normalised
NETWORK, RATE = "test_resnet", 5e-3  # a small ResNet of timm, and its highest learning rate


@dataclass(frozen=True)
class Stack:
    """Operations on training images, beside crop and flip.

    Attributes:
        name: for people. kind: of the model whose modes moves follow.
        image: names of torchvision v2 transforms of single images; "RandAugment 5" has magnitude 5. "ColorJitter 0.4"
            changes brightness, contrast and saturation by up to 0.4, and hue by up to a quarter of it.
        batch: "MixUp", "CutMix" or "".
        policy: of `GLEMAugment`, which moves half of the images; None: none.
    """

    name: str
    kind: str
    image: tuple[str, ...] = ()
    batch: str = ""
    policy: Policy | None = None

    @property
    def adversarial(self) -> bool:
        """Whether moves raise the loss of the network in training. All other moves are made before the training."""
        return self.policy is not None and self.policy.wants_classifier


PLAIN = Stack("crop + flip", "plain")


def moves(kind: str, shown: str, policy: Policy) -> Stack:
    """A stack of moves along the modes of a model."""
    words = f"{policy.name} {policy.strength:g}" if isinstance(policy, Noise) else policy.name
    return Stack(f"{shown}: {words}", kind, policy=policy)


@dataclass
class Comparison:
    """Trains the network with one stack after another.

    Args:
        models: for each kind of moves, a function that makes a model with modes of some training images.
        steps: of each training. network: of timm, trained from scratch.
        copies: moved copies of every image.
        bf16: whether the network runs in bfloat16, which takes ten times as long on a processor without it.
    """

    models: dict[str, Callable[[ImageData], GLEM]]
    steps: int
    network: str = NETWORK
    copies: int = 4
    bf16: bool = True
    _fitted: dict[tuple[str, ImageData], GLEM] = field(default_factory=dict)
    _copies: dict[tuple[Stack, ImageData], Tensor] = field(default_factory=dict)

    def accuracy(self, stack: Stack, train: ImageData, test: ImageData, seed: int) -> float:
        """Percent of the test images that a network recognises, trained on images moved in float32."""
        if stack.policy and not stack.adversarial:
            self.moved(stack, train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = timm.create_model(self.network, num_classes=len(train.classes), in_chans=train.image_shape[0])
        network.train().to(memory_format=torch.channels_last)
        optimizer = create_optimizer_v2(network, opt="adamw", lr=RATE, weight_decay=0.05)
        schedule = CosineLRScheduler(
            optimizer, t_initial=self.steps, warmup_t=self.steps // 10, warmup_lr_init=RATE / 100, t_in_epochs=False
        )
        batches = islice(self.batches(stack, train, seed, network), self.steps)
        # A cache of the weights in bfloat16 would last for the whole block, and hide all steps.
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            descend(network, batches, optimizer, schedule.step_update)
            network.eval()
            with torch.inference_mode():
                parts = test.batches(np.arange(len(test)), 256)
                right = sum(int((network(normalised(x)).argmax(1) == y).sum()) for x, y in parts)
        return 100 * right / len(test)

    def batches(
        self, stack: Stack, train: ImageData, seed: int, network: torch.nn.Module | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of normalised images and labels without end, a function of the seed.

        `network`: the network in training, whose loss adversarial moves raise.
        """
        x, y = train.tensor(), torch.from_numpy(train.targets)
        copies = self.moved(stack, train) if stack.policy and not stack.adversarial else None
        aug = self.adversary(stack, train, seed, network) if stack.adversarial and network is not None else None
        rng, size = np.random.default_rng([seed, 7]), train.image_shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
        crop = v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)
        each = v2.Compose([crop, v2.RandomHorizontalFlip(), *(_operation(*text.split()) for text in stack.image)])
        mix = getattr(v2, stack.batch)(num_classes=len(train.classes)) if stack.batch else None
        while True:
            order = rng.permutation(len(x))
            for start in range(0, max(1, len(x) - BATCH + 1), BATCH):
                rows = torch.from_numpy(order[start : start + BATCH])
                images = x[rows]
                if copies is not None:
                    chosen = torch.from_numpy(rng.random(len(rows)) < 0.5)
                    view = torch.from_numpy(rng.integers(len(copies), size=len(rows)))
                    images = torch.where(chosen[:, None, None, None], copies[view, rows], images)
                elif aug is not None:
                    images = aug(images, y[rows])[0]
                with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
                    torch.set_rng_state(state)
                    images = normalised(torch.stack([each(image) for image in images]))
                    labels: Tensor = y[rows]
                    if mix is not None:
                        images, labels = mix(images, labels)
                    state = torch.get_rng_state()
                yield images.contiguous(memory_format=torch.channels_last), labels

    def adversary(self, stack: Stack, train: ImageData, seed: int, network: torch.nn.Module) -> GLEMAugment:
        """The transform that moves half of the images against the network in training."""
        channels = train.image_shape[0]
        normalise = v2.Normalize([MEAN] * channels, [STD] * channels)
        assert stack.policy is not None
        aug = GLEMAugment(self.model(stack.kind, train), stack.policy, p=0.5, seed=seed)
        return aug.attach(torch.nn.Sequential(normalise, network))

    def moved(self, stack: Stack, train: ImageData) -> Tensor:
        """Moved copies of all training images, uint8 [copies, N, C, H, W], made once."""
        key = stack, train
        if key not in self._copies:
            assert stack.policy is not None
            aug = GLEMAugment(self.model(stack.kind, train), stack.policy, p=1.0, seed=0)
            x, y = train.tensor(), torch.from_numpy(train.targets)
            out = torch.empty(self.copies, *x.shape, dtype=torch.uint8)
            for view in range(self.copies):
                order = torch.from_numpy(np.random.default_rng([view, 11]).permutation(len(x)))
                for rows in order.split(BATCH):  # a new order for each copy, so that partners vary
                    out[view, rows] = aug(x[rows], y[rows])[0]
            self._copies[key] = out
        return self._copies[key]

    def model(self, kind: str, train: ImageData) -> GLEM:
        """The model with modes of the training images, made once."""
        key = kind, train
        if key not in self._fitted:
            self._fitted[key] = self.models[kind](train)
        return self._fitted[key]


def _operation(name: str, magnitude: str | None = None) -> Callable[[Tensor], Tensor]:
    """torchvision's transform of this name."""
    if name == "ColorJitter":
        size = float(magnitude or 0)
        return v2.ColorJitter(size, size, size, size / 4)
    made: Callable[[Tensor], Tensor] = getattr(v2, name)(**{} if magnitude is None else {"magnitude": int(magnitude)})
    return made


def normalised(x: Tensor) -> Tensor:
    """Images uint8, normalised for the network: float."""
    return (x.float() / 255 - MEAN) / STD
