"""Figures 2 and 4 of the paper, drawn with this library's flows; `figures.<scale>.json` has the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.classifier import Classifier
from benchmarks.paper.lab import Lab
from benchmarks.paper.research import Research, ResearchObjective
from benchmarks.paper.tables import Cell
from glem_augment import GLEM
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.io import write_json
from glem_augment.training.moments import LatentStatistics
from glem_augment.training.objective import Progress

PAIRS, STEPS = 200, 11


def _plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _plots().close(figure)


def run_figures(lab: Lab, scale: str, out: Path) -> None:
    """Draw the figures; flows and oracle come from the lab."""
    folder = out / "figures"
    facts: dict[str, Any] = {"figure2": losses_in_two_dimensions(folder / f"figure2.{scale}.png")}
    facts["figure4"] = interpolations(lab, folder / f"figure4.{scale}.png")
    write_json(out / f"figures.{scale}.json", facts)
    print(f"figures in {folder}", flush=True)


# ---- Figure 2: what the two losses do to Gaussians ----------------------------------------------------------------

SETTINGS = {
    "likelihood only": dict(objective="mle"),
    "KLD, only means": dict(objective="glem", kld_weight=0.1, learn="means"),
    "KLD, only variances": dict(objective="glem", kld_weight=0.1, learn="variances"),
    "KLD, both": dict(objective="glem", kld_weight=0.1),
}


def two_dimensional_fit(settings: dict[str, Any], z: Tensor, y: Tensor, steps: int = 200) -> ClassGaussians:
    """Gaussians of points z [N, 2] by the trainer's M-step loss, starting at the maximum of likelihood.

    The points are fixed, although a flow would move them. So the figure shows the effect of the losses alone.
    """
    objective = ResearchObjective(Research(psi=(5.0, 0.2, 0.05), **settings))
    classes = int(y.max()) + 1
    gaussians = ClassGaussians(classes, 2, objective.psi)
    with torch.no_grad():
        for c in range(classes):
            gaussians.mu[c] = z[y == c].mean(0)
        gaussians.set_variance(torch.stack([z[y == c].var(0) for c in range(classes)]))
        statistics = LatentStatistics(classes, 2)
        statistics.add(z, y, -gaussians.log_prob_of(z, y))
    optimizer = torch.optim.Adam(gaussians.parameters())
    gaussians.mu.requires_grad_("mu" in objective.learned)
    gaussians.s.requires_grad_("s" in objective.learned)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        loss = objective.m_loss(gaussians, statistics, Progress(0, 1, 0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gaussians


def losses_in_two_dimensions(path: Path) -> dict[str, Any]:
    """Four overlapping classes, of which two are similar; one panel per setting."""
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-1.2, 0.0], [-0.2, 0.5], [1.4, -0.4], [0.4, -1.4]])
    spread = torch.tensor([[0.7, 0.5], [0.7, 0.4], [0.5, 0.7], [0.6, 0.5]])
    y = torch.arange(800) % 4
    z = centres[y] + spread[y] * torch.randn(800, 2, generator=g)
    plt = _plots()
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), sharex=True, sharey=True)
    facts = {}
    for axis, (name, settings) in zip(axes, SETTINGS.items(), strict=True):
        gaussians = two_dimensional_fit(settings, z, y)
        mu, std = gaussians.mu.detach(), gaussians.variance().detach().sqrt()
        kld = gaussians.kld_matrix().detach()
        facts[name] = {"means": mu.tolist(), "deviations": std.tolist(), "mean KLD": float(kld.sum() / 12)}
        angle = torch.linspace(0, 2 * math.pi, 100)
        for c in range(4):
            colour = f"C{c}"
            axis.scatter(*z[y == c].T, s=2, color=colour, alpha=0.4)
            for times in (1, 2):
                axis.plot(
                    mu[c, 0] + times * std[c, 0] * angle.cos(), mu[c, 1] + times * std[c, 1] * angle.sin(), color=colour
                )
        axis.set(title=f"{name}\nmean KLD {facts[name]['mean KLD']:.2f} nats", aspect="equal")
    _save(figure, path)
    return facts


def _show(axis: Any, image: Tensor) -> None:
    picture = image.permute(1, 2, 0).cpu()
    if picture.shape[2] == 1:
        axis.imshow(picture[..., 0], cmap="gray")
    else:
        axis.imshow(picture)
    axis.set_axis_off()


# ---- Figure 4: interpolations, and how sure the oracle is along them ------------------------------------------------


@torch.no_grad()
def entropy_along(oracle: Classifier, lines: Tensor) -> Tensor:
    """The oracle's mean entropy, nats, at each step of lines [P, S, C, H, W]: [S]."""
    logits = oracle.run(lines.flatten(0, 1))[1].double().log_softmax(1)
    return -(logits.exp() * logits).sum(1).view(lines.shape[:2]).mean(0)


def _lines(model: GLEM | None, a: Tensor, b: Tensor) -> Tensor:
    """Interpolations in latent space, or of the pixels without a model: the control."""
    if model is not None:
        return torch.nan_to_num(model.interpolate(a, b, STEPS), 0.5).clamp(0, 1).cpu()
    weight = torch.linspace(0, 1, STEPS)[:, None, None, None]
    return a[:, None].float() / 255 * (1 - weight) + b[:, None].float() / 255 * weight


def interpolations(lab: Lab, path: Path) -> dict[str, list[float]]:
    """Between test images of different classes: pictures, and the oracle's entropy over many pairs."""
    _, test = lab.data("main")
    x, y = test.tensor(), torch.from_numpy(test.targets)
    g = torch.Generator().manual_seed(0)
    first = torch.randperm(len(x), generator=g)[:PAIRS]
    second = torch.randperm(len(x), generator=g)[:PAIRS]
    differ = y[first] != y[second]
    first, second = first[differ], second[differ]
    models: dict[str, GLEM | None] = {
        "GLEM": lab.flow(Cell("GLEM", "main", "glem", ()), 0).model,
        "IB-INN": lab.flow(Cell("IB-INN", "main", "ib-inn", ()), 0).model,
        "pixels (control)": None,
    }
    oracle = lab.oracle("main")
    plt = _plots()
    figure, axes = plt.subplots(3 * len(models) + 1, STEPS, figsize=(11, 10))
    for axis in axes.flat:
        axis.set_axis_off()
    grid = axes[0, 0].get_gridspec()
    curve = figure.add_subplot(grid[-1, :])
    facts = {}
    for block, (name, model) in enumerate(models.items()):
        lines = _lines(model, x[first], x[second])
        facts[name] = entropy_along(oracle, lines).tolist()
        curve.plot(facts[name], label=name)
        for pair in range(3):
            for step in range(STEPS):
                _show(axes[3 * block + pair, step], (lines[pair, step] * 255).round().to(torch.uint8))
        axes[3 * block, 0].set_title(name, fontsize=8, loc="left")
    curve.set(ylabel="entropy, nats", xlabel="step")
    curve.legend(fontsize=7)
    _save(figure, path)
    return facts
