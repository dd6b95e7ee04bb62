"""Batch augmentations of `augmentation/run.py`, with separate parameters for every image, and stacks of them.

torchvision's transforms draw once per call, so transforms of single images are called image by image. Transforms of
batches are the library's training operations (crop, flip), and Mixup, CutMix and RandomErasing of torchvision and timm.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.proof.augmentation.settings import METHODS, PLAIN, REUSE
from glem_augment import GLEM, GLEMAugment, SyntheticDataset
from glem_augment.augment.policies import as_policy
from glem_augment.tensors import evaluating
from glem_augment.training.augmentation import augment_batch

Component = tuple[str, dict[str, Any]]
# (uint8 images, labels, bool mask) to images and labels, changed where the mask is true.
Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
SYNTHETIC_POOL, POOL_RATIO = 200, 4  # images of a class, at most; to a training image
# Pixel operations first, then operations that make batches float, then operations that mix labels.
_ORDER = (*PLAIN, "jitter", "trivial", "pixel-adversarial", "erasing", "mixup", "cutmix")


class RememberingGLEM(GLEM):
    """Encodes an image once, and finds its latent again by the image's bytes.

    Flow-based methods come before crop and flip here, so they encode the same few images repeatedly.
    """

    @classmethod
    def of(cls, model: GLEM) -> RememberingGLEM:
        result = cls(model.config, model.flow, model.latent_classes, model.codec)
        result._latents: dict[bytes, Tensor] = {}
        return result.eval().requires_grad_(False)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        keys = [row.tobytes() for row in x.detach().contiguous().numpy()]
        new = [i for i, key in enumerate(keys) if key not in self._latents]
        if new:
            with torch.no_grad():
                for i, z in zip(new, super().encode(x[new])[0], strict=True):
                    self._latents[keys[i]] = z
        # Nothing here needs the log-determinant.
        return torch.stack([self._latents[key] for key in keys]), x.new_zeros(len(x), dtype=torch.float32)


class Reused:
    """A transform of a share p of the images. A transformed image is used `REUSE` times on average.

    Args:
        transform: returns the labels of all images in one form, hard or soft.
        count: training images.
    """

    def __init__(self, transform: Change, p: float, count: int) -> None:
        self.transform, self.p, self.count = transform, p, count
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self.made = torch.zeros(count, dtype=torch.bool)

    def __call__(self, rows: Tensor, x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        use, again = (torch.rand(len(x), generator=g) < share for share in (self.p, 1 / REUSE))
        mask = use & (again | ~self.made[rows])
        if bool(mask.any()):
            changed, fresh = self.transform(x, y, mask), mask.nonzero()[:, 0]
            images, labels = changed[0][fresh], changed[1][fresh]
            if self.images is None or self.labels is None:
                self.images = torch.empty(self.count, *images.shape[1:], dtype=images.dtype)
                self.labels = torch.empty(self.count, *labels.shape[1:], dtype=labels.dtype)
            self.images[rows[fresh]], self.labels[rows[fresh]] = images, labels
            self.made[rows[fresh]] = True
        chosen = use.nonzero()[:, 0]
        if not len(chosen):
            return x, y
        assert self.images is not None and self.labels is not None
        x = x.index_copy(0, chosen, self.images[rows[chosen]])
        if self.labels.ndim == 2:
            y = F.one_hot(y, self.labels.shape[1]).to(self.labels.dtype)
        return x, y.index_copy(0, chosen, self.labels[rows[chosen]])


class Stack:
    """The operations on a batch between the training set and the classifier.

    Args:
        components: (method, parameters), see `METHODS`; the parameters of flow-based methods name the "flow".
        flows: returns the adapted model of a flow's name, pooled or not.
        network: the classifier, from floats in [0, 1] to logits; adversarial methods use its gradient.
        count, num_classes: of the training images.
    """

    def __init__(
        self,
        components: list[Component],
        flows: Callable[[str, bool], GLEM],
        network: nn.Module,
        count: int,
        num_classes: int,
        seed: int,
    ) -> None:
        self.network, self.num_classes = network, num_classes
        self.generator = torch.Generator().manual_seed(seed)
        random.seed(seed)  # timm's RandomErasing
        self.first: list[Callable[..., tuple[Tensor, Tensor]]] = []
        self.then: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
        for name, params in components:
            if METHODS[name].flow:
                settings = {key: value for key, value in params.items() if key not in ("flow", "p", "basis")}
                model = RememberingGLEM.of(flows(params["flow"], params.get("basis") == "shared"))
                self.first.append(self._through_flow(name, settings, model, params["p"], count, seed))
            elif name not in ("none", "natural"):  # "natural" changes only the order of the images
                self.then[name] = self._on_pixels(name, params)

    def __call__(self, rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Training images `rows`, uint8 [B,C,H,W], with labels int64 [B], to floats in [0, 1] and labels, hard or soft
        [B,K]."""
        for change in self.first:
            x, y = change(rows, x, y, self.generator)
        for name in _ORDER:
            if name in self.then:
                if name not in (*PLAIN, "jitter", "trivial"):
                    x = as_float(x)
                x, y = self.then[name](x, y)
        return as_float(x), y

    # ---- through a flow --------------------------------------------------------------------------------------------

    def _through_flow(
        self, name: str, params: dict[str, Any], model: GLEM, p: float, count: int, seed: int
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        if name == "synthetic":
            per_class = min(SYNTHETIC_POOL, max(20, POOL_RATIO * (count // model.num_classes)))
            drawn = SyntheticDataset(model, per_class, seed=seed, **params)
            return Pool(drawn.images(range(len(drawn))).unflatten(0, (-1, per_class)), p)
        if name == "latent-noise":
            return Reused(self._latent_noise(model, params["strength"]), p, count)
        assert model.modes is not None
        policy = as_policy({"name" if key == "policy" else key: value for key, value in params.items()})
        classes = [0] * self.num_classes if model.num_classes == 1 else None
        aug = GLEMAugment(model, policy, p=1.0, modes=min(64, model.modes.rank), class_map=classes, seed=seed)
        if policy.wants_classifier:
            aug.attach(self.network)
        # All rows may be partners; only rows of the mask are decoded.
        return Reused(lambda x, y, mask: aug.replay(x, y, aug.draw(x, y).where(mask)), p, count)

    def _latent_noise(self, model: GLEM, strength: float) -> Change:
        """Gaussian noise in all dimensions of the latent, in standard deviations of the image's class."""
        spread = model.gaussians.variance().detach().sqrt()

        @torch.no_grad()
        def moved(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            z = model.encode(as_float(x[mask]))[0]
            z = z + strength * spread[y[mask]] * torch.randn(z.shape, generator=self.generator)
            out = x.clone()
            out[mask] = (model.decode(z).nan_to_num_(0.5) * 255).round_().clamp_(0, 255).to(torch.uint8)
            return out, y

        return moved

    # ---- on pixels -------------------------------------------------------------------------------------------------

    def _on_pixels(self, name: str, params: dict[str, Any]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        if name in PLAIN:
            return lambda x, y: (augment_batch(x, PLAIN[name], self.generator), y)
        if name == "jitter":
            s = params["strength"]
            jitter = v2.ColorJitter(s, s, s, s / 4)
            return lambda x, y: (torch.cat([jitter(part) for part in x.split(params.get("each", 1))]), y)
        if name == "trivial":
            trivial = v2.TrivialAugmentWide()

            def some(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                chosen = self._chance(params["p"], len(x)).tolist()
                return torch.stack([trivial(i) if c else i for i, c in zip(x, chosen, strict=True)]), y

            return some
        if name == "erasing":
            erase = RandomErasing(probability=params["p"], mode="pixel", device="cpu")

            def erased(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                # Its noise is N(0, 1), meant for standardised images.
                mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
                return erase((x - mean) / std) * std + mean, y

            return erased
        if name == "pixel-adversarial":
            return lambda x, y: (self._adversarial_pixels(x, y, params["epsilon"] / 255, params["p"]), y)
        mix = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=params["alpha"], num_classes=self.num_classes)
        return lambda x, y: mix(x, y) if bool(self._chance(params.get("p", 1.0), 1)) else (x, y)

    def _chance(self, p: float, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator) < p

    def _adversarial_pixels(self, x: Tensor, y: Tensor, epsilon: float, p: float) -> Tensor:
        """A random start within epsilon, then one step of size epsilon up the loss (fast gradient sign, Wong et al.
        2020), with the classifier in eval mode."""
        rows = self._chance(p, len(x)).nonzero()[:, 0]
        if not len(rows):
            return x
        clean = x[rows]
        start = (torch.rand(clean.shape, generator=self.generator) * 2 - 1) * epsilon
        moved = (clean + start).clamp(0, 1).requires_grad_(True)
        with evaluating(self.network):
            (grad,) = torch.autograd.grad(F.cross_entropy(self.network(moved), y[rows]), moved)
        changed = clean + (moved.detach() + epsilon * grad.sign() - clean).clamp(-epsilon, epsilon)
        return x.index_copy(0, rows, changed.clamp(0, 1))


class Pool:
    """Replaces images, with probability p, by random images of their class.

    Args:
        images: uint8 [K, n, C, H, W], n images of each class.
        p: for all classes, or of each class [K].
        labels: of these images, soft [K, n, K]; None: the class.
    """

    def __init__(self, images: Tensor, p: float | Tensor, labels: Tensor | None = None) -> None:
        self.images, self.p, self.labels = images, torch.as_tensor(p).expand(len(images)), labels

    def __call__(self, rows: Tensor, x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = (torch.rand(len(x), generator=g) < self.p[y]).nonzero()[:, 0]
        which = torch.randint(self.images.shape[1], (len(chosen),), generator=g)
        images, classes = self.images[y[chosen], which], y[chosen]
        if images.shape[1:] != x.shape[1:]:
            images = v2.functional.resize(images, list(x.shape[2:]), antialias=True)
        if self.labels is not None:
            y = F.one_hot(y, len(self.images)).float().index_copy(0, chosen, self.labels[classes, which])
        return x.index_copy(0, chosen, images), y


def as_float(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x
