"""Conditional encoding (CE): a class code painted below every image, so that a flow learns labels along with images.

Enescu & Sahbi, ACCV 2024, Sec. 5.2, Baselines 1 and 3: images grow by 2^L rows (L levels of the flow) that hold the
class's prototype plus uniform noise smaller than the prototypes' spacing. The flow itself is told nothing. The label of
a decoded sample is the nearest prototype of its code. A flow with one Gaussian for all classes can then be asked for
images with labels, though not for a chosen one: class balance comes from rejection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from glem_augment.data.dataset import ImageData
from glem_augment.errors import DataError, ModelFileError
from glem_augment.io import atomic_write
from glem_augment.model.glem import GLEM

__all__ = ["ClassCodes", "balance_by_rejection", "code_agreement"]

FILE = "codes.safetensors"
_LR = 0.05
_SEED = 0xC0DE


class ClassCodes:
    """The prototypes of K classes, and what is done with them.

    Attributes:
        prototypes: float32 [K, C, R, W] in [0, 1]; R = 2^L rows.
        amplitude: of the uniform noise, in the same units: a code is its prototype + U(-amplitude, amplitude). Never so
            large that the nearest prototype could be another class's.
        height: H of the images without codes.

    >>> codes = ClassCodes.design(num_classes=10, image_shape=(1, 28, 28), levels=2)
    >>> x = codes.append(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.tensor([7, 0, 7]))
    >>> x.shape, codes.read(x)[0]
    (torch.Size([3, 1, 32, 28]), tensor([7, 0, 7]))
    """

    def __init__(self, prototypes: Tensor, amplitude: float, height: int) -> None:
        if prototypes.ndim != 4 or not bool(((prototypes >= 0) & (prototypes <= 1)).all()):
            raise ValueError(f"prototypes must be [K, C, R, W] in [0, 1], got shape {list(prototypes.shape)}")
        if not 0 <= amplitude < 0.5 or height < 1:
            raise ValueError(f"amplitude must lie in [0, 0.5) and height be positive, got {amplitude} and {height}")
        self.prototypes, self.amplitude, self.height = prototypes.float(), float(amplitude), int(height)

    @classmethod
    def design(
        cls,
        num_classes: int,
        image_shape: tuple[int, int, int],
        levels: int,
        noise: float = 0.5,
        bits: int = 8,
        regularisation: float = 0.05,
        steps: int = 100,
        seed: int = 0,
    ) -> ClassCodes:
        """Spread the prototypes by repulsion plus L2.

        ``steps`` gradient steps on w, prototype = tanh(w), of
        ``-mean over pairs of log(mean squared difference) + regularisation * mean w^2``: a repulsion that never stops
        but flattens, against a pull to grey that keeps pixels off the ends of their range. The paper gives no more than
        "minimizing a regularized mean squared error"; the logarithm is this library's, since the plain squared
        difference has no minimum. The result is scaled so that prototype and noise together stay in [0, 1].

        Args:
            image_shape: (C, H, W) of the images without codes. levels: L of the flow, for 2^L rows.
            noise: the noise as a share, in [0, 1), of the largest that can't change a label.
            bits: of the flow: what is cut off of each pixel counts as noise too.

        Raises:
            ValueError: settings that make no sense, or more classes than so few pixels can keep apart.
        """
        channels, height, width = image_shape
        if num_classes < 1 or levels < 1 or min(image_shape) < 1 or steps < 0:
            raise ValueError(f"need classes, levels and pixels, got K={num_classes}, L={levels}, {image_shape}")
        if not 0 <= noise < 1 or not 1 <= bits <= 8:
            raise ValueError(f"noise must lie in [0, 1) and bits in 1..8, got {noise} and {bits}")
        shape = (num_classes, channels, 2**levels, width)
        pixels = math.prod(shape[1:])
        g = torch.Generator().manual_seed(seed ^ _SEED)
        w = (0.5 * torch.randn(num_classes, pixels, generator=g)).requires_grad_(True)
        row, column = torch.triu_indices(num_classes, num_classes, 1)
        optimizer = torch.optim.Adam([w], lr=_LR)
        for _ in range(steps if num_classes > 1 else 0):
            u = w.tanh()
            gram = u @ u.T
            size = gram.diagonal()
            squared = (size[:, None] + size - 2 * gram)[row, column] / pixels
            loss = -(squared.clamp_min(0) + 1e-6).log().mean() + regularisation * w.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        u = w.detach().tanh()
        spacing = float(torch.cdist(u, u)[row, column].min()) if num_classes > 1 else 2 * math.sqrt(pixels)
        # Noise of amplitude a in every pixel moves a code by at most a sqrt(pixels); half the spacing is too far. With
        # prototype = 1/2 + scale/2 u, the spacing is scale/2 times that of u.
        lost = 2.0**-bits
        reach = spacing / (4 * math.sqrt(pixels))
        scale = min(1.0, (0.5 + noise * lost) / (0.5 + noise * reach))
        largest = scale * reach - lost
        if largest <= 0:
            raise ValueError(
                f"{num_classes} classes can't be told apart in {pixels} pixels of {bits} bits: use more levels or bits"
            )
        return cls((0.5 + 0.5 * scale * u).view(shape).clamp(0, 1), noise * largest, height)

    # ---- facts ---------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        return self.prototypes.shape[0]

    @property
    def rows(self) -> int:
        """R = 2^L."""
        return self.prototypes.shape[2]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) without codes."""
        return self.prototypes.shape[1], self.height, self.prototypes.shape[3]

    @property
    def coded_shape(self) -> tuple[int, int, int]:
        """(C, H + R, W), which is what the flow takes."""
        channels, height, width = self.image_shape
        return channels, height + self.rows, width

    def spacing(self) -> float:
        """Distance of the two nearest prototypes (L2, pixels in [0, 1]); inf for one class."""
        flat = self.prototypes.flatten(1)
        distances = torch.cdist(flat, flat)
        distances.fill_diagonal_(math.inf)
        return float(distances.min())

    # ---- writing and reading -------------------------------------------------------------------------------------

    def draw(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Codes of the classes y int64 [B]: uint8 [B, C, R, W]; without a generator the bare prototypes."""
        code = self.prototypes[y.cpu()]
        if generator is not None:
            code = code + self.amplitude * (2 * torch.rand(code.shape, generator=generator) - 1)
        return (code * 255).round().clamp(0, 255).to(torch.uint8)

    def append(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images uint8 [B,C,H,W] of classes y with their codes below: uint8 [B,C,H+R,W]."""
        return torch.cat([self._checked(x), self.draw(y, generator).to(x.device)], 2)

    def append_random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images with codes that mean nothing, uniform pixels: all that a test image, whose class is unknown, can get.

        The paper's NF accuracy of CEGLEM (12.8 % and 2.0 %) is measured on these.
        """
        x = self._checked(x)
        shape = (len(x), *self.prototypes.shape[1:])
        return torch.cat([x, torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(x.device)], 2)

    def _checked(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images must be uint8 [B, {self.image_shape}], got {x.dtype} {list(x.shape)}")
        return x

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coded images [B,C,H+R,W] to images [B,C,H,W] and codes [B,C,R,W]."""
        if tuple(x.shape[1:]) != self.coded_shape:
            raise ValueError(f"coded images must be [B, {self.coded_shape}], got {list(x.shape)}")
        return x[:, :, : self.height], x[:, :, self.height :]

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of coded images by nearest prototype.

        Args:
            x: [B,C,H+R,W], uint8 or float in [0, 1].

        Returns:
            labels int64 [B], and margins float32 [B] in [0, 1]: 1 - d1/d2, the distances to the nearest and the second
            nearest prototype; 0 means undecided.
        """
        code = self.split(x)[1]
        code = (code.float() / 255 if code.dtype == torch.uint8 else code.float()).flatten(1).cpu()
        near = torch.cdist(code, self.prototypes.flatten(1)).topk(min(2, self.num_classes), largest=False)
        if self.num_classes == 1:
            return near.indices[:, 0], torch.ones(len(code))
        return near.indices[:, 0], 1 - near.values[:, 0] / near.values[:, 1].clamp_min(1e-12)

    def dataset(self, data: ImageData, seed: int = 0, monomodal: bool = False) -> ImageData:
        """``data`` with a code under every image, its noise drawn once per image from ``seed``.

        Args:
            monomodal: give all images one class, "all", for a flow with a single Gaussian (Baseline 1); by default the
                classes stay (CEGLEM, Baseline 3).

        Raises:
            DataError: other classes or images than the codes were made for, or too many to hold in memory.
        """
        if len(data.classes) != self.num_classes or tuple(data.image_shape) != self.image_shape:
            raise DataError(
                f"{data.name} has {len(data.classes)} classes of images {tuple(data.image_shape)}, the codes are for "
                f"{self.num_classes} and {self.image_shape}"
            )
        x, y = data.tensor(), torch.from_numpy(data.targets)
        if x is None:
            raise DataError(f"{data.name} does not fit in memory; raise cache_bytes to add codes to its images")
        coded = self.append(x, y, torch.Generator().manual_seed(seed))
        if monomodal:
            return ImageData.from_tensors(coded, torch.zeros_like(y), ["all"], name=f"{data.name} with codes")
        return ImageData.from_tensors(coded, y, data.classes, data.class_ids, name=f"{data.name} with codes")

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``codes.safetensors`` beside the model's files, atomically."""
        facts = json.dumps({"amplitude": self.amplitude, "height": self.height})
        with atomic_write(Path(folder) / FILE) as file:
            file.write(safetensors_bytes({"prototypes": self.prototypes.contiguous()}, metadata={"codes": facts}))

    @classmethod
    def load(cls, folder: str | Path) -> ClassCodes:
        """Read what ``save`` wrote. Raises ModelFileError for anything else."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["codes"])
                return cls(file.get_tensor("prototypes"), facts["amplitude"], facts["height"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ModelFileError(f"{path} can't be read: {error!r}; save the codes again") from None


def code_agreement(
    model: GLEM, codes: ClassCodes, per_class: int = 100, temperature: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """CEGLEM: how often the code of a sample names the class whose Gaussian it was drawn from.

    Returns:
        ``agreement`` in [0, 1], ``margin`` (mean, see ``ClassCodes.read``) and ``images``.
    """
    if model.num_classes != codes.num_classes:
        raise ValueError(f"the flow has {model.num_classes} classes, the codes {codes.num_classes}")
    y = torch.arange(codes.num_classes).repeat_interleave(per_class)
    g = torch.Generator().manual_seed(seed)
    right, margin = 0, 0.0
    for part in y.split(256):
        read, sure = codes.read(model.sample(part, temperature, g))
        right, margin = right + int((read == part).sum()), margin + float(sure.sum())
    return {"agreement": right / len(y), "margin": margin / len(y), "images": len(y)}


def balance_by_rejection(
    draw: Callable[[int], Tensor], codes: ClassCodes, per_class: int, batch: int = 256, most: float = 50.0
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Samples of a flow that can't be asked for a class, as many of each class as wanted.

    Args:
        draw: gives n coded images [n,C,H+R,W], float in [0, 1]; fresh ones at every call.
        per_class: images wanted of each class.
        batch: images drawn at a time. most: give up after so many times the number of images wanted.

    Returns:
        images uint8 [K * per_class, C, H, W], class after class, labels int64, and ``drawn``, ``acceptance`` (the share
        kept) and ``rarest`` (the rarest class's share of what was drawn; 1/K is balanced).

    Raises:
        DataError: a class that hardly ever comes.
    """
    kept: list[list[Tensor]] = [[] for _ in range(codes.num_classes)]
    seen, wanted = torch.zeros(codes.num_classes, dtype=torch.int64), per_class * codes.num_classes
    drawn = 0
    while int(seen.min()) < per_class:
        if drawn >= most * wanted:
            c = int(seen.argmin())
            raise DataError(f"{drawn} samples held {int(seen[c])} of class {c}, {per_class} are wanted: raise `most`")
        x = draw(batch)
        labels, _ = codes.read(x)
        images = (codes.split(x)[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        drawn += len(x)
        for c in labels.unique().tolist():
            members = (labels == c).nonzero().flatten()
            room = max(0, per_class - int(seen[c]))
            if room:
                kept[c].append(images[members[:room]])
            seen[c] += len(members)
    y = torch.arange(codes.num_classes).repeat_interleave(per_class)
    facts = {"drawn": drawn, "acceptance": wanted / drawn, "rarest": int(seen.min()) / drawn}
    return torch.cat([part for parts in kept for part in parts]), y, facts
