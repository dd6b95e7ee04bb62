"""GLEM as a whole: densities over levels, exact images, clear errors, and files that are read with suspicion."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glem_augment import GLEM
from glem_augment.data.pixels import to_levels
from glem_augment.errors import ClassMismatchError, DataError, ModelFileError
from glem_augment.model.weights import bundled_models

TINY = dict(depth=[1, 1], blocks=[1, 1], width=[6, 6])


def tiny_model(preset: str = "mef_tiny", shape=(1, 4, 4), classes=("a", "b", "c"), bits: int = 8, **options) -> GLEM:
    """A model with every weight away from its start."""
    options = {**(TINY if preset != "identity" else {}), **options}
    model = GLEM.create(preset, shape, classes=list(classes), bits=bits, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def images(n: int = 6, shape=(1, 4, 4)) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8)


# ---- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["identity", "glow_tiny", "mef_tiny"])
def test_densities_sum_to_one_over_all_images_of_two_bits(preset: str) -> None:
    """The sum over the 4^4 images of E_u[p(levels + u | y)] is the integral of p over [0, 4]^4: all of its mass."""
    options = {} if preset == "identity" else dict(depth=[2], blocks=[1], width=[6])
    model = tiny_model(preset, (1, 2, 2), ("a", "b"), bits=2, psi=None, **options)
    with torch.no_grad():
        model.gaussians.mu.mul_(0.2)
        model.gaussians.initial_variance = 0.01
        model.gaussians.s.fill_(0.11**2)
        # Small Gaussians in the middle of the image range.
        model.gaussians.mu.add_(model.encode(torch.full((1, 1, 2, 2), 0.5))[0])
    levels = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8).reshape(-1, 1, 2, 2)
    generator = torch.Generator().manual_seed(0)
    per_class, marginal = torch.zeros(2, dtype=torch.float64), 0.0
    rounds = 400
    for _ in range(rounds):
        per_class += model.log_prob_per_class(levels << 6, generator).double().exp().sum(0) / rounds
        marginal += model.log_prob(levels << 6, generator=generator).double().exp().sum().item() / rounds
    assert per_class.tolist() == pytest.approx([1, 1], abs=0.06)
    assert marginal == pytest.approx(1, abs=0.06)


def test_log_prob_of_the_identity_is_the_gaussian_over_levels() -> None:
    for bits in (8, 5):
        model, x = tiny_model("identity", bits=bits), images()
        z, logdet = model.encode(x)
        levels = (x >> (8 - bits)).flatten(1).double()
        torch.testing.assert_close(z.double(), (levels + 0.5) / 2**bits - 0.5, rtol=0, atol=1e-7)
        torch.testing.assert_close(logdet, torch.full((6,), -16 * bits * math.log(2)))
        normal = torch.distributions.Normal(
            model.gaussians.mu[1].double(), model.gaussians.variance()[1].double().sqrt()
        )
        want = normal.log_prob(model.encode(x, torch.Generator().manual_seed(0))[0].double()).sum(1) + logdet.double()
        torch.testing.assert_close(model.log_prob(x, torch.ones(6, dtype=torch.long)).double(), want, rtol=0, atol=1e-4)


def test_bits_per_dim_and_the_marginal_follow_their_definitions() -> None:
    model, x, y = tiny_model(), images(), torch.tensor([0, 1, 2, 0, 1, 2])
    table = model.log_prob_per_class(x)
    assert table.shape == (6, 3)
    torch.testing.assert_close(model.log_prob(x, y), table[torch.arange(6), y], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.log_prob(x), _marginal(table))
    torch.testing.assert_close(model.bits_per_dim(x, y), -model.log_prob(x, y) / (16 * math.log(2)))
    torch.testing.assert_close(model.bits_per_dim(x), -model.log_prob(x) / (16 * math.log(2)))
    assert torch.equal(model.log_prob(x), model.log_prob(x))  # a fixed seed unless told otherwise
    other = model.log_prob(x, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(model.log_prob(x), other)


def _marginal(table: Tensor) -> Tensor:
    return torch.logsumexp(table.double(), 1).float() - math.log(table.shape[1])


def test_uniform_noise_costs_eight_bits() -> None:
    """A flat density over all levels has exactly log2(256) bits per dimension; a very wide Gaussian costs more."""
    model = GLEM.create("identity", (1, 4, 4), classes=["a"], psi=(1.0, 0.2, 1 / 12))
    x = images(500)
    with torch.no_grad():
        model.gaussians.set_variance(torch.full((1, 16), 0.0933))  # as near to 1/12 as the clamp allows
    bits = model.bits_per_dim(x).mean().item()
    # Entropy of the uniform plus its divergence from the normal of the same variance: 0.254 bits.
    assert bits == pytest.approx(8.254, abs=0.02)


# ---- encode and decode -----------------------------------------------------------------------------------------------


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
        assert torch.equal((back * 255).round().to(torch.uint8), x)
    # With dequantisation noise the image stays in its bin.
    noisy = model.decode(model.encode(x, torch.Generator().manual_seed(0))[0], clamp=False)
    assert ((noisy * levels - (x >> (8 - bits))).abs() <= 0.5 + 1e-2).all()


def test_float_input_is_not_rounded() -> None:
    model = tiny_model()
    x = torch.rand(4, 1, 4, 4)
    torch.testing.assert_close(model.decode(model.encode(x)[0]), x, rtol=0, atol=1e-4)
    assert torch.equal(model.encode(x.half())[0], model.encode(x.half().float())[0])
    as_floats, as_bytes = model.encode(images().float() / 255)[0], model.encode(images())[0]
    assert as_floats.shape == as_bytes.shape
    x = images()
    torch.testing.assert_close(model.encode(x.float() / 255)[0], model.encode(x)[0], rtol=0, atol=1e-4)
    one_ulp = torch.full((1, 1, 4, 4), 0.5)
    assert not torch.equal(model.encode(one_ulp)[0], model.encode(one_ulp + 1e-4)[0])


def test_encode_is_deterministic_without_a_generator_and_seeded_with_one() -> None:
    model, x = tiny_model(), images()
    assert torch.equal(model.encode(x)[0], model.encode(x)[0])

    def noisy(seed: int) -> Tensor:
        return model.encode(x, torch.Generator().manual_seed(seed))[0]

    assert torch.equal(noisy(1), noisy(1))
    assert not torch.equal(noisy(1), noisy(2)) and not torch.equal(noisy(1), model.encode(x)[0])


def test_dequantisation_noise_fills_every_bin_evenly() -> None:
    for bits in (8, 3):
        model, x = tiny_model("identity", bits=bits), images(1000)
        z, _ = model.encode(x, torch.Generator().manual_seed(0))
        u = ((z + 0.5) * 2**bits - (x >> (8 - bits)).flatten(1)).flatten().double()
        assert u.min() >= 0 and u.max() < 1  # to the last bit: no image is rounded into the next bin
        counts = torch.histc(u, 10, 0, 1) / len(u)
        assert (counts - 0.1).abs().max() < 0.012  # five standard deviations


def test_dequantisation_noise_is_independent_and_the_same_for_every_dtype() -> None:
    x = torch.full((999, 1, 3, 7), 200, dtype=torch.uint8)
    single, double = (
        to_levels(x, 8, dtype, torch.Generator().manual_seed(0)) for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single.double(), double)
    u = ((double + 0.5) * 256 - 200).flatten()
    assert u.unique().numel() > 17_700  # of 20,979 in 65,536 places: 17,950 expected, give or take 50
    size = len(u) // 4 * 4
    words = u[:size].view(-1, 4)
    correlations = torch.corrcoef(torch.cat([words.T, words.roll(1, 0).T]))
    assert (correlations - torch.eye(8)).abs().max() < 5 / len(words) ** 0.5


def test_more_images_than_a_chunk_and_none_at_all() -> None:
    model, x = tiny_model(), images(600)
    z, logdet = model.encode(x)
    assert z.shape == (600, 16) and logdet.shape == (600,)
    torch.testing.assert_close(z[590:], model.encode(x[590:])[0], rtol=0, atol=1e-5)
    assert model.decode(z).shape == (600, 1, 4, 4)
    empty = x[:0]
    z, logdet = model.encode(empty)
    assert z.shape == (0, 16) and logdet.shape == (0,)
    assert model.decode(z).shape == (0, 1, 4, 4) and model.predict(empty).shape == (0,)
    assert model.sample(torch.zeros(0, dtype=torch.long)).shape == (0, 1, 4, 4)


def test_input_is_never_written_to() -> None:
    model, x, f = tiny_model(), images(), torch.rand(2, 1, 4, 4)
    x_before, f_before = x.clone(), f.clone()
    model.log_prob(x), model.encode(f), model.predict(x)
    z = model.encode(x)[0]
    z_before = z.clone()
    model.decode(z), model.posterior_from_latents(z)
    assert torch.equal(x, x_before) and torch.equal(f, f_before) and torch.equal(z, z_before)


def test_ambient_autocast_changes_nothing() -> None:
    model, x = tiny_model(), images()
    want = model.log_prob_per_class(x), model.posterior(x), model.sample(torch.tensor([0, 2]), 1.0, _seeded())
    with torch.autocast("cpu", torch.bfloat16):
        got = model.log_prob_per_class(x), model.posterior(x), model.sample(torch.tensor([0, 2]), 1.0, _seeded())
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(1, 4, 4, dtype=torch.uint8), ValueError, r"\[B,1,4,4\].*\[1, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ValueError, r"\[2, 3, 4, 4\]"),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), ValueError, r"\[2, 1, 4, 5\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.bool), TypeError, "bool"),
        (torch.full((2, 1, 4, 4), 255.0), ValueError, r"\[0,1\].*255"),
        (torch.full((2, 1, 4, 4), -1.0), ValueError, r"\[0,1\].*-1"),
        (torch.full((2, 1, 4, 4), math.nan), ValueError, "image 0 of the batch has NaN"),
        (torch.full((2, 1, 4, 4), math.inf), ValueError, "inf"),
        ([[0]], TypeError, "list"),
    ],
)
@pytest.mark.parametrize("call", ["encode", "log_prob", "predict", "posterior", "check_invertibility"])
def test_wrong_images_are_refused_with_one_clear_error(call: str, x, kind, message: str) -> None:
    with pytest.raises(kind, match=message):
        getattr(tiny_model(), call)(x)


def test_a_single_nan_pixel_is_found() -> None:
    x = torch.rand(3, 1, 4, 4)
    x[1, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="image 1 of the batch has NaN"):
        tiny_model().encode(x)


def test_wrong_latents_labels_and_priors_are_refused() -> None:
    model, x = tiny_model(), images()
    for z in (torch.zeros(2, 15), torch.zeros(16), torch.zeros(2, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"\[B, 16\]"):
            model.decode(z)
    for y in (torch.tensor([3]), torch.tensor([-1])):
        with pytest.raises(ClassMismatchError, match="unknown class.*classes 0 to 2"):
            model.sample(y)
    with pytest.raises(ClassMismatchError, match="unknown class"):
        model.log_prob(x, torch.full((6,), 7))
    with pytest.raises(ValueError, match=r"\[6\]"):
        model.log_prob(x, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="whole numbers"):
        model.sample(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="fit_modes"):
        model.sample_latents(torch.tensor([0]), source="rfcm")
    with pytest.raises(ValueError, match="'gaussian' or 'rfcm'"):
        model.sample_latents(torch.tensor([0]), source="prior")
    for prior in (torch.ones(2), torch.zeros(3), torch.tensor([1.0, -1, 1]), torch.tensor([1.0, math.nan, 1])):
        with pytest.raises(ValueError, match="prior must be 3 numbers"):
            model.posterior(x, prior)
    with pytest.raises(ValueError, match="at least 2"):
        model.interpolate(x, x, 1)
    with pytest.raises(ValueError, match="same shape"):
        model.interpolate(x, x[:2], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=0), "bits"),
        (dict(bits=9), "bits"),
        (dict(psi=(1, 2)), "psi"),
        (dict(psi=(1, 2, -3)), "psi"),
        (dict(classes=["a", "a"]), "twice.*a"),
        (dict(classes=[]), "non-empty"),
        (dict(classes=["a", "b"], class_ids=["x"]), "equal length"),
        (dict(image_shape=(1, 6, 6)), "divisible by 4, got 6x6"),
        (dict(image_shape=(0, 4, 4)), "image_shape"),
        (dict(preset="mef_nano"), "unknown preset"),
    ],
)
def test_create_refuses_what_is_no_model(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GLEM.create(**{**dict(preset="mef_tiny", image_shape=(1, 4, 4), classes=["a", "b"]), **change})


# ---- classification and generation -----------------------------------------------------------------------------------


def test_posterior_is_bayes_and_predict_its_argmax() -> None:
    model, x = tiny_model(), images(50)
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.sum(1), torch.ones(50))
    scores = model.gaussians.log_prob(model.encode(x)[0]).double()
    torch.testing.assert_close(posterior.double(), scores.softmax(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(model.predict(x), posterior.argmax(1)) and model.predict(x).dtype == torch.int64
    prior = torch.tensor([0.2, 0.0, 3.0])
    weighted = scores.softmax(1) * prior
    torch.testing.assert_close(
        model.posterior(x, prior).double(), weighted / weighted.sum(1, keepdim=True), rtol=1e-3, atol=1e-6
    )
    assert (model.posterior(x, prior)[:, 1] == 0).all()
    torch.testing.assert_close(model.posterior(x, [5.0, 5.0, 5.0]), posterior)


def test_samples_of_well_separated_classes_are_recognised() -> None:
    model = tiny_model("identity")
    with torch.no_grad():
        model.gaussians.mu.copy_(torch.tensor([-0.3, 0.0, 0.3])[:, None].expand(3, 16))
        model.gaussians.set_variance(torch.full((3, 16), 0.055))
    y = torch.arange(3).repeat(100)
    x = model.sample(y, 0.5, _seeded())
    assert x.shape == (300, 1, 4, 4) and x.min() >= 0 and x.max() <= 1
    assert (model.predict(x) == y).float().mean() > 0.99
    assert torch.equal(x, model.sample(y, 0.5, _seeded()))
    assert torch.equal(model.sample_latents(y, 0.0), model.gaussians.mu[y])


def test_interpolation_starts_and_ends_at_the_images() -> None:
    model, a, b = tiny_model(), images(3), images(3)
    lines = model.interpolate(a, b, 5)
    assert lines.shape == (3, 5, 1, 4, 4)
    assert torch.equal((lines[:, 0] * 255).round().byte(), a) and torch.equal((lines[:, -1] * 255).round().byte(), b)
    middle = model.decode((model.encode(a)[0] + model.encode(b)[0]) / 2)
    torch.testing.assert_close(lines[:, 2], middle, rtol=0, atol=1e-5)


def test_fit_modes_from_tensors() -> None:
    model = tiny_model()
    x, y = images(60), torch.arange(60) % 3
    modes = model.fit_modes((x, y), rank=4)
    assert model.modes is modes and model.config.modes_rank == 4
    assert modes.directions.shape == (3, 4, 16) and modes.counts.tolist() == [20, 20, 20]
    for k in range(3):
        want = model.encode(x[y == k])[0].mean(0)
        torch.testing.assert_close(modes.mean[k], want, rtol=0, atol=0.02)  # dequantisation noise
    assert model.sample(y, 1.0, _seeded(), source="rfcm").shape == (60, 1, 4, 4)
    assert torch.equal(model.fit_modes((x, y), rank=4).mean, modes.mean)
    with pytest.raises(DataError, match="images of 1 x 4 x 8"):
        model.fit_modes((images(6, (1, 4, 8)), torch.arange(6) % 3))
    for settings in ({"rank": 0}, {"max_per_class": 0}, {"max_per_class": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            model.fit_modes((x, y), **settings)
    for source in ("gaussian", "rfcm"):
        for temperature in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="temperature must be"):
                model.sample(y, temperature, source=source)


def test_check_invertibility_reports_errors_in_uint8_steps() -> None:
    model, x = tiny_model(), images(20)
    report = model.check_invertibility(x)
    assert set(report) == {"max_error", "mean_error", "within_half_step", "non_finite"}
    assert 0 <= report["mean_error"] <= report["max_error"] < 0.1
    assert report["within_half_step"] == 1 and report["non_finite"] == 0

    class Broken(type(model.flow)):
        def inverse(self, z):
            x, logdet = super().inverse(z)
            x[0, 0, 0, 0] = math.nan
            x[1, 0, 0, 0] += 3 / 256
            return x, logdet

    model.flow.__class__ = Broken
    report = model.check_invertibility(x)
    assert report["non_finite"] == pytest.approx(1 / 320) and report["within_half_step"] == pytest.approx(318 / 320)
    assert report["max_error"] == pytest.approx(3, abs=0.05)


def test_facts() -> None:
    model = GLEM.create("identity", (3, 4, 6), classes=["cat", "dog"], class_ids=["n1", "n2"], bits=5)
    assert model.image_shape == (3, 4, 6) and model.dim == 72 and model.num_classes == 2 and model.bits == 5
    assert model.classes == ["cat", "dog"] and model.class_ids == ["n1", "n2"]
    assert model.class_to_idx == {"cat": 0, "dog": 1} and model.device == torch.device("cpu")
    assert "identity, 3x4x6 at 5 bits, 2 classes" in repr(model)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model()
    model.fit_modes((images(12), torch.arange(12) % 3), rank=2)
    model.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("preset", "psi"), [("mef_tiny", (0.5, 0.2, 0.05)), ("glow_tiny", None), ("identity", None)])
@pytest.mark.parametrize("with_modes", [False, True])
def test_save_and_load_give_the_same_bits(tmp_path: Path, preset: str, psi, with_modes: bool) -> None:
    model = tiny_model(preset, psi=psi)
    if with_modes:
        model.fit_modes((images(12), torch.arange(12) % 3), rank=3)
    model.config.training = {"note": "é", "numbers": [1, 2.5]}
    model.save(tmp_path / "m")
    loaded = GLEM.from_pretrained(tmp_path / "m")
    assert loaded.config == model.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in model.state_dict().items())
    x = images()
    assert torch.equal(loaded.encode(x)[0], model.encode(x)[0]) and torch.equal(loaded.log_prob(x), model.log_prob(x))
    loaded.save(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_weights_are_read_as_float32(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, saved / "model.safetensors")
    model = GLEM.from_pretrained(saved)
    assert model.gaussians.mu.dtype == torch.float32
    assert model.check_invertibility(images())["within_half_step"] == 1


def test_missing_folders_and_files_say_what_is_there(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelFileError, match="no model at"):
        GLEM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelFileError, match="no bundled model 'mnist'; bundled are"):
        GLEM.from_pretrained("bundled:mnist")
    with pytest.raises(ModelFileError):
        GLEM.from_pretrained("bundled:../../tests")
    for name in ("model.safetensors", "config.json"):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(ModelFileError, match=f"no {name}"):
            GLEM.from_pretrained(saved)
        (saved / name).write_bytes(content)


def test_truncated_weights_are_refused_at_every_length(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, 100, *range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match="model.safetensors"):
            GLEM.from_pretrained(saved)
    for foreign in (
        whole + b"x",
        b"PK\x03\x04" * 50,
        b"\xff" * 64,
        b"\x00" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
    ):
        path.write_bytes(foreign)
        with pytest.raises(ModelFileError, match="model.safetensors"):
            GLEM.from_pretrained(saved)


def test_tensors_that_do_not_fit_the_config_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    state = load_file(path)
    mu = "gaussians.mu"
    flag = next(k for k, v in state.items() if v.dtype == torch.bool)
    nan, inf = state[mu].clone(), state[mu].clone()
    nan[0, 0], inf[-1, -1] = math.nan, -math.inf
    for change, message in (
        ({mu: None}, "1 tensors missing.*gaussians.mu"),
        ({"extra": torch.zeros(3)}, "1 unknown.*extra"),
        ({mu: state[mu][:2]}, r"gaussians.mu has shape \(2, 16\).*\(3, 16\)"),
        ({mu: state[mu].flatten()}, "gaussians.mu has shape"),
        ({mu: nan}, "gaussians.mu holds values that are not finite"),
        ({mu: inf}, "gaussians.mu holds values that are not finite"),
        ({mu: nan.half()}, "not finite"),
        ({mu: state[mu].long()}, "gaussians.mu is of type I64"),
        ({mu: nan.to(torch.float8_e5m2)}, "gaussians.mu is of type F8"),
        ({mu: state[mu].to(torch.complex64)}, "gaussians.mu is of type C64"),
        ({flag: state[flag].float()}, "is of type F32, expected BOOL"),
    ):
        changed = {k: v.contiguous() for k, v in {**state, **change}.items() if v is not None}
        save_file(changed, path)
        with pytest.raises(ModelFileError, match=message):
            GLEM.from_pretrained(saved)


def _flow(**changes):
    return lambda config: config["flow"].update(changes)


def _top(**changes):
    return lambda config: config.update(changes)


def _drop(*keys):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return change


HOSTILE = {
    "absurd depth": _flow(depth=[10**9, 1]),
    "absurd width": _flow(width=[10**9, 6]),
    "absurd blocks": _flow(blocks=[10**9, 6]),
    "all at their limits": _flow(depth=[256] * 2, blocks=[64] * 2, width=[4096] * 2),
    "many levels": _flow(depth=[1] * 50, blocks=[1] * 50, width=[1] * 50),
    "negative depth": _flow(depth=[-1, 1]),
    "depth no list": _flow(depth=5),
    "depth empty": _flow(depth=[]),
    "depth of strings": _flow(depth=["8", "8"]),
    "nested depth": _flow(depth=[[[[1]]], 1]),
    "uneven lists": _flow(depth=[1, 1, 1]),
    "huge image": _flow(image_shape=[3, 10**9, 10**9]),
    "largest image": _flow(image_shape=[4096, 4096, 4096]),
    "odd image": _flow(image_shape=[1, 5, 5]),
    "image no list": _flow(image_shape="1,4,4"),
    "unknown coupling": _flow(coupling="__import__('os')"),
    "coupling list": _flow(coupling=["matexp"]),
    "bound nan": _flow(bound=math.nan),
    "bound huge": _flow(bound=10**300),
    "bound string": _flow(bound="1"),
    "rank huge": _flow(rank=10**9),
    "rank string": _flow(rank="3"),
    "actnorm list": _flow(actnorm=["element"]),
    "flow no table": _top(flow=[1, 2]),
    "flow null": _top(flow=None),
    "many classes": _top(class_ids=[str(i) for i in range(300_000)], class_names=[str(i) for i in range(300_000)]),
    "the same class often": _top(class_ids=["a"] * 150_000, class_names=["a"] * 150_000),
    "repeated pairs": _top(class_ids=[str(i // 2) for i in range(150_000)], class_names=["a"] * 150_000),
    "unhashable classes": _top(class_ids=[["a"], ["b"], ["c"]]),
    "numbered classes": _top(class_ids=[0, 1, 2]),
    "classes no list": _top(class_names="abc"),
    "fewer names": _top(class_names=["a", "b"]),
    "modes huge": _top(modes_rank=10**12),
    "modes at the limit": _top(modes_rank=4096),
    "modes string": _top(modes_rank="2"),
    "no modes": _top(modes_rank=None),
    "psi short": _top(psi=[1, 2]),
    "psi nan": _top(psi=[math.nan, 1, 1]),
    "psi strings": _top(psi=["a", "b", "c"]),
    "psi huge": _top(psi=[1e300, 1, 1]),
    "bits huge": _top(bits=10**6),
    "bits string": _top(bits="8"),
    "bits float": _top(bits=8.5),
    "training list": _top(training=[1]),
    "future format": _top(format_version=2),
    "format string": _top(format_version="1"),
    "unknown field": _top(exec="rm -rf /"),
    "other preset": _flow(coupling="affine"),
    "other classes": _top(class_ids=["a", "b"], class_names=["a", "b"]),
    "psi true": _top(psi=[True, 0.2, 0.05]),
    "format true": _top(format_version=True),
    "bits true": _top(bits=True),
    "subnet list": _flow(subnet=["residual"]),
    "activation list": _flow(activation=["elu"]),
    "patch list": _flow(patch=[2]),
    "preset table": _flow(preset={"a": 1}),
    "preset that clears the screen": _flow(preset="\x1b[2J"),
    "class that clears the screen": _top(class_names=["\x1b[2J", "b", "c"]),
    "class that UTF-8 can't hold": _top(class_ids=["\ud800", "b", "c"]),
    "class with a line break": _top(class_ids=["a\nb", "b", "c"]),
    "class without end": _top(class_ids=["a" * 2000, "b", "c"]),
    "record that clears the screen": _top(training={"data": "\x1b[2J"}),
    "record with such a name": _top(training={"\x00": 1}),
    "record that UTF-8 can't hold": _top(training={"a": [{"b": "\udfff"}]}),
    "record that is not finite": _top(training={"loss": math.nan}),
    "record that is deep": _top(training=functools.reduce(lambda inner, _: {"a": inner}, range(100), {})),
    "identity with a depth": lambda c: c["flow"].update(coupling="identity"),
    "no flow": _drop("flow"),
    "no format": _drop("format_version"),
    "no depth": _drop("flow", "depth"),
    "no coupling": _drop("flow", "coupling"),
    "everything at its limit": lambda c: (
        c["flow"].update(image_shape=[4096, 4096, 4096], width=[4096, 4096]),
        c.update(
            modes_rank=4096, class_ids=[str(i) for i in range(200_000)], class_names=[str(i) for i in range(200_000)]
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configs_are_refused_quickly(saved: Path, name: str) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    HOSTILE[name](config)
    path.write_text(json.dumps(config))
    began = time.perf_counter()
    with pytest.raises(ModelFileError):
        GLEM.from_pretrained(saved)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b"{'flow': 1}",
        b'"' + b"a" * 1000,
        b"NaN",
    ],
)
def test_configs_that_are_no_json_tables_are_refused(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match="config.json"):
        GLEM.from_pretrained(saved)


def test_a_name_given_twice_is_refused(saved: Path) -> None:
    """Which of the two counts would depend on who reads it."""
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"bits": 8', '"bits": 8, "bits": 5'))
    with pytest.raises(ModelFileError, match="config.json: it gives 'bits' twice"):
        GLEM.from_pretrained(saved)


def test_what_could_not_be_loaded_is_not_saved(saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = GLEM.from_pretrained(saved)
    for training in ({"data": "\ud800"}, {"data": "\x1b[2J"}):
        model.config.training = training
        with pytest.raises(ModelFileError, match="can't be saved"):
            model.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_variances_that_are_not_positive_are_refused(tmp_path: Path, saved: Path) -> None:
    plain = tiny_model(psi=None)
    plain.save(tmp_path / "plain")
    assert GLEM.from_pretrained(tmp_path / "plain", check=True).gaussians.psi is None
    for folder, name, value in (
        (tmp_path / "plain", "gaussians.s", 0.0),
        (tmp_path / "plain", "gaussians.s", -0.3),
        (saved, "modes.scales", -1.0),
        (saved, "modes.rest", -1e-3),
    ):
        whole = (folder / "model.safetensors").read_bytes()
        state = load_file(folder / "model.safetensors")
        state[name].reshape(-1)[0] = value
        save_file(state, folder / "model.safetensors")
        with pytest.raises(ModelFileError, match=name):
            GLEM.from_pretrained(folder)
        (folder / "model.safetensors").write_bytes(whole)
    # A variance can vanish in float32 though all numbers of psi are positive.
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "psi": [1e-40, 1.0, 1e-45]}))
    with pytest.raises(ModelFileError, match="variances"):
        GLEM.from_pretrained(saved)


@pytest.mark.parametrize("preset", ["mef_tiny", "glow_tiny"])
def test_a_flow_that_cannot_be_inverted_is_found_when_asked(tmp_path: Path, preset: str) -> None:
    model = tiny_model(preset)
    model.save(tmp_path)
    GLEM.from_pretrained(tmp_path, check=True)
    for name, value in model.state_dict().items():
        if name.endswith("log_scale"):
            value.fill_(100.0)
    model.save(tmp_path)
    GLEM.from_pretrained(tmp_path)  # finite weights
    with pytest.raises(ModelFileError, match="can't be inverted"):
        GLEM.from_pretrained(tmp_path, check=True)


def test_every_tensor_of_a_loaded_model_comes_from_the_file(tmp_path: Path) -> None:
    """Models are built without memory and filled; nothing may be left that was neither."""
    for preset in ("mef_tiny", "glow_tiny", "identity"):
        tiny_model(preset).save(tmp_path)
        model = GLEM.from_pretrained(tmp_path)
        stored = set(load_file(tmp_path / "model.safetensors"))
        assert {name for name, _ in [*model.named_parameters(), *model.named_buffers()]} == stored
        for module in model.modules():
            assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]


def test_a_huge_config_is_not_even_read(saved: Path) -> None:
    with open(saved / "config.json", "wb") as file:
        file.truncate(2**40)  # sparse
    began = time.perf_counter()
    with pytest.raises(ModelFileError, match=f"{2**40} bytes"):
        GLEM.from_pretrained(saved)
    assert time.perf_counter() - began < 1


def test_a_config_without_optional_numbers_still_loads(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["flow"]["rank"], config["training"]
    (saved / "config.json").write_text(json.dumps(config))
    assert GLEM.from_pretrained(saved).num_classes == 3


def test_repr_needs_no_preset_name(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["flow"]["preset"]
    (saved / "config.json").write_text(json.dumps(config))
    assert "1x4x4" in repr(GLEM.from_pretrained(saved))


@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_save_leaves_the_old_files_whole(saved: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Whichever of the two files the disk has no room for, the old pair stays a pair."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    other = tiny_model(shape=(1, 4, 4), classes=("x", "y"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space") as caught:
        other.save(saved)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and str(saved) in str(caught.value)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert GLEM.from_pretrained(saved).num_classes == 3


def test_a_training_record_that_is_no_json_is_refused_before_anything_is_written(saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = tiny_model(classes=("x", "y"))
    for bad in (math.nan, object()):
        model.config.training = {"bits": bad}
        with pytest.raises((TypeError, ValueError)):
            model.save(saved)
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_saving_onto_a_file_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        tiny_model().save(tmp_path / "file")


@pytest.mark.skipif(not bundled_models(), reason="no bundled models in this checkout")
def test_bundled_models_classify_and_invert(bundled_test) -> None:
    for name in bundled_models():
        model = GLEM.from_pretrained(f"bundled:{name}")
        if model.image_shape != tuple(bundled_test.image_shape):
            continue
        x, y = bundled_test.tensor()[::4], torch.as_tensor(bundled_test.targets)[::4]
        assert (model.predict(x) == y).float().mean() > 0.85
        assert float(model.bits_per_dim(x, y).mean()) < 4
        report = model.check_invertibility(x)
        assert report["within_half_step"] >= 0.9999 and report["non_finite"] == 0
