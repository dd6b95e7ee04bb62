"""Train with settings that stored results and recipes need, and that the package does not have.

    python benchmarks/paper/research.py DATA --config RECIPE.yaml --out DIR [--init MODEL] [--max-minutes M]

trains like `glem train --config`, with these settings in addition to the package's settings. It resumes a run in DIR.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from glem_augment import GLEM, ImageData, open_data
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.cli.common import table
from glem_augment.cli.train import checked
from glem_augment.training import EXIT_TIME_UP, TimeUpError, TrainConfig, Trainer
from glem_augment.training.folder import has_checkpoint
from glem_augment.training.objective import LatentStatistics, m_learning_rates

REFIT_STEPS, REFIT_LR = 200, 3e-3


@dataclass
class Research:
    """Settings in addition to `TrainConfig`.

    Attributes:
        m_rounds: M-steps per epoch, evenly spread.
        freeze_gaussians_at: share of the run after which the Gaussians are fixed and the flow trains on all images.
        sigma_lr_scale: factor of the variances' learning rate.
        averaging: "ema", or "none" for the flow's last weights.
        beta_anneal: (share, factor). After this share of the run, beta falls geometrically to `factor * beta`.
        equal_steps: an epoch without M-steps has only as many steps as an epoch with M-steps.
        refit_beta: beta of the Gaussians' refit at the end of a hybrid run with M-steps; None: beta; 0: no refit.

    M-steps of a hybrid run have the cross-entropy, too, with classes of equal weight.
    """

    m_rounds: int = 1
    freeze_gaussians_at: float = 1.0
    sigma_lr_scale: float = 1.0
    averaging: str = "ema"
    beta_anneal: tuple[float, float] = (0.0, 1.0)
    equal_steps: bool = False
    refit_beta: float | None = None


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], Research]:
    """Settings of the package, and research settings."""
    names = {field.name for field in fields(Research)}
    own = {name: value for name, value in settings.items() if name not in names}
    return own, Research(**{name: value for name, value in settings.items() if name in names})


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

    def cross_entropy(self, gaussians: ClassGaussians, config: TrainConfig) -> Tensor:
        """Mean over the classes of their mean cross-entropy."""
        z, y = torch.cat(self.latents), torch.cat(self.labels)
        # Torch's own `weight` would weigh the smoothing by the classes that it is spread over.
        weight = (1 / self.count.clamp_min(1)).to(z.dtype)[y]
        scores = config.ce_scale * gaussians.log_prob(z)
        each = F.cross_entropy(scores, y, label_smoothing=config.label_smoothing, reduction="none")
        return ((weight * each).sum() / weight.sum()).double()


class ResearchTrainer(Trainer):
    """A `Trainer` with the settings `research`."""

    def __init__(self, data: ImageData, config: TrainConfig, *args: Any, research: Research, **options: Any) -> None:
        self.research = research
        super().__init__(data, config, *args, **options)
        self.frozen_from = math.ceil(research.freeze_gaussians_at * config.epochs) if self.m_total else 0
        self.m_total = research.m_rounds * self.frozen_from
        self.m_rates = m_learning_rates(self.m_total, config.m_steps, self.frozen_from * self.steps_per_epoch)
        if self.ema is not None and research.averaging == "none":
            self.ema.decay = 0.0

    def count_steps(self) -> int:
        if not self.research.equal_steps:
            return super().count_steps()
        return max(1, len(self.split.nf) // self.config.batch_size)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        if self.m_total and epoch < getattr(self, "frozen_from", math.inf):
            return self.split.nf
        return np.concatenate([self.split.nf, self.split.g])

    def m_steps_due(self, epoch: int, position: int) -> int:
        rounds = self.research.m_rounds
        first = epoch * rounds
        before = [first + r for r in range(rounds) if r * self.steps_per_epoch // rounds == position]
        return sum(self.m_done <= r for r in before) if epoch < self.frozen_from else 0

    def e_step(self, *batch: Any) -> tuple[float, float]:
        with self.with_beta(self.annealed()):
            return super().e_step(*batch)

    def m_step(self) -> None:
        with self.with_beta(self.annealed()):
            super().m_step()

    def annealed(self) -> float:
        """The current beta."""
        start, end = self.research.beta_anneal
        late = max(0.0, self.step / self.total_steps - start) / (1 - start)
        return self.config.beta * end**late

    @contextmanager
    def with_beta(self, beta: float) -> Iterator[None]:
        """A context with another beta."""
        before, self.config.beta = self.config.beta, beta
        try:
            yield
        finally:
            self.config.beta = before

    @property
    def crossed(self) -> bool:
        """Whether M-steps have the cross-entropy."""
        return bool(self.config.beta) and not self.config.joint

    def new_statistics(self) -> LatentStatistics:
        if not self.crossed:
            return super().new_statistics()
        return KeptLatents(self.model.num_classes, self.model.dim, self.device)

    def m_loss(self, statistics: LatentStatistics) -> Tensor:
        loss = super().m_loss(statistics)
        if isinstance(statistics, KeptLatents):
            loss = loss + self.config.beta * statistics.cross_entropy(self.model.gaussians, self.config)
        return loss

    def refit_rows(self) -> np.ndarray:
        if not self.crossed:
            return super().refit_rows()
        if self.research.refit_beta == 0:
            return np.empty(0, np.int64)
        return self.some_of_each_class(np.concatenate([self.split.nf, self.split.g]), self.model.num_classes)

    def refit(self, model: GLEM, rows: np.ndarray) -> None:
        if not self.crossed:
            return super().refit(model, rows)
        statistics = self.latent_pass(self.m_total, rows, model)
        self.m_optimizer.state.clear()
        beta = self.research.refit_beta
        with self.with_beta(self.config.beta if beta is None else beta):
            for step in range(REFIT_STEPS):
                self.descend(statistics, REFIT_LR * (1 - step / REFIT_STEPS))

    @torch.no_grad()
    def gaussian_step(self, rate: float) -> None:
        s = self.model.gaussians.s
        before = s.clone()
        super().gaussian_step(rate)
        s.copy_(before + self.research.sigma_lr_scale * (s - before))  # Adam's step is linear in its rate
        self.model.gaussians.project()


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("data")
    args.add_argument("--config", type=table, required=True)
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--init", type=GLEM.from_pretrained)
    args.add_argument("--max-minutes", type=float)
    given = args.parse_args()
    own, research = split_settings(given.config)
    config = TrainConfig(**checked(own, "--config"), max_minutes=given.max_minutes)
    size = None if given.init is None else given.init.image_shape[1:]
    data = open_data(given.data, "train", size)
    resume = has_checkpoint(given.out)
    trainer = ResearchTrainer(data, config, given.out, resume, None if resume else given.init, research=research)
    try:
        trainer.fit()
    except TimeUpError as stop:
        print(f"research: {stop}")
        return EXIT_TIME_UP
    return 0


if __name__ == "__main__":
    sys.exit(main())
