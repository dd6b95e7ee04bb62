"""Published autoencoders: the TAESD family against a reference, files that lie, names, and modules of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glem_augment
from glem_augment.codec.autoencoder import StandardisedAutoencoder, latent_shape
from glem_augment.codec.published import TAESD, load_taesd, open_autoencoder
from glem_augment.errors import ModelFileError
from glem_augment.io import file_sha256

TAEF2 = Path(glem_augment.__file__).parent / "bundled" / "autoencoders" / "taef2" / "model.safetensors"


def no_hub(name: str) -> tuple[Path, str]:
    raise AssertionError("nothing is downloaded here")


def test_files_of_half_precision_give_the_same_autoencoder(tmp_path: Path) -> None:
    module, path = TAESD(4, pooled=False), tmp_path / "weights.safetensors"
    save_file({k: v.half().contiguous() for k, v in module.state_dict().items()}, path)
    model, x = load_taesd(path), torch.rand(2, 3, 16, 24)
    h = model.encode(x)
    assert h.shape == (2, 4, 2, 3) and h.dtype == torch.float32
    torch.testing.assert_close(h, module.encode(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.decode(h), module.decode(h), rtol=1e-2, atol=1e-2)


def test_taef2_ships_works_offline_and_shows_what_it_encodes() -> None:
    model, facts = open_autoencoder("taef2", no_hub)
    assert facts == {"name": "taef2", "sha256": file_sha256(TAEF2)}
    assert (TAEF2.parent / "LICENSE").read_text().startswith("MIT License")
    yy, xx = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    x = torch.stack([yy, xx, (8 * xx).sin() * 0.5 + 0.5])[None].requires_grad_()
    back = model.decode(model.encode(x))
    assert float((back - x).detach().square().mean()) < 10**-2.4  # 24 dB
    back.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert not any(p.requires_grad for p in model.parameters())


NAME = "encoder.layers.5.conv.0.weight"
CHANGES: dict[str, dict[str, Tensor | None]] = {
    "renamed": {NAME: None, "encoder.layers.5.conv.00.weight": torch.zeros(64, 64, 3, 3).half()},
    "nan": {NAME: torch.full((64, 64, 3, 3), float("nan")).half()},
}


@pytest.mark.parametrize("kind", ["truncated", "header", *CHANGES])
def test_damaged_weights_are_one_error(kind: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", TAEF2.read_bytes()
    if kind in CHANGES:
        weights = {**load_file(TAEF2), **CHANGES[kind]}
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    else:
        path.write_bytes(whole[:-100] if kind == "truncated" else (2**40).to_bytes(8, "little") + whole[8:])
    with pytest.raises(ModelFileError, match="weights.safetensors"):
        load_taesd(path)


def test_names_that_are_none_and_files_that_have_changed(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="taef2"):
        open_autoencoder("taef3", no_hub)
    with pytest.raises(ModelFileError, match="changed"):
        open_autoencoder("taef2", no_hub, sha256="0" * 64)
    path = tmp_path / "weights.safetensors"
    save_file(load_file(TAEF2), path)
    for config in ({"_class_name": "AutoencoderKL"}, {"act_fn": "silu"}, {"upsampling_scaling_factor": 4}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelFileError, match="hub:a/b is not of the TAESD family"):
            open_autoencoder("hub:a/b", lambda name: (path, f"{name}@1"))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", "act_fn": "relu"}))
    assert open_autoencoder("hub:a/b", lambda name: (path, f"{name}@1"))[1]["name"] == "hub:a/b@1"


class Halving(nn.Module):
    """An autoencoder of the user's, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        self.calls.data += 1
        return F.avg_pool2d(x, 2)

    def decode(self, h: Tensor) -> Tensor:
        return F.interpolate(h, scale_factor=2)


def test_latent_shapes_of_named_and_own_autoencoders() -> None:
    taesd, own = TAESD(4, pooled=False), Halving()
    assert latent_shape(taesd, (3, 64, 32)) == (4, 8, 4)
    assert latent_shape(own, (3, 6, 8)) == (3, 3, 4)
    assert float(own.calls.detach()) == 0  # a copy was tried
    assert latent_shape(taesd, (1, 100, 99)) == (4, 13, 13)  # sides are extended
    with pytest.raises(ValueError, match="image size"):
        latent_shape(own, (3, 7, 8))
    with pytest.raises(ValueError, match="4 channels"):
        latent_shape(taesd, (4, 64, 64))
    with pytest.raises(TypeError):
        latent_shape(nn.Identity(), (3, 64, 64))


def test_standardised_latents_have_mean_0_and_variance_1_and_exact_densities() -> None:
    codec, x = (
        StandardisedAutoencoder(Halving(), (3, 4, 4)),
        torch.rand(50, 3, 4, 4) * torch.tensor([1.0, 3.0, 9.0])[:, None, None],
    )
    codec.fit(x)
    assert codec.ready
    h = codec.encode(x)
    assert torch.allclose(h.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(h.std((0, 2, 3)), torch.ones(3), atol=1e-5)
    assert torch.allclose(codec.decode(h), F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), atol=1e-5)
    assert float(codec.logdet()) == pytest.approx(-4 * float(codec.std.log().sum()))
    before = codec.std.clone()
    codec.fit(2 * x)  # it happens once
    assert torch.equal(codec.std, before)
    assert not codec.train().training
