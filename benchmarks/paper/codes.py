"""Conditional encoding (CE): a class code below every image, so that a flow learns labels along with images.

Source: Enescu & Sahbi, ACCV 2024, Sec. 5.2, Baselines 1 and 3. Images get 2^L more rows, for L levels of the flow. The
rows hold the class's prototype plus uniform noise, which is smaller than the spacing of the prototypes. The flow gets
no label. The label of a decoded sample is the prototype nearest to its code. A flow with one Gaussian for all classes
can then draw labelled images, but not of a chosen class. Rejection balances the classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.research import Research, ResearchTrainer
from glem_augment import GLEM
from glem_augment.distributed import Share
from glem_augment.errors import DataError
from glem_augment.flows import resolve_preset
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig
from glem_augment.training.augmentation import augment_batch

CODED_METHODS = {
    # Baseline 1: a monomodal flow, N(0, I), on images with class codes.
    "ce": dict(objective="mle", psi=None, learn="none", random_init=(0.0, 0.0)),
    # Baseline 3: GLEM on images with class codes.
    "ceglem": dict(objective="glem", kld_weight=10.0),
}
# Weight of the L2 term, and noise as a share of the largest noise that cannot change a label. The paper gives neither.
_REGULARISATION, _NOISE, _LR, _SEED = 0.05, 0.5, 0.05, 0xC0DE


@dataclass(frozen=True)
class ClassCodes:
    """The prototypes of K classes.

    Attributes:
        prototypes: float32 [K, C, R, W] in [0, 1]; R = 2^L rows.
        amplitude: a code is its prototype + U(-amplitude, amplitude).
        height: H of the images without codes.
    """

    prototypes: Tensor
    amplitude: float
    height: int

    @classmethod
    def design(
        cls, num_classes: int, image_shape: tuple[int, ...], levels: int, bits: int = 8, steps: int = 100
    ) -> ClassCodes:
        """Spread the prototypes tanh(w) by `steps` gradient steps on w of

            -mean over pairs of log(mean squared difference) + 0.05 mean w^2.

        The repulsion flattens with distance, and the L2 term keeps pixels away from the ends of their range. The paper
        only says "minimizing a regularized mean squared error". The logarithm is a choice of this reproduction, since
        the plain squared difference has no minimum. Prototype plus noise are scaled to [0, 1].

        Args:
            image_shape: (C, H, W) of the images without codes.
            bits: of the flow; the bits that it drops count as noise, too.

        Raises:
            ValueError: too many classes for so few pixels.
        """
        channels, height, width = image_shape
        shape = (num_classes, channels, 2**levels, width)
        pixels = math.prod(shape[1:])
        g = torch.Generator().manual_seed(_SEED)
        w = (0.5 * torch.randn(num_classes, pixels, generator=g)).requires_grad_(True)
        row, column = torch.triu_indices(num_classes, num_classes, 1)
        optimizer = torch.optim.Adam([w], lr=_LR)
        for _ in range(steps):
            u = w.tanh()
            gram = u @ u.T
            size = gram.diagonal()
            squared = (size[:, None] + size - 2 * gram)[row, column] / pixels
            loss = -(squared.clamp_min(0) + 1e-6).log().mean() + _REGULARISATION * w.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        u = w.detach().tanh()
        # Noise of amplitude a in every pixel moves a code by at most a sqrt(pixels), which must stay below half the
        # spacing. With prototype = 1/2 + scale/2 u, the spacing is scale/2 times the spacing of u.
        spacing = float(torch.cdist(u, u)[row, column].min())
        lost = 2.0**-bits
        reach = spacing / (4 * math.sqrt(pixels))
        scale = min(1.0, (0.5 + _NOISE * lost) / (0.5 + _NOISE * reach))
        largest = scale * reach - lost
        if largest <= 0:
            raise ValueError(
                f"{num_classes} classes can't be told apart in {pixels} pixels of {bits} bits: use more levels or bits"
            )
        return cls((0.5 + 0.5 * scale * u).view(shape).clamp(0, 1), _NOISE * largest, height)

    @classmethod
    def for_flow(cls, data: ImageData, config: TrainConfig) -> ClassCodes:
        """Codes for the data's classes, with as many rows as the levels of the flow need."""
        spec = resolve_preset(config.preset, tuple(data.image_shape), **config.flow_options)
        return cls.design(len(data.classes), data.image_shape, len(spec["depth"]), config.bits)

    def draw(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Codes of the classes y int64 [B]: uint8 [B, C, R, W]."""
        code = self.prototypes[y]
        code = code + self.amplitude * (2 * torch.rand(code.shape, generator=generator) - 1)
        return (code * 255).round().clamp(0, 255).to(torch.uint8)

    def append(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Images uint8 [B,C,H,W] of classes y with their codes below: uint8 [B,C,H+R,W]."""
        return torch.cat([x, self.draw(y, generator)], 2)

    def append_random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images with random codes, of uniform pixels, since the class of a test image is unknown.

        The paper measures CEGLEM's NF accuracy on such images (12.8 and 2.0 %).
        """
        shape = (len(x), *self.prototypes.shape[1:])
        return torch.cat([x, torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)], 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coded images [B,C,H+R,W] to images [B,C,H,W] and codes [B,C,R,W]."""
        return x[:, :, : self.height], x[:, :, self.height :]

    def read(self, x: Tensor) -> Tensor:
        """Labels int64 [B] of coded images [B,C,H+R,W], uint8 or float in [0, 1], by nearest prototype."""
        code = self.split(x)[1].cpu()
        code = code.float() / 255 if code.dtype == torch.uint8 else code.float()
        return torch.cdist(code.flatten(1), self.prototypes.flatten(1)).argmin(1)

    def dataset(self, data: ImageData, seed: int = 0, monomodal: bool = False) -> ImageData:
        """`data` with a code below every image, with noise drawn once per image.

        Args:
            monomodal: give all images one class, "all", for a flow with a single Gaussian.
        """
        y = torch.from_numpy(data.targets)
        coded = self.append(data.tensor(), y, torch.Generator().manual_seed(seed))
        if monomodal:
            return ImageData.from_tensors(coded, torch.zeros_like(y), ["all"], name=f"{data.name} with codes")
        return ImageData.from_tensors(coded, y, data.classes, data.class_ids, name=f"{data.name} with codes")


def coded_trainer(
    codes: ClassCodes,
    data: ImageData,
    config: TrainConfig,
    folder: Path,
    resume: bool,
    device: torch.device,
    research: Research,
) -> ResearchTrainer:
    """A trainer for `data` with codes, whose augmentation leaves the codes alone."""

    def augment(x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
        image, code = codes.split(x)
        return torch.cat([augment_batch(image, config.augment, generator, share), code], 2)

    return ResearchTrainer(data, config, folder, resume, device=device, augment=augment, research=research)


def code_agreement(model: GLEM, codes: ClassCodes, per_class: int, temperature: float, seed: int) -> float:
    """CEGLEM: the share of samples whose code names the class of their Gaussian, in [0, 1]."""
    y = torch.arange(model.num_classes).repeat_interleave(per_class)
    g = torch.Generator().manual_seed(seed)
    right = sum(int((codes.read(model.sample(part, temperature, g)) == part).sum()) for part in y.split(256))
    return right / len(y)


def balance_by_rejection(
    draw: Callable[[int], Tensor], codes: ClassCodes, per_class: int, batch: int = 256, most: float = 50.0
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Equally many samples of each class, from a flow that cannot draw a chosen class.

    Args:
        draw: gives n new coded images [n,C,H+R,W], float in [0, 1].
        most: give up after this many times the number of images wanted.

    Returns:
        images uint8 [K * per_class, C, H, W], class after class, labels int64, and `acceptance` (the share kept) and
        `rarest` (the rarest class's share of all images drawn; 1/K is balanced).

    Raises:
        DataError: a class is too rare among the samples.
    """
    classes = len(codes.prototypes)
    kept: list[list[Tensor]] = [[] for _ in range(classes)]
    seen, wanted, drawn = torch.zeros(classes, dtype=torch.int64), per_class * classes, 0
    while int(seen.min()) < per_class:
        if drawn >= most * wanted:
            c = int(seen.argmin())
            raise DataError(f"{drawn} samples held {int(seen[c])} of class {c}, {per_class} are wanted: raise `most`")
        x = draw(batch)
        labels = codes.read(x)
        images = (codes.split(x)[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        drawn += len(x)
        for c in labels.unique().tolist():
            members = (labels == c).nonzero().flatten()
            kept[c].append(images[members[: max(0, per_class - int(seen[c]))]])
            seen[c] += len(members)
    y = torch.arange(classes).repeat_interleave(per_class)
    facts = {"acceptance": wanted / drawn, "rarest": int(seen.min()) / drawn}
    return torch.cat([part for parts in kept for part in parts]), y, facts
