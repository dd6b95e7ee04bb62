"""Models on the Hub, through the real client, against a server on the loopback interface."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import model_cases
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, file_download
from PIL import Image
from safetensors.torch import save as safetensors_bytes

import glem_augment
from glem_augment import GLEM, HubError, ModelFileError, SyntheticDataset
from glem_augment.cli import main
from glem_augment.codec.published import TAESD
from glem_augment.hub import HubName, hub_errors
from glem_augment.hub.cards import CardFacts, model_card, trained_on
from glem_augment.model.config import MAX_CONFIG_BYTES, data_name, data_names
from glem_augment.model.weights import CONFIG, WEIGHTS

BUNDLED = Path(glem_augment.__file__).parent / "bundled" / "models"
TOKEN, READER = "hf_writer", "hf_reader"
Pushed = tuple[HubServer, GLEM, str]
# The second name is that of versions before 1.
close_session = getattr(huggingface_hub.utils, "close_session", None) or huggingface_hub.utils.reset_sessions


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A new Hub for each test; the client's settings are as if read from the environment at its import."""
    hub = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # which has a copy of it before version 1
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.utils.disable_progress_bars()
    close_session()
    yield hub
    hub.close()
    close_session()


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


def refused(*words: str, name: str = "org/flow", **options: object) -> None:
    """Loading fails with one HubError of one line that holds the words and no secret."""
    with pytest.raises(HubError) as caught:
        GLEM.from_pretrained(name, **options)
    text = str(caught.value)
    for word in (*words, name.split("@")[0].removeprefix("hf-hub:")):
        assert word in text, text
    assert "\n" not in text and "hf_" not in text


@pytest.fixture
def pushed(server: HubServer, tmp_path: Path) -> Pushed:
    """A server with one model in org/flow, the model, and its commit."""
    model = tiny_model()
    return server, model, server.put("org/flow", files_of(model, tmp_path / "pushed"))


# ---- push and pull -----------------------------------------------------------------------------------------------


def test_what_is_pulled_is_what_was_pushed(server: HubServer, tmp_path: Path) -> None:
    model = tiny_model(data="private/photos", images=120, held_out={"val_accuracy": 0.5, "val_bits_per_dim": 4.25})
    commit = model.push_to_hub("org/flow", license="mit", commit_message="First")
    repo = server.repo("org/flow")
    tree = repo.commits[commit.oid]
    assert sorted(tree) == [".gitattributes", "README.md", CONFIG, WEIGHTS, "samples.png"] and not repo.private
    assert repo.messages[1:] == [(commit.oid, "First")]
    assert Image.open(io.BytesIO(tree["samples.png"])).size == (8 * 10 + 2, 3 * 10 + 2)
    pulled = GLEM.from_pretrained("org/flow")
    assert same(pulled, model) and pulled.config == model.config
    assert pulled.origin == f"org/flow@{commit.oid}" and model.origin is None
    pulled.save_pretrained(tmp_path / "again")  # the Hub's word for save
    assert same(GLEM.from_pretrained(tmp_path / "again"), model)
    assert not pulled.training and not any(p.requires_grad for p in pulled.parameters())


def test_pinned_and_updated(pushed: Pushed, tmp_path: Path) -> None:
    server, old, first = pushed
    new = tiny_model(1)
    assert same(GLEM.from_pretrained("org/flow"), old)
    second = new.push_to_hub("org/flow", license="mit", samples=False).oid
    assert same(GLEM.from_pretrained("org/flow"), new)
    repo = server.repo("org/flow")
    repo.tags["v1.0"] = repo.refs["old/one"] = first
    for name, revision in ((f"org/flow@{first}", None), ("hf-hub:org/flow", "v1.0"), ("org/flow@old/one", "old/one")):
        pinned = GLEM.from_pretrained(name, revision=revision)
        assert same(pinned, old) and pinned.origin == f"org/flow@{first}"
    server.requests.clear()
    assert same(GLEM.from_pretrained(f"org/flow@{second}"), new) and not server.requests
    assert same(GLEM.from_pretrained("org/flow", cache_dir=tmp_path / "elsewhere"), new)
    assert (tmp_path / "elsewhere" / "models--org--flow").is_dir()


def test_a_folder_wins_over_a_name_of_the_same_spelling(
    pushed: Pushed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, remote, commit = pushed
    monkeypatch.chdir(tmp_path)
    local = tiny_model(7)
    local.save("org/flow")
    assert same(GLEM.from_pretrained("org/flow"), local) and not server.requests
    for name in ("hf-hub:org/flow", f"org/flow@{commit}"):
        assert same(GLEM.from_pretrained(name), remote)


def test_bad_names_and_revisions(server: HubServer) -> None:
    for name in ("./org/flow", "a/b/c", "flow", "org/flow@", "~/flow", "org\\flow", Path("org/flow")):
        with pytest.raises(ModelFileError, match="no model at"):  # no name on the Hub, so a folder
            GLEM.from_pretrained(name)
    for name in ("hf-hub:", "hf-hub:a/b/c", "hf-hub:org/flow@", "hf-hub:org/fl ow"):
        with pytest.raises(HubError, match="hf-hub:org/name"):
            GLEM.from_pretrained(name)
    with pytest.raises(ModelFileError, match="different revisions"):
        GLEM.from_pretrained("org/flow@a", revision="b")
    refused("is no name of a repository", name="org/flow--x")
    assert not server.requests


# ---- without the network -----------------------------------------------------------------------------------------


def test_offline_from_the_cache(pushed: Pushed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server, model, commit = pushed
    GLEM.from_pretrained("org/flow")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    server.requests.clear()
    for name in ("org/flow", f"org/flow@{commit}"):
        assert same(GLEM.from_pretrained(name), model)
    refused("not in the cache", "HF_HUB_OFFLINE", cache_dir=tmp_path / "empty")
    refused("v9", "HF_HUB_OFFLINE", "no folder", name="org/flow@v9")
    with pytest.raises(HubError, match="offline mode"):
        model.push_to_hub("org/flow", license="mit", samples=False)
    assert not server.requests


def test_a_hub_that_is_down(pushed: Pushed, caplog: pytest.LogCaptureFixture) -> None:
    server, model, _ = pushed
    GLEM.from_pretrained("org/flow")
    with server.faulty("org/flow", 503):
        assert same(GLEM.from_pretrained("org/flow"), model)
    assert "using the cache" in caplog.text
    server.close()
    close_session()
    assert same(GLEM.from_pretrained("org/flow"), model)
    refused("can't be had", "HF_ENDPOINT", "no folder 'org/other'", name="org/other")
    with pytest.raises(HubError, match="can't be had"):
        model.push_to_hub("org/flow", license="mit", samples=False)


@pytest.mark.parametrize("broken", [f"HEAD .*{CONFIG}", f"HEAD .*{WEIGHTS}", f"GET .*{WEIGHTS}"])
def test_an_update_that_fails_leaves_the_earlier_model_for_offline_use(
    pushed: Pushed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    server, old, _ = pushed
    GLEM.from_pretrained("org/flow")
    files = files_of(tiny_model(1), tmp_path / "new")
    second = server.put("org/flow", {**files, CONFIG: files[CONFIG] + b"\n"})
    with server.faulty(broken, 403):
        refused("403")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert same(GLEM.from_pretrained("org/flow"), old)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    assert GLEM.from_pretrained("org/flow").origin == f"org/flow@{second}"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [(WEIGHTS, "corrupt", "damaged"), (WEIGHTS, "short", "onsistency check failed"), (CONFIG, "short", "")],
)
def test_a_damaged_download_is_never_loaded(pushed: Pushed, file: str, change: str, words: str) -> None:
    server, model, _ = pushed
    with server.faulty(f"GET .*{file}", change=change):
        refused(words)
    assert not list(Path(constants.HF_HUB_CACHE).rglob(file))
    assert same(GLEM.from_pretrained("org/flow"), model)


# ---- what the Hub answers ----------------------------------------------------------------------------------------


def test_repositories_without_a_model_that_can_be_read(pushed: Pushed, tmp_path: Path) -> None:
    server, model, _ = pushed
    refused("404", server.endpoint, "hf auth login", "no folder 'org/nothing' here, and http", name="org/nothing")
    refused("org/flow@v9", "Invalid rev id: v9", name="org/flow@v9")
    server.put("org/bare", {WEIGHTS: b"x" * 1000})
    refused("holds no model of glem-augment", CONFIG, name="org/bare")
    server.put("org/bert", {CONFIG: b'{"model_type": "bert"}', WEIGHTS: b"x" * 1000})
    refused("no config of glem-augment", "model_type", name="org/bert")
    server.put("org/half", {CONFIG: files_of(model, tmp_path / "half")[CONFIG]})
    refused("holds no model of glem-augment", WEIGHTS, name="org/half")
    files = files_of(model, tmp_path / "new")
    newer = json.dumps({**json.loads(files[CONFIG]), "format_version": 2, "new_field": 1}).encode()
    commit = server.put("org/new", {**files, CONFIG: newer})
    refused("format_version 2", "pip install -U glem-augment", commit, name="org/new")
    assert not any(WEIGHTS in path and "half" not in path for _, path in server.requests)
    server.put("org/huge", {**files, CONFIG: b" " * (MAX_CONFIG_BYTES + 1)})
    refused("larger than", name="org/huge")


def test_access(pushed: Pushed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server, model, _ = pushed
    refused("Invalid credentials", "a token with access", token="hf_invented")
    with server.faulty("GET .*safetensors", 403):
        refused("403", "a token with access")
    server.repo("org/flow").gated = True
    assert same(GLEM.from_pretrained("org/flow"), model)
    for token in (READER, False):
        refused("Access to model org/flow is restricted", token=token, cache_dir=tmp_path / "a")
    model.push_to_hub("org/secret", private=True, license="mit", samples=False)
    assert server.repo("org/secret").private
    monkeypatch.delenv("HF_TOKEN")
    refused("not found", name="org/secret")
    assert same(GLEM.from_pretrained("org/secret", token=READER), model)
    Path(constants.HF_TOKEN_PATH).write_text(READER)  # as `hf auth login` leaves it
    assert same(GLEM.from_pretrained("org/secret", cache_dir=tmp_path / "b"), model)
    refused("not found", name="org/secret", token=False, cache_dir=tmp_path / "c")


def test_secrets_are_taken_out_of_messages(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sent b'Bearer SECRET\\n' with hf_SECRET to http://me:SE@CRET@host/x?Signature=SECRET and\nmore"
    with pytest.raises(HubError) as caught, hub_errors(HubName("org/flow")):
        raise RuntimeError(said)
    text = str(caught.value)
    assert "SECRET" not in text and "CRET" not in text and "http://host/x and more" in text
    secret = server.endpoint.replace("://", "://me:PASSWORD@")
    monkeypatch.setattr(constants, "ENDPOINT", secret)
    with pytest.raises(HubError) as caught:
        GLEM.from_pretrained("org/flow")
    assert server.endpoint in str(caught.value) and "PASSWORD" not in str(caught.value)


# ---- pushing -----------------------------------------------------------------------------------------------------


def test_refused_pushes_change_nothing(pushed: Pushed, monkeypatch: pytest.MonkeyPatch) -> None:
    server, model, _ = pushed

    def push(words: str, **options: object) -> None:
        with pytest.raises(HubError, match=words) as caught:
            model.push_to_hub("org/flow", samples=False, **{"license": "mit", **options})
        assert "org/flow" in str(caught.value) and "hf_" not in str(caught.value)

    push("write access.*a token with access", token=READER)
    push("401.*a token with access", token="hf_invented")
    push("license", license="gpl-17")  # as the Hub judges it
    with server.faulty("PUT /lfs/", 403):
        push("403")
    with server.faulty("POST .*/commit/", 500):
        push("500")
    monkeypatch.delenv("HF_TOKEN")
    push("401")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    broken = tiny_model()
    broken.gaussians.mu[0, 0] = float("nan")
    with pytest.raises(ModelFileError, match="gaussians.mu.*finite"):
        broken.push_to_hub("org/flow", license="mit")
    with monkeypatch.context() as patch:
        patch.setattr("glem_augment.hub.upload", None)  # these are refused before a repository is made
        with pytest.raises(ValueError, match="metrics"):
            model.push_to_hub("org/new", license="mit", metrics=[{"loss": 1.0}])
        with pytest.raises(ValueError, match="give license='other'"):
            model.push_to_hub("org/new", license="mit", license_name="mine")
    assert len(server.repo("org/flow").commits) == 2
    server.requests.clear()
    for name in ("org/flow--x", "a/b/c", "org/flow.git", "org/flow@v1", "hf-hub:org/flow", ""):
        with pytest.raises(HubError, match="no name"):
            model.push_to_hub(name, license="mit")
    assert not server.requests


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_private_files_never_go_to_a_public_repository(server: HubServer, kind: str) -> None:
    thing = tiny_model() if kind == "model" else SyntheticDataset(tiny_model(), per_class=1)
    for name, private in (("org/open", False), ("org/shut", True)):
        server.repo(name, kind, private=private)
        with pytest.raises(HubError, match=f"exists and is {'private' if private else 'public'}"):
            thing.push_to_hub(name, private=not private, license="mit")
        assert not any("commit" in path or "lfs" in path for _, path in server.requests)
    assert thing.push_to_hub("org/shut", private=True, license="mit").oid


def test_a_push_to_a_new_branch_leaves_main_as_it_is(pushed: Pushed) -> None:
    server, old, first = pushed
    new = tiny_model(1)
    commit = new.push_to_hub("org/flow", revision="next", license="mit", samples=False)
    assert server.repo("org/flow").refs == {"main": first, "next": commit.oid}
    for revision, model in (("main", old), ("next", new)):
        assert same(GLEM.from_pretrained("org/flow", revision=revision), model)


def test_a_card_written_by_hand_is_kept(server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()

    def push(license: str) -> bytes:  # noqa: A002
        commit = model.push_to_hub("org/flow", license=license, samples=False)
        return server.repo("org/flow").commits[commit.oid]["README.md"]

    assert b"license: mit" in push("mit") and b"license: apache-2.0" in push("apache-2.0")
    huggingface_hub.hf_hub_download("org/flow", "README.md")  # an older card in the user's cache is not believed
    edited = server.put("org/flow", {"README.md": b"---\nlicense: mit\n---\nMine.\n"})
    for method in ("HEAD", "GET"):
        with server.faulty(f"{method} .*README", 403), pytest.raises(HubError, match="403"):
            push("mit")
    assert server.repo("org/flow").refs["main"] == edited and "written by hand" not in caplog.text
    assert push("apache-2.0") == b"---\nlicense: mit\n---\nMine.\n"
    assert "written by hand" in caplog.text


# ---- the card ----------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_known() -> None:
    config, held_out = (
        {"objective": "hybrid", "beta": 0.3, "epochs": 5},
        {"val_accuracy": 0.75, "val_bits_per_dim": 4.25},
    )
    model = tiny_model(data="private/photos", images=1200, config=config, held_out={**held_out, "val_images": 60})
    measured = {"data": "bundled:fashion-mnist", "split": "test", "n": 100, "accuracy": 0.5, "fid": 12.5, "bits": 8}
    metrics = [measured, {**measured, "accuracy": 0.25}]
    facts = CardFacts("other", "Photo licence", "https://example.com/l", "org/photos", metrics)
    for bad in ({"loss": 1.0}, {"accuracy": 0.5, "bits": 5}):  # not written by glem eval; of 5 bits
        with pytest.raises(ValueError):
            model_card(model, "org/flow", CardFacts(metrics=[bad]))
    text = str(model_card(model, "org/flow", facts))
    card = ModelCard(text)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("glem-augment", "unconditional-image-generation")
    assert (data["license"], data["license_name"], data["datasets"]) == ("other", "Photo licence", ["org/photos"])
    assert "data-augmentation" in data["tags"] and "mef_tiny" in data["tags"]
    assert {(r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("train (held out)", "accuracy", 0.75),
        ("train (held out)", "bits_per_dim", 4.25),
        ("test", "accuracy", 0.5),
        ("test", "fid", 12.5),
        ("test", "accuracy", 0.25),
    }
    for words in ("objective hybrid, epochs 5, beta 0.3", "Photo licence (other) ([text](https://example.com/l))"):
        assert words in text
    assert "private" not in text


def test_data_are_named_without_their_folders() -> None:
    for spec, name in (
        ("private/me@there.example/flowers", "flowers"),
        ("wds/@sets/shards", "shards"),
        ("torch/cifar10@private/me", "cifar10"),
        ("hfds/ylecun/mnist?input_key=img", "mnist"),
        ("sets/a@2x.tar", "a@2x.tar"),
        ("bundled:fashion-mnist", "fashion-mnist"),
        ("", "unknown data"),
    ):
        assert data_name(spec) == name
    assert data_names({"data": "photos", "adapted_from": {"training": {}}}) == ["photos"]  # nothing was trained before
    assert data_names({}) == ["data that its record does not name"]
    once = {"data": "photos", "adapted_from": {"training": {"data": "private/large"}}}
    assert trained_on(data_names({"adapted_from": {"training": once}})) == (
        "large, then adapted to photos, then adapted to data that its record does not name"
    )


def test_the_card_of_a_flow_that_was_made_from_another(server: HubServer) -> None:
    model = tiny_model()
    assert "base_model" not in model_card(model, "org/flow").data.to_dict()
    model.push_to_hub("org/flow", license="mit", samples=False)
    x, y = torch.randint(0, 255, (6, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1, 1])
    adapted = GLEM.from_pretrained("org/flow").adapt((x, y), classes=["bee", "owl"], progress=False)
    for flow in (adapted, adapted.adapt((x, y), classes=["yes", "no"], progress=False)):
        card = model_card(flow, "org/mine")
        assert card.data.base_model == "org/flow" and card.data.license is None
        assert "For other classes, adapt it (`glem fit`)" in card.text
    model.config.training = {"init_from": {"origin": "org/flow@abc", "weights_sha256": ""}}  # glem train --init
    assert model_card(model, "org/mine").data.base_model == "org/flow"
    model.config.training = {"init_from": {"origin": "hf-hub: x\n"}}
    assert model_card(model, "org/mine").data.base_model is None


def test_the_bundled_flow_names_its_licence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundled = GLEM.from_pretrained("bundled:fashion-mnist")
    card = model_card(bundled, "org/fashion")
    assert card.data.license == "mit" and "The publisher states: mit." in card.text
    assert model_card(bundled, "org/fashion", CardFacts("cc-by-4.0")).data.license == "cc-by-4.0"
    for layout in ("imagefolder", "webdataset"):  # its samples inherit it
        drawn = SyntheticDataset(tiny_model(license="mit"), per_class=1, temperature=0)
        folder = drawn.export(tmp_path / layout, layout, progress=False)
        assert json.loads((folder / "glem-provenance.json").read_text())["license"] == "mit"
        folder = drawn.export(tmp_path / f"{layout}-cc", layout, progress=False, license="cc0-1.0")
        assert json.loads((folder / "glem-provenance.json").read_text())["license"] == "cc0-1.0"
    assert ModelCard.load(tmp_path / "webdataset" / "README.md").data.license == "mit" and not caplog.text


def test_nothing_is_invented_where_nothing_is_known(caplog: pytest.LogCaptureFixture, server: HubServer) -> None:
    card = model_card(tiny_model(), "org/flow", samples=False)
    assert not {"license", "datasets", "model-index"} & set(card.data.to_dict())
    assert "not stated" in card.text and "No measurements" in card.text and "samples.png" not in card.text
    tiny_model(data=str(Path.home() / "photos")).push_to_hub("org/flow", samples=False)
    assert "no licence is given" in caplog.text and "names the folder of the training images" in caplog.text


def test_names_of_classes_cannot_break_out_of_the_card() -> None:
    names = ["a|b", "<script>alert(1)</script>", "[x](javascript:y)", "`c`", "--- license: mit ---"]
    model = GLEM.create("identity", (1, 8, 8), names)
    model.config.training = {"data": "x\n---\nlicense: mit\n---", "held_out": {"val_accuracy": 0.5, "val_images": "|"}}
    card = ModelCard(str(model_card(model, "org/flow")))
    assert card.data.license is None
    row = next(line for line in card.text.splitlines() if line.startswith("| classes |"))
    assert "<script" not in row.replace("\\<", "") and row.count("|") - row.count("\\|") == 3
    assert not [line for line in card.text.splitlines() if line.strip() == "---"]


# ---- commands ----------------------------------------------------------------------------------------------------


def test_commands_take_names_on_the_hub(server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save(tmp_path / "flow")

    def glem(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main([str(arg) for arg in argv]) == 0
        return capsys.readouterr().out

    push = ["push", tmp_path / "flow", "flow", "--license", "mit", "--no-samples"]
    (tmp_path / "eval.json").write_text(json.dumps({"data": "photos", "split": "test", "accuracy": 0.5}))
    look = ["--metrics", tmp_path / "eval.json", "--dry-run", tmp_path / "look"]
    listed = json.loads(glem("push", tmp_path / "flow", "flow", *look))
    assert (
        "| photos, test | accuracy of the generative classifier | 50.00 % |"
        in (tmp_path / "look/README.md").read_text()
    )
    assert set(listed["files"]) == {CONFIG, WEIGHTS, "README.md", "samples.png"} == set(os.listdir(tmp_path / "look"))
    assert main([str(arg) for arg in [*push, "--dry-run", tmp_path / "look"]]) == 2  # nothing is written over
    assert not server.repos
    out = json.loads(glem(*push, "--private", "--message", "Mine"))
    repo = server.repo("org/flow")  # the full name, where the owner was left out
    assert repo.private and repo.messages[-1] == (out["commit"], "Mine")
    assert (out["repo"], out["pinned"]) == ("org/flow", f"org/flow@{out['commit']}")
    assert json.loads(glem("info", "org/flow", "--json"))["hub"] == {"repo": "org/flow", "commit": out["commit"]}
    glem("generate", out["pinned"], "--per-class", "2", "--out", tmp_path / "images", "--device", "cpu")
    assert len(list((tmp_path / "images").rglob("*.png"))) == 6
    assert main(["info", "org/nothing"]) == 2
    assert "404 for the model 'org/nothing'" in capsys.readouterr().err


# ---- autoencoders ------------------------------------------------------------------------------------------------


def autoencoder_file(seed: int) -> dict[str, bytes]:
    torch.manual_seed(seed)
    state = {name: tensor.contiguous() for name, tensor in TAESD(4, pooled=False).state_dict().items()}
    return {"taesd.safetensors": safetensors_bytes(state)}


def test_an_autoencoder_is_pulled_pinned_and_pulled_again_with_the_model(server: HubServer, tmp_path: Path) -> None:
    first = server.put("org/taesd", autoencoder_file(0))
    model = GLEM.create("identity", (3, 16, 16), ["cat", "dog"], autoencoder="hub:org/taesd")
    assert model.config.autoencoder is not None and model.config.autoencoder["name"] == f"hub:org/taesd@{first}"
    x = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    model = model.adapt((x, torch.arange(12) % 2), rank=2, progress=False)
    model.push_to_hub("org/photos", license="mit", samples=False)
    server.put("org/taesd", autoencoder_file(1))  # the model keeps what it was made with
    pulled = GLEM.from_pretrained("org/photos", cache_dir=tmp_path / "elsewhere")
    assert torch.equal(pulled.log_prob(x), model.log_prob(x))
    assert GLEM.create("identity", (3, 16, 16), ["a"], autoencoder="hub:org/taesd").config.autoencoder != (
        model.config.autoencoder
    )


def test_repositories_without_an_autoencoder_are_refused(server: HubServer) -> None:
    server.put("org/two", {**autoencoder_file(0), "other.safetensors": b"1"})
    server.put("org/none", {"taesd.safetensors": safetensors_bytes({"a": torch.zeros(1)})})
    for name, word in (
        ("org/two", "2 safetensors"),
        ("org/none", "TAESD"),
        ("org/nowhere", "404"),
        ("nowhere", "name"),
    ):
        with pytest.raises(ModelFileError, match=word):
            GLEM.create("identity", (3, 16, 16), ["a"], autoencoder=f"hub:{name}")
