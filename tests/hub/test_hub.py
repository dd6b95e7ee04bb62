"""Models on the Hub, through the real client, against a server on the loopback interface."""

from __future__ import annotations

import json
import time
from pathlib import Path

import hub_server
import model_cases
import pytest
import torch
from hub_server import HubServer, close_session
from huggingface_hub import ModelCard, constants
from safetensors.torch import save as safetensors_bytes

from glem_augment import GLEM
from glem_augment.cli import main
from glem_augment.codec.published import TAESD
from glem_augment.errors import HubError, ModelFileError
from glem_augment.hub.cards import model_card, table_row
from glem_augment.model.config import data_name, data_names
from glem_augment.model.files import CONFIG, WEIGHTS

server = hub_server.server  # the fixture: a Hub on the loopback interface


def tiny_model(seed: int = 0, **training: object) -> GLEM:
    """A flow for 1x8x8 images of three classes, with every weight away from its start."""
    model = model_cases.tiny_model(shape=(1, 8, 8), classes=("cat", "dog", "ant"), seed=seed)
    model.config.training = dict(training)
    return model


def files_of(model: GLEM, folder: Path) -> dict[str, bytes]:
    model.save(folder)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def same(a: GLEM, b: GLEM) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- one round trip ----------------------------------------------------------------------------------------------


def test_push_pull_and_offline(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tiny_model(), tiny_model(1)
    old.save(tmp_path / "flow")
    assert main(["push", str(tmp_path / "flow"), "org/flow", "--license", "mit", "--private"]) == 0
    first = json.loads(capsys.readouterr().out)
    files = server.repos["org/flow"][first["commit"]]
    assert {CONFIG, WEIGHTS, "README.md", "samples.png"} <= set(files) and "org/flow" in server.private
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    server.put("org/flow", {"README.md": b"mine"})
    second = new.push_to_hub("org/flow", license="mit").oid
    assert server.repos["org/flow"][second]["README.md"] == b"mine"  # an edited card is kept
    with pytest.raises(HubError, match="private"):
        new.push_to_hub("org/flow", private=False)
    GLEM.create("identity", (5, 4, 4), ["a"]).push_to_hub("org/spectra")
    broken = tiny_model()
    broken.gaussians.mu[0, 0] = float("nan")
    with pytest.raises(ModelFileError):
        broken.push_to_hub("org/broken")
    assert "org/spectra" in server.repos and "org/broken" not in server.repos

    pulled = GLEM.from_pretrained("org/flow")
    assert same(pulled, new) and pulled.origin == f"org/flow@{second}" and old.origin is None
    server.repos["org/flow"]["v1.0"] = server.repos["org/flow"][first["commit"]]
    for name, revision in ((first["pinned"], None), ("hf-hub:org/flow", "v1.0")):
        assert same(GLEM.from_pretrained(name, revision=revision), old)
    assert same(GLEM.from_pretrained("org/flow", cache_dir=tmp_path / "elsewhere"), new)
    server.put("org/bert", {CONFIG: b'{"model_type": "bert"}', WEIGHTS: b"x" * 1000})
    with pytest.raises(HubError, match="org/bert.*model_type"):
        GLEM.from_pretrained("org/bert")
    with pytest.raises(HubError, match="404.*hf auth login"):
        GLEM.from_pretrained("org/nothing")
    with pytest.raises(ValueError, match="cc-by-4.0 or other, got 'CC BY'"):
        new.push_to_hub("org/flow", license="CC BY")

    server.close()  # no network, then none on purpose
    close_session()
    assert same(GLEM.from_pretrained("org/flow"), new)
    began = time.monotonic()
    with pytest.raises(HubError, match="no connection"):
        GLEM.from_pretrained("org/never-seen")
    assert time.monotonic() - began < 5
    with pytest.raises(HubError, match="'org/flow' was not uploaded.*HF_HUB_DISABLE_XET=1"):
        new.push_to_hub("org/flow")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    for name, model in (("org/flow", new), (first["pinned"], old)):
        assert same(GLEM.from_pretrained(name), model)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        GLEM.from_pretrained("org/other")


def test_names(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remote, local = tiny_model(), tiny_model(7)
    commit = server.put("org/flow", files_of(remote, tmp_path / "remote"))
    local.save("org/flow")
    assert same(GLEM.from_pretrained("org/flow"), local)  # a folder wins
    for name in ("hf-hub:org/flow", f"org/flow@{commit}"):
        assert same(GLEM.from_pretrained(name), remote)
    for name in ("./org/flow2", "a/b/c", "flow", "org/flow@", "~/flow", Path("org/flow2"), "hf-hub:a/b/c"):
        with pytest.raises(ModelFileError, match="no model at|hf-hub:org/name"):
            GLEM.from_pretrained(name)
    with pytest.raises(ModelFileError, match="different revisions"):
        GLEM.from_pretrained("org/flow@a", revision="b")


def test_an_autoencoder_is_pinned_and_pulled_with_the_model(server: HubServer, tmp_path: Path) -> None:
    def autoencoder(seed: int) -> dict[str, bytes]:
        torch.manual_seed(seed)
        state = {name: tensor.contiguous() for name, tensor in TAESD(4, pooled=False).state_dict().items()}
        return {"taesd.safetensors": safetensors_bytes(state)}

    first = server.put("org/taesd", autoencoder(0))
    model = GLEM.create("identity", (3, 16, 16), ["cat", "dog"], autoencoder="hub:org/taesd")
    assert model.config.autoencoder is not None and model.config.autoencoder["name"] == f"hub:org/taesd@{first}"
    x = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    model = model.adapt((x, torch.arange(12) % 2), rank=2)
    model.save(tmp_path / "photos")
    server.put("org/taesd", autoencoder(1))  # the model keeps the weights that it was made with
    assert torch.equal(GLEM.from_pretrained(tmp_path / "photos").log_prob(x), model.log_prob(x))
    server.put("org/two", {**autoencoder(0), "other.safetensors": b"1"})
    with pytest.raises(ModelFileError, match="2 safetensors"):
        GLEM.create("identity", (3, 16, 16), ["a"], autoencoder="hub:org/two")


# ---- the card and the table ----------------------------------------------------------------------------------------


def test_the_card_says_what_is_known(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    held_out = {"val_accuracy": 0.75, "val_bits_per_dim": 4.25, "val_images": 60}
    model = tiny_model(data="private/photos", images=1200, held_out=held_out, command="glem train photos")
    card = model_card(model, "org/flow", "cc-by-4.0")
    assert card.data.license == "cc-by-4.0" and {"glem-augment", "normalizing-flow"} <= set(card.data.tags)
    for words in ("75.0 %", "4.250 bits/dim", "glem train photos", "| images | photos |"):
        assert words in card.text
    assert "private" not in card.text and not caplog.text
    plain = GLEM.create("identity", (1, 8, 8), ["a|b", "<script>", "[x](javascript:y)"])
    plain.config.training = {"data": "x\n---\nlicense: mit\n---"}
    card = model_card(plain, "org/plain")
    assert card.data.license == "unknown" and "licence" in caplog.text
    assert "normalizing-flow" not in card.data.tags and "<script" not in card.text.replace("\\<", "")
    bundled = GLEM.from_pretrained("bundled:fashion-mnist")
    assert model_card(bundled, "org/fashion").data.license == "mit"
    assert table_row(bundled)["accuracy"] == "90.5 %" and "-" not in table_row(bundled).values()


def test_the_list_of_models_has_no_null(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    bundled = {f"bundled:{name}" for name in ("cifar10", "fashion-mnist", "imagenette", "photographs", "tiny-imagenet")}
    assert bundled <= {line.split()[0] for line in lines}
    assert not any("None" in line for line in lines)


def test_data_are_named_without_their_folders() -> None:
    for spec, name in (
        ("private/me@there.example/flowers", "flowers"),
        ("torch/cifar10@private/me", "cifar10"),
        ("hfds/ylecun/mnist", "mnist"),
        ("bundled:fashion-mnist", "fashion-mnist"),
        ("", "unknown data"),
    ):
        assert data_name(spec) == name
    assert data_names({}) == ["data that its record does not name"]
    once = {"data": "photos", "adapted_from": {"origin": "org/flow@abc", "training": {"data": "private/large"}}}
    assert data_names({"adapted_from": {"training": once}})[:2] == ["large", "photos"]
