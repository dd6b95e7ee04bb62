"""The pictures, and the demo that draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from glem_augment import GLEM, DataError, ImageData
from glem_augment.evaluation import preview as preview_module
from glem_augment.evaluation.preview import LARGEST, SMALLEST, Section, compose, contact_sheet, preview

# Small tensors gain nothing from a second thread, and `--threads` must not outlast these tests.
pytestmark = pytest.mark.usefixtures("one_thread")


def small(
    shape: tuple[int, int, int] = (3, 8, 8), classes: int = 3, count: int = 5, modes: bool = True
) -> tuple[GLEM, ImageData]:
    """An identity flow and random images, `count` per class."""
    names = [f"class {i}" for i in range(classes)]
    x = torch.randint(0, 256, (classes * count, *shape), dtype=torch.uint8)
    data = ImageData.from_tensors(x, torch.arange(classes).repeat_interleave(count), names)
    model = GLEM.create("identity", shape, names)
    if modes:
        model.fit_modes(data, rank=2)
    return model.eval(), data


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (3, 8, 24), (2, 6, 6), (3, 160, 64)])
def test_a_preview_of_any_shape_is_reproducible(shape: tuple[int, int, int]) -> None:
    model, data = small(shape)
    before = torch.get_rng_state()
    one, two = (pixels(preview(model, data, rows=4, seed=1)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert (one == two).all()
    assert 400 < one.shape[1] < 4000 and 400 < one.shape[0] < 4000
    other = pixels(preview(model, data, rows=4, seed=2))
    assert one.shape != other.shape or (one != other).any()


def test_fewer_things_to_draw_give_smaller_pictures() -> None:
    model, data = small()
    whole = preview(model, data)
    assert preview(model, data, policies=("noise",)).size <= whole.size
    without, _ = small(modes=False)
    assert preview(without, data).height < whole.height
    # One class: nothing to interpolate between. One image of it: its own partner.
    single, one = small(classes=1)
    preview(single, one)
    preview(single, one.subset([0]))
    assert preview(model, data, rows=1).height < whole.height


def test_more_classes_than_a_picture_holds() -> None:
    model, data = small((1, 4, 4), classes=30, count=3)
    assert preview(model, data, rows=40).height < 8000


def test_what_a_preview_refuses() -> None:
    model, data = small()
    with pytest.raises(DataError, match=r"\(3, 8, 8\)"):
        preview(model, small((1, 8, 8))[1])
    with pytest.raises(DataError, match="no images"):
        preview(model, data.subset([]))
    with pytest.raises(ValueError, match="modes"):
        preview(model, data, modes=99)


def test_cells_are_enlarged_by_whole_factors_and_large_ones_shrunk() -> None:
    black = torch.zeros(1, 1, 1, 28, 28)
    picture = pixels(compose("t", "", [Section("", black)]))
    dark = (picture == 0).all(2)
    assert dark.sum() == SMALLEST**2
    picture = pixels(compose("t", "", [Section("", torch.zeros(1, 1, 3, 512, 256))]))
    assert (picture == 0).all(2).sum() == LARGEST * LARGEST // 2


def test_values_that_are_not_finite_are_drawn_grey() -> None:
    cells = torch.full((1, 1, 1, 56, 56), float("nan"))
    picture = pixels(compose("t", "", [Section("", cells)]))
    assert ((picture == 127) | (picture == 128)).all(2).sum() >= 56 * 56


def test_a_contact_sheet_has_a_row_for_each_class() -> None:
    x = torch.zeros(7, 1, 56, 56, dtype=torch.uint8)
    sheet = pixels(contact_sheet(x, [0, 0, 0, 2, 2, 2, 2], ["a", "b", "c"], "t", columns=4))
    assert (sheet == 0).all(2).sum() == 7 * 56 * 56
    late = pixels(contact_sheet(x, [30, 30, 31, 31, 32, 33, 34], list(map(str, range(40))), "t", columns=2))
    assert (late == 0).all(2).sum() == 7 * 56 * 56
    with pytest.raises(DataError, match="no images"):
        contact_sheet(x[:0], [], ["a"], "t")


# ---- the demo ------------------------------------------------------------------------------------------------------


def test_mixup_goes_from_the_real_image_to_the_partner_that_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small((1, 2, 2), count=40, modes=False)
    model.fit_modes(data, rank=4)  # all directions that there are
    monkeypatch.setattr(preview_module, "MIX_SHARES", (1.0, 0.0))
    section = preview_module._augmentations(model, data, 4, "mixup", 4, 0)
    real, same, mixed, partner = section.cells.unbind(1)
    assert torch.allclose(same, real, atol=0.01) and torch.allclose(mixed, partner, atol=0.01)
    assert not torch.allclose(real, partner, atol=0.01)
