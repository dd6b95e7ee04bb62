"""Figures 2 to 6 of the paper, drawn with this library's flows; `figures.<scale>.json` has the numbers."""

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
from glem_augment import GLEM, GLEMAugment
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.codec.pixel_range import UINT8
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
    """Draw all figures; flows and oracle come from the lab."""
    folder = out / "figures"
    facts: dict[str, Any] = {"figure2": losses_in_two_dimensions(folder / f"figure2.{scale}.png")}
    psi_and_codes(lab, folder / f"figure3.{scale}.png")
    facts["figure4"] = interpolations(lab, folder / f"figure4.{scale}.png")
    pairwise_interpolations(lab, folder / f"figure5.{scale}.png")
    augmented_pictures(lab, folder / f"figure6.{scale}.png")
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


# ---- Figure 3: psi, and class codes -------------------------------------------------------------------------------


def psi_and_codes(lab: Lab, path: Path) -> None:
    """psi for a = 2, c = 0 and the paper's slopes; below, one training image of each class with its code."""
    train, _ = lab.data("main")
    plt = _plots()
    count = min(10, len(train.classes))
    figure = plt.figure(figsize=(10, 6))
    top = figure.add_subplot(2, 1, 1)
    s = torch.linspace(-30, 30, 301)
    for b in (0.05, 0.1, 0.2, 0.5, 1.0):
        top.plot(s, 2 * torch.sigmoid(b * s), label=f"b = {b:g}")
    top.set(xlabel="s", ylabel="variance", title="psi(s) = a sigmoid(b s) + c, a = 2, c = 0")
    top.legend()
    fitted = lab.flow(Cell("CEGLEM", "main", "ceglem", ()), 0)
    codes = fitted.codes
    assert codes is not None
    rows = [int((torch.from_numpy(train.targets) == c).nonzero()[0]) for c in range(count)]
    x = codes.append(train.tensor()[rows], torch.arange(count), torch.Generator().manual_seed(0))
    for i in range(count):
        axis = figure.add_subplot(2, count, count + i + 1)
        _show(axis, x[i])
        axis.set_title(train.classes[i][:12], fontsize=7)
    _save(figure, path)


def _show(axis: Any, image: Tensor) -> None:
    picture = image.permute(1, 2, 0).cpu()
    if picture.shape[2] == 1:
        axis.imshow(picture[..., 0], cmap="gray")
    else:
        axis.imshow(picture)
    axis.set_axis_off()


# ---- Figure 4: interpolations, and how sure the oracle is along them; Figure 5: between four images ----------------


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


@torch.no_grad()
def pairwise_interpolations(lab: Lab, path: Path, side: int = 7) -> None:
    """Test images of four classes at the corners; between them, decoded, the bilinear mixtures of their latents."""
    _, test = lab.data("main")
    model = lab.flow(Cell("GLEM", "main", "glem", ()), 0).model
    x, y = test.tensor(), torch.from_numpy(test.targets)
    classes = torch.linspace(0, len(test.classes) - 1, 4).long().tolist()
    corners = torch.stack([x[int((y == c).nonzero()[0])] for c in classes])
    z = model.encode(corners.to(model.device))[0]
    down, right = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    weights = torch.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], dim=-1)
    images = UINT8.clamp(model.decode(weights.view(-1, 4).to(z) @ z)).cpu()
    figure, axes = _plots().subplots(side, side, figsize=(side, side))
    for axis, image in zip(axes.flat, images, strict=True):
        _show(axis, (image * 255).round().to(torch.uint8))
    for axis, c in ((axes[0, 0], 0), (axes[0, -1], 1), (axes[-1, 0], 2), (axes[-1, -1], 3)):
        axis.set_title(test.classes[classes[c]], fontsize=8)
    _save(figure, path)


# ---- Figure 6: augmented pictures ----------------------------------------------------------------------------------


def augmented_pictures(lab: Lab, path: Path) -> None:
    """Training images (left) and three augmentations of each by the paper's mixup along principal modes."""
    train, _ = lab.data("main")
    model = lab.flow(Cell("GLEM", "main", "glem", ()), 0).model
    model.fit_modes(train, rank=64, max_per_class=500)
    rows = torch.arange(len(train))[:: max(1, len(train) // 64)][:64]
    x, y = train.tensor()[rows].float() / 255, torch.from_numpy(train.targets)[rows]
    augment = GLEMAugment(model, "mixup", p=1.0, seed=0)
    out = [augment(x.to(model.device), y.to(model.device))[0].cpu() for _ in range(3)]
    plt = _plots()
    shown = torch.linspace(0, len(rows) - 1, 8).long().tolist()
    figure, axes = plt.subplots(len(shown), 4, figsize=(5, 10))
    for line, index in zip(axes, shown, strict=True):
        for axis, images in zip(line, [x, *out], strict=True):
            _show(axis, (images[index].clamp(0, 1) * 255).round().to(torch.uint8))
    for axis, title in zip(axes[0], ("image", "1", "2", "3"), strict=True):
        axis.set_title(title, fontsize=8)
    _save(figure, path)
