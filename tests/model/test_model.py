"""GLEM as a whole: densities over levels, exact images, classification, generation, and clear errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from model_cases import images, seeded, tiny_model
from torch import Tensor

from glem_augment import GLEM
from glem_augment.codec.pixel_range import UINT8
from glem_augment.errors import ClassMismatchError, DataError
from glem_augment.images.dataset import ImageData
from glem_augment.model.glem import as_model

# ---- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["identity", "glow_tiny", "mef_tiny"])
def test_densities_sum_to_one_over_all_images_of_two_bits(preset: str) -> None:
    """The sum over the 4^4 images of E_u[p(levels + u | y)] is the integral of p over [0, 4]^4: all of its mass."""
    options = {} if preset == "identity" else dict(depth=[2], blocks=[1], width=[6])
    model = tiny_model(preset, (1, 2, 2), ("a", "b"), bits=2, psi=None, **options)
    with torch.no_grad():
        model.gaussians.mu.mul_(0.2)
        model.gaussians.lowest_variance = 0.001
        model.gaussians.s.fill_(0.11**2)
        # Small Gaussians in the middle of the image range.
        model.gaussians.mu.add_(model.encode(torch.full((1, 1, 2, 2), 0.5))[0])
    levels = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8).reshape(-1, 1, 2, 2)
    rounds = 80
    x = (levels << 6).repeat(rounds, 1, 1, 1)
    per_class = model.log_prob_per_class(x, seeded()).double().exp().sum(0) / rounds
    marginal = float(model.log_prob(x, generator=seeded(1)).double().exp().sum()) / rounds
    assert per_class.tolist() == pytest.approx([1, 1], abs=0.06)
    assert marginal == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("bits", [8, 5])
def test_log_prob_of_the_identity_is_the_gaussian_over_levels(bits: int) -> None:
    model, x = tiny_model("identity", bits=bits), images()
    z, logdet = model.encode(x)
    levels = (x >> (8 - bits)).flatten(1).double()
    torch.testing.assert_close(z.double(), (levels + 0.5) / 2**bits - 0.5, rtol=0, atol=1e-7)
    torch.testing.assert_close(logdet, torch.full((6,), -16 * bits * math.log(2)))
    normal = torch.distributions.Normal(model.gaussians.mu[1].double(), model.gaussians.variance()[1].double().sqrt())
    want = normal.log_prob(model.encode(x, 0)[0].double()).sum(1) + logdet.double()
    torch.testing.assert_close(model.log_prob(x, torch.ones(6, dtype=torch.long)).double(), want, rtol=0, atol=1e-4)


def test_bits_per_dim_and_the_marginal_follow_their_definitions() -> None:
    model, x, y = tiny_model(), images(), torch.tensor([0, 1, 2, 0, 1, 2])
    table = model.log_prob_per_class(x)
    torch.testing.assert_close(model.log_prob(x, y), table[torch.arange(6), y], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.log_prob(x), torch.logsumexp(table.double(), 1).float() - math.log(3))
    torch.testing.assert_close(model.bits_per_dim(x, y), -model.log_prob(x, y) / (16 * math.log(2)))
    torch.testing.assert_close(model.bits_per_dim(x), -model.log_prob(x) / (16 * math.log(2)))
    for other in (1, seeded(0)):
        assert not torch.equal(model.log_prob(x), model.log_prob(x, generator=other))
    assert torch.equal(model.log_prob(x, generator=np.int64(1)), model.log_prob(x, generator=1))
    black = torch.zeros_like(x[:1])  # whose hash is zero
    assert not torch.equal(model.log_prob(black), model.log_prob(black, generator=1))


@pytest.mark.parametrize("bits", [8, 5])
def test_an_image_has_one_likelihood_whatever_its_batch_and_dtype(bits: int) -> None:
    model, levels = tiny_model(bits=bits), torch.randint(0, 2**bits, (8, 1, 4, 4))
    levels[0], levels[1] = 0, 2**bits - 1
    x = (levels << (8 - bits)).to(torch.uint8)
    want, order = model.log_prob(x), [3, 7, 0, 0, 1]
    torch.testing.assert_close(model.log_prob(x[order]), want[order], rtol=0, atol=1e-4)
    for one, wanted in zip(x, want, strict=True):
        torch.testing.assert_close(model.log_prob(one[None])[0], wanted, rtol=0, atol=1e-4)
    # Floats on levels are the same images, to the last bit; also of half precision, and after a normalisation.
    floats = levels.double() / (2**bits - 1)
    normalised = (floats.float() - 0.4914) / 0.2023
    for same in (floats, floats.float(), floats.half(), normalised * 0.2023 + 0.4914, x.float() / 255):
        assert torch.equal(model.log_prob(same), want)
        assert torch.equal(model.encode(same, seeded())[0], model.encode(x, seeded())[0])


def test_the_likelihood_of_a_point_between_the_levels_is_its_density() -> None:
    model, x = tiny_model("identity"), images().double() / 255
    x[:3, 0, 0, 0] += 0.01 - x[:3, 0, 0, 0].round() * 0.02  # one pixel, and the image is a point
    z, logdet = model.encode(x)
    torch.testing.assert_close(
        model.log_prob(x)[:3], (model.gaussians.log_prob(z).logsumexp(1) + logdet)[:3] - math.log(3)
    )
    assert torch.equal(model.log_prob(x)[3:], model.log_prob((x * 255).round().to(torch.uint8))[3:])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x).sum(), x)
    assert gradient.isfinite().all() and gradient.flatten(1).any(1).all()


def test_posterior_is_bayes_and_predict_its_argmax() -> None:
    model, x = tiny_model(), images(50)
    posterior = model.posterior(x)
    scores = model.gaussians.log_prob(model.encode(x)[0]).double()
    torch.testing.assert_close(posterior.double(), scores.softmax(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(model.predict(x), posterior.argmax(1)) and model.predict(x).dtype == torch.int64


# ---- images and latents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 5, 1])
@pytest.mark.parametrize(
    ("preset", "shape"), [("identity", (3, 5, 3)), ("mef_tiny", (3, 8, 4)), ("glow_tiny", (2, 4, 8))]
)
def test_uint8_images_come_back_exactly(preset: str, shape: tuple[int, int, int], bits: int) -> None:
    model, x = tiny_model(preset, shape, bits=bits), images(8, shape)
    x[0], x[1] = 0, 255
    back = model.decode(model.encode(x)[0])
    assert back.dtype == torch.float32 and back.min() >= 0 and back.max() <= 1
    levels = 2**bits - 1
    assert torch.equal((back * levels).round().to(torch.uint8), x >> (8 - bits))
    if bits == 8:
        assert torch.equal(UINT8.from_floats(back), x)
    # With dequantisation noise the image stays in its bin.
    noisy = model.decode(model.encode(x, seeded())[0], clamp=False)
    assert ((noisy * levels - (x >> (8 - bits))).abs() <= 0.5 + 1e-2).all()


def test_float_input_is_not_rounded() -> None:
    model, x = tiny_model(), torch.rand(4, 1, 4, 4)
    torch.testing.assert_close(model.decode(model.encode(x)[0]), x, rtol=0, atol=1e-4)
    assert torch.equal(model.encode(x.half())[0], model.encode(x.half().float())[0])
    flat = torch.full((1, 1, 4, 4), 0.5)
    assert not torch.equal(model.encode(flat)[0], model.encode(flat + 1e-4)[0])
    model.encode(torch.tensor([-0.0009, 1.0009]).repeat(8).reshape(1, 1, 4, 4))  # rounding beyond the range


@pytest.mark.parametrize("source", [seeded, int])
@pytest.mark.parametrize("bits", [8, 3])
def test_dequantisation_noise_is_seeded_and_fills_every_bin_evenly(source: Callable, bits: int) -> None:
    model, x = tiny_model("identity", bits=bits), images(1000)
    x[500:] = torch.arange(500)[:, None, None, None]  # flat ones, 250 of which differ in one level alone at 8 bits
    z, _ = model.encode(x, source(0))
    assert torch.equal(z, model.encode(x, source(0))[0]) and not torch.equal(z, model.encode(x, source(1))[0])
    u = ((z + 0.5) * 2**bits - (x >> (8 - bits)).flatten(1)).double()
    assert u.min() >= 0 and u.max() < 1  # to the last bit: no image is rounded into the next bin
    for part in (u[:500], u[500:][: 2**bits]):
        share = torch.histc(part, 10, 0, 1) / part.numel()
        assert (share - 0.1).abs().max() < 5 * 0.3 / part.numel() ** 0.5  # five standard deviations
    correlation = torch.corrcoef(u[:500].T) - torch.eye(16)  # of the pixels
    assert correlation.abs().max() < 0.25


def test_more_images_than_a_chunk_and_none_at_all() -> None:
    model, x = tiny_model(), images(600)
    z, _ = model.encode(x)
    torch.testing.assert_close(z[590:], model.encode(x[590:])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.decode(z)[590:], model.decode(z[590:]), rtol=0, atol=1e-5)
    assert model.decode(model.encode(x[:0])[0]).shape == (0, 1, 4, 4) and model.predict(x[:0]).shape == (0,)


@pytest.mark.parametrize("autoencoder", [None, "taef2"])
def test_ambient_autocast_changes_nothing(autoencoder: str | None) -> None:
    y = torch.tensor([0, 2])
    if autoencoder is None:
        model, x = tiny_model(), images()
    else:
        model, x = GLEM.create("identity", (3, 8, 8), ["a", "b", "c"], autoencoder=autoencoder), images(shape=(3, 8, 8))
    z = model.encode(x)[0]

    def results() -> list[Tensor]:
        return [model.log_prob_per_class(x), model.sample(y, 1.0, seeded()), model.decode(z), model.posterior(x)]

    wanted = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(wanted, results(), strict=True))


def test_decoded_images_as_they_can_be_shown() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.1, 0.3, 1.7])
    assert torch.equal(UINT8.clamp(x), torch.tensor([0.5, 1.0, 0.0, 0.0, 0.3, 1.0]))
    assert UINT8.from_floats(x).tolist() == [128, 255, 0, 0, 76, 255] and math.isnan(x[0])


def test_check_invertibility_reports_errors_in_uint8_steps() -> None:
    model, x = tiny_model(), images(20)
    report = model.check_invertibility(x)
    assert 0 <= report["mean_error"] <= report["max_error"] < 0.1
    assert report["within_half_step"] == 1 and report["non_finite"] == 0

    inverse = model.flow.inverse

    def broken(z: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = inverse(z)
        x[0, 0, 0, 0] = math.nan
        x[1, 0, 0, 0] += 3 / 256
        return x, logdet

    model.flow.inverse = broken
    worst = model.round_trip_error(x).flatten(1).amax(1)
    assert worst[0] == math.inf and worst[1].item() == pytest.approx(3, abs=0.05) and (worst[2:] < 0.1).all()
    assert model.flow_error(x)[0] == math.inf and model.flow_error(x)[1].item() == pytest.approx(3 / 256, abs=2e-4)
    report = model.check_invertibility(x)
    assert report["non_finite"] == pytest.approx(1 / 320) and report["within_half_step"] == pytest.approx(318 / 320)
    assert report["max_error"] == pytest.approx(3, abs=0.05)
    assert report["mean_error"] == pytest.approx(3 / 319, abs=0.01)


# ---- generation ------------------------------------------------------------------------------------------------------


def test_interpolation_is_a_straight_line_between_the_images() -> None:
    model, a, b = tiny_model(), images(3), images(3)
    lines = model.interpolate(a, b, 5)
    assert lines.shape == (3, 5, 1, 4, 4)
    assert torch.equal(UINT8.from_floats(lines[:, 0]), a) and torch.equal(UINT8.from_floats(lines[:, -1]), b)
    quarter = model.decode(model.encode(a)[0] * 0.75 + model.encode(b)[0] * 0.25)
    torch.testing.assert_close(lines[:, 1], quarter, rtol=0, atol=1e-5)


# ---- what labelled images tell ---------------------------------------------------------------------------------------


def test_fit_modes_takes_every_class_from_its_own_images() -> None:
    model = tiny_model()
    x, y = images(60), torch.arange(60) % 3
    modes = model.fit_modes((x, y), rank=4)
    assert model.modes is modes and model.config.modes_rank == model.checked_modes(None) == 4
    assert modes.directions.shape == (3, 4, 16) and modes.counts.tolist() == [20, 20, 20]
    for k in range(3):
        latents = model.encode(x[y == k], seeded(k))[0]  # noise from the seed and the class
        torch.testing.assert_close(modes.mean[k], latents.mean(0), rtol=0, atol=1e-5)
    assert model.sample(y, 1.0, seeded(), source="rfcm").shape == (60, 1, 4, 4)
    with pytest.raises(ValueError, match="modes must be from 1 to 4"):
        model.checked_modes(5)
    assert not torch.equal(model.fit_modes((x, y), rank=4, seed=1).mean, modes.mean)
    assert model.fit_modes((x, y), rank=2, max_per_class=5).counts.tolist() == [5, 5, 5]
    first = torch.arange(15)  # five of each class
    assert torch.equal(model.fit_modes((x[first], y[first]), rank=2).mean, model.modes.mean)


def test_classes_of_other_data_are_matched_by_name() -> None:
    model, x = tiny_model(), images(60)
    data = ImageData.from_tensors(x, torch.arange(60) % 3, ["c", "a", "b"])
    modes = model.fit_modes(data, rank=2)
    assert torch.equal(modes.mean, model.fit_modes((x, (torch.arange(60) + 2) % 3), rank=2).mean)
    other = data.with_targets(data.targets, ["c", "a", "fox"])
    with pytest.raises(ClassMismatchError, match="'fox'"):
        model.fit_modes(other)
    assert torch.equal(model.fit_modes(other, rank=2, class_map={"fox": "b"}).mean, modes.mean)


def test_facts_and_names() -> None:
    model = GLEM.create("identity", (3, 4, 6), classes=["cat", "dog"], class_ids=["n1", "n2"], bits=5)
    assert model.dim == 72 and model.class_ids == ["n1", "n2"] and model.class_to_idx == {"cat": 0, "dog": 1}
    assert "identity, 3x4x6 at 5 bits, 2 classes" in repr(model)
    assert model.on(None) is model.on("cpu") is as_model(model) is model
    assert model.on("meta").device.type == "meta" and model.device.type == "cpu"
    with pytest.raises(TypeError, match="must be a GLEM or the name of one, got int"):
        as_model(3)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_wrong_latents_and_labels_are_refused() -> None:
    model, x, y = tiny_model(), images(), torch.arange(6) % 3
    for error, message, call in (
        (ValueError, r"\[B, 16\]", lambda: model.decode(torch.zeros(2, 15))),
        (ClassMismatchError, "classes 0 to 2", lambda: model.sample(torch.tensor([3]))),
        (ValueError, r"\[6\]", lambda: model.log_prob(x, y[:5])),
        (ValueError, "whole numbers", lambda: model.sample(torch.tensor([0.5]))),
        (ValueError, "fit_modes", lambda: model.sample_latents(y, source="rfcm")),
        (ValueError, "temperature", lambda: model.sample(y, -1.0)),
        (ValueError, "NaN", lambda: model.encode(x / 255 * math.nan)),
        (ValueError, "steps", lambda: model.interpolate(x, x, 1)),
        (ValueError, "rank", lambda: model.fit_modes((x, y), rank=0)),
        (ValueError, "rank must be at most 4096", lambda: model.fit_modes((x, y), rank=9999)),
        (DataError, "4, 4", lambda: model.fit_modes(ImageData.from_tensors(images(6, (1, 4, 8)), y, "abc"))),
        (DataError, r"\(c\)", lambda: model.fit_modes((x, torch.arange(6) % 2))),
    ):
        with pytest.raises(error, match=message):
            call()
    for change, name in (
        (dict(bits=9), "bits"),
        (dict(psi=(1, 2, -3)), "psi"),
        (dict(classes=["a", "a"]), "class_ids"),
    ):
        with pytest.raises(ValueError, match=name):
            GLEM.create(**{**dict(preset="mef_tiny", image_shape=(1, 4, 4), classes=["a", "b"]), **change})
