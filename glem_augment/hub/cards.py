"""Facts of a model, as a row of a table or as its card on the Hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from glem_augment.model.config import GLEMConfig, data_names, licence_id
from glem_augment.model.files import stored
from glem_augment.model.glem import GLEM

LIBRARY, SAMPLES = "glem-augment", "samples.png"
# The Hub's task for models that draw images. The model classifies too, but the Hub's widgets cannot run it for
# "image-classification".
PIPELINE = "unconditional-image-generation"
_TAGS = [LIBRARY, "class-conditional", "data-augmentation", "synthetic-data"]
_AUGMENT = "aug = GLEMAugment(model, Mixup(), classes=data.classes)\nx, y = aug(x, y)  # a batch of data\n"
_UNKNOWN = "unknown"  # as the Hub names it
_log = logging.getLogger(__name__)


def table_row(model: GLEM) -> dict[str, str]:
    """A row of a table of models; "-" where the model's record lacks a fact.

    Accuracy and likelihood are measured on test images (`test` in the record), or on held-out training images.
    """
    training, (c, h, w) = model.config.training, model.image_shape
    tensors = stored(model.config, model.state_dict()).values()
    held_out = training.get("held_out")
    held_out = {k.removeprefix("val_"): v for k, v in held_out.items()} if isinstance(held_out, dict) else {}
    measured = training["test"] if isinstance(training.get("test"), dict) else held_out
    size = sum(t.nbytes for t in tensors) if model.origin_file is None else model.origin_file.stat().st_size
    key, unit, _ = model.likelihood
    accuracy, likelihood = measured.get("accuracy"), measured.get(key)
    return {
        "images": ", then ".join(data_names(training)),
        "size": f"{c}x{h}x{w}",
        "codec": (model.config.autoencoder or {"name": f"pixels {model.numbers_are}"})["name"],
        "flow": str(model.config.flow.get("preset", "custom")) if flow_parameters(model) else "-",
        "parameters": f"{sum(t.numel() for t in tensors) / 1e6:.2f} M",
        "MiB": f"{size / 2**20:.1f}",
        "accuracy": f"{100 * accuracy:.1f} %" if isinstance(accuracy, float) else "-",
        "likelihood": f"{likelihood:.3f} {unit}" if isinstance(likelihood, float) else "-",
        "licence": licence_id(training.get("license")) or "-",
        "made by": str(training.get("command", "-")),
    }


def flow_parameters(model: GLEM) -> int:
    """The number of parameters of the flow; 0 where there is no flow."""
    return sum(parameter.numel() for parameter in model.flow.parameters())


def model_card(model: GLEM, repo_id: str, license: str | None = None) -> ModelCard:  # noqa: A002  (the Hub's word)
    """The card of `model` for the repository `repo_id`, beside the picture of samples.

    Args:
        license: of the training images, as the Hub names it; by default the licence in the record of the training. If
            both are missing, the card says "unknown", with a warning.
    """
    training = model.config.training
    license = license or licence_id(training.get("license"))  # noqa: A001
    if license is None:
        license = _UNKNOWN  # noqa: A001
        _log.warning(
            "no licence is given, so the card says that it is unknown. Samples inherit the licence of the images that "
            "the model was trained on: state it with license= (--license)"
        )
    metadata = ModelCardData(
        license=license,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=[*_TAGS, *(["normalizing-flow"] if flow_parameters(model) else [])],
    )
    row = table_row(model)
    text = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    noise = "**After its training this model was worse than independent numbers: images drawn from it are noise.**\n\n"
    text = text.format(
        title=escape(repo_id),
        repo_id=repo_id,
        shape=row["size"],
        count="one class" if model.num_classes == 1 else f"{model.num_classes} classes",
        data=escape(row["images"]),
        picture=f"![Samples, one row for each class]({SAMPLES})",
        augment="" if model.modes is None else _AUGMENT,
        privacy=_privacy(model.config),
        noise=noise if training.get("worse_than_independent_pixels") is True else "",
        table="\n".join(f"| {key} | {escape(value)} |" for key, value in {**row, "licence": license}.items()),
        classes=", ".join(map(escape, model.classes)),
        licence="not stated: ask the publisher before you use this" if license == _UNKNOWN else license,
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _privacy(config: GLEMConfig) -> str:
    """The section on a private model's promise; nothing for any other model."""
    if (facts := config.privacy) is None:
        return ""
    return (
        f"## Privacy\n\n{escape(config.promise)} The mechanism: {escape(facts.get('mechanism', 'none'))}. "
        "Other releases of the same images add up with this one. Reports of quality are not covered.\n\n"
    )


def escape(text: object) -> str:
    """Untrusted text for Markdown, without table cells, links, tags or code."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
