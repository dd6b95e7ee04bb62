"""The words of ``glem demo``'s report."""

from __future__ import annotations

import math
import textwrap
from typing import Any


def measured_text(measured: dict[str, Any]) -> str:
    """What ``evaluate`` found, for the terminal."""
    trip = measured["round_trip"]
    ece = "" if measured["ece"] is None else f", calibration error {measured['ece']:.3f}"
    return (
        f"   accuracy {100 * measured['accuracy']:.1f} % (top 5: {100 * measured['top5']:.1f} %){ece}\n"
        f"   {measured['bits_per_dim']:.3f} bits/dim at {measured['bits']} bits\n"
        f"   round trip: {100 * trip['within_half_step']:.4f} % of pixels within half a uint8 step, largest error "
        f"{trip['max_error']:.2g} steps\n"
        f"   {measured['images_per_second']:.0f} images/s classified on {measured['threads']} thread(s)"
    )


def arms_text(report: dict[str, Any]) -> str:
    """Accuracies of the arms and what they mean, for the terminal."""
    classifier = report["classifier"]
    lines = []
    for name, arm in classifier["arms"].items():
        spread = "" if arm["std"] is None else f" +- {100 * arm['std']:.2f}"
        each = ", ".join(f"{100 * value:.1f}" for value in arm["accuracies"])
        lines.append(f"   {name:<18}{100 * arm['mean']:.2f}{spread} %   ({each})")
    lines.append(f"   {verdict(classifier['arms'])}")
    return "\n".join([*lines, textwrap.fill(classifier["caution"], 110, initial_indent="   ", subsequent_indent="   ")])


def verdict(arms: dict[str, Any]) -> str:
    """What the numbers say, and whether they can say it: a difference within twice its standard error is none."""
    plain, ours = arms["no augmentation"], arms["GLEMAugment"]
    gain = 100 * (ours["mean"] - plain["mean"])
    if plain["std"] is None or ours["std"] is None:
        return f"With GLEMAugment {gain:+.2f} points; one seed can't tell this from chance."
    error = 100 * math.sqrt((plain["std"] ** 2 + ours["std"] ** 2) / len(plain["accuracies"]))
    clear = "more" if abs(gain) > 2 * error else "not more"
    return (
        f"With GLEMAugment {gain:+.2f} points, {clear} than twice the standard error of the difference ({error:.2f})."
    )


def markdown(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    flow, classifier = report["flow"], report["classifier"]
    trip, settings = flow["round_trip"], classifier["settings"]
    rows = [
        ("accuracy", f"{100 * flow['accuracy']:.2f} %"),
        ("top-5 accuracy", f"{100 * flow['top5']:.2f} %"),
        ("bits/dim, given the class", f"{flow['bits_per_dim']:.4f} at {flow['bits']} bits"),
        ("calibration error", "not measured (torchmetrics)" if flow["ece"] is None else f"{flow['ece']:.4f}"),
        ("pixels back within half a step", f"{100 * trip['within_half_step']:.4f} %"),
        ("largest round-trip error", f"{trip['max_error']:.3g} steps of 255"),
    ]
    arms = []
    for name, arm in classifier["arms"].items():
        spread = "one seed" if arm["std"] is None else f"{100 * arm['std']:.2f}"
        each = ", ".join(f"{100 * value:.1f}" for value in arm["accuracies"])
        arms.append(f"| {name} | {100 * arm['mean']:.2f} | {spread} | {each} |")
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    smoke = "\n**A quick run: these numbers mean little.**\n" if report["quick"] else ""
    return f"""# glem demo
{smoke}
Flow `{report["model"]}` on {flow["n"]} bundled Fashion-MNIST test images:

| | |
|---|---|
{table}

`preview.png` shows augmentations, samples and interpolations; `synthetic/` holds {settings["per_class"]} images of each
class, drawn together in `synthetic.png`.

## A classifier on {classifier["train_images"]} images, with and without

timm `{classifier["network"]}` from scratch, {classifier["steps"]} steps of {settings["batch_size"]} images, AdamW,
cosine schedule; the same batches and no other augmentation in every arm; accuracy in % on
{classifier["test_images"]} test images after the last step.
Augmented arms replace an image with probability {settings["p"]} by one of {settings["views"]} copies made beforehand by
`GLEMAugment` (mixup along the modes of the class; otherwise its defaults).

| arm | mean | std | runs |
|---|---|---|---|
{chr(10).join(arms)}

{verdict(classifier["arms"])}

{classifier["caution"]}

The whole demo took {report["seconds"]:.0f} s.
"""
