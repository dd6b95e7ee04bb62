"""Model folders: written atomically, validated on load, and folders of the first format still load."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import images, tiny_model
from safetensors.torch import load_file, save_file

from glem_augment import GLEM
from glem_augment.codec.pixel_range import UINT8
from glem_augment.errors import ModelFileError
from glem_augment.model.files import WEIGHTS, bundled_models, local_folder, stored, weights_sha256

BEFORE = Path(__file__).parent / "before"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model()
    model.fit_modes((images(12), torch.arange(12) % 3), rank=2)
    model.save(tmp_path / "model")
    return tmp_path / "model"


# ---- files that load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in BEFORE.iterdir()))
def test_files_written_before_still_mean_the_same(name: str, tmp_path: Path) -> None:
    """Models saved by version 0.1.0 before its code was cut into rooms, with the numbers that it computed from them."""
    model, wanted = GLEM.from_pretrained(BEFORE / name), load_file(BEFORE / name / "expected.safetensors")
    assert model.classes == ["cat", "dog", "ant"] and model.config.training["held_out"] == {"accuracy": 0.5}
    z, logdet = model.encode(wanted["images"])
    y, generator = torch.arange(9) % 3, torch.Generator().manual_seed(2)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(z, wanted["latents"])
    close(logdet, wanted["log_det"])
    close(model.log_prob_per_class(wanted["images"], torch.Generator().manual_seed(0)), wanted["log_prob"])
    close(model.decode(wanted["latents"] * 0.9), wanted["decoded"])
    close(model.sample_latents(y, 0.8, generator, source="rfcm"), wanted["rfcm"])
    model.save(tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (BEFORE / name / file).read_bytes()


@pytest.mark.parametrize(("preset", "psi"), [("mef_tiny", (0.5, 0.2, 0.05)), ("glow_tiny", None), ("identity", None)])
def test_save_and_load_give_the_same_bits(tmp_path: Path, preset: str, psi: Any) -> None:
    model = tiny_model(preset, psi=psi)
    if preset != "glow_tiny":
        model.fit_modes((images(12), torch.arange(12) % 3), rank=5)  # more than four images have
    model.config.training = {"note": "é", "numbers": [1, 2.5]}
    model.latent_classes.temperature = 3.25
    model.save(tmp_path / "m")
    loaded = GLEM.from_pretrained(tmp_path / "m")
    assert loaded.config == model.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert stored(model.config, state).keys() == load_file(tmp_path / "m" / "model.safetensors").keys()
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in model.state_dict().items())
    x = images()
    assert torch.equal(loaded.log_prob(x), model.log_prob(x)) and torch.equal(loaded.posterior(x), model.posterior(x))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert weights_sha256(loaded) == weights_sha256(model) != weights_sha256(tiny_model())


def test_half_precision_weights_and_configs_without_optional_fields_are_read(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    del config["flow"]["rank"], config["flow"]["preset"], config["training"]
    (saved / "config.json").write_text(json.dumps(config))
    model = GLEM.from_pretrained(saved)
    assert model.gaussians.mu.dtype == torch.float32 and "1x4x4" in repr(model)
    assert model.check_invertibility(images())["within_half_step"] == 1


def test_the_flow_of_clothes_classifies_and_inverts(bundled_test) -> None:
    model = GLEM.from_pretrained("bundled:fashion-mnist")
    x, y = bundled_test.tensor()[::25], torch.as_tensor(bundled_test.targets)[::25]
    assert (model.predict(x) == y).float().mean() > 0.85
    assert float(model.bits_per_dim(x, y).mean()) < 4
    report = model.check_invertibility(x)
    assert report["within_half_step"] >= 0.9999 and report["non_finite"] == 0
    # Images unlike the training data ask for float64.
    board = ((torch.arange(28)[:, None] + torch.arange(28)) % 2 * 255).expand(1, 1, 28, 28)
    odd = torch.cat([torch.randint(0, 256, (2, 1, 28, 28)), board, 255 - x[:2].long()]).to(torch.uint8)
    assert model.round_trip_error(odd).amax() > 0.5 and model.double().round_trip_error(odd).amax() < 0.01


@pytest.mark.parametrize("name", ["bundled:cifar10", "bundled:imagenette"])
def test_a_flow_of_colour_knows_its_own_samples(name: str) -> None:
    model = GLEM.from_pretrained(name)
    y = torch.arange(10).repeat(3)
    x = UINT8.from_floats(model.sample(y, 0.8, torch.Generator().manual_seed(0), "rfcm"))
    assert (model.predict(x) == y).float().mean() > 0.7 and x.unique().numel() > 200
    assert isinstance(model.config.training["adapt"], dict)  # so `fit_modes` fits the Gaussians again, too
    found = model.check_invertibility(x)
    assert found["flow_error"] < 1e-4 and found["psnr"] > 24


def test_the_bundled_flows_are_small() -> None:
    files = [folder / WEIGHTS for name in bundled_models() if (folder := local_folder(f"bundled:{name}"))]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 8 * 2**20 and sum(sizes) <= 33 * 2**20


# ---- files that do not -----------------------------------------------------------------------------------------------


def test_missing_folders_and_files_say_what_is_there(tmp_path: Path, saved: Path) -> None:
    for name in (tmp_path / "nowhere", "bundled:mnist", "bundled:../../tests", saved / "config.json"):
        with pytest.raises(ModelFileError, match=Path(name).name.removeprefix("bundled:")):
            GLEM.from_pretrained(name)
    with pytest.raises(ModelFileError, match="'main'"):
        GLEM.from_pretrained(saved, revision="main")
    run = saved.parent / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ModelFileError, match="--resume"):
        GLEM.from_pretrained(run)
    for name in ("model.safetensors", "config.json"):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(ModelFileError, match=f"no {name}"):
            GLEM.from_pretrained(saved)
        (saved / name).write_bytes(content)


def test_truncated_and_foreign_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    lengths = (0, 7, 9, 100, len(whole) // 2, len(whole) - 1)
    for content in [*(whole[:length] for length in lengths), whole + b"x", b"PK\x03\x04" * 50, b"\xff" * 64]:
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="model.safetensors"):
            GLEM.from_pretrained(saved)


def test_tensors_that_do_not_fit_the_config_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    state = load_file(path)
    mu = "gaussians.mu"
    flag = next(k for k, v in state.items() if v.dtype == torch.bool)
    nan = state[mu].clone()
    nan[-1, -1] = math.nan
    for name, change in (
        (mu, None),
        ("extra", torch.zeros(3)),
        (mu, state[mu][:2]),
        (mu, nan),
        (mu, state[mu].double() + 1e300),
        (flag, state[flag].float()),
        ("modes.scales", -state["modes.scales"]),
        ("modes.rest", state["modes.rest"] - 1e3),
    ):
        changed = {k: v.contiguous() for k, v in {**state, name: change}.items() if v is not None}
        save_file(changed, path)
        with pytest.raises(ModelFileError, match=name):
            GLEM.from_pretrained(saved)


HOSTILE = (
    {"flow": dict(depth=[256] * 2, blocks=[64] * 2, width=[4096] * 2)},  # all at their limits
    dict(modes_rank=4096),
    *(dict(posterior_temperature=t) for t in (0, 1e5, 10**400, True, "2", [2.0])),
    dict(class_names=True),
    dict(psi=[1, 2]),
    dict(pixel_range={"dtype": "uint8"}),
    dict(exec="rm -rf /"),
)


def test_configs_that_do_not_fit_the_weights_are_refused(saved: Path) -> None:
    path = saved / "config.json"
    whole = path.read_text()
    config = json.loads(whole)
    for changes in HOSTILE:
        path.write_text(json.dumps({**config, **changes, "flow": {**config["flow"], **changes.get("flow", {})}}))
        with pytest.raises(ModelFileError):
            GLEM.from_pretrained(saved)
    for content in (b"", b"null", b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="config.json"):
            GLEM.from_pretrained(saved)
    path.write_text(whole.replace('"bits": 8', '"bits": 5, "bits": 8'))
    with pytest.raises(ModelFileError, match="key is there twice"):
        GLEM.from_pretrained(saved)
    path.write_text(whole.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ModelFileError, match="config.json"):
        GLEM.from_pretrained(saved)
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(ModelFileError, match="config.json"):
        GLEM.from_pretrained(saved)


# ---- saves that fail -------------------------------------------------------------------------------------------------


def test_what_could_not_be_loaded_is_not_saved(saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = GLEM.from_pretrained(saved)
    for training in ({"data": "\ud800"}, {"bits": math.nan}, {"bits": object()}):
        model.config.training = training
        with pytest.raises((TypeError, ValueError)):
            model.save(saved)
    with pytest.raises(OSError, match="config.json"):
        tiny_model().save(saved / "config.json")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


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

    other = tiny_model(classes=("x", "y"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        other.save(saved)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and str(saved) in str(caught.value)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
