"""The content of a model's picture, for every shape of image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import write_images

from glem_augment import GLEM
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


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 6, 6), (3, 160, 64)])
def test_a_preview_of_any_shape_is_reproducible(shape: tuple[int, int, int]) -> None:
    model, data = small(shape)
    before = torch.get_rng_state()
    one, two, other = (np.asarray(preview(model, data, rows=4, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert (one == two).all() and (one.shape != other.shape or (one != other).any())


def test_a_preview_shows_what_there_is(tmp_path: Path) -> None:
    model, data = small()
    height = preview(model, data).height
    without, _ = small(rank=0)
    assert max(preview(without, data).height, preview(model, data, rows=1).height) < height
    # One class: nothing to interpolate between. One image of it: the image is shown as partner.
    single, one = small(classes=1)
    assert preview(single, one.subset([0])).height < height
    with pytest.raises(DataError):
        preview(model, data.subset([]))
    model.save(tmp_path / "flow")
    write_images(tmp_path / "photos", tuple(model.classes), (20, 30), 2)
    command = ["preview", str(tmp_path / "flow"), str(tmp_path / "photos"), "--out", str(tmp_path / "p.png")]
    assert main(command) == 0
    assert Image.open(tmp_path / "p.png").height > 0


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
    def black(cell: torch.Tensor) -> int:
        return int((np.asarray(compose("t", [Section("", cell[None, None])])) == 0).all(2).sum())

    assert black(torch.zeros(1, 28, 28)) == SMALLEST**2
    assert black(torch.zeros(3, 512, 256)) == LARGEST * LARGEST // 2
