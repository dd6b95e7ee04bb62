"""Jet: the flow against the published code, and files of `jet-pytorch`."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jet_pytorch import Jet
from jet_pytorch.util import bits_per_dim
from safetensors.torch import save_file

from glem_augment import GLEM, GLEMAugment, GLEMError, ModelFileError
from glem_augment.cli import main
from glem_augment.cli.info import model_facts
from glem_augment.flows import JetFlow, create_flow


def published(
    side: int = 16, couplings: int = 6, width: int = 64, blocks: int = 2, heads: int = 1, high: int = 0, **options: Any
) -> Jet:
    """A small Jet of the published code, every weight away from its start."""
    torch.manual_seed(0)
    dims = (high or side, side)
    shape = dict(patch_size=4, patch_dim=48, n_patches=dims[0] * dims[1] // 16, img_dims=dims)
    jet = Jet(**shape, coupling_layers=couplings, block_width=width, block_depth=blocks, num_heads=heads, **options)
    with torch.no_grad():
        for parameter in jet.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.03)
    return jet


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(published().state_dict(), tmp_path / "jet.safetensors")
    return tmp_path / "jet.safetensors"


def test_a_file_of_the_published_code_gives_its_latents_likelihoods_and_inverse(weights: Path) -> None:
    model, jet = GLEM.from_pretrained(f"jet:{weights}"), published()
    levels, noise = torch.randint(0, 256, (6, 3, 16, 16)), torch.rand(6, 3, 16, 16)
    with torch.no_grad():
        wanted, wanted_logdet = jet(((levels + noise) * 2 / 255 - 1).permute(0, 2, 3, 1))
        z, logdet = model.flow((levels + noise) / 256 - 0.5)
        torch.testing.assert_close(z, wanted.flatten(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logdet - 768 * math.log(512 / 255), wanted_logdet[:, 0], rtol=1e-4, atol=1e-4)
        log_prob = model.gaussians.log_prob(z)[:, 0] + logdet - 768 * math.log(256)
        bits, _, _ = bits_per_dim(wanted, wanted_logdet, 768)
        assert float(-log_prob.mean() / (768 * math.log(2))) == pytest.approx(float(bits), rel=1e-5)
        assert float((model.flow.inverse(z)[0] - ((levels + noise) / 256 - 0.5)).abs().max()) < 1e-5
    # The same through the model's own dequantisation, whose noise is another.
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        wanted, wanted_logdet = jet(((images + torch.rand(images.shape)) * 2 / 255 - 1).permute(0, 2, 3, 1))
    bits, _, _ = bits_per_dim(wanted, wanted_logdet, 768)
    assert float(model.bits_per_dim(images).mean()) == pytest.approx(float(bits), abs=2e-3)


@pytest.mark.parametrize(("high", "heads"), [(64, 1), (8, 1), (16, 4)])
def test_image_sides_are_read_and_heads_are_asked_for(high: int, heads: int, tmp_path: Path) -> None:
    path, jet = tmp_path / "jet.safetensors", published(high=high, heads=heads)
    save_file(jet.state_dict(), path)
    x = torch.rand(2, 3, high, 16)
    wanted = jet(((x - 0.5) * 512 / 255 + 1 / 255).permute(0, 2, 3, 1))[0].flatten(1).detach()
    model = GLEM.from_pretrained(f"jet:{path}", heads=heads)
    assert model.image_shape == (3, high, 16)
    torch.testing.assert_close(model.flow(x - 0.5)[0], wanted, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="heads"):
        assumed = GLEM.from_pretrained(f"jet:{path}")
    assert torch.allclose(assumed.flow(x - 0.5)[0], wanted, atol=1e-4) == (heads == 1)


def test_other_orders_of_couplings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "jet.safetensors"
    save_file(published(coupling_types=("spatial", *("channels",) * 4)).state_dict(), path)
    with pytest.raises(ModelFileError, match="the order of its couplings"):
        GLEM.from_pretrained(f"jet:{path}")
    whole = published().state_dict()
    more = torch.cat([whole["spatial_projections"]] * 2)
    shuffled = whole["spatial_projections"][:, torch.randperm(16)]
    for changed, message in ((more, "the order of its couplings"), (shuffled, "belong to no image")):
        save_file({**whole, "spatial_projections": changed}, path)
        with pytest.raises(ModelFileError, match=message):
            GLEM.from_pretrained(f"jet:{path}")


def test_patterns_beyond_the_published_six_are_checkerboards() -> None:
    jet = published(couplings=36, width=8, blocks=1)
    flow = create_flow("jet_tiny", (3, 16, 16), depth=[36], width=[8], heads=1)
    orders = [coupling.order for coupling in flow.couplings if coupling.over == "tokens"]
    assert torch.equal(torch.stack(orders), jet.spatial_projections.argmax(1))


def test_log_determinant_is_that_of_the_jacobian_and_both_memories_have_its_gradients() -> None:
    flow = create_flow("jet_tiny", (1, 8, 8), depth=[6], width=[16], heads=2).double()
    assert isinstance(flow, JetFlow)
    torch.manual_seed(1)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64) - 0.5
    z, logdet = flow(x)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[i]).reshape(64, 64)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(logdet[i].item(), abs=1e-9)
    back, back_logdet = flow.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_logdet, -logdet)
    grads = {}
    for memory in ("stored", "reversible"):
        flow.set_memory(memory)
        inputs = x.clone().requires_grad_()
        z, logdet = flow(inputs)
        grads[memory] = torch.autograd.grad((z**3).sum() - logdet.sum(), [inputs, *flow.parameters()])
    for stored, rebuilt in zip(*grads.values(), strict=True):
        torch.testing.assert_close(stored, rebuilt)


def test_the_published_size_has_the_published_parameters() -> None:
    with torch.device("meta"):
        flow = create_flow("jet_imagenet64", (3, 64, 64))
    assert sum(p.numel() for p in flow.parameters()) == 207_177_216


def test_a_jet_knows_no_classes_until_it_is_adapted(weights: Path, tmp_path: Path) -> None:
    jet = GLEM.from_pretrained(f"jet:{weights}")
    assert list(model_facts(f"jet:{weights}")["files"]) == ["jet.safetensors"]
    assert jet.classes == ["image"] and jet.sample(torch.zeros(2, dtype=torch.int64)).shape == (2, 3, 16, 16)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    assert jet.interpolate(images[:2], images[2:4], 3).shape == (2, 3, 3, 16, 16)
    labels = torch.arange(40) % 4
    adapted = jet.adapt((images, labels.numpy()), rank=4, progress=False)
    adapted.save(tmp_path / "adapted")
    again = GLEM.from_pretrained(tmp_path / "adapted")
    assert again.config.flow["coupling"] == "jet" and again.num_classes == 4
    moved, _ = GLEMAugment(again, p=1.0, seed=0)(images, labels)
    assert moved.shape == images.shape and bool((moved != images).any())


def test_an_adapted_jet_may_refer_to_the_weights(weights: Path, image_folder: Path, tmp_path: Path) -> None:
    jet, folder = GLEM.from_pretrained(f"jet:{weights}"), tmp_path / "adapted"
    images, labels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), torch.arange(12) % 3
    adapted = jet.adapt((images, labels.numpy()), rank=2, progress=False)
    adapted.save(tmp_path / "whole")
    adapted.save(folder, weights="reference")
    size = (folder / "model.safetensors").stat().st_size
    assert size < (tmp_path / "whole" / "model.safetensors").stat().st_size - sum(
        4 * p.numel() for p in jet.flow.parameters()
    )
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    text = (folder / "config.json").read_text()
    assert json.loads(text)["base"] == {"jet": str(weights), "sha256": digest} == model_facts(str(folder))["base"]
    again = GLEM.from_pretrained(folder)
    assert torch.equal(again.log_prob(images), adapted.log_prob(images))
    # It can be adapted and saved in both ways again.
    options = ["--rank", "1", "--weights", "reference", "--quiet"]
    assert main(["adapt", str(folder), str(image_folder), "--out", str(tmp_path / "third"), *options]) == 0
    assert json.loads((tmp_path / "third" / "config.json").read_text())["base"]["jet"] == str(weights)
    again.save(tmp_path / "copy")
    assert "base" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()

    with torch.no_grad():
        adapted.flow.couplings[0].net.tail.bias.add_(1e-3)
    with pytest.raises(ValueError, match="save a copy"):
        adapted.save(folder, weights="reference")
    with pytest.raises(ValueError, match="weights must be one of 'copy', 'reference'"):
        adapted.save(folder, weights="link")
    with pytest.raises(ValueError, match="this one is not"):
        GLEM.create("jet_tiny", (3, 8, 8), ["a"], depth=[1]).save(folder, weights="reference")
    assert (folder / "config.json").read_text() == text

    def changed(**values: object) -> None:
        config = {**json.loads(text), **values}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    flow = {**json.loads(text)["flow"], "depth": [2048], "blocks": [1]}
    larger = {**json.loads(text)["flow"], "image_shape": [3, 24, 24]}
    for change in (
        {"base": {"jet": str(weights), "sha256": digest[:-1] + "g"}},
        {"base": {"jet": str(folder), "sha256": digest}},
        {"base": {"jet": "x" * 5000, "sha256": digest}},
        {"base": {"jet": "x" * 900, "sha256": digest}},
        {"base": {"jet": "~nobody-here/x", "sha256": digest}},
        {"base": {"jet": "/dev/zero", "sha256": digest}},
        {"base": {"jet": str(tmp_path / "whole" / "model.safetensors"), "sha256": digest}},
        {"base": {"jet": str(weights)}},
        {"base": {"jet": 1, "sha256": digest}},
        {"base": [str(weights), digest]},
        {"base": ...},
        {"flow": flow},
        {"flow": larger},
    ):
        changed(**change)
        with pytest.raises(ModelFileError) as caught:
            GLEM.from_pretrained(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2500
    (folder / "config.json").write_text(text)
    GLEM.from_pretrained(folder)
    weights.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelFileError, match=f"stored in jet:{weights} alone, which can't be used"):
        GLEM.from_pretrained(folder)


def test_every_damaged_file_is_one_error(weights: Path, tmp_path: Path) -> None:
    data, path = weights.read_bytes(), tmp_path / "damaged.safetensors"
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    whole = published().state_dict()
    for trial in range(60):
        mutant = bytearray(data)
        if trial % 3 == 0:
            mutant = mutant[: rng.integers(0, len(mutant))]
        else:
            mutant[rng.integers(8, header)] = rng.integers(0, 256)
        path.write_bytes(mutant)
        try:
            GLEM.from_pretrained(f"jet:{path}")
        except GLEMError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        # A header may change in a place that means nothing; then the file loads.
    for change in (
        {"blocks.0.dnn.pos_emb": torch.zeros(1, 15, 64)},
        {"blocks.1.dnn.init_proj.bias": torch.full((64,), math.nan)},
        {"blocks.1.dnn.init_proj.bias": torch.zeros(65)},
        {"channel_projections": whole["channel_projections"] * 0},
        {"spatial_projections": whole["spatial_projections"][:0]},
        {"extra": torch.zeros(3)},
    ):
        save_file({name: t.contiguous() for name, t in {**whole, **change}.items()}, path)
        with pytest.raises(ModelFileError, match="damaged.safetensors"):
            GLEM.from_pretrained(f"jet:{path}")
    with pytest.raises(GLEMError):
        GLEM.from_pretrained(f"jet:{tmp_path / 'absent.safetensors'}")
