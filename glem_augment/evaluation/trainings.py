"""Trainings of one network with stacks of augmentation, as `compare` needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from glem_augment.augment.transform import GLEMAugment
from glem_augment.codec.pixel_range import to_uint8
from glem_augment.codec.resize import PixelAdapter
from glem_augment.evaluation.classifier import MEAN, STD, accuracy, fit_network, new_network, normalised
from glem_augment.evaluation.stacks import Stack
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import GLEM

COPIES, BATCH = 4, 64  # moved copies of an image at most, images per step
NETWORK, RATE, RATE_PRETRAINED = "test_resnet", 5e-3, 1e-3  # a small ResNet of timm, and learning rates


@dataclass
class Comparison:
    """Trains the network with one stack after another.

    Args:
        models: for each kind of moves, a function that makes a model with modes of some training images.
        steps: of each training. network, pretrained: see `new_network`.
        copies: moved copies of every image.
        tick: called before each step, and before each batch of moved copies with False.
    """

    models: dict[str, Callable[[ImageData], GLEM]]
    steps: int
    network: str = NETWORK
    pretrained: bool = False
    copies: int = COPIES
    tick: Callable[[bool], object] = lambda step: None
    _fitted: dict[tuple[str, ImageData], GLEM] = field(default_factory=dict)
    _copies: dict[tuple[Stack, ImageData], Tensor] = field(default_factory=dict)

    def accuracy(self, stack: Stack, train: ImageData, test: ImageData, seed: int, steps: int | None = None) -> float:
        """Accuracy in percent on `test` of the network trained on `train` with this stack."""
        return accuracy(self.trained(stack, train, seed, steps), test)

    def trained(self, stack: Stack, train: ImageData, seed: int, steps: int | None = None) -> torch.nn.Module:
        """The network trained on `train` with this stack, in eval mode; it expects normalised images."""
        network = new_network(train.image_shape[0], len(train.classes), seed, self.network, self.pretrained)
        rate = RATE_PRETRAINED if self.pretrained else RATE
        return fit_network(network, self.batches(stack, train, seed, network), steps or self.steps, rate)

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
        each = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                *(_operation(*text.split()) for text in stack.image),
            ]
        )
        mix = getattr(v2, stack.batch)(num_classes=len(train.classes)) if stack.batch else None
        while True:
            order = rng.permutation(len(x))
            for start in range(0, max(1, len(x) - BATCH + 1), BATCH):
                self.tick(True)
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
        """Moved copies of all images, uint8 [copies, N, C, H, W], made once."""
        key = stack, train
        if key not in self._copies:
            assert stack.policy is not None
            aug = GLEMAugment(self.model(stack.kind, train), stack.policy, p=1.0, seed=0)
            x, y = train.tensor(), torch.from_numpy(train.targets)
            out = torch.empty(self.copies, *x.shape, dtype=torch.uint8)
            for view in range(self.copies):
                order = torch.from_numpy(np.random.default_rng([view, 11]).permutation(len(x)))
                for rows in order.split(BATCH):  # a new order for each copy, so that partners vary
                    self.tick(False)
                    out[view, rows] = aug(x[rows], y[rows])[0]
            self._copies[key] = out
        return self._copies[key]

    def has_moved(self, stack: Stack, train: ImageData) -> bool:
        """Whether a training with this stack needs no more copies."""
        return not stack.policy or stack.adversarial or (stack, train) in self._copies

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


def models_for(train: ImageData, autoencoder: str | None, flow: GLEM | None) -> dict[str, Callable[[ImageData], GLEM]]:
    """Makers of the model for each kind of moves: one pass over the training images, nothing is trained."""
    fit = partial(GLEM.fit, progress=False)
    made: dict[str, Callable[[ImageData], GLEM]] = {"pixels": fit}
    if autoencoder is not None and train.image_shape[0] == 3:
        made["autoencoder"] = partial(fit, autoencoder=autoencoder)
    if flow is not None:
        pixels = PixelAdapter(flow.image_shape)

        def adapted(data: ImageData) -> GLEM:
            x = to_uint8(pixels.to_model(pixels.to_floats(data.tensor())))
            return fit((x, data.targets), flow=flow, classes=data.classes)

        made["flow"] = adapted
    return made
