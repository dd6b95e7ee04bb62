"""The model card: what a flow is, what it was trained on, how good it is, and what it is not for.

Only what is known is written. What the model does not record (the licence of its training data, above all) is asked of
whoever pushes it, and left out where they do not say.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from glem_augment.data.timm_sources import PREFIXES
from glem_augment.io import expand

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from glem_augment.model.glem import GLEM

__all__ = ["CardFacts", "model_card"]

LIBRARY = "glem-augment"
# Of the Hub's tasks this is the one for models that make images without a text or an image to start from. The flow
# classifies too, but "image-classification" would promise the Hub's widgets a classifier that they can run.
PIPELINE = "unconditional-image-generation"
TAGS = ["glem-augment", "normalizing-flow", "class-conditional", "data-augmentation", "synthetic-data"]
SAMPLES = "samples.png"
_MAX_CLASSES = 100
_TASKS = {
    "accuracy": ("image-classification", "accuracy", "accuracy of the generative classifier"),
    "top5": ("image-classification", "top_5_accuracy", "top-5 accuracy"),
    "ece": ("image-classification", "expected_calibration_error", "expected calibration error, 15 bins"),
    "bits_per_dim": (PIPELINE, "bits_per_dim", "bits/dim given the class"),
    "bits_per_dim_marginal": (PIPELINE, "bits_per_dim_marginal", "bits/dim, all classes equally likely"),
    "fid": (PIPELINE, "fid", "FID of samples"),
}

_WHAT_IT_IS = """\
It maps an image exactly to a latent and back; each class has a Gaussian of its own there. It draws new images of a
class, moves real images along the principal modes of their class (data augmentation), and classifies by its exact
likelihood p(image | class). The method is GLEM (Enescu and Sahbi, "Learning Classwise Untangled Continuums for
Conditional Normalizing Flows", ACCV 2024), the library glem-augment."""
_INTENDED_USE = """\
- For augmenting and balancing the training sets of image classifiers with these classes, and for research on
  generative classifiers. Other classes take fine-tuning (`glem train --init`).
- Not for images that are to be taken for real ones, and not for decisions about people. The posterior knows only
  these classes: an image of anything else gets one of them.
- Samples repeat what is in the training images, with its biases and gaps, and may resemble single images. Look at them
  before use, and compare with the `identity` preset, the control without a learned flow."""
_FILES = """\
`model.safetensors` and `config.json` hold no code. The library compares names, shapes and types with the config before
it loads anything, and the download with the checksum that the Hub states."""


@dataclass(frozen=True)
class CardFacts:
    """What whoever publishes a model has to add, since the model does not know it.

    Attributes:
        license: identifier of the Hub ("mit", "cc-by-4.0", ..., "other" with ``license_name`` and ``license_link``).
            What a flow draws derives from its training images, so that it is their licence that counts.
        datasets: identifiers on the Hub of the training data, if it is there.
        metrics: results as ``glem eval`` prints them (tables, or JSON files with one); they may hold ``fid`` as well.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: Sequence[str] = ()
    metrics: Sequence[Mapping[str, Any] | str | Path] = ()

    def __post_init__(self) -> None:
        for name in ("datasets", "metrics"):
            value = getattr(self, name)
            if isinstance(value, str | Path | Mapping):
                object.__setattr__(self, name, (value,))
        if (self.license_name or self.license_link) and self.license != "other":
            raise ValueError('license_name and license_link are for license="other"; give license="other" too')
        if self.license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license) is None:
            raise ValueError(f'license must be an identifier of the Hub such as "mit" or "other", got {self.license!r}')
        for name in self.datasets:
            if re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) is None:
                raise ValueError(f'datasets are identifiers on the Hub such as "org/name", got {name!r}')


def model_card(model: GLEM, repo_id: str, facts: CardFacts | None = None, samples: bool = True) -> ModelCard:
    """The card of ``model`` for the repository ``repo_id``.

    Args:
        model: whose config holds the record of its training.
        repo_id: "org/name", for the title and the code.
        facts: see `CardFacts`.
        samples: whether a picture ``samples.png`` lies beside the card.

    Raises:
        ValueError, FileNotFoundError: metrics that are not what ``glem eval`` prints, or of another bit depth.
    """
    from huggingface_hub import ModelCard, ModelCardData

    facts = facts or CardFacts()
    measured = _measured(model, facts)
    name = repo_id.split("/")[-1]
    results = [result for table in measured for result in _eval_results(table, facts)]
    data = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=[*TAGS, str(model.config.flow.get("preset", "flow"))],
        datasets=list(facts.datasets) or None,
        metrics=["accuracy"] if any(result.metric_type == "accuracy" for result in results) else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(model, repo_id, facts, measured, samples)}")


# ---- numbers -----------------------------------------------------------------------------------------------------


def _measured(model: GLEM, facts: CardFacts) -> list[dict[str, Any]]:
    """Tables with data, split, n and metrics: the held-out part of the training first."""
    tables = []
    training = model.config.training
    held_out = training.get("held_out")
    if isinstance(held_out, dict):
        values = {key: held_out.get(f"val_{key}") for key in ("accuracy", "bits_per_dim")}
        if any(_number(value) for value in values.values()):
            tables.append(
                {"data": training.get("data"), "split": "train (held out)", "n": held_out.get("val_images"), **values}
            )
    for given in facts.metrics:
        table = dict(given) if isinstance(given, Mapping) else _read(Path(given))
        if not any(_number(table.get(key)) for key in _TASKS):
            raise ValueError(
                f"metrics must be what glem eval prints, with one of {', '.join(_TASKS)}; got {list(table)}"
            )
        if table.get("bits", model.bits) != model.bits:
            raise ValueError(f"these metrics were measured at {table['bits']} bits, the model has {model.bits}")
        tables.append(table)
    return tables


def _read(path: Path) -> dict[str, Any]:
    path = expand(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file with metrics at {path}: write it with glem eval ... --out FILE")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read as JSON: {error}; write it with glem eval ... --out FILE") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a table as glem eval writes it, got {type(table).__name__}")
    return table


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _eval_results(table: Mapping[str, Any], facts: CardFacts) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    name = data_name(table.get("data"))
    slug = re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-.") or "unknown"
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " "),
            dataset_type=facts.datasets[0] if len(facts.datasets) == 1 else slug,
            dataset_name=name,
            dataset_split=None if table.get("split") is None else str(table["split"]),
            metric_type=metric,
            metric_name=words,
            metric_value=round(float(table[key]), 6),
        )
        for key, (task, metric, words) in _TASKS.items()
        if _number(table.get(key))
    ]


def data_name(spec: object) -> str:
    """A name for people: the last part of a path (the rest is nobody's business), what follows ``bundled:``, and timm's
    name of a set, or of wds/ the folder."""
    text = str(spec or "").strip().removeprefix("bundled:")
    if text.lower().startswith(PREFIXES):
        name, _, root = text.partition("?")[0].partition("@")
        text = root if name.endswith("/") else name
    return PurePath(text.replace("\\", "/")).name or "unknown data"


def trained_on(training: Mapping[str, Any]) -> str:
    """From the record of a training: what the flow learned from, and what it was then adapted to; Markdown."""
    steps = [
        escape(data_name(record["data"])) if record.get("data") else "data that its record does not name"
        for record in reversed(records(training))
    ]
    return steps[0] + "".join(f", then adapted to {step}" for step in steps[1:])


def records(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The record of a training, and of those of the flows that it was adapted from, newest first."""
    found = [training]
    while isinstance(before := found[-1].get("adapted_from"), dict) and isinstance(before.get("training"), dict):
        found.append(before["training"])
    return found


# ---- words -------------------------------------------------------------------------------------------------------


def _body(model: GLEM, repo_id: str, facts: CardFacts, measured: Sequence[Mapping[str, Any]], samples: bool) -> str:
    config, training = model.config, model.config.training
    c, h, w = model.image_shape
    first = records(training)[-1]
    settings = first["config"] if isinstance(first.get("config"), dict) else {}
    data = trained_on(training)
    images = f", {training['images']:,} images" if isinstance(training.get("images"), int) else ""
    parameters = sum(p.numel() for p in model.flow.parameters())
    modes = "none stored" if model.modes is None else f"{model.modes.rank} per class"
    psi = "plain" if config.psi is None else "{:g} sigmoid({:g} s) + {:g}".format(*config.psi)
    shown = ", ".join(escape(text) for text in model.classes[:_MAX_CLASSES])
    more = (
        f", and {model.num_classes - _MAX_CLASSES} more (see config.json)" if model.num_classes > _MAX_CLASSES else ""
    )
    objective = ", ".join(
        f"{key.replace('_', ' ')} {settings[key]}"
        for key in ("objective", "epochs", "batch_size", "lr", "repulsion", "kld_weight", "beta", "averaging", "seed")
        if settings.get(key) is not None and not (key == "kld_weight" and settings.get("repulsion") == "none")
    )
    parts = [
        f"# {escape(repo_id)}",
        f"A class-conditional normalizing flow for {c}x{h}x{w} images (channels x height x width) of "
        f"{model.num_classes} classes, trained on {data}. {_WHAT_IT_IS}",
    ]
    if samples:
        parts.append(f"![Samples of each class at several temperatures]({SAMPLES})")
    parts += [
        "## Use",
        _code(model, repo_id),
        "## Training data and licence",
        f"Trained on {data}{images}." + _licence(facts),
        "## Model",
        _table(
            [
                ("preset", f"`{config.flow.get('preset', 'flow')}`, {parameters:,} parameters in the flow"),
                ("images", f"{c}x{h}x{w}, {model.bits} bits per channel"),
                ("class Gaussians", f"diagonal, variances {psi}"),
                ("principal modes", modes),
                ("classes", shown + more),
                ("training", escape(objective) or "no record"),
            ]
        ),
        "## Evaluation",
        _evaluation(measured, model.bits),
        "## Intended use and limits",
        f"{_INTENDED_USE}\n- Trained at {h}x{w}; other images are resized on the way in. The flow runs in float32.",
        "## Files",
        _FILES,
    ]
    return "\n\n".join(parts) + "\n"


def _code(model: GLEM, repo_id: str) -> str:
    rank = (
        "" if model.modes is None else 'aug = GLEMAugment(model, p=0.5, policy="mixup")\nx, y = aug(x, y)  # a batch\n'
    )
    return (
        "```python\n"
        "from glem_augment import GLEM, GLEMAugment, SyntheticDataset\n\n"
        f'model = GLEM.from_pretrained("{repo_id}")  # "{repo_id}@<commit>" pins these weights\n'
        f"{rank}"
        "synthetic = SyntheticDataset(model, per_class=100, seed=0)\n"
        "```\n\n"
        f"```bash\nglem generate {repo_id} --per-class 100 --out synthetic/\n```"
    )


def _licence(facts: CardFacts) -> str:
    text = "\n\nSamples derive from the training images, and their licence passes on to what this model draws. "
    if facts.license is None:
        return text + "**The licence was not stated when this model was pushed: ask its author before you use it.**"
    named = f"{facts.license_name} ({facts.license})" if facts.license_name else facts.license
    where = f" ([text]({facts.license_link}))" if facts.license_link else ""
    return text + f"Stated by whoever pushed this model: {named}{where}."


def _evaluation(measured: Sequence[Mapping[str, Any]], bits: int) -> str:
    if not measured:
        return "No measurements are recorded."
    rows = []
    for table in measured:
        where = f"{escape(data_name(table.get('data')))}, {escape(str(table.get('split', 'test')))}"
        count = f"{table['n']:,}" if isinstance(table.get("n"), int) else "?"
        for key, (_, _, words) in _TASKS.items():
            if _number(table.get(key)):
                share = key in ("accuracy", "top5")
                value = f"{100 * table[key]:.2f} %" if share else f"{table[key]:.4g}"
                rows.append(f"| {where} | {count} | {words} | {value} |")
    head = "| data | images | metric | value |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + f"\n\nBits/dim are at {bits} bits per channel; lower is better."


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows)


def escape(text: str) -> str:
    """Text of others, inside Markdown: no table cell, link, tag or code may come out of it."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
