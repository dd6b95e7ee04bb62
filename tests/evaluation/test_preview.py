"""The pictures: what they show, of every shape of image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, cross_entropy

from glem_augment import GLEM, DataError, ImageData
from glem_augment.evaluation import preview as preview_module
from glem_augment.evaluation.preview import LARGEST, SMALLEST, FlowClassifier, Section, compose, preview


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
    assert 400 < one.shape[1] < 4000 and 400 < one.shape[0] < 4000


def test_a_preview_shows_what_there_is() -> None:
    model, data = small()
    height = preview(model, data).height
    without, _ = small(rank=0)
    assert max(preview(without, data).height, preview(model, data, rows=1).height) < height
    assert preview(model, data, policies=("noise",)).height < height
    del model.config.flow["preset"]  # as of somebody else's bijection
    assert preview(model, data).height == height
    # One class: nothing to interpolate between. One image of it: its own partner.
    single, one = small(classes=1)
    assert preview(single, one.subset([0])).height < height
    many, images = small((1, 4, 4), classes=30, count=3)
    assert preview(many, images, rows=40).height < 10_000
    with pytest.raises(DataError, match="no images"):
        preview(model, data.subset([]))
    with pytest.raises(ValueError, match="modes"):
        preview(model, data, modes=99)


def test_moves_begin_at_the_real_image_and_mixup_ends_at_the_partner_that_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = small((1, 2, 2), count=40, rank=4)  # all directions that there are
    monkeypatch.setattr(preview_module, "MIX_SHARES", (1.0, 0.0))
    monkeypatch.setattr(preview_module, "NOISE_STRENGTHS", (0.0, 0.5))
    real, same, mixed, partner = preview_module._augmentations(model, data, 4, "mixup", 4, 0).cells.unbind(1)
    assert torch.allclose(same, real, atol=0.01) and torch.allclose(mixed, partner, atol=0.01)
    assert not torch.allclose(real, partner, atol=0.01)
    real, same, moved = preview_module._augmentations(model, data, 4, "noise", 4, 0).cells.unbind(1)
    assert torch.allclose(same, real, atol=0.01) and not torch.allclose(moved, real, atol=0.01)


def test_adversarial_moves_lower_the_posterior_and_moves_that_are_put_back_are_framed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = small((1, 2, 2), count=40)
    model = model.adapt(data, rank=4, progress=False)  # classes of their own
    monkeypatch.setattr(preview_module, "NOISE_STRENGTHS", (0.3, 100.0))
    y = torch.tensor([model.classes.index(f"class {i}") for i in (0, 0, 1, 2)])
    confidence = {}
    for policy in ("noise", "adversarial"):
        section = preview_module._augmentations(model, data, 4, policy, 4, 0)
        real, moved, kept = section.cells.unbind(1)
        assert torch.equal(kept, real) and not torch.equal(moved, real)
        assert section.marked is not None and section.marked.tolist() == [[False, False, True]] * 4
        confidence[policy] = model.posterior(moved).gather(1, y[:, None])
        drawn = pixels(compose("", "", [section]))
        assert ((drawn == (215, 0, 0)).all(2)).any(0).sum() == SMALLEST + 4  # one framed column
    assert (confidence["adversarial"] < confidence["noise"]).all()


def test_the_flows_own_classifier_has_gradients_in_float32(bundled_test: ImageData) -> None:
    model = GLEM.from_pretrained("bundled:fashion-mnist")
    x, y = bundled_test.tensor()[::100], torch.arange(10)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        images = (x.to(dtype) / 255).requires_grad_()
        logits = FlowClassifier(model.to(dtype))(images)
        torch.testing.assert_close(logits.softmax(1), model.posterior(images))
        return torch.autograd.grad(cross_entropy(logits, y), images)[0].flatten(1).double()

    assert cosine_similarity(gradient(torch.float32), gradient(torch.float64)).min() > 0.99


def test_cells_are_enlarged_by_whole_factors_and_large_ones_shrunk() -> None:
    def drawn(cell: torch.Tensor) -> np.ndarray:
        return pixels(compose("t", "", [Section("", cell[None, None])]))

    assert (drawn(torch.zeros(1, 28, 28)) == 0).all(2).sum() == SMALLEST**2
    assert (drawn(torch.zeros(3, 512, 256)) == 0).all(2).sum() == LARGEST * LARGEST // 2
    grey = drawn(torch.full((1, 56, 56), float("nan")))
    assert ((grey == 127) | (grey == 128)).all(2).sum() >= 56 * 56
