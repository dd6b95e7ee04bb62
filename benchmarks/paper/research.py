"""Train with settings that stored results and recipes need, and that the package does not have.

    python benchmarks/paper/research.py DATA --out DIR [--method NAME] [--config RECIPE.yaml] [--init MODEL]

trains like `glem train --config`, with the settings of `Research` in addition to the package's settings, and with the
methods of `methods.py`. RECIPE wins over the method. The command resumes a run in DIR.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.paper.methods import HYBRID_JOINT, METHODS, PAPER
from glem_augment import GLEM, open_data
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.cli.common import table
from glem_augment.distributed import Share
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig, Trainer
from glem_augment.training.checkpoint import has_checkpoint
from glem_augment.training.moments import LatentStatistics
from glem_augment.training.objective import Objective, Progress, Repulsion, falling, with_noise
from glem_augment.training.steps import latent_pass

REFIT_STEPS, REFIT_LR = 200, 3e-3
NOISE_STD = 0.5  # levels; the dequantisation of IB-INN
BY_OBJECTIVE: Any = "by objective"


@dataclass
class Research:
    """Settings in addition to `TrainConfig`, or in place of its objective.

    The E-step's loss is `mean NLL / d + beta * cross-entropy`. The M-step's loss is the mean NLL, with classes of equal
    weight, plus the cross-entropy of a hybrid, and with a repulsion:

    - "glem" is `training.objective.Repulsion`.
    - "mle" (the paper's Baseline 2), "hybrid" and "ib" have no repulsion. After their M-steps, a refit ends the run. It
      fits the Gaussians to latents of the training images under the averaged flow.

    "ib" is the objective of IB-INN: -log p(x) = -log mean_y p(x|y) in place of -log p(x|y), and Gaussian
    dequantisation.

    Attributes:
        kld_weight: of "glem", at the start.
        beta, label_smoothing: of the cross-entropy of "hybrid" and "ib". ce_scale: factor of its class scores.
        joint: the E-step's loss teaches the Gaussians on all images, in place of M-steps. By default so for "hybrid".
        random_init: standard deviations of the means and of the variances' parameters of a random start; None: start at
            class means of the initial latents, with equal variances.
        psi: variances are a*sigmoid(b*s)+c; None: plain variances.
        learn: the parameters of the Gaussians that are learned: "both", "means", "variances" or "none".
        m_rounds: M-steps per epoch, evenly spread.
        freeze_gaussians_at: part of the run after which the Gaussians are fixed and the flow trains on all images.
        sigma_lr_scale: factor of the variances' learning rate.
        averaging: "ema", or "none" for the flow's last weights.
        beta_anneal: (part, factor). After this part of the run, beta falls geometrically to `factor * beta`.
        equal_steps: an epoch without M-steps has only as many steps as an epoch with M-steps.
        refit_beta: beta of the Gaussians' refit at the end of a hybrid run with M-steps; None: beta; 0: no refit.
    """

    objective: str = "hybrid"
    kld_weight: float = 3.0
    beta: float = BY_OBJECTIVE
    ce_scale: float = BY_OBJECTIVE
    label_smoothing: float = BY_OBJECTIVE
    joint: bool = BY_OBJECTIVE
    random_init: tuple[float, float] | None = BY_OBJECTIVE
    psi: tuple[float, float, float] | None = BY_OBJECTIVE
    learn: str = "both"
    m_rounds: int = 1
    freeze_gaussians_at: float = 1.0
    sigma_lr_scale: float = 1.0
    averaging: str = "ema"
    beta_anneal: tuple[float, float] = (0.0, 1.0)
    equal_steps: bool = False
    refit_beta: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("glem", "mle", "hybrid", "ib"):
            raise ValueError(f"no objective {self.objective!r}: use glem, mle, hybrid or ib")
        hybrid = self.objective in ("hybrid", "ib")
        others = PAPER | (dict(beta=0.3, ce_scale=0.2) if hybrid else dict(beta=0.0, ce_scale=1.0))
        joint = self.objective == "hybrid" and self.joint is not False
        for name, value in (HYBRID_JOINT if joint else others).items():
            if getattr(self, name) == BY_OBJECTIVE:
                setattr(self, name, value)
        if self.psi is not None:
            a, b, c = self.psi
            self.psi = (float(a), float(b), float(c))


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], Research]:
    """Settings of the package, and research settings."""
    names = {field.name for field in fields(Research)}
    own = {name: value for name, value in settings.items() if name not in names}
    return own, Research(**{name: value for name, value in settings.items() if name in names})


# ---- the objective ---------------------------------------------------------------------------------------------------


class KeptLatents(LatentStatistics):
    """Statistics that keep the latents, for a cross-entropy."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.latents: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, z: Tensor, y: Tensor, nll: Tensor) -> None:
        super().add(z, y, nll)
        self.latents.append(z)
        self.labels.append(y)

    def cross_entropy(self, gaussians: ClassGaussians, research: Research) -> Tensor:
        """Mean over the classes of their mean cross-entropy."""
        z, y = torch.cat(self.latents), torch.cat(self.labels)
        # Torch's own `weight` would weigh the smoothing by the classes that it is spread over.
        weight = (1 / self.count.clamp_min(1)).to(z.dtype)[y]
        scores = research.ce_scale * gaussians.log_prob(z)
        each = F.cross_entropy(scores, y, label_smoothing=research.label_smoothing, reduction="none")
        return ((weight * each).sum() / weight.sum()).double()


class ScaledAdam(torch.optim.Adam):
    """Adam on Gaussians whose variances have `scale` times the learning rate."""

    def __init__(self, gaussians: ClassGaussians, scale: float) -> None:
        super().__init__(gaussians.parameters())
        self.gaussians, self.scale = gaussians, scale

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        s = self.gaussians.s
        before = s.clone()
        super().step(closure)
        self.gaussians.project()
        s.copy_(before + self.scale * (s - before))  # Adam's step is linear in its rate


class ResearchObjective(Objective):
    """The objective of the settings `research`."""

    def __init__(self, research: Research) -> None:
        self.research = research
        self.psi, self.joint, self.m_rounds = research.psi, research.joint, research.m_rounds
        named = {"means": "mu", "variances": "s"}
        self.learned = tuple(named[name] for name in named if research.learn in ("both", name))
        self.fixed_beta: float | None = None

    def settings(self) -> dict[str, Any]:
        own = asdict(self.research).items()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own}

    @property
    def repels(self) -> bool:
        """Whether M-steps push the classes apart."""
        return self.research.objective == "glem"

    @property
    def crossed(self) -> bool:
        """Whether M-steps have the cross-entropy."""
        return bool(self.research.beta) and not self.joint

    def weights(self, progress: Progress) -> dict[str, float]:
        return {"kld_weight": falling(self.research.kld_weight, progress)} if self.repels else {}

    def m_epochs(self, epochs: int) -> int:
        none = self.joint or self.research.learn == "none"
        return 0 if none else math.ceil(self.research.freeze_gaussians_at * epochs)

    def annealed(self, progress: Progress) -> float:
        """The current beta."""
        if self.fixed_beta is not None:
            return self.fixed_beta
        start, end = self.research.beta_anneal
        late = max(0.0, progress.step / progress.steps - start) / (1 - start)
        return self.research.beta * end**late

    def gaussian_optimizer(self, gaussians: ClassGaussians) -> torch.optim.Optimizer:
        return ScaledAdam(gaussians, self.research.sigma_lr_scale)

    @torch.no_grad()
    def start(
        self,
        gaussians: ClassGaussians,
        statistics: Callable[[], LatentStatistics],
        generator: Callable[[int], torch.Generator],
    ) -> None:
        if self.research.random_init is None:
            statistics().start_of_new_flow(gaussians)
            return
        if self.psi is None:
            gaussians.set_variance(torch.ones_like(gaussians.s))
        means, noise = (torch.randn(gaussians.mu.shape, generator=generator(key)) for key in (2, 6))
        gaussians.mu.copy_(self.research.random_init[0] * means)
        gaussians.s.add_(self.research.random_init[1] * noise.to(gaussians.s))
        gaussians.project()

    def numbers(
        self, model: GLEM, x: Tensor, generator: torch.Generator, share: Share, latent_noise: float = 0.0
    ) -> Tensor:
        if x.dtype != torch.uint8 or self.research.objective != "ib":
            return super().numbers(model, x, generator, share, latent_noise)
        return with_noise(model.numbers(x), NOISE_STD * 2.0**-model.bits, generator, share)

    def e_loss(
        self, gaussians: ClassGaussians, z: Tensor, logdet: Tensor, y: Tensor, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        beta, ib = self.annealed(progress), self.research.objective == "ib"
        if not beta and not ib:
            return super().e_loss(gaussians, z, logdet, y, progress)
        scores = gaussians.log_prob(z)
        own = scores.gather(1, y[:, None])[:, 0]
        if ib:
            own = torch.logsumexp(scores, 1) - math.log(gaussians.num_classes)
        nll = -(own + logdet).mean() / gaussians.dim
        if not beta:
            return nll, nll
        smoothing = self.research.label_smoothing
        return nll + beta * F.cross_entropy(self.research.ce_scale * scores, y, label_smoothing=smoothing), nll

    def statistics(self, num_classes: int, dim: int, device: torch.device) -> LatentStatistics:
        return (KeptLatents if self.crossed else LatentStatistics)(num_classes, dim, device)

    def m_loss(self, gaussians: ClassGaussians, statistics: LatentStatistics, progress: Progress) -> Tensor:
        if self.research.objective == "glem":
            return Repulsion(self.research.kld_weight).m_loss(gaussians, statistics, progress)
        loss = statistics.balanced_nll(gaussians) / gaussians.dim
        if isinstance(statistics, KeptLatents):
            loss = loss + self.annealed(progress) * statistics.cross_entropy(gaussians, self.research)
        return loss


@torch.no_grad()
def most_likely(
    statistics: LatentStatistics, gaussians: ClassGaussians, learned: tuple[str, ...] = ("mu", "s")
) -> None:
    """Set the learned parameters to the minimum of `balanced_nll` within the range of the variances."""
    mean, variance = statistics.moments()
    if "mu" in learned:
        gaussians.mu.copy_(mean)
    if "s" in learned:
        # About the Gaussian's mean, which is the class mean only if it was just set.
        gaussians.set_variance(variance + (mean - gaussians.mu.double()).square())


# ---- the trainer -----------------------------------------------------------------------------------------------------


class ResearchTrainer(Trainer):
    """A `Trainer` with the settings `research`."""

    def __init__(self, data: ImageData, config: TrainConfig, *args: Any, research: Research, **options: Any) -> None:
        self.research, self.own_objective = research, ResearchObjective(research)
        super().__init__(data, config, *args, objective=self.own_objective, **options)
        if self.ema is not None and research.averaging == "none":
            self.ema.decay = 0.0

    def count_steps(self) -> int:
        if not self.research.equal_steps:
            return super().count_steps()
        return max(1, len(self.batches.split.nf) // self.config.batch_size)

    def refit(self, model: GLEM) -> bool:
        """After M-steps without repulsion, fit the Gaussians to latents of the training images."""
        objective, beta = self.own_objective, self.research.refit_beta
        if not self.m_total or objective.repels or (objective.crossed and beta == 0):
            return False
        rows = np.concatenate([self.batches.split.nf, self.batches.split.g])
        if not objective.crossed:
            most_likely(self.last_pass(model, np.sort(rows)), model.gaussians, objective.learned)
            return True
        rows = self.batches.some_of_each_class(rows, model.dim * model.num_classes)  # all classes are in memory
        statistics = self.last_pass(model, rows)
        self.gaussian_optimizer.state.clear()
        objective.fixed_beta = self.research.beta if beta is None else beta
        for step in range(REFIT_STEPS):
            self.descend(statistics, REFIT_LR * (1 - step / REFIT_STEPS))
        return True

    def last_pass(self, model: GLEM, rows: np.ndarray) -> LatentStatistics:
        """Statistics of the latents of `rows` under the flow of `model`, for a refit after the last step."""
        return latent_pass(model, self.batches, self.objective, rows, self.m_total, "encoding for the refit")


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("data")
    args.add_argument("--method", choices=METHODS)
    args.add_argument("--config", type=table)
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--init", type=GLEM.from_pretrained)
    given = args.parse_args()
    own, research = split_settings({**METHODS.get(given.method, {}), **(given.config or {})})
    config = TrainConfig(**own)
    size = None if given.init is None else given.init.image_shape[1:]
    data = open_data(given.data, "train", size)
    resume = has_checkpoint(given.out)
    try:
        ResearchTrainer(data, config, given.out, resume, given.init, research=research).fit()
    except KeyboardInterrupt as stop:
        print(f"research: {stop}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
