"""The card of a synthetic data set: that it is synthetic, what drew it and how, and whose licence it inherits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from glem_augment.hub.cards import LIBRARY, CardFacts, data_name, escape, trained_on
from glem_augment.synthetic.provenance import PROVENANCE, REAL_IMAGES

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

    from glem_augment.synthetic.dataset import SyntheticDataset

__all__ = ["dataset_card"]

_MAX_CLASSES = 200
_DRAWN = """drawn from a class-conditional normalizing flow. None is a photograph, and none should be taken for one."""
_MIXED = """made by a class-conditional normalizing flow: each is a real image, moved part of the way
towards another one of its class. Many are close to the real image that they began with."""
_LICENCE_MIXED = "Mixtures derive from the real images that were mixed, and"


def dataset_card(dataset: SyntheticDataset, repo_id: str, facts: CardFacts, origin: dict[str, Any]) -> DatasetCard:
    """The card; its metadata tell ``datasets`` where the images are and what the classes are called.

    Args:
        dataset: what was written.
        repo_id: "org/name", for the title and the code.
        facts: the licence; the rest is not used.
        origin: the content of glem-provenance.json.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    names = {str(i): name for i, name in enumerate(dataset.classes)}
    image, label = ("image", "label") if origin["format"] == "imagefolder" else ("png", "cls")
    features: list[dict[str, Any]] = [
        {"name": image, "dtype": "image"},
        {"name": label, "dtype": {"class_label": {"names": names}}},
    ]
    config: dict[str, Any] = {"config_name": "default"}
    if origin["format"] == "imagefolder":
        features.append({"name": "index", "dtype": "int64"})
        config["data_files"] = [{"split": "train", "path": "data/train/**"}]
        # Where there is a metadata file, `datasets` takes the names of the classes from here alone.
        config["features"] = copy.deepcopy(features)  # the same list twice would become a YAML alias
    else:
        features += [{"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]
        config["data_files"] = [{"split": "train", "path": "data/train-*.tar"}]
    data = DatasetCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        pretty_name=repo_id.split("/")[-1],
        annotations_creators=["machine-generated"],
        task_categories=["image-classification"],
        size_categories=[_size_category(len(dataset))],
        tags=["synthetic", LIBRARY],
        dataset_info={"features": features},
        configs=[config],
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_body(dataset, repo_id, facts, (image, label), origin)}")


def _arguments(settings: dict[str, Any]) -> str:
    """Of the call that makes the images again. The real images and a judge of one's own can't be written down."""
    mixed, own_judge = settings["source"] == "mixup", settings.get("oracle", "posterior") != "posterior"
    left_out = {"oracle", REAL_IMAGES, *(["temperature"] if mixed else [])}
    shown = [f"{key}={value!r}" for key, value in settings.items() if key not in left_out]
    needs_real = mixed or settings["per_class"] == "balance"
    return ", ".join([*shown, *(["real=real"] if needs_real else []), *(["oracle=oracle"] if own_judge else [])])


def _temperature_or_real(dataset: SyntheticDataset, mixed: bool) -> str:
    if not mixed:
        return f"| temperature (factor on the standard deviation) | {dataset.temperature:g} |"
    real = dataset.latent_source.real
    return f"| the real images that were mixed | {escape(data_name(real.name)) if real else 'not recorded'} |"


def _size_category(count: int) -> str:
    edges = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    return next((name for edge, name in edges if count < edge), "n>10M")


def _body(
    dataset: SyntheticDataset, repo_id: str, facts: CardFacts, columns: tuple[str, str], origin: dict[str, Any]
) -> str:
    c, h, w = dataset.image_shape
    flow, settings = origin["flow"], origin["settings"]
    named = facts.license_name or facts.license
    licence = (
        f"as stated by whoever pushed it: {named}" if named else "**not stated: ask its author before you use it**"
    )
    loaded = f"`{flow['loaded_from']}` on the Hub" if flow["loaded_from"] else "a local model"
    classes = "\n".join(
        f"| {entry['index']} | {escape(entry['name'])} | {escape(entry['id'])} | {entry['count']:,} |"
        for entry in origin["classes"][:_MAX_CLASSES]
    )
    left = len(dataset.classes) - _MAX_CLASSES
    more = f"\n\nand {left} more (see {PROVENANCE})" if left > 0 else ""
    mixed = settings["source"] == "mixup"
    return f"""# {escape(repo_id)}

**These images are synthetic.** {len(dataset):,} images, {c}x{h}x{w} (channels x height x width), of
{len(dataset.classes)} classes, {_MIXED if mixed else _DRAWN}
They are for training image classifiers together with real images; measure on real ones only.

```python
from datasets import load_dataset

data = load_dataset("{repo_id}", split="train")
image, label = data[0]["{columns[0]}"], data[0]["{columns[1]}"]
```

## How they were made

| | |
|---|---|
| generator | {origin["generator"]} |
| flow | {loaded}, weights with SHA-256 `{flow["weights_sha256"]}` |
| the flow was trained on | {trained_on(dataset.model.config.training)} |
| source | {settings["source"]} |
{_temperature_or_real(dataset, mixed)}
| seed | {settings["seed"]} |
| images whose values were not finite and were replaced | {origin["images_not_finite"]} |

With the same flow, version and kind of machine, they can be drawn again:

```python
SyntheticDataset(model, {_arguments(settings)})
```

`{PROVENANCE}` holds all of this for programs.

## Licence

{_LICENCE_MIXED if mixed else "Samples derive"} from the images that the flow was trained on and inherit their licence,
{licence}.

## Classes

| label | name | id | images |
|---|---|---|---|
{classes}{more}

## Limits

The labels are the classes that the flow was asked for; it draws some images that a classifier, or a person, would call
something else. The images repeat what is in the training images, with its biases and gaps, and may resemble single
ones.
"""
