"""What the explorer computes: the same samples, moves and numbers as the library's own, and no hostile file decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from glem_augment import GLEM, BadImageError, GLEMAugment, ImageData, Noise, SyntheticDataset
from glem_augment.apps.explorer import LONGEST, Explorer, read_upload
from glem_augment.evaluation import evaluate
from glem_augment.evaluation.metrics import calibration_error
from glem_augment.images.dataset import images_for


@pytest.fixture
def explorer() -> Explorer:
    """A linear flow of three classes of 3x8x8 images, whose colours differ."""
    means = torch.tensor([[110, 120, 120], [120, 110, 120], [120, 120, 110]]).repeat_interleave(12, 0)[:, :, None, None]
    x = (means + torch.randint(-40, 40, (36, 3, 8, 8))).to(torch.uint8)
    data = ImageData.from_tensors(x, torch.arange(3).repeat_interleave(12), ["red", "green", "blue"])
    train, held_out = data.subset(range(0, 36, 2)), data.subset(range(1, 36, 2))
    model = GLEM.create("identity", (3, 8, 8), data.classes).adapt(train, rank=4)
    return Explorer(model, [held_out, train])


def test_samples_are_those_of_a_data_set_and_neighbours_are_the_nearest(explorer: Explorer) -> None:
    found = explorer.samples(1, 0.7, "rfcm", 5, 4)
    assert torch.equal(found, SyntheticDataset(explorer.model, 9, 0.7, 5, source="rfcm").images(range(9, 13)))
    sheet, again = (explorer.sample_sheet(1, 0.7, "rfcm", 5) for _ in range(2))
    assert sheet == again != explorer.sample_sheet(1, 0.7, "rfcm", 6)
    # At temperature 0 all samples are the class's mean, which is the mean of its training images, not of other images.
    picture, text = explorer.neighbours(1, 0.0, "gaussian", 0)
    assert picture.width > 700 and text.startswith("12 of 12 samples are nearer to a training image")
    assert "train split" in Explorer(explorer.model, [explorer.data]).neighbours(1, 0.0, "gaussian", 0)[1]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 50, 40)])
def test_moves_are_those_of_the_transform_in_any_size(explorer: Explorer, shape: tuple[int, int, int]) -> None:
    model, image = explorer.model, torch.randint(60, 120, shape, dtype=torch.uint8)
    still = explorer.move(image, 2, "noise", 1.0, coefficients=[0.0] * 4)
    assert torch.equal(still.image, image) and not still.rejected
    assert torch.equal(still.posterior[0], still.posterior[1]) and torch.equal(still.likelihood[0], still.likelihood[1])
    # One mode by one standard deviation.
    assert model.modes is not None
    change = (model.modes.scales[2, 1] * model.modes.directions[2, 1]).view(1, 3, 8, 8) * 256 / 255
    aug = GLEMAugment(model)
    x = aug.pixels.to_floats(image[None])
    small = aug.pixels.to_model(x)
    wanted = aug.pixels.from_floats(aug.pixels.from_model(x, small, small + change), torch.uint8)[0]
    moved = explorer.move(image, 2, "noise", 0.5, coefficients=[0.0, 2.0, 0.0, 0.0])
    assert (moved.image.int() - wanted.int()).abs().max() <= 1 and not torch.equal(wanted, image)
    # The policies move as they do elsewhere, and a rejected move is shown all the same.
    y = torch.tensor([2])
    noise = GLEMAugment(model, Noise(0.3), p=1.0, seed=7)(image[None], y)[0][0]
    assert torch.equal(explorer.move(image, 2, "noise", 0.3, 7).image, noise)
    assert torch.equal(explorer.move(image, 2, "mixup", 0.0, 7).image, image)
    calm, fooled = (explorer.move(image, 2, policy, 0.3, 7) for policy in ("noise", "adversarial"))
    assert fooled.posterior[1, 2] < calm.posterior[1, 2]
    wild = explorer.move(image, 2, "noise", 100.0)
    assert wild.rejected and not torch.equal(wild.image, image)


def test_lines_run_from_the_first_image_to_the_second(explorer: Explorer) -> None:
    first, second = (explorer.data[i][0] for i in (0, 8))
    for share, wanted in ((0.0, first), (1.0, second)):
        image, shares, posterior = explorer.between(first, second, share)
        assert (image.int() - wanted.int()).abs().max() <= 1
    assert shares[0] == 0 and shares[-1] == 1
    assert torch.allclose(posterior[[0, -1]], explorer.model.posterior(torch.stack([first, second])), atol=1e-5)


def test_a_data_set_is_measured_as_eval_does(explorer: Explorer) -> None:
    posterior, bits, y = explorer.measured
    wanted = evaluate(explorer.model, explorer.data, round_trip=0)
    confidence, best = posterior.max(1)
    assert wanted["accuracy"] == (best == y).double().mean()
    assert wanted["ece"] == pytest.approx(calibration_error(confidence, best == y))
    assert wanted["bits_per_dim"] == pytest.approx(bits.double().mean().item(), rel=1e-5)


def test_uploads_are_reduced_and_hostile_ones_refused(explorer: Explorer, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1500), (90, 130, 130)).save(tmp_path / "photo.jpg")
    image, cls = explorer.picked(0, str(tmp_path / "photo.jpg"))
    assert image.shape == (3, LONGEST // 2, LONGEST) and cls == 0
    assert explorer.picked(17)[1] == 2
    # Images of the data are shown at their own size.
    x = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8)
    large = images_for(explorer.model, (x, [0, 1, 2, 0]))
    assert torch.equal(Explorer(explorer.model, [large.subset([2, 3])]).picked(0)[0], x[2])
    assert explorer.move(image, cls, "noise", 0.2).image.shape == image.shape
    on_its_side = Image.Exif()
    on_its_side[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "portrait.jpg", exif=on_its_side)
    assert read_upload(str(tmp_path / "portrait.jpg")).shape == (3, 60, 40)
    Image.new("L", (5, 9)).save(tmp_path / "grey.png")
    assert read_upload(str(tmp_path / "grey.png")).shape == (1, 9, 5)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes()[:5000])
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
    Image.new("1", (11_000, 9100)).save(tmp_path / "bomb.png")
    for name, words in {"broken.jpg": "cannot be read", "large.png": "8000 x 8000", "bomb.png": "11000 x 9100"}.items():
        with pytest.raises(BadImageError, match=f"^{name} .*{words}"):
            read_upload(str(tmp_path / name))


def test_a_model_of_an_autoencoders_latents_is_explored() -> None:
    x, y = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 2
    model = GLEM.create("identity", (3, 16, 16), ["image"], autoencoder="taef2").adapt((x, y), rank=2)
    explorer = Explorer(model, [images_for(model, (x, y))])
    posterior, likelihood, _ = explorer.measured
    assert posterior.shape == (8, 2) and likelihood.isfinite().all()
    assert explorer.move(x[0], 0, "noise", 0.1).likelihood.shape == (2,)
