"""The EM-like procedure of the paper (Sec. 4.3, Algorithm 1): its start, its two steps, and the refit at its end.

E-step: the flow's weights by Eq. 3 on D_nf, the Gaussians fixed. M-step: the Gaussians by Eq. 5 on D_g, the flow fixed.
Every random draw is a function of the seed and of the step's number, and `state` holds all the rest, so a run that is
killed and resumed takes exactly the steps of one that was not.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from glem_augment.autoencoders import StandardisedAutoencoder
from glem_augment.data.dataset import ImageData
from glem_augment.devices import send
from glem_augment.distributed import Share, add_up, is_primary, world_size
from glem_augment.errors import DataError, GLEMError, TrainingError
from glem_augment.flows import Flow
from glem_augment.latent.fit import pooled_covariance
from glem_augment.model.config import GLEMConfig
from glem_augment.model.glem import GLEM
from glem_augment.training.batches import (
    AlreadyEncoded,
    augment_batch,
    choose_views,
    latent_views,
    stratified_split,
)
from glem_augment.training.checkpoint import Checkpoint
from glem_augment.training.config import TrainConfig
from glem_augment.training.logs import gaussian_state, held_out
from glem_augment.training.objective import LatentStatistics, e_step_loss, encode, m_learning_rates, m_step_loss
from glem_augment.training.optim import (
    CLIP_NORM,
    DivergenceError,
    LossGuard,
    flow_optimizer,
    gaussian_optimizer,
    independent_latents,
    independent_pixels,
    load_optimizer_tensors,
    optimizer_tensors,
)

_EVAL_BATCH = 256
_INIT_IMAGES = 1024  # ActNorm's start needs a fair estimate of each element's spread
_SHRINKAGE = 10  # images
KLD_WEIGHT_END, EMA_DECAY = 0.5, 0.999
JOINT_LR = 1e-2  # the best of a few on held-out training images of a 14x14 Fashion-MNIST
REFIT_STEPS, REFIT_LR = 200, 3e-3
# So many numbers of latents fit in memory (60,000 of 784 are 190 MB); the least number of images of each class.
MOST_NUMBERS, LEAST_IMAGES = 60_000 * 784, 8
_COUNTERS = ("step", "m_done", "bad_steps", "rollbacks")


class EM:
    """A GLEM in training: the model, its optimizers, and the two steps; `Trainer` runs them."""

    whole_epochs = True  # an epoch without M-steps covers D_nf and D_g; False: it has only as many steps as D_nf

    def __init__(
        self,
        data: ImageData,
        config: TrainConfig,
        init_model: GLEM | None = None,
        begun: Checkpoint | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        ready: Callable[[Any], object] | None = None,
    ) -> None:
        self.data, self.config, self.progress = data, config, progress and is_primary()
        self.views = data  # what the steps see: with an autoencoder, several latents of each image
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.split = stratified_split(data.targets, len(data.classes), config.val_fraction, config.seed)
        self.model = self._new_model(init_model, begun).to(self.device)
        self.saved_as, self.codec = self.model.config, self.model.autoencoder
        if self.codec is not None:
            self._take_latents(self.codec)
        # Gaussians that are learned jointly, or not at all, need no images of their own.
        m_steps = not config.joint and config.learn != "none"
        images = len(self.split.nf) + (0 if m_steps or not self.whole_epochs else len(self.split.g))
        self.steps_per_epoch = max(1, images // config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.frozen_from = math.ceil(config.freeze_gaussians_at * config.epochs) if m_steps else 0
        self.m_total = config.m_rounds * self.frozen_from
        self.m_rates = m_learning_rates(self.m_total, config.m_steps, self.frozen_from * self.steps_per_epoch)
        self.flow_optimizer, self.scheduler = flow_optimizer(self.model.flow, config, self.total_steps)
        self.lr = float(self.scheduler.base_values[0])  # at the end of the warm-up
        self.m_optimizer = gaussian_optimizer(self.model.gaussians, config)
        self.guard = LossGuard(config.bits)
        self.step = self.m_done = 0  # E-steps and M-steps taken
        self.bad_steps = self.rollbacks = 0  # E-steps skipped because they were not finite, and returns
        self.lr_scale = 1.0
        self.epoch_loss = (0.0, 0)  # sum and number of the finite losses of the current epoch
        self.image_seconds = self.latent_seconds = 0.0  # of encoding an image, and of a latent in a Gaussian step
        if begun is None:
            if ready is not None:
                ready(self)
            self._initialise(init_model)
        self.ema: ModelEmaV3 | None = None
        if config.averaging == "ema" and any(True for _ in self.model.flow.parameters()):
            self.ema = ModelEmaV3(self.model.flow, decay=EMA_DECAY, use_warmup=True)
        if begun is not None:
            self.restore(begun)

    # ---- the model at the start ----------------------------------------------------------------------------------

    def _new_model(self, init_model: GLEM | None, begun: Checkpoint | None) -> GLEM:
        config, data = self.config, self.data
        torch.manual_seed(config.seed)
        if begun is not None:
            # All weights are in the checkpoint: the model that the run started from need not be there any more.
            try:
                return self._build(json.loads(begun.facts["flow"]), begun.facts.get("autoencoder"))
            except (GLEMError, KeyError, ValueError, TypeError, RuntimeError) as error:
                raise TrainingError(f"{begun.path} describes no flow that can be built: {error}") from error
        if init_model is None:
            about = data.image_shape, data.classes, data.class_ids, config.bits, config.psi, config.autoencoder
            return GLEM.create(config.preset, *about, **config.flow_options)
        if (init_model.bits, init_model.image_shape) != (config.bits, tuple(data.image_shape)):
            raise DataError(
                f"the model to start from takes images {init_model.image_shape} at {init_model.bits} bits, this run "
                f"has {data.image_shape} at {config.bits} bits: use the same"
            )
        model = self._build(init_model.config.flow, init_model.config.autoencoder, init_model.autoencoder)
        model.flow.load_state_dict(init_model.flow.state_dict())
        return model

    def _build(
        self, flow: dict[str, Any], autoencoder: dict[str, Any] | None = None, module: nn.Module | None = None
    ) -> GLEM:
        ids, names, bits, psi = list(self.data.class_ids), list(self.data.classes), self.config.bits, self.config.psi
        config = GLEMConfig(flow, bits, psi, class_ids=ids, class_names=names, autoencoder=autoencoder)
        return GLEM(config, autoencoder=copy.deepcopy(module))

    def _take_latents(self, codec: StandardisedAutoencoder) -> None:
        """Let the images be their latents for the run, so that they are encoded only once; `whole` undoes it."""
        config, data = self.config, self.data
        x = data.some(_INIT_IMAGES)
        self.model.standardise(x)
        views = latent_views(codec.autoencoder, data, config.augment, config.seed, self.device, self.progress)
        self.data, self.views = data.with_numbers(views[:, 0]), data.with_numbers(views)
        stand_in = StandardisedAutoencoder(AlreadyEncoded(), len(codec.mean)).to(self.device)
        stand_in.load_state_dict({name: codec.state_dict()[name] for name in stand_in.state_dict()})
        named = {"name": "latents", "sha256": "", "image_shape": list(self.saved_as.flow_shape)}
        config_of_latents = replace(self.saved_as, autoencoder=named)
        self.model = GLEM(config_of_latents, self.model.flow, self.model.gaussians, autoencoder=stand_in)

    def whole(self, model: GLEM) -> GLEM:
        """`model` for images, where it is one for latents."""
        if self.codec is None:
            return model
        config = replace(model.config, autoencoder=self.saved_as.autoencoder)
        return GLEM(config, model.flow, model.gaussians, model.modes, self.codec)

    @torch.no_grad()
    def _initialise(self, init_model: GLEM | None) -> None:
        """Data-dependent ActNorms, then the Gaussians: a function of the seed and the data."""
        config, gaussians = self.config, self.model.gaussians
        rows = np.random.default_rng([config.seed, 0x1217]).permutation(self.split.nf)[:_INIT_IMAGES]
        x = torch.cat([x for x, _ in self.data.batches(rows, _EVAL_BATCH, config.workers)]).to(self.device)
        if self.codec is None:
            self.guard.pixels = independent_pixels(x, config.bits)
        else:
            self.guard.pixels = independent_latents(self.codec.std)
            self.guard.uniform = self.guard.pixels + 2
        whiten = getattr(self.model.flow, "whiten", None)
        if whiten is not None and not whiten.initialised:
            facts = pooled_covariance(self._numbers_of_class, self.model.num_classes, len(whiten.gain), self.model.dim)
            whiten.fit(*facts)
        layers = [module for module in self.model.flow.modules() if isinstance(module, nn.Conv2d)]
        with self._bar("start: ActNorm", len(layers), "layer") as bar, ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_hook(lambda *_: bar.update()).remove)
            self.model.initialise(x, self._generator(1))
        if init_model is not None:
            if (init_model.class_ids, init_model.config.psi) == (self.model.class_ids, config.psi):
                gaussians.load_state_dict(init_model.gaussians.state_dict())
                return
            statistics = self._latent_pass(-1, self.split.g)
            means, spread = statistics.moments()
            gaussians.mu.copy_(means)
            # Shrunk towards the pooled variance, since D_g may hold few images of a class.
            n = statistics.count[:, None]
            pooled = (spread * n).sum(0) / n.sum()
            gaussians.set_variance((n * spread + _SHRINKAGE * pooled) / (n + _SHRINKAGE))
            return
        if config.random_init is not None:
            if config.psi is None:
                gaussians.set_variance(torch.ones_like(gaussians.s))
            means = torch.randn(gaussians.mu.shape, generator=self._generator(2)).to(gaussians.mu)
            gaussians.mu.copy_(config.random_init[0] * means)
            noise = torch.randn(gaussians.s.shape, generator=self._generator(6)).to(gaussians.s)
            gaussians.s.add_(config.random_init[1] * noise)
            gaussians.project()
            return
        statistics = self._latent_pass(-1, self.split.g)
        # ActNorm leaves unit variance; the Gaussians start at a/2 + c, so the flow will shrink to that. The means of a
        # few images are mostly noise, which would set classes hundreds of nats apart before anything is learned.
        # Rare pixels have far-out means; the cut keeps the first steps from being about them alone.
        means = statistics.total / (statistics.count[:, None] + _SHRINKAGE)
        gaussians.mu.copy_(means.clamp(-2, 2) * gaussians.variance().mean().sqrt())

    def _numbers_of_class(self, y: int) -> Tensor:
        """What the flow sees of training images of class y, as many as memory holds: [n, d]."""
        rows = self.split.nf[self.data.targets[self.split.nf] == y]
        rows = rows[: max(LEAST_IMAGES, MOST_NUMBERS // self.model.dim)]
        batches = self.data.batches(rows, _EVAL_BATCH, self.config.workers)
        return torch.cat([self.model.numbers(x.to(self.device)).flatten(1).cpu() for x, _ in batches])

    def images(
        self, indices: np.ndarray, batch_size: int, data: ImageData | None = None
    ) -> Generator[tuple[Tensor, Tensor, Share], None, None]:
        """What `ImageData.shared_batches` gives of `data`, by default the run's, on the device."""
        for x, y, share in (data or self.data).shared_batches(indices, batch_size, self.config.workers):
            yield send(x, self.device), send(y, self.device), share

    def augmented(self, x: Tensor, generator: torch.Generator, share: Share) -> Tensor:
        """`x` uint8 [b,C,H,W] under the run's augmentation, or one of the views of latents [b,V,C,h,w].

        A subclass may keep parts of the images as they are.
        """
        if x.ndim == 5:
            return choose_views(x, generator, share)
        return augment_batch(x, self.config.augment, generator, share)

    def _generator(self, *key: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.config.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed) & (2**63 - 1))

    # ---- the E-step ----------------------------------------------------------------------------------------------

    def beta(self) -> float:
        """Weight of the cross-entropy now; with `beta_anneal` it falls geometrically over the last part of the run."""
        start, end = self.config.beta_anneal or (0.0, 1.0)
        late = max(0.0, self.step / self.total_steps - start) / (1 - start)
        return (self.config.beta or 0.0) * end**late

    def e_step(self, x: Tensor, y: Tensor, share: Share | None = None) -> tuple[float, float]:
        """One step of Adamax on the flow (Eq. 3); with `joint`, one of Adam on the Gaussians too.

        Args:
            x, y: this rank's images uint8 [b,C,H,W] and labels int64 [b]; b may be 0.
            share: what part of the batch they are; by default all of it.

        Returns:
            The loss, nats per dimension, and the likelihood, bits/dim, of the whole batch; NaN if the step was skipped.
        """
        config, model, share = self.config, self.model, share or Share(0, len(x), len(x))
        self._let_gaussians_learn(config.joint)
        generator = self._generator(4, self.step)
        self.flow_optimizer.zero_grad(set_to_none=True)
        self.m_optimizer.zero_grad(set_to_none=True)
        loss = nll = torch.zeros((), dtype=model.dtype, device=self.device)
        if len(x):
            shown = self.augmented(x, generator, share)
            z, logdet = encode(model, shown, config, generator, share, config.latent_noise)
            # Means over the batch are sums of the ranks' means, each times its part of the images.
            means = e_step_loss(model.gaussians, z, logdet, y, config, self.beta())
            loss, nll = (len(x) / share.total * mean for mean in means)
            if loss.requires_grad:  # not so for the identity flow with fixed Gaussians
                loss.backward()
        loss, nll = loss.detach().clone(), nll.detach().clone()
        if world_size() > 1:
            learned = [p for p in model.parameters() if p.requires_grad]
            for p in learned:  # a rank without images has no gradients
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            add_up(loss, nll, *(p.grad for p in learned if p.grad is not None))
        norm = nn.utils.clip_grad_norm_(list(model.flow.parameters()), CLIP_NORM)
        # One read per step, of all numbers at once: a bad step has to be known before the weights move.
        value, bits, norm_value = torch.stack([loss, nll / math.log(2), norm.to(loss)]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            self.bad_steps += 1
            return math.nan, math.nan
        self.flow_optimizer.step()
        if config.joint:
            # The share of the schedule includes the return after a divergence.
            self._adam_step(JOINT_LR * self.flow_optimizer.param_groups[0]["lr"] / self.lr)
        if self.ema is not None:
            self.ema.update(model.flow, step=self.step + 1)
        return value, bits

    # ---- the M-step ----------------------------------------------------------------------------------------------

    def kld_weight(self) -> float:
        """lambda_t: falls linearly from `kld_weight` to half of it at the last M-step; 0 without repulsion."""
        share = min(1.0, self.m_done / max(1, self.m_total - 1))
        return self.config.kld_weight * (1 + (KLD_WEIGHT_END - 1) * share) if self.config.repels else 0.0

    @torch.no_grad()
    def _latent_pass(
        self, round_index: int, rows: np.ndarray, keep: bool = False, model: GLEM | None = None
    ) -> LatentStatistics:
        """One pass over the images `rows` with the noise of an M-step; with a bar at the start and for the refit."""
        title = "start: latents" if round_index < 0 else "encoding for the refit"
        bar = self._bar(title, len(rows), "image", round_index < 0 or model is not None)
        model, began = model or self.model, time.monotonic()
        statistics = LatentStatistics(model.num_classes, model.dim, keep, self.device)
        generator = self._generator(3, round_index + 1)
        with bar:
            for x, y, share in self.images(rows, _EVAL_BATCH, self.views):
                z, logdet = encode(model, self.augmented(x, generator, share), self.config, generator, share)
                statistics.add(z, y, -(model.gaussians.log_prob_of(z, y) + logdet))
                bar.update(share.total)
        statistics.add_ranks()
        self.image_seconds = (time.monotonic() - began) / len(rows)
        return statistics

    def _bar(self, title: str, total: int, unit: str, show: bool = True) -> tqdm:
        return tqdm(total=total, desc=title, unit=unit, disable=not (show and self.progress), dynamic_ncols=True)

    def m_step(self) -> None:
        """One pass over D_g and `m_steps` Adam steps on the Gaussians (Eq. 5, the flow fixed)."""
        beta, steps = self.beta(), self.config.m_steps
        statistics, began = self._latent_pass(self.m_done, self.split.g, keep=bool(beta)), time.monotonic()
        for rate in self.m_rates[self.m_done * steps : (self.m_done + 1) * steps]:
            self._gaussian_step(statistics, rate * self.lr_scale, beta)
        self.latent_seconds = (time.monotonic() - began) / (steps * len(self.split.g))
        if self.m_done == 0:
            # As the authors do: the moments of the first, large gradients are forgotten.
            self.m_optimizer.state.clear()
        self.m_done += 1

    def _gaussian_step(self, statistics: LatentStatistics, rate: float, beta: float) -> None:
        gaussians = self.model.gaussians
        self._let_gaussians_learn(True)
        loss = m_step_loss(gaussians, statistics, self.config, self.kld_weight(), beta)
        self.m_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grads = [p.grad for p in gaussians.parameters() if p.grad is not None]
        if beta:
            loss = loss.detach().to(grads[0])
            add_up(loss, *grads)
        if not all(bool(torch.isfinite(value).all()) for value in (loss, *grads)):
            raise DivergenceError(f"the M-step's loss or its gradient is not finite (loss {loss.item():.4g})")
        self._adam_step(rate)

    def _adam_step(self, rate: float) -> None:
        for group in self.m_optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.m_optimizer.step()
        self.model.gaussians.project()

    def _let_gaussians_learn(self, learn: bool) -> None:
        """Whether the next loss has gradients with respect to those Gaussian parameters that are learned at all."""
        self.model.gaussians.mu.requires_grad_(learn and self.config.learns("means"))
        self.model.gaussians.s.requires_grad_(learn and self.config.learns("variances"))

    # ---- the refit -----------------------------------------------------------------------------------------------

    @property
    def refit_steps(self) -> int:
        """Adam steps of the refit: none where the loss is the likelihood alone, whose maximum has a closed form."""
        return REFIT_STEPS if self.config.refit_beta else 0

    def refit_rows(self) -> np.ndarray:
        """Sorted indices of the images to refit on: all training images, or as many as memory holds the latents of."""
        config, model = self.config, self.model
        if config.learn == "none" or not (self.refit_steps or config.objective == "mle" and not config.joint):
            return np.empty(0, np.int64)
        rows = np.concatenate([self.split.nf, self.split.g])
        return self._some_of_each_class(rows, model.num_classes) if self.refit_steps else np.sort(rows)

    def mode_rows(self) -> np.ndarray:
        """Sorted indices of the images that the modes are fitted to, for which latents are held a class at a time."""
        return self._some_of_each_class(np.arange(len(self.data)), 1)

    def _some_of_each_class(self, rows: np.ndarray, classes: int) -> np.ndarray:
        """Those of `rows`, chosen at random and sorted, of which memory holds the latents of `classes` classes."""
        rows = np.random.default_rng([self.config.seed, 0x2EF17]).permutation(rows)
        most = max(LEAST_IMAGES, MOST_NUMBERS // (self.model.dim * classes))
        return np.sort(
            np.concatenate([rows[self.data.targets[rows] == k][:most] for k in range(self.model.num_classes)])
        )

    def refit(self, model: GLEM, rows: np.ndarray) -> None:
        """Fit the Gaussians to the latents of `rows` under `model`'s flow, since averaging has moved them."""
        config, steps = self.config, self.refit_steps
        statistics = self._latent_pass(self.m_total, rows, keep=steps > 0, model=model)
        if not steps:
            statistics.most_likely(self.model.gaussians, config.learns("means"), config.learns("variances"))
            return
        self.m_optimizer.state.clear()
        with self._bar("refit", steps, "step") as bar:
            for step in range(steps):
                self._gaussian_step(statistics, REFIT_LR * (1 - step / steps), config.refit_beta or 0.0)
                bar.update()

    def seconds_after(self) -> float:
        """About how long the refit and the modes will take after the last step, as far as anything was timed so far."""
        refit = len(self.refit_rows())
        encoded = refit + (len(self.data) if self.config.modes_rank else 0)
        return encoded * self.image_seconds + self.refit_steps * refit * self.latent_seconds

    # ---- measuring and state -------------------------------------------------------------------------------------

    def evaluated(self) -> GLEM:
        """The model as it would be saved now: averaged flow, current Gaussians."""
        flow = self.model.flow if self.ema is None else self.ema.module
        return GLEM(self.model.config, flow, self.model.gaussians, self.model.modes, self.model.autoencoder)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Metrics of the held-out images, or without any of those in D_g; and the Gaussians' state."""
        rows, began = self.split.val if len(self.split.val) else self.split.g, time.monotonic()
        metrics = held_out(self.evaluated(), self.images(rows, _EVAL_BATCH))
        self.image_seconds = (time.monotonic() - began) / len(rows)
        return {**metrics, **gaussian_state(self.model.gaussians)}

    def is_finite(self) -> bool:
        """Whether every weight, averaged ones too, is finite."""
        tensors = [*self.model.state_dict().values(), *self._ema_state().values()]
        return bool(torch.stack([torch.isfinite(t).all() for t in tensors if t.is_floating_point()]).all())

    def _ema_state(self) -> dict[str, Tensor]:
        return {} if self.ema is None else self.ema.state_dict()

    def set_lr_scale(self, scale: float) -> None:
        """Multiply all learning rates of both steps by `scale`, in (0, 1], from now on."""
        self.lr_scale = scale
        for group in self.flow_optimizer.param_groups:
            group["lr_scale"] = scale  # timm's schedulers multiply by it
        self.scheduler.step_update(self.step)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as JSON facts and named tensors.

        The schedules, the learning rates, the order of the images and the noise follow from the settings and the step.
        """
        guard, series = self.guard.state()
        facts = {
            "config": self.config.to_dict(),
            "flow": json.dumps(self.model.config.flow),  # as text, which keeps the order of the keys
            "autoencoder": self.saved_as.autoencoder,
            **{name: getattr(self, name) for name in _COUNTERS},
            "lr_scale": self.lr_scale,
            "epoch_loss": list(self.epoch_loss),
            "guard": guard,
        }
        groups = {
            "model": self.model.state_dict(),
            "ema": self._ema_state(),
            "flow_optimizer": optimizer_tensors(self.flow_optimizer),
            "m_optimizer": optimizer_tensors(self.m_optimizer),
            "run": {"rng": torch.get_rng_state()},
            "guard": series,
        }
        return facts, {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `state` was taken. Raises TrainingError for a checkpoint that does not fit this run."""
        facts, parts = checkpoint.facts, defaultdict[str, dict[str, Tensor]](dict)
        for name, tensor in checkpoint.tensors.items():
            group, _, rest = name.partition("/")
            parts[group][rest] = tensor
        try:
            self.model.load_state_dict(parts["model"], strict=True)
            if self.ema is not None:
                self.ema.load_state_dict(parts["ema"])
            load_optimizer_tensors(self.flow_optimizer, parts["flow_optimizer"])
            load_optimizer_tensors(self.m_optimizer, parts["m_optimizer"])
            torch.set_rng_state(parts["run"]["rng"])
            self.guard.load(facts["guard"], parts["guard"])
            for name in _COUNTERS:
                setattr(self, name, facts[name])
            self.epoch_loss = facts["epoch_loss"][0], facts["epoch_loss"][1]
            self.set_lr_scale(facts["lr_scale"])
        except (LookupError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"{checkpoint.path} does not fit this run: {type(error).__name__}: {reason}") from error


@contextmanager
def training_mode(flow: Flow, config: TrainConfig) -> Iterator[None]:
    """Apply `precision` and `memory` to the flow that is trained; outside, it is float32 and keeps its activations."""
    flow.set_autocast(torch.bfloat16 if config.precision == "bf16" else None)
    flow.set_memory(config.memory)
    try:
        yield
    finally:
        flow.set_autocast(None)
        flow.set_memory("stored")
