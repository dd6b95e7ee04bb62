"""Training in an autoencoder's latents: encoded once, repeatable, and saved as a model of images."""

from __future__ import annotations

from pathlib import Path

import model_cases
import pytest
import torch

from glem_augment import GLEM
from glem_augment.codec.autoencoder import StandardisedAutoencoder
from glem_augment.codec.published import open_autoencoder
from glem_augment.distributed import Share
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig, Trainer
from glem_augment.training.batches import choose_views
from glem_augment.training.latents import kept_views, latent_views

OPTIONS = dict(preset="latent", autoencoder="taef2", flow_options={"depth": [1, 1], "width": [16, 16]}, batch_size=16,
               modes_rank=4, latent_noise=0.1, augment=("flip",), val_fraction=0.2, sample_every=0)  # fmt: skip


@pytest.fixture(scope="module")
def photos() -> ImageData:
    return ImageData.from_tensors(*model_cases.photos(60), ["a", "b"])


def test_views_are_the_image_its_flip_and_crops(photos: ImageData) -> None:
    codec = StandardisedAutoencoder(open_autoencoder("taef2", lambda name: (Path(), name))[0], photos.image_shape)
    codec.fit(photos.tensor())
    device = torch.device("cpu")
    both = latent_views(codec, photos, ("flip",), 4, 0, device)
    assert both.shape == (60, 2, 32, 2, 2) and both.dtype == torch.float16
    x = photos.tensor().float() / 255
    assert torch.allclose(both[:, 0].float(), codec.encode(x), atol=5e-3)
    assert torch.allclose(both[:, 1].float(), codec.encode(x.flip(3)), atol=5e-3)
    several = latent_views(codec, photos, ("flip", "crop"), 4, 0, device)
    assert several.shape[1] == 4 and torch.equal(several[:, 0], both[:, 0])
    chosen = choose_views(several, torch.Generator().manual_seed(1), Share(0, 60, 60))
    part = choose_views(several[20:40], torch.Generator().manual_seed(1), Share(20, 40, 60))
    assert torch.equal(chosen[20:40], part)  # whatever the number of ranks


@pytest.mark.parametrize("objective", ["hybrid", pytest.param("glem", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_goes_on_to_the_same_model_of_images(
    photos: ImageData, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(objective=objective, epochs=4, **OPTIONS)  # type: ignore[arg-type]
    whole = Trainer(photos, config, tmp_path / "whole").fit()
    stopped = Trainer(photos, config, tmp_path / "parts")
    stopped.log.callbacks.append(lambda row: setattr(stopped, "stop_requested", True))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    with monkeypatch.context() as patch:  # the latents are read, not encoded again
        patch.setattr(StandardisedAutoencoder, "encode", None)
        resumed_run = Trainer(photos, config, tmp_path / "parts", resume=True)
    resumed = resumed_run.fit()
    assert not (tmp_path / "parts" / "latents.pt").exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert whole.image_shape == (3, 16, 16) and whole.config.autoencoder["name"] == "taef2"  # type: ignore[index]
    x, y = photos.tensor(), torch.from_numpy(photos.targets)
    found = GLEM.from_pretrained(tmp_path / "whole")
    assert torch.equal(found.predict(x), whole.predict(x))
    assert float((found.predict(x) == y).float().mean()) > 0.8
    assert found.check_invertibility(x)["flow_error"] < 1e-4
    record = whole.config.training
    if objective == "hybrid":  # which learns the likelihood faster
        assert record["held_out"]["val_nats_per_number"] < record["independent_pixels"]


def test_a_flow_starts_from_whitened_latents(photos: ImageData, tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="augment changes pixels"):
        Trainer(photos, config, tmp_path, augment=lambda x, *_: x)
    trainer = Trainer(photos, config, tmp_path)
    assert bool(trainer.model.flow.whiten.initialised)  # type: ignore[union-attr]


def test_latents_of_other_images_are_not_taken(tmp_path: Path) -> None:
    path, old, new = tmp_path / "latents.pt", torch.zeros(2), torch.ones(2)
    assert torch.equal(kept_views(path, {"seed": 0}, lambda: old), old)
    assert torch.equal(kept_views(path, {"seed": 0}, lambda: new), old)
    assert torch.equal(kept_views(path, {"seed": 1}, lambda: new), new)
    assert torch.equal(kept_views(path, {"seed": 1}, lambda: old), new)
