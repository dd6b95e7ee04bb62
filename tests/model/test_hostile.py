"""Single values that a hostile or damaged model may hold: each is one ModelFileError, on loading."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import images, photos, tiny_model
from safetensors.torch import load_file, save_file
from test_autoencoder_models import Blocks
from torch import Tensor

from glem_augment import GLEM
from glem_augment.errors import ModelFileError
from glem_augment.model.files import CONFIG, WEIGHTS

Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with full covariances, with a whitened flow of latents, and with a user's autoencoder."""
    folder = tmp_path_factory.mktemp("hostile")
    full = tiny_model("identity").adapt((images(150), torch.arange(150) % 3), rank=3)
    full.save(folder / "full")
    small = dict(depth=[1, 1], blocks=[1, 1], width=[4, 4])
    tiny_model("latent", (3, 16, 16), autoencoder="taef2", whiten=4, **small).save(folder / "latent")
    GLEM.create("identity", (3, 16, 16), ["a"], autoencoder=Blocks()).adapt(photos(20)).save(folder / "own")
    for name, own in (("full", None), ("latent", None), ("own", Blocks())):
        model = GLEM.from_pretrained(folder / name, autoencoder=own)
        assert bool(model.log_prob_per_class(images(3, model.image_shape)).isfinite().all())
    return folder


def changed(folders: Path, name: str, to: Path, config: dict[str, Any], tensor: str = "", change: Any = None) -> Path:
    """A copy of a model with other values in its config, or in a tensor."""
    folder = shutil.copytree(folders / name, to / name)
    values = json.loads((folder / CONFIG).read_text())
    for key, value in config.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (folder / CONFIG).write_text(json.dumps(values))
    if tensor:
        state = load_file(folder / WEIGHTS)
        save_file({**state, tensor: change(state[tensor]).contiguous()}, folder / WEIGHTS)
    return folder


def first(value: float) -> Change:
    """Set the first number."""
    return lambda tensor: torch.cat([torch.full((1,), value, dtype=tensor.dtype), tensor.flatten()[1:]]).view_as(tensor)


TENSORS: list[tuple[str, str, Change]] = [
    ("latent", "autoencoder.std", first(0.0)),
    ("latent", "flow.whiten.scale", first(1e-38)),
    ("latent", "flow.flow.levels.0.layers.3.net.head.bias", first(1e12)),
    ("full", "modes.shared_scales", torch.zeros_like),
    ("full", "modes.shared_directions", lambda t: t[:1].expand_as(t)),
    ("full", "modes.scales", first(3e38)),
    ("full", "modes.directions", first(1e8)),
    ("full", "modes.counts", torch.zeros_like),
]


@pytest.mark.parametrize("number", range(len(TENSORS)))
def test_tensors_that_would_fail_at_the_first_use(number: int, folders: Path, tmp_path: Path) -> None:
    name, tensor, change = TENSORS[number]
    folder = changed(folders, name, tmp_path, {}, tensor, change)
    with pytest.raises(ModelFileError, match=re.escape(str(folder))):
        GLEM.from_pretrained(folder)


@pytest.mark.parametrize("shape", [[3, 16384, 16384], [3, 8, 8], [2, 16, 16]], ids=str)
def test_images_that_do_not_fit_the_flow_or_the_autoencoder(shape: list[int], folders: Path, tmp_path: Path) -> None:
    for name, own in (("latent", None), ("own", Blocks())):
        folder = changed(folders, name, tmp_path, {"autoencoder": {"image_shape": shape}})
        with pytest.raises(ModelFileError, match=re.escape(str(folder))):
            GLEM.from_pretrained(folder, autoencoder=own)


def test_flows_that_do_not_fit_the_images(folders: Path, tmp_path: Path) -> None:
    folder = changed(folders, "latent", tmp_path, {"flow": {"image_shape": [32, 4, 2]}})
    with pytest.raises(ModelFileError, match="config.json"):
        GLEM.from_pretrained(folder)
    with pytest.raises(ModelFileError, match="autoencoder="):
        GLEM.from_pretrained(folders / "full", autoencoder=Blocks())
