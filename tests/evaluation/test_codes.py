"""Class codes: kept apart, never misread within their noise, read back from a flow's samples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glem_augment import GLEM, ImageData
from glem_augment.errors import DataError, ModelFileError
from glem_augment.evaluation.codes import ClassCodes, balance_by_rejection, code_agreement


@pytest.fixture(scope="module")
def codes() -> ClassCodes:
    return ClassCodes.design(10, (1, 28, 28), levels=2)


@pytest.mark.parametrize(
    ("k", "shape", "levels", "rows"), [(10, (1, 28, 28), 2, 4), (100, (3, 32, 32), 3, 8), (1, (1, 8, 8), 1, 2)]
)
def test_shapes_are_those_that_the_levels_divide(k: int, shape: tuple, levels: int, rows: int) -> None:
    made = ClassCodes.design(k, shape, levels)
    assert made.prototypes.shape == (k, shape[0], rows, shape[2]) and made.rows == rows == 2**levels
    assert made.image_shape == shape and made.coded_shape == (shape[0], shape[1] + rows, shape[2])
    assert made.coded_shape[1] % 2**levels == 0
    assert float(made.prototypes.min()) - made.amplitude >= -1e-6
    assert float(made.prototypes.max()) + made.amplitude <= 1 + 1e-6


def test_design_spreads_the_prototypes() -> None:
    start = ClassCodes.design(20, (1, 8, 8), 2, steps=0, noise=0.0)
    spread = ClassCodes.design(20, (1, 8, 8), 2, steps=100, noise=0.0)
    assert spread.spacing() > 1.5 * start.spacing()
    assert torch.equal(spread.prototypes, ClassCodes.design(20, (1, 8, 8), 2, noise=0.0).prototypes)
    assert not torch.equal(spread.prototypes, ClassCodes.design(20, (1, 8, 8), 2, noise=0.0, seed=1).prototypes)
    # nothing runs away: more steps end at about the same place
    assert ClassCodes.design(20, (1, 8, 8), 2, steps=400, noise=0.0).spacing() < 1.3 * spread.spacing()


@pytest.mark.parametrize("bits", [8, 5])
def test_noise_can_never_change_a_label(bits: int) -> None:
    made = ClassCodes.design(10, (1, 28, 28), 2, noise=0.99, bits=bits)
    assert made.amplitude > 0.02
    pixels = math.prod(made.prototypes.shape[1:])
    assert (made.amplitude + 2.0**-bits) * math.sqrt(pixels) < made.spacing() / 2
    # the worst noise there is: every pixel as far as it can go towards the nearest other prototype
    flat = made.prototypes.flatten(1)
    distances = torch.cdist(flat, flat).fill_diagonal_(math.inf)
    other = flat[distances.argmin(1)]
    worst = (flat + made.amplitude * (other - flat).sign()).view_as(made.prototypes)
    worst = ((worst * 255).round().to(torch.uint8) >> (8 - bits)).float() / (2**bits - 1)
    x = torch.cat([torch.zeros(10, 1, 28, 28), worst], 2)
    assert made.read(x)[0].tolist() == list(range(10))


def test_append_split_and_read_agree(codes: ClassCodes) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (50, 1, 28, 28), generator=g, dtype=torch.uint8)
    y = torch.arange(50) % 10
    coded = codes.append(x, y, g)
    image, code = codes.split(coded)
    labels, margin = codes.read(coded)
    assert torch.equal(image, x) and torch.equal(labels, y) and coded.dtype == torch.uint8
    assert torch.equal(codes.read(coded.float() / 255)[0], y)
    assert not torch.equal(code[0], code[10])  # same class, other noise
    assert float((code.float() / 255 - codes.prototypes[y]).abs().max()) <= codes.amplitude + 0.51 / 255
    assert 0 < float(margin.min()) and float(margin.max()) <= 1
    assert float(codes.read(codes.append(x, y))[1].min()) > float(margin.max())  # bare prototypes are surer
    blank = codes.append_random(x, g)
    assert torch.equal(codes.split(blank)[0], x)
    assert float(codes.read(blank)[1].mean()) < float(margin.mean())


def make_data(n: int = 300) -> ImageData:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    base = torch.randint(60, 190, (3, 1, 8, 8), generator=g)
    x = (base[y] + torch.randint(-20, 20, (n, 1, 8, 8), generator=g)).to(torch.uint8)
    return ImageData.from_tensors(x, y, ["a", "b", "c"])


def test_a_coded_data_set_for_one_gaussian_or_many() -> None:
    data, made = make_data(), ClassCodes.design(3, (1, 8, 8), 1)
    coded = made.dataset(data)
    assert coded.image_shape == (1, 10, 8) and coded.classes == data.classes
    assert torch.equal(made.read(coded.tensor())[0], torch.from_numpy(data.targets))
    assert torch.equal(made.dataset(data).tensor(), coded.tensor())
    single = made.dataset(data, seed=1, monomodal=True)
    assert single.classes == ["all"] and not single.targets.any()
    assert torch.equal(made.read(single.tensor())[0], torch.from_numpy(data.targets))
    with pytest.raises(DataError, match="3 and"):
        made.dataset(ImageData.from_tensors(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], ["a", "b"]))


def fitted(data: ImageData) -> GLEM:
    """Identity flow with each class's mean and variances."""
    model = GLEM.create("identity", data.image_shape, data.classes, psi=None).requires_grad_(False)
    z, y = model.encode(data.tensor(), torch.Generator().manual_seed(0))[0], torch.from_numpy(data.targets)
    for c in range(len(data.classes)):
        model.gaussians.mu[c], model.gaussians.s[c] = z[y == c].mean(0), z[y == c].var(0)
    model.gaussians.initial_variance = 1e-6  # so that the lower bound does not bind
    return model


def test_ceglem_codes_agree_with_the_gaussian_and_random_codes_do_not_classify() -> None:
    data, made = make_data(), ClassCodes.design(3, (1, 8, 8), 1)
    model = fitted(made.dataset(data))
    result = code_agreement(model, made, per_class=50)
    assert result["agreement"] > 0.95 and result["images"] == 150 and 0 < result["margin"] <= 1
    # swapped prototypes: the codes name other classes
    swapped = ClassCodes(made.prototypes.roll(1, 0), made.amplitude, made.height)
    assert code_agreement(model, swapped, per_class=50)["agreement"] < 0.05
    with pytest.raises(ValueError, match="3 classes"):
        code_agreement(model, ClassCodes.design(4, (1, 8, 8), 1))


def test_rejection_balances_what_a_single_gaussian_draws() -> None:
    made = ClassCodes.design(3, (1, 8, 8), 1)
    g = torch.Generator().manual_seed(0)
    share = torch.tensor([0.7, 0.25, 0.05])

    def draw(n: int) -> torch.Tensor:
        y = torch.multinomial(share, n, replacement=True, generator=g)
        images = torch.full((n, 1, 8, 8), 0.0) + y[:, None, None, None] / 10
        return torch.cat([images, made.draw(y, g).float() / 255], 2)

    x, y, facts = balance_by_rejection(draw, made, per_class=40)
    assert x.shape == (120, 1, 8, 8) and x.dtype == torch.uint8 and y.bincount().tolist() == [40, 40, 40]
    assert torch.equal(x[:, 0, 0, 0].long(), (y * 25.5).round().long())  # each image with its own code's label
    assert 0.02 < facts["rarest"] < 0.1 and facts["acceptance"] == 120 / facts["drawn"] < 0.3
    share = torch.tensor([0.7, 0.3, 0.0])
    with pytest.raises(DataError, match="held 0 of class 2"):
        balance_by_rejection(draw, made, per_class=5)


def test_codes_come_back_from_their_file(codes: ClassCodes, tmp_path: Path) -> None:
    codes.save(tmp_path)
    again = ClassCodes.load(tmp_path)
    assert torch.equal(again.prototypes, codes.prototypes)
    assert (again.amplitude, again.height) == (codes.amplitude, codes.height)
    for facts in ('{"amplitude": 0.1, "height": 1e400}', "[" * 100_000):
        save_file({"prototypes": codes.prototypes}, tmp_path / "codes.safetensors", {"codes": facts})
        with pytest.raises(ModelFileError, match="codes.safetensors"):
            ClassCodes.load(tmp_path)
    (tmp_path / "codes.safetensors").write_bytes(b"short")
    with pytest.raises(ModelFileError, match="codes.safetensors"):
        ClassCodes.load(tmp_path)


def test_bad_settings_are_named(codes: ClassCodes) -> None:
    with pytest.raises(ValueError, match="can't be told apart"):
        ClassCodes.design(500, (1, 4, 2), 1, bits=1)
    with pytest.raises(ValueError, match="noise"):
        ClassCodes.design(3, (1, 8, 8), 1, noise=1.0)
    with pytest.raises(ValueError, match="levels"):
        ClassCodes.design(3, (1, 8, 8), 0)
    with pytest.raises(ValueError, match="uint8"):
        codes.append(torch.zeros(1, 1, 28, 28), torch.tensor([0]))
    with pytest.raises(ValueError, match="coded images"):
        codes.read(torch.zeros(1, 1, 28, 28))
