"""Batch augmentations of ``augmentation.py``, each with parameters of its own for every image, and their stacking.

torchvision's transforms draw once per call, so those on single images are called image by image; the library's own
training operations (crop, flip) and Mixup, CutMix and RandomErasing of torchvision and timm take batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.proof.augmentation_settings import METHODS, PLAIN, REUSE, WHOLE_LATENT
from glem_augment import GLEM, GLEMAugment, SyntheticDataset
from glem_augment.training.batches import augment_batch

Component = tuple[str, dict[str, Any]]
# (uint8 images, labels, bool mask) to images and labels with those of the mask changed.
Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
SYNTHETIC_POOL, POOL_RATIO = 200, 4  # images of a class, at most; to a training image
LR, WEIGHT_DECAY, WARM_UP = 3e-3, 0.05, 0.15  # of classifiers and proxies
# Pixel operations first, then what makes batches float, then what mixes labels.
_ORDER = (*PLAIN, "jitter", "trivial", "pixel-adversarial", "erasing", "mixup", "cutmix", "distill")


class RememberingGLEM(GLEM):
    """Encodes an image once: its latent is found again by the image's bytes.

    The transforms come before crop and flip here, so that they see the same few images again and again.
    """

    @classmethod
    def of(cls, model: GLEM) -> RememberingGLEM:
        result = cls(model.config, model.flow, model.gaussians, model.modes)
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
    """A transform applied to a share p of the images; what it made of one is used ``REUSE`` times on average.

    Args:
        transform: gives the labels of all in one form, hard or soft.
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
    """What happens to a batch between the training set and the classifier.

    Args:
        components: (method, parameters), see ``METHODS``; of flow-based ones the parameters name the "flow".
        flows: the adapted flow of each name in them.
        network: the classifier, from floats in [0,1] to logits; adversarial methods look at it.
        count, num_classes: of the training images.
        seed: of everything drawn.
        teacher: of "distill".
        steps: how many batches there will be, for methods that end before the last.
        proxy: of "adversarial-proxy": a smaller network, which looks on in the classifier's place and learns from
            the same batches.
    """

    def __init__(
        self,
        components: list[Component],
        flows: Callable[[str], GLEM],
        network: nn.Module,
        count: int,
        num_classes: int,
        seed: int,
        teacher: nn.Module | None = None,
        steps: int = 1,
        proxy: nn.Module | None = None,
    ) -> None:
        self.network, self.num_classes, self.teacher = network, num_classes, teacher
        self.proxy = None if proxy is None else Learner(proxy, steps)
        self.steps, self.done = steps, 0
        self.generator = torch.Generator().manual_seed(seed)
        random.seed(seed)  # timm's RandomErasing
        self.first: list[Callable[..., tuple[Tensor, Tensor]]] = []
        self.then: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
        for name, params in components:
            if METHODS[name].flow:
                model = RememberingGLEM.of(flows(params["flow"]))
                pixels = RememberingGLEM.of(flows("identity")) if name == "adversarial-both" else None
                self.first.append(self._latent(name, dict(params), model, count, seed, pixels))
            elif name not in ("none", "natural"):  # the latter is up to the order of the images
                self.then[name] = self._pixel(name, params)

    def __call__(self, rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Training images ``rows``, uint8 [B,C,H,W], with their labels int64 [B], to floats in [0,1] and labels, hard
        or soft [B,K]."""
        for change in self.first:
            x, y = change(rows, x, y, self.generator)
        self.done += 1
        for name in _ORDER:
            if name in self.then:
                if name not in (*PLAIN, "jitter", "trivial"):
                    x = as_float(x)
                x, y = self.then[name](x, y)
        x = as_float(x)
        if self.proxy is not None:
            self.proxy.learn(x, y)
        return x, y

    # ---- through a flow --------------------------------------------------------------------------------------------

    def _latent(
        self, name: str, params: dict[str, Any], model: GLEM, count: int, seed: int, pixels: GLEM | None
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        del params["flow"]
        p, until, agree = params.pop("p"), params.pop("until", None), params.pop("agree", None)
        if until is not None:
            change = Reused(self._along_modes(model, seed, params), p, count)
            return lambda rows, x, y, g: change(rows, x, y, g) if self.done < until * self.steps else (x, y)
        if agree is not None:
            return Reused(self._agreeing(self._along_modes(model, seed, params), agree), p, count)
        if name == "synthetic":
            return _Synthetic(model, p, count // model.num_classes, seed, **params)
        if name in WHOLE_LATENT:
            return Reused(self._whole_latent(model, params["strength"], name == "latent-adversarial"), p, count)
        moved = self._along_modes(model, seed, params)
        if pixels is None:
            return Reused(moved, p, count)
        moved_pixels = self._along_modes(pixels, seed + 1, params)

        def either(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            coin = self._chance(0.5, len(x))
            return moved_pixels(*moved(x, y, mask & coin), mask & ~coin)

        return Reused(either, p, count)

    def _along_modes(self, model: GLEM, seed: int, params: dict[str, Any]) -> Change:
        assert model.modes is not None
        aug = GLEMAugment(model, p=1.0, modes=min(64, model.modes.rank), seed=seed, **params)
        if params["policy"] == "adversarial":
            aug.attach(self.network if self.proxy is None else self.proxy.network)
        # All rows may be partners; only those of the mask are decoded.
        return lambda x, y, mask: aug.apply(x, y, aug.draw(x, y).where(mask))

    def _agreeing(self, moved: Change, weight: float) -> Change:
        """The labels of moved images in part the classifier's for these images as they were."""

        def change(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            with evaluating(self.network), torch.no_grad():
                said = self.network(as_float(x)).softmax(1)
            x, y = moved(x, y, mask)
            return x, self._softened(y, said, weight * mask[:, None])

        return change

    def _whole_latent(self, model: GLEM, strength: float, adversarial: bool) -> Change:
        """Moves in all dimensions, in standard deviations of the image's class: Gaussian, or up the classifier's loss.

        The step up the loss is ``strength sqrt(d)`` long and starts from noise half that long.
        """
        spread = model.gaussians.variance().detach().sqrt()

        def moved(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            labels = y[mask]
            with torch.no_grad():
                z = model.encode(as_float(x[mask]))[0]
            noise, scale = torch.randn(z.shape, generator=self.generator), spread[labels]
            move = strength * noise
            if adversarial:
                start = move / 2
                grad = self._gradient(
                    lambda e: F.cross_entropy(self.network(model.decode(z + scale * e, clamp=False)), labels), start
                )
                move = start + strength * z.shape[1] ** 0.5 * F.normalize(grad)
            with torch.no_grad():
                out = x.clone()
                out[mask] = as_bytes(model.decode(z + scale * move).nan_to_num_(0.5))
            return out, y

        return moved

    def _gradient(self, loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        """Of ``loss`` at ``at``, with the classifier in eval mode, as the adversarial policy has it."""
        with evaluating(self.network), torch.enable_grad():
            variable = at.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(loss(variable), variable)
        return grad

    # ---- on pixels -------------------------------------------------------------------------------------------------

    def _pixel(self, name: str, params: dict[str, Any]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        g = self.generator
        if name in PLAIN:
            return lambda x, y: (augment_batch(x, PLAIN[name], g), y)
        if name == "jitter":
            s = params["strength"]
            jitter = v2.ColorJitter(s, s, s, s / 4)
            return lambda x, y: (torch.stack([jitter(image) for image in x]), y)
        if name == "trivial":
            trivial, p = v2.TrivialAugmentWide(), params["p"]

            def some(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                chosen = self._chance(p, len(x)).tolist()
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
        if name == "distill":
            return lambda x, y: (x, self._taught(x, y, params["weight"]))
        mix = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=params["alpha"], num_classes=self.num_classes)
        often = params.get("p", 1.0)
        return lambda x, y: mix(x, y) if bool(self._chance(often, 1)) else (x, y)

    @torch.no_grad()
    def _taught(self, x: Tensor, y: Tensor, weight: float) -> Tensor:
        assert self.teacher is not None
        return self._softened(y, self.teacher(x).softmax(1), weight)

    def _softened(self, y: Tensor, said: Tensor, weight: float | Tensor) -> Tensor:
        """Labels, hard or soft, moved by ``weight`` towards the distributions ``said`` [B,K]."""
        hard = y if y.ndim == 2 else F.one_hot(y, self.num_classes).float()
        return hard + weight * (said - hard)

    def _chance(self, p: float, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator) < p

    def _adversarial_pixels(self, x: Tensor, y: Tensor, epsilon: float, p: float) -> Tensor:
        """A random start within epsilon and one step of its size up the loss (fast gradient sign, as in Wong et al.
        2020)."""
        rows = self._chance(p, len(x)).nonzero()[:, 0]
        if not len(rows):
            return x
        clean = x[rows]
        start = (torch.rand(clean.shape, generator=self.generator) * 2 - 1) * epsilon
        moved = (clean + start).clamp(0, 1)
        grad = self._gradient(lambda images: F.cross_entropy(self.network(images), y[rows]), moved)
        changed = clean + (moved + epsilon * grad.sign() - clean).clamp(-epsilon, epsilon)
        return x.index_copy(0, rows, changed.clamp(0, 1))


class Learner:
    """A network and its training, one step for every batch that it is given: AdamW, one cycle."""

    def __init__(self, network: nn.Module, steps: int) -> None:
        self.network = network.train()
        self.optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LR, total_steps=steps, pct_start=WARM_UP)

    def learn(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of floats in [0,1] with labels, hard or soft, before the step."""
        loss = F.cross_entropy(self.network(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


class _Synthetic:
    """Rows replaced, with probability p, by images that the flow draws for their class."""

    def __init__(self, model: GLEM, p: float, per_class: int, seed: int, temperature: float, source: str) -> None:
        self.p = p
        self.per_class = min(SYNTHETIC_POOL, max(20, POOL_RATIO * per_class))
        drawn = SyntheticDataset(model, self.per_class, temperature=temperature, seed=seed, source=source)
        self.images = drawn.images(range(len(drawn)))

    def __call__(self, rows: Tensor, x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = (torch.rand(len(x), generator=g) < self.p).nonzero()[:, 0]
        which = torch.randint(self.per_class, (len(chosen),), generator=g)
        images = self.images[y[chosen] * self.per_class + which]
        if images.shape[1:] != x.shape[1:]:
            images = v2.functional.resize(images, list(x.shape[2:]), antialias=True)
        return x.index_copy(0, chosen, images), y


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """``network`` in eval mode, and then as it was."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def as_float(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def as_bytes(x: Tensor) -> Tensor:
    return (x * 255).round_().clamp_(0, 255).to(torch.uint8)
