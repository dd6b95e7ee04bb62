"""The pictures: what they show, of every shape of image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from glem_augment import GLEM, open_data
from glem_augment.cli import main
from glem_augment.errors import DataError
from glem_augment.evaluation import preview as preview_module
from glem_augment.evaluation.pictures import LARGEST, SMALLEST, Section, compose
from glem_augment.evaluation.preview import preview
from glem_augment.images.dataset import ImageData


def small(
    shape: tuple[int, int, int] = (3, 8, 8), classes: int = 3, count: int = 5, rank: int = 2
) -> tuple[GLEM, ImageData]:
    """An identity flow and random images, `count` per class."""
    names = [f"class {i}" for i in range(classes)]
    x = torch.randint(0, 256, (classes * count, *shape), dtype=torch.uint8)
    data = ImageData.from_tensors(x, torch.arange(classes).repeat_interleave(count), names)
    model = GLEM.create("identity", shape, names)
    if rank:
        model.fit_modes(data, rank=rank)
    return model.eval(), data


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 6, 6), (3, 160, 64)])
def test_a_preview_of_any_shape_is_reproducible(shape: tuple[int, int, int]) -> None:
    model, data = small(shape)
    before = torch.get_rng_state()
    one, two, other = (pixels(preview(model, data, rows=4, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert (one == two).all() and (one.shape != other.shape or (one != other).any())
    assert 400 < one.shape[1] < 1700 and 400 < one.shape[0] < 4500


def test_a_preview_shows_what_there_is() -> None:
    model, data = small()
    height = preview(model, data).height
    without, _ = small(rank=0)
    assert max(preview(without, data).height, preview(model, data, rows=1).height) < height
    assert preview(model, data, policies=("noise",)).height < height
    del model.config.flow["preset"]  # as of somebody else's bijection
    assert preview(model, data).height == height
    # One class: nothing to interpolate between. One image of it: the image is shown as partner.
    single, one = small(classes=1)
    assert preview(single, one.subset([0])).height < height
    many, images = small((1, 4, 4), classes=30, count=3)
    assert preview(many, images, rows=40).height < 20_000
    with pytest.raises(DataError, match="no images"):
        preview(model, data.subset([]))


def test_images_are_moved_at_their_own_size(tmp_path: Path) -> None:
    """The change is made at the flow's size; the photographs' detail stays."""
    x = torch.randint(0, 256, (8, 3, 40, 60), dtype=torch.uint8)
    for i, image in enumerate(x):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        to_pil_image(image).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    images = open_data(str(tmp_path), image_size=8)
    assert images.subset([5]).where(0) == str(tmp_path / "b" / "3.png")
    model = GLEM.create("identity", (3, 8, 8), images.classes)
    model.fit_modes(images, rank=2)
    data = images.subset([5, 0, 6]).at_own_size()
    assert data.image_shape == (3, 40, 40) and torch.equal(data[0][0], x[3, :, :, 10:50])
    assert images.at_own_size(16).image_shape == (3, 16, 16)
    section = preview_module._moves(model, data, 2, "noise", 0)
    assert section.cells.shape[-2:] == (40, 40)
    real, moved = section.cells[:, 0], section.cells[:, 1]
    assert not torch.equal(moved, real) and (moved - real).diff(dim=-1).abs().max() < real.diff(dim=-1).max() / 4
    model.save(tmp_path / "flow")
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / name).rename(tmp_path / "photos" / name)
    command = ["preview", str(tmp_path / "flow"), str(tmp_path / "photos"), "--out", str(tmp_path / "p.png")]
    assert main([*command, "--rows", "1", "--policy", "noise"]) == 0
    photos = open_data(str(tmp_path / "photos"), image_size=8)
    wanted = preview(model, photos.at_own_size(), 1, ("noise",), name=str(tmp_path / "flow"))
    assert (pixels(Image.open(tmp_path / "p.png")) == pixels(wanted)).all()


def test_moves_begin_at_the_real_image_and_mixup_ends_at_the_partner_that_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = small((1, 2, 2), count=40, rank=4)  # all directions that there are
    monkeypatch.setattr(preview_module, "KEPT", (1.0, 0.0))
    monkeypatch.setattr(preview_module, "NOISE_STRENGTHS", (0.0, 0.5))
    real, same, mixed, partner = preview_module._moves(model, data, 4, "mixup", 0).cells.unbind(1)
    assert torch.allclose(same, real, atol=0.01) and torch.allclose(mixed, partner, atol=0.01)
    assert not torch.allclose(real, partner, atol=0.01)
    real, same, moved = preview_module._moves(model, data, 4, "noise", 0).cells.unbind(1)
    assert torch.allclose(same, real, atol=0.01) and not torch.allclose(moved, real, atol=0.01)


def test_cells_are_enlarged_by_whole_factors_and_large_ones_shrunk() -> None:
    def drawn(cell: torch.Tensor) -> np.ndarray:
        return pixels(compose("t", "", [Section("", cell[None, None])]))

    assert (drawn(torch.zeros(1, 28, 28)) == 0).all(2).sum() == SMALLEST**2
    assert (drawn(torch.zeros(3, 512, 256)) == 0).all(2).sum() == LARGEST * LARGEST // 2
    grey = drawn(torch.full((1, 56, 56), float("nan")))
    assert ((grey == 127) | (grey == 128)).all(2).sum() >= 56 * 56
