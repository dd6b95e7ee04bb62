"""Cards of models and synthetic sets, from model_card.md and dataset_card.md, records and the publisher's facts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from glem_augment.classes.privacy import promise
from glem_augment.model.config import data_name, data_names, licence_id, records
from glem_augment.model.glem import GLEM

LIBRARY, SAMPLES = "glem-augment", "samples.png"
# The Hub's task for models that draw images. The model classifies too, but the Hub's widgets cannot run it for
# "image-classification".
PIPELINE = "unconditional-image-generation"
_TAGS = [LIBRARY, "normalizing-flow", "class-conditional", "data-augmentation", "synthetic-data"]
# Keys of a table of `glem eval`: the Hub's task, the Hub's metric, and words for people.
_METRICS = {
    "accuracy": ("image-classification", "accuracy", "accuracy of the generative classifier"),
    "top5": ("image-classification", "top_5_accuracy", "top-5 accuracy"),
    "ece": ("image-classification", "expected_calibration_error", "expected calibration error, 15 bins"),
    "bits_per_dim": (PIPELINE, "bits_per_dim", "bits/dim given the class"),
    "bits_per_dim_marginal": (PIPELINE, "bits_per_dim_marginal", "bits/dim, all classes equally likely"),
    "nats_per_number": (PIPELINE, "nats_per_number", "nats per number given the class"),
    "fid": (PIPELINE, "fid", "FID of samples"),
}
_AUGMENT = "aug = GLEMAugment(model, Noise(strength=0.5))\nx, y = aug(x, y)  # a batch\n"
_SETTINGS = ("objective", "epochs", "batch_size", "lr", "beta", "seed")
# Keys of a report of `evaluation.quality_report`, and words for people.
_REPORTED = {
    "fid": "FID",
    "coverage": "coverage",
    "density": "density",
    "label_reliability": "share of images that a classifier of real images gives their class",
    "judge_accuracy": "the same share of real held-out images",
    "ratio": "distance to the nearest training image, over that to the nearest held-out one (copies: near 0)",
}


@dataclass(frozen=True)
class CardFacts:
    """Facts from the publisher that are not in the model's files.

    Attributes:
        license: the licence of the training images, as the Hub names it ("mit", ..., or "other" with `license_name`
            and `license_link`); by default the licence in the record of the training.
        datasets: identifiers of the training data on the Hub.
        metrics: tables that `glem eval` printed; they may hold `fid` as well.
        report: of a synthetic set, the folder that `evaluation.quality_report` wrote.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: str | Sequence[str] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    report: str | os.PathLike[str] | None = None

    def metadata(self) -> dict[str, Any]:
        """The licence as metadata of a card. ValueError: a name or a link of a licence that the Hub knows."""
        if (self.license_name or self.license_link) and self.license != "other":
            raise ValueError(
                "license_name and license_link are for licences that the Hub does not know: give license='other'"
            )
        return {"license": self.license, "license_name": self.license_name, "license_link": self.license_link}

    def sentence(self) -> str:
        """A sentence on the licence that images drawn by the model inherit."""
        if self.license is None:
            return "**The licence was not stated: ask the publisher before you use this.**"
        named = f"{self.license_name} ({self.license})" if self.license_name else self.license
        return f"The publisher states: {named}" + (f" ([text]({self.license_link}))." if self.license_link else ".")


def _filled(template: str, data: CardData, /, **values: Any) -> str:
    """The text of a card: metadata, and the template with these values."""
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return f"---\n{data.to_yaml()}\n---\n\n{text.format(**values)}"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


# ---- models --------------------------------------------------------------------------------------------------------


def model_card(model: GLEM, repo_id: str, facts: CardFacts | None = None, samples: bool = True) -> ModelCard:
    """The card of `model` for the repository `repo_id`; `samples`: whether `samples.png` lies beside it.

    Raises:
        ValueError: metrics that `glem eval` did not write, or of another bit depth.
    """
    training, facts = model.config.training, facts or CardFacts()
    facts = replace(facts, license=facts.license or licence_id(training.get("license")))
    if facts.metrics:
        model.refuse_if_private("metrics on the card")
    results = _results(model, facts.metrics)
    preset = str(model.config.flow.get("preset", "flow"))
    metadata = ModelCardData(
        **facts.metadata(),
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=[*_TAGS, preset],
        base_model=base_model(training),
        datasets=[facts.datasets] if isinstance(facts.datasets, str) else list(facts.datasets) or None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    c, h, w = model.image_shape
    settings = records(training)[-1].get("config")
    settings = settings if isinstance(settings, dict) else {}
    trained = ", ".join(f"{key} {settings[key]}" for key in _SETTINGS if settings.get(key) is not None)
    about = {
        "preset": f"`{preset}`, {sum(p.numel() for p in model.flow.parameters()):,} parameters in the flow",
        "images": f"{c}x{h}x{w}, {model.numbers_are}",
        "classes": ", ".join(map(escape, model.classes)),
        "training": escape(trained) or "no record",
    }
    noise = "**After its training this model was worse than independent pixels: images drawn from it are noise.**\n\n"
    text = _filled(
        "model_card.md",
        metadata,
        title=escape(repo_id),
        repo_id=repo_id,
        shape=f"{c}x{h}x{w}",
        size=f"{h}x{w}",
        count=model.num_classes,
        data=trained_on(data_names(training)),
        images=f", {training['images']:,} images" if isinstance(training.get("images"), int) else "",
        picture=f"\n\n![Samples, one row for each class]({SAMPLES})" if samples else "",
        augment="" if model.modes is None else _AUGMENT,
        licence=facts.sentence(),
        about=_table(about),
        privacy=_privacy(model.config.privacy),
        evaluation=(noise if training.get("worse_than_independent_pixels") is True else "") + _evaluation(results),
        unit=model.likelihood[1],
    )
    return ModelCard(text)


def _results(model: GLEM, metrics: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The numbers that the trainer recorded on the held-out images, then the numbers of tables of `glem eval`."""
    training = model.config.training
    for table in metrics:
        if not any(is_number(table.get(key)) for key in _METRICS):
            raise ValueError(f"metrics must hold one of {', '.join(_METRICS)}, as glem eval writes them; got {table}")
        if table.get("bits", model.bits) != model.bits:
            raise ValueError(f"metrics are for {table['bits']} bits, and the model has {model.bits}: measure again")
    recorded = {"data": training.get("data"), "split": "train (held out)", **held_out(training)}
    results = []
    for table in (recorded, *metrics):
        name = data_name(table.get("data"))
        for key, (task, metric, words) in _METRICS.items():
            if is_number(table.get(key)):
                result = EvalResult(
                    task_type=task,
                    dataset_type=re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-.") or "unknown",
                    dataset_name=name,
                    dataset_split=None if table.get("split") is None else str(table["split"]),
                    metric_type=metric,
                    metric_name=words,
                    metric_value=round(float(table[key]), 6),
                )
                results.append(result)
    return results


def _evaluation(results: Sequence[EvalResult]) -> str:
    if not results:
        return "No measurements are recorded."
    rows = ["| data | metric | value |", "|---|---|---|"]
    for result in results:
        share = result.metric_type.endswith("accuracy")
        value = f"{100 * result.metric_value:.2f} %" if share else f"{result.metric_value:.4g}"
        where = f"{escape(result.dataset_name)}, {escape(result.dataset_split or 'test')}"
        rows.append(f"| {where} | {result.metric_name} | {value} |")
    return "\n".join(rows)


def held_out(training: Mapping[str, Any]) -> dict[str, float | None]:
    """Accuracy and likelihood on held-out training images, from the trainer's record."""
    found = training.get("held_out")
    found = found if isinstance(found, dict) else {}
    keys = ("accuracy", "nats_per_number" if "val_nats_per_number" in found else "bits_per_dim")
    values = {key: found.get(f"val_{key}") for key in keys}
    return {key: value if is_number(value) else None for key, value in values.items()}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- synthetic sets ------------------------------------------------------------------------------------------------


def dataset_card(manifest: Mapping[str, Any], name: str, facts: CardFacts) -> DatasetCard:
    """The card of synthetic images as shards, with metadata for the library `datasets`.

    Args:
        manifest: of the export, see `synthetic.export`.
        name: the title.
        facts: the licence.
    """
    names = {str(entry["index"]): entry["name"] for entry in manifest["classes"]}
    columns = {"png": "image", "cls": {"class_label": {"names": names}}, "__key__": "string", "__url__": "string"}
    metadata = DatasetCardData(
        **facts.metadata(),
        annotations_creators=["machine-generated"],
        task_categories=["image-classification"],
        tags=["synthetic", LIBRARY],
        dataset_info={"features": [{"name": column, "dtype": kind} for column, kind in columns.items()]},
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.tar"}]}],
    )
    c, h, w = manifest["image_shape"]
    loaded = f"`{manifest['loaded_from']}` on the Hub" if manifest["loaded_from"] else "a local model"
    made = "drawn from a class-conditional model. None is a photograph, and none should be taken for one."
    derived = "Samples derive"
    if manifest["settings"]["source"] == "mixup":
        made = "made by a class-conditional model: each is a real image, moved part of the way to another."
        derived = f"Mixtures derive from real images ({escape(manifest['real'] or 'not recorded')}) and"
    about = {
        "generator": manifest["generator"],
        "model": f"{loaded}, weights with SHA-256 `{manifest['weights_sha256']}`",
        "the model was trained on": trained_on(manifest["trained_on"]),
        **{key: escape(value) for key, value in manifest["settings"].items()},
    }
    text = _filled(
        "dataset_card.md",
        metadata,
        title=escape(name),
        name=name,
        count=manifest["count"],
        shape=f"{c}x{h}x{w}",
        classes=len(manifest["classes"]),
        made=made,
        about=_table(about),
        privacy=_privacy(manifest["model"].get("privacy")),
        quality=f"\n\n## Quality\n\n{_quality(manifest['quality'])}" if "quality" in manifest else "",
        derived=derived,
        licence=facts.sentence(),
    )
    return DatasetCard(text)


def _privacy(facts: Mapping[str, Any] | None) -> str:
    """The section on a private model's promise; nothing for any other model."""
    if facts is None:
        return ""
    return (
        f"## Privacy\n\n{escape(promise(dict(facts)))} The mechanism: {escape(facts.get('mechanism', 'none'))}. "
        "Other releases of the same images add up with this one. Reports of quality are not covered.\n\n"
    )


def _quality(report: Mapping[str, Any]) -> str:
    """The section on a report of `evaluation.quality_report`."""
    found = {**report, **(report["memorisation"] or {})}
    rows = {words: f"{found[key]:.3g}" for key, words in _REPORTED.items() if key in found}
    images = ", ".join(f"{count} {name.replace('_', '-')}" for name, count in report["images"].items())
    picture = "![Synthetic images beside the nearest real ones](report.png)"
    text = f"Measured on {images} images; features of {escape(report['features'])}. {escape(report['warning'] or '')}"
    return f"{_table(rows)}\n\n{text.strip()}\n\n{picture}"


# ---- names -------------------------------------------------------------------------------------------------------


def trained_on(names: Sequence[str]) -> str:
    """Markdown for `data_names`."""
    return ", then adapted to ".join(map(escape, names))


def base_model(training: Mapping[str, Any]) -> str | None:
    """The repository of the model that was adapted or fine-tuned; None if that model is not from the Hub."""
    for record in records(training):
        before = record.get("adapted_from") or record.get("init_from")
        repo_id = str(before.get("origin")).partition("@")[0] if isinstance(before, dict) else ""
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
            return repo_id
    return None


def escape(text: object) -> str:
    """Untrusted text for Markdown, without table cells, links, tags or code."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
