"""Models and data sets on the Hub, through the real client, against a server on the loopback interface."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image

from glem_augment import GLEM, GLEMAugment, ModelFileError, SyntheticDataset
from glem_augment.cli.main import main
from glem_augment.hub import download as _hub_remote
from glem_augment.hub import files as hub
from glem_augment.hub.cards import CardFacts, model_card
from glem_augment.hub.files import HubError
from glem_augment.model.weights import CONFIG, WEIGHTS

TOKEN, READER = "hf_writer", "hf_reader"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of its own for each test; the client's settings are as if read from the environment at its import."""
    with_client = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", with_client.endpoint)
    template = with_client.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.utils.disable_progress_bars()
    yield with_client
    with_client.close()


def tiny_model(seed: int = 0, **training: object) -> GLEM:
    """A flow for 1x8x8 images of three classes, every weight away from its start."""
    model = GLEM.create("mef_tiny", (1, 8, 8), ["cat", "dog", "ant"], depth=[1, 1], blocks=[1, 1], width=[6, 6])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.config.training = dict(training)
    return model.eval().requires_grad_(False)


def files_of(model: GLEM, folder: Path) -> dict[str, bytes]:
    model.save(folder)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def same(a: GLEM, b: GLEM) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def refused(*words: str, name: str = "org/flow", **options: object) -> str:
    """Loading fails with one HubError that holds the words and no token."""
    with pytest.raises(HubError) as caught:
        GLEM.from_pretrained(name, **options)
    text = str(caught.value)
    assert isinstance(caught.value, ModelFileError)
    for word in (*words, name.split("@")[0].removeprefix("hf-hub:")):
        assert word in text, text
    assert "hf_" not in text and "Signature" not in text
    return text


@pytest.fixture
def pushed(server: HubServer, tmp_path: Path) -> tuple[HubServer, GLEM, str]:
    """A server with one model in org/flow, the model, and its commit."""
    model = tiny_model()
    return server, model, server.put("org/flow", files_of(model, tmp_path / "pushed"))


# ---- push and pull -----------------------------------------------------------------------------------------------


def test_what_is_pulled_is_what_was_pushed(server: HubServer) -> None:
    model = tiny_model(data="private/photos", images=120, held_out={"val_accuracy": 0.5, "val_bits_per_dim": 4.25})
    commit = model.push_to_hub("org/flow", license="mit", commit_message="First")
    repo = server.repo("org/flow")
    tree = repo.commits[commit.oid]
    assert sorted(tree) == [".gitattributes", "README.md", CONFIG, WEIGHTS, "samples.png"]
    assert tree[WEIGHTS].lfs and not tree[CONFIG].lfs and not repo.private
    assert repo.messages[-1] == (commit.oid, "First") and len(repo.messages) == 2
    assert Image.open(io.BytesIO(tree["samples.png"].data)).size[0] > 100

    pulled = GLEM.from_pretrained("org/flow")
    assert same(pulled, model) and pulled.config == model.config
    assert pulled.origin == f"org/flow@{commit.oid}" and model.origin is None
    assert not pulled.training and not any(p.requires_grad for p in pulled.parameters())
    # The token goes to the Hub alone, not to the store of large files that it sends the client to.
    assert {sent for method, path, sent in server.requests if path.startswith(("/objects/", "/upload/"))} == {False}
    assert any(sent for *_, sent in server.requests)


def test_pinned_and_updated(pushed: tuple[HubServer, GLEM, str], tmp_path: Path) -> None:
    server, old, first = pushed
    new = tiny_model(1)
    assert same(GLEM.from_pretrained("org/flow"), old)
    second = new.push_to_hub("org/flow", license="mit").oid
    assert same(GLEM.from_pretrained("org/flow"), new)
    api = HfApi()
    api.create_tag("org/flow", tag="v1.0", revision=first)
    api.create_branch("org/flow", branch="old/one", revision=first)
    for name, revision in ((f"org/flow@{first}", None), ("hf-hub:org/flow", "v1.0"), ("org/flow@old/one", "old/one")):
        pinned = GLEM.from_pretrained(name, revision=revision)
        assert same(pinned, old) and pinned.origin == f"org/flow@{first}"
    # A commit that is in the cache never needs the Hub again.
    count = len(server.requests)
    assert same(GLEM.from_pretrained(f"org/flow@{second}"), new)
    assert len(server.requests) == count
    assert same(GLEM.from_pretrained("org/flow", cache_dir=tmp_path / "elsewhere"), new)
    assert (tmp_path / "elsewhere" / "models--org--flow").is_dir()


def test_both_files_come_from_one_commit(pushed: tuple[HubServer, GLEM, str], tmp_path: Path) -> None:
    """Somebody pushes a model of other classes between the two downloads."""
    server, old, first = pushed
    other = GLEM.create("mef_tiny", (1, 8, 8), ["a", "b"], depth=[1, 1], blocks=[1, 1], width=[6, 6])
    files = files_of(other, tmp_path / "other")
    answer = server.fault_of

    def push_meanwhile(method: str, target: str) -> Fault | None:
        if method == "HEAD" and WEIGHTS in target and len(server.repo("org/flow").commits) == 2:
            server.put("org/flow", files)
        return answer(method, target)

    server.fault_of = push_meanwhile  # type: ignore[method-assign]
    model = GLEM.from_pretrained("org/flow")
    assert model.origin == f"org/flow@{first}" and same(model, old)
    assert (Path(constants.HF_HUB_CACHE) / "models--org--flow" / "refs" / "main").read_text() == first
    assert GLEM.from_pretrained("org/flow").classes == ["a", "b"]


def test_a_folder_wins_over_a_name_of_the_same_spelling(
    pushed: tuple[HubServer, GLEM, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, remote, commit = pushed
    monkeypatch.chdir(tmp_path)
    local = tiny_model(7)
    local.save("org/flow")
    server.requests.clear()
    assert same(GLEM.from_pretrained("org/flow"), local)
    with pytest.raises(ModelFileError, match="no revision 'v1'"):
        GLEM.from_pretrained("org/flow", revision="v1")
    assert not server.requests
    for name in ("hf-hub:org/flow", f"org/flow@{commit}"):
        assert same(GLEM.from_pretrained(name), remote)
    with pytest.raises(ModelFileError, match="no model at"):
        GLEM.from_pretrained(Path("org/other"))


@pytest.mark.parametrize(
    "name", ["./org/flow", "a/b/c", "flow", "/org/flow", "org/flow@", "~/flow", "org\\flow", "../x"]
)
def test_what_is_no_name_on_the_hub_is_a_folder(server: HubServer, name: str) -> None:
    with pytest.raises(ModelFileError, match="no model at"):
        GLEM.from_pretrained(name)
    assert not server.requests


def test_a_file_is_no_model(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save(tmp_path / "flow")
    monkeypatch.chdir(tmp_path)
    for name in (f"flow/{WEIGHTS}", Path(f"flow/{WEIGHTS}"), str(tmp_path / "flow" / CONFIG)):
        with pytest.raises(ModelFileError, match="is a file; give its folder, '.*flow'"):
            GLEM.from_pretrained(name)
    assert not server.requests


def test_only_what_the_hub_does_not_have_may_be_a_mistyped_folder(pushed: tuple[HubServer, GLEM, str]) -> None:
    server, *_ = pushed
    server.put("org/empty", {"README.md": b"x"})
    for name in ("org/flow@v9", "org/empty", "hf-hub:org/nothing"):
        assert "no folder" not in refused(name=name)
    assert "(and there is no folder 'org/nothing' here)" in refused(name="org/nothing")


def test_bad_names_and_revisions(server: HubServer) -> None:
    for name in ("hf-hub:", "hf-hub:a/b/c", "hf-hub:org/flow@", "hf-hub:org/fl ow"):
        with pytest.raises(HubError, match="write hf-hub:org/name"):
            GLEM.from_pretrained(name)
    with pytest.raises(ModelFileError, match="different revisions"):
        GLEM.from_pretrained("org/flow@a", revision="b")
    with pytest.raises(ModelFileError, match="no revision 'b'"):
        GLEM.from_pretrained("bundled:fashion-mnist", revision="b")
    refused("is no name of a repository", name="org/flow--x")


# ---- without the network -----------------------------------------------------------------------------------------


def test_offline_from_the_cache(
    pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, model, commit = pushed
    GLEM.from_pretrained("org/flow")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    for name in ("org/flow", f"org/flow@{commit}"):
        assert same(GLEM.from_pretrained(name), model)
    refused("not in the cache", "HF_HUB_OFFLINE", cache_dir=tmp_path / "empty")
    refused("v9", "HF_HUB_OFFLINE", name="org/flow@v9")
    with pytest.raises(HubError, match="offline mode"):
        model.push_to_hub("org/flow", license="mit", samples=False)
    assert not server.requests


def test_an_unreachable_hub(pushed: tuple[HubServer, GLEM, str], caplog: pytest.LogCaptureFixture) -> None:
    server, model, _ = pushed
    GLEM.from_pretrained("org/flow")
    server.close()
    huggingface_hub.utils.close_session() if hasattr(huggingface_hub.utils, "close_session") else None
    began = time.monotonic()
    assert same(GLEM.from_pretrained("org/flow"), model)
    assert "using the copy in the cache" in caplog.text
    refused("can't be reached", "HF_ENDPOINT", "no folder 'org/other'", name="org/other")
    with pytest.raises(HubError, match="can't be reached"):
        model.push_to_hub("org/flow", license="mit", samples=False)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("broken", ["HEAD .*config", "HEAD .*safetensors", "GET /objects/"])
def test_an_update_that_fails_leaves_the_model_that_is_there(
    pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    server, old, first = pushed
    assert same(GLEM.from_pretrained("org/flow"), old)
    new = tiny_model(1)
    files = files_of(new, Path(constants.HF_HUB_CACHE).parent / "new")
    second = server.put("org/flow", {**files, CONFIG: files[CONFIG] + b"\n"})

    def load() -> GLEM:
        """The same, online and offline."""
        online = GLEM.from_pretrained("org/flow")
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            assert GLEM.from_pretrained("org/flow").origin == online.origin
        return online

    with server.faulty(Fault(broken, 403)):
        model = load()
        assert model.origin == f"org/flow@{first}" and same(model, old)
        assert "403" in caplog.text and "using the copy in the cache" in caplog.text
        refused("403", name=f"org/flow@{second}")
    # What the Hub has is no longer our model: that is said, and is not the Hub's failure.
    server.put("org/flow", {CONFIG: b'{"model_type": "bert"}'})
    refused("no config of glem-augment")
    third = server.put("org/flow", files)
    model = load()
    assert model.origin == f"org/flow@{third}" and same(model, new)


# ---- damaged on the way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("mode", ["corrupt", "short"])
def test_a_damaged_download_is_never_loaded(pushed: tuple[HubServer, GLEM, str], file: str, mode: str) -> None:
    server, model, commit = pushed
    pattern = "GET /objects/" if file == WEIGHTS else f"GET .*{CONFIG}"
    with server.faulty(Fault(pattern, mode=mode)):
        text = refused("revision", file if mode == "corrupt" else "cut off")
    assert mode == "short" or "checksum" in text
    # Nothing of it is left for anybody, this library or another.
    assert not list(Path(constants.HF_HUB_CACHE).rglob(file))
    whole = {blob.data for blob in server.repo("org/flow").commits[commit].values()}
    blobs = [path for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if path.suffix != ".incomplete"]
    assert {path.read_bytes() for path in blobs} <= whole
    assert same(GLEM.from_pretrained("org/flow"), model)


@pytest.mark.parametrize("mode", ["corrupt", "truncate"])
def test_a_transfer_that_is_damaged_once_is_repeated(pushed: tuple[HubServer, GLEM, str], mode: str) -> None:
    server, model, _ = pushed
    with server.faulty(Fault("GET /objects/", mode=mode, times=1)):
        assert same(GLEM.from_pretrained("org/flow"), model)
    assert sum(path.startswith("/objects/") for _, path, _ in server.requests) == 2


def test_a_file_damaged_in_the_cache(
    pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, model, commit = pushed
    name = f"org/flow@{commit}"
    path = hub.locate(name) / WEIGHTS
    whole = path.read_bytes()

    def damage() -> None:
        blob = path.resolve()
        blob.chmod(0o644)
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    damage()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("damaged", str(path), "online", name=name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert same(GLEM.from_pretrained(name), model) and path.read_bytes() == whole
    assert "downloading it again" in caplog.text


def test_a_file_that_is_no_link_is_compared_with_what_the_hub_states(pushed: tuple[HubServer, GLEM, str]) -> None:
    """As in the cache of a system without symbolic links, whose files do not have a checksum for a name."""
    server, model, commit = pushed
    path = hub.locate(f"org/flow@{commit}") / WEIGHTS
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    server.requests.clear()
    assert same(GLEM.from_pretrained(f"org/flow@{commit}"), model) and path.read_bytes() == whole
    assert any(target.startswith("/objects/") for _, target, _ in server.requests)


# ---- what the Hub answers ----------------------------------------------------------------------------------------


def test_no_such_repository_revision_or_file(
    pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, *_ = pushed
    refused("no model repository", server.endpoint, "hf auth login", "no folder", name="org/nothing")
    refused("no revision 'v9'", "branch, a tag or a full commit hash", name="org/flow@v9")
    refused("no revision", name="org/flow@" + "0" * 40)
    server.put("org/bert", {"config.json": b'{"model_type": "bert"}', "pytorch_model.bin": b"x"})
    refused(f"has no {WEIGHTS}", "pytorch_model.bin", name="org/bert")
    monkeypatch.delenv("HF_TOKEN")
    refused("no model repository", "private", "HF_TOKEN", name="org/nothing")


def test_another_library_is_recognised_before_its_weights_are_fetched(pushed: tuple[HubServer, GLEM, str]) -> None:
    server, *_ = pushed
    for name, config in (
        ("org/bert", {"model_type": "bert", "architectures": ["BertModel"]}),
        ("org/timm", {"architecture": "resnet18", "num_classes": 1000}),
        ("org/list", [1, 2]),
    ):
        card = b"---\nlibrary_name: transformers\n---\n"
        server.put(name, {CONFIG: json.dumps(config).encode(), WEIGHTS: b"x" * 1000, "README.md": card})
        refused("can't be used", "library transformers", CONFIG, name=name)
    assert "model_type bert" in refused("no config of glem-augment", name="org/bert")
    assert not any(path.startswith("/objects/") for _, path, _ in server.requests)


def test_a_newer_format_and_a_huge_config(pushed: tuple[HubServer, GLEM, str], tmp_path: Path) -> None:
    server, model, _ = pushed
    files = files_of(model, tmp_path / "new")
    config = json.loads(files[CONFIG])
    files[CONFIG] = json.dumps({**config, "format_version": 2, "new_field": 1}).encode()
    commit = server.put("org/new", files)
    refused("format_version 2", "pip install -U glem-augment", commit, name="org/new")
    server.put("org/huge", {**files, CONFIG: b" " * (hub.MAX_CONFIG_BYTES + 1)})
    refused("bytes, more than", name="org/huge")
    assert not any("huge/resolve" in path for _, path, _ in server.requests)


def test_refusals(pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, model, _ = pushed
    assert "401" in refused("refused the token", token="hf_invented")
    with server.faulty(Fault("org/flow", 403)):
        refused("forbids", "403")
    server.repo("org/flow").gated = True
    assert same(GLEM.from_pretrained("org/flow"), model)  # with access
    for token in (READER, False):
        refused("is gated: ask for access at", f"{server.endpoint}/org/flow", token=token, cache_dir=f"{token}")
    with server.faulty(Fault("GET /api/models/", 404)):  # a mirror that serves files, and no API
        server.repo("org/flow").gated = False
        assert same(GLEM.from_pretrained("org/flow", cache_dir="mirror"), model)


@pytest.fixture
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


test_refusals = pytest.mark.usefixtures("_in_tmp")(test_refusals)


@pytest.mark.parametrize("token", ["", " \n", "hf_s\xe9cret", "hf_se cret", "hf_se\ncret", "hf_se\0cret"])
def test_tokens_that_can_not_be_one(server: HubServer, token: str) -> None:
    refused("the token for 'org/flow'", "as the Hub shows it", token=token)
    for thing in (tiny_model(), SyntheticDataset(tiny_model(), per_class=1)):
        with pytest.raises(HubError, match="as the Hub shows it") as caught:
            thing.push_to_hub("org/flow", license="mit", token=token)
        assert "cret" not in str(caught.value)
    assert not server.requests


def test_tokens_read_from_a_file(pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = pushed
    monkeypatch.setenv("HF_TOKEN", "hf_s\u20accret")
    refused("holds characters that no token has", "hf auth login")
    model.push_to_hub("org/secret", private=True, license="mit", samples=False, token=f"{TOKEN}\n")
    assert same(GLEM.from_pretrained("org/secret", token=f"{READER}\r\n"), model)


def test_a_cache_that_can_not_be_written(
    pushed: tuple[HubServer, GLEM, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "in"):
        text = refused("'main'", str(place), "is a file, not a folder", "cache_dir=", cache_dir=place)
        assert "free some space" not in text

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_hub_remote, "hf_hub_download", full)
    refused(f"({tmp_path / 'mine'}: no space left", "free some space", cache_dir=tmp_path / "mine")
    refused(f"({constants.HF_HUB_CACHE}: no space left")


def test_private_repositories(
    pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server, model, _ = pushed
    model.push_to_hub("org/secret", private=True, license="mit", samples=False)
    assert server.repo("org/secret").private
    monkeypatch.delenv("HF_TOKEN")
    refused("private", name="org/secret")
    assert same(GLEM.from_pretrained("org/secret", token=READER), model)
    Path(constants.HF_TOKEN_PATH).write_text(READER)  # as `hf auth login` leaves it
    assert same(GLEM.from_pretrained("org/secret", cache_dir=tmp_path / "b"), model)
    refused("private", name="org/secret", token=False, cache_dir=tmp_path / "c")


def test_waiting_and_giving_up(
    pushed: tuple[HubServer, GLEM, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client tries again for some seconds where that can help: all cases at once."""
    server, model, _ = pushed
    files = files_of(model, tmp_path / "more")
    for name in ("limited", "failing", "cut", "passing"):
        server.put(f"org/{name}", files)
    cut = Fault("GET /org/cut/resolve", mode="cut")
    faults = [
        Fault("org/limited", 429, {"Retry-After": "0"}),
        Fault("org/failing", 503, {"Retry-After": "0"}),
        cut,
        Fault("org/passing", 500, times=3),
    ]
    outcomes: dict[str, GLEM | Exception] = {}

    def load(name: str) -> None:
        try:
            outcomes[name] = GLEM.from_pretrained(f"org/{name}")
        except Exception as error:
            outcomes[name] = error

    with server.faulty(*faults):
        threads = [
            threading.Thread(target=load, args=(f.pattern.split("/resolve")[0][-7:].split("/")[-1],)) for f in faults
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(outcomes) == {"limited", "failing", "cut", "passing"}
    for name, words in (("limited", "limits requests (429)"), ("failing", "failed with 503"), ("cut", "cut off")):
        assert isinstance(outcomes[name], HubError) and words in str(outcomes[name]), outcomes[name]
        assert f"org/{name}" in str(outcomes[name])
    assert isinstance(outcomes["passing"], GLEM) and same(outcomes["passing"], model)
    # With a copy in the cache nobody waits.
    began = time.monotonic()
    with server.faulty(Fault("org/passing", 503)):
        assert same(GLEM.from_pretrained("org/passing"), model)
    assert time.monotonic() - began < 2 and "failed with 503" in caplog.text


# ---- pushing -----------------------------------------------------------------------------------------------------


def test_refused_pushes_change_nothing(pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, model, _ = pushed
    commits = len(server.repo("org/flow").commits)

    def push(words: str, **options: object) -> None:
        with pytest.raises(HubError, match=words) as caught:
            model.push_to_hub("org/flow", samples=False, **{"license": "mit", **options})
        assert "org/flow" in str(caught.value) and "hf_" not in str(caught.value)

    push("exists and is public, not private", private=True)
    push("may write there", token=READER)
    push("refused the token", token="hf_invented")
    push("takes a token", token=False)
    push("license", license="gpl-17")  # as the Hub judges it
    with server.faulty(Fault("PUT /upload/", 403)):
        push("403")
    with server.faulty(Fault("POST .*/commit/", 500)):
        push("failed with 500")
    monkeypatch.delenv("HF_TOKEN")
    push("401")
    assert len(server.repo("org/flow").commits) == commits
    broken = tiny_model()
    broken.gaussians.mu[0, 0] = float("nan")
    with pytest.raises(ModelFileError, match="not finite"):
        broken.push_to_hub("org/flow", license="mit", samples=False)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_private_files_in_no_pull_request_to_a_public_repository(server: HubServer, kind: str) -> None:
    model = tiny_model()
    thing = model if kind == "model" else SyntheticDataset(model, per_class=1)
    for name, private in (("org/open", False), ("org/shut", True)):
        server.repo(name, kind, private=private)
        with pytest.raises(HubError, match="exists and is .* as asked"):
            thing.push_to_hub(name, private=not private, create_pr=True, license="mit")
        assert not any("commit" in path or "upload" in path for _, path, _ in server.requests)
    assert thing.push_to_hub("org/shut", private=True, create_pr=True, license="mit").pr_url


def test_branches_and_pull_requests(pushed: tuple[HubServer, GLEM, str]) -> None:
    server, old, first = pushed
    new = tiny_model(1)
    branch = new.push_to_hub("org/flow", revision="next", license="mit", samples=False)
    pull = new.push_to_hub("org/flow", create_pr=True, license="mit", samples=False)
    assert pull.pr_url and pull.pr_url.endswith("/1") and branch.pr_url is None
    repo = server.repo("org/flow")
    assert repo.refs == {"main": first, "next": branch.oid, "refs/pr/1": pull.oid}
    assert same(GLEM.from_pretrained("org/flow"), old)
    assert same(GLEM.from_pretrained("org/flow@next"), new)
    assert same(GLEM.from_pretrained("org/flow@refs/pr/1"), new)


def test_servers_without_xet_storage(
    pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With hf_xet installed the client uploads large files to Xet storage, which only the Hub itself has."""
    pytest.importorskip("hf_xet")
    server, model, _ = pushed
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    commit = model.push_to_hub("org/other", license="mit", samples=False)
    assert any("xet-write-token" in path for _, path, _ in server.requests)
    assert server.repo("org/other").commits[commit.oid][WEIGHTS].lfs
    assert same(GLEM.from_pretrained(f"org/other@{commit.oid}"), model)
    images = SyntheticDataset(model, per_class=3)
    assert set(push_images(images, server, format="webdataset")) >= {"data/train-00000-of-00001.tar"}
    for status, words in ((401, "refused the token"), (403, "may write there")):
        with server.faulty(Fault("xet-write-token", status)), pytest.raises(HubError, match=words):
            tiny_model(1).push_to_hub("org/other", license="mit", samples=False)
    assert server.repo("org/other").refs["main"] == commit.oid


def test_a_server_that_speaks_just_enough(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No list of files, no judge of cards, 404 without a reason, ETags that look like checksums and are none."""
    server.bare = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    model = tiny_model()
    first = model.push_to_hub("org/flow", license="mit", samples=False).oid
    assert same(GLEM.from_pretrained("org/flow"), model)
    assert caplog.text.count("can't be compared with a checksum") == 2  # config and weights, said once each
    count = sum(path.startswith("/objects/") for _, path, _ in server.requests)
    new = tiny_model(1)
    second = new.push_to_hub("org/flow", license="mit", samples=False).oid
    assert same(GLEM.from_pretrained(f"org/flow@{first}"), model)
    assert sum(path.startswith("/objects/") for _, path, _ in server.requests) == count  # from the cache
    assert same(GLEM.from_pretrained("org/flow"), new)
    assert GLEM.from_pretrained("org/flow").origin == f"org/flow@{second}"
    # What was learned about the ETags serves offline, and damage is still found.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(GLEM.from_pretrained(f"org/flow@{first}"), model)
    blob = (hub.locate(f"org/flow@{first}") / WEIGHTS).resolve()
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    refused("damaged", name=f"org/flow@{first}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert same(GLEM.from_pretrained(f"org/flow@{first}"), model)
    with pytest.raises(HubError, match="org/nothing"):
        GLEM.from_pretrained("org/nothing")


def test_a_card_written_by_hand_is_kept(server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()

    def push(license: str) -> bytes:  # noqa: A002
        commit = model.push_to_hub("org/flow", license=license, samples=False)
        return server.repo("org/flow").commits[commit.oid]["README.md"].data

    assert b"license: mit" in push("mit") and b"license: apache-2.0" in push("apache-2.0")
    server.put("org/flow", {"README.md": b"---\nlicense: mit\n---\nMine.\n"})
    assert push("apache-2.0") == b"---\nlicense: mit\n---\nMine.\n"
    assert "written by hand" in caplog.text


def test_a_card_that_can_not_be_read_is_not_overwritten(server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is an older one taken for it."""
    model = tiny_model()
    for _ in range(2):
        model.push_to_hub("org/flow", license="mit", samples=False)
    assert not Path(constants.HF_HUB_CACHE).exists()
    HfApi().hf_hub_download("org/flow", "README.md")
    mine = server.put("org/flow", {"README.md": b"---\nlicense: mit\n---\nMine.\n"})
    for method in ("HEAD", "GET"):
        with server.faulty(Fault(f"{method} .*README", 403)), pytest.raises(HubError) as caught:
            model.push_to_hub("org/flow", license="mit", samples=False)
        for words in ("the present card of 'org/flow' can't be read", "nothing was uploaded", "403"):
            assert words in str(caught.value)
    assert server.repo("org/flow").refs["main"] == mine
    model.push_to_hub("org/flow", license="mit", samples=False)
    assert "written by hand" in caplog.text


def test_every_place_that_takes_a_model_takes_its_name(pushed: tuple[HubServer, GLEM, str], tmp_path: Path) -> None:
    _, model, commit = pushed
    model.save(tmp_path / "flow")
    for name in ("org/flow", f"org/flow@{commit}", "hf-hub:org/flow", tmp_path / "flow", str(tmp_path / "flow")):
        assert same(SyntheticDataset(name, per_class=1).model, model)
    aug = GLEMAugment("bundled:fashion-mnist")
    assert aug.model.num_classes == 10
    with pytest.raises(HubError, match="no model repository 'org/nothing'"):
        GLEMAugment("org/nothing")
    with pytest.raises(ModelFileError, match="no model at"):
        SyntheticDataset(Path("org/flow"))
    assert GLEM.from_pretrained("org/flow", check=True).origin == f"org/flow@{commit}"


# ---- the card ----------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    model = tiny_model(
        data="private/photos",
        images=1200,
        config={"objective": "hybrid", "beta": 0.3, "epochs": 5},
        held_out={"val_images": 60, "val_accuracy": 0.75, "val_bits_per_dim": 4.25},
    )
    measured = {"data": "bundled:fashion-mnist", "split": "test", "n": 100, "accuracy": 0.5, "fid": 12.5, "bits": 8}
    (tmp_path / "eval.json").write_text(json.dumps({**measured, "accuracy": 0.25}))
    facts = CardFacts(
        "other", "Photo licence", "https://example.com/l", ["org/photos"], [measured, tmp_path / "eval.json"]
    )
    text = str(model_card(model, "org/flow", facts))
    card = ModelCard(text)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("glem-augment", "unconditional-image-generation")
    assert (data["license"], data["license_name"], data["datasets"]) == ("other", "Photo licence", ["org/photos"])
    assert "data-augmentation" in data["tags"] and "mef_tiny" in data["tags"] and data["metrics"] == ["accuracy"]
    results = {(r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert results == {
        ("train (held out)", "accuracy", 0.75),
        ("train (held out)", "bits_per_dim", 4.25),
        ("test", "accuracy", 0.5),
        ("test", "fid", 12.5),
        ("test", "accuracy", 0.25),
    }
    for words in ("trained on photos", "1,200 images", "cat, dog, ant", "objective hybrid", "75.00 %", "Photo licence"):
        assert words in text, words
    assert "private" not in text
    assert 'GLEM.from_pretrained("org/flow")' in text and "samples.png" in text


def test_nothing_is_invented_where_nothing_is_known(caplog: pytest.LogCaptureFixture, server: HubServer) -> None:
    card = model_card(tiny_model(), "org/flow", samples=False)
    data = card.data.to_dict()
    assert not {"license", "datasets", "model-index", "metrics"} & set(data)
    assert "not stated" in card.text and "No measurements" in card.text and "samples.png" not in card.text
    tiny_model().push_to_hub("org/flow", samples=False)
    assert "licence" in caplog.text


def test_names_of_classes_cannot_break_out_of_the_card() -> None:
    names = ["a|b", "<script>alert(1)</script>", "[x](javascript:y)", "`c`", "--- license: mit ---"]
    model = GLEM.create("identity", (1, 8, 8), names)
    model.config.training = {"data": "x\n---\nlicense: mit\n---", "held_out": {"val_accuracy": 0.5, "val_images": "|"}}
    card = ModelCard(str(model_card(model, "org/flow")))
    assert card.data.license is None
    row = next(line for line in card.text.splitlines() if line.startswith("| classes |"))
    assert "<script" not in row.replace("\\<", "") and row.count("|") - row.count("\\|") == 3
    assert len([line for line in card.text.splitlines() if line.strip() == "---"]) == 0
    for preset in ("x` </code><img src=x onerror=alert(1)>", "a | b", "", "n" * 61):
        with pytest.raises(ModelFileError, match="preset must be a short name"):
            replace(model.config, flow={**model.config.flow, "preset": preset})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"license_name": "x"}, "license_name"),
        ({"license": "My Licence"}, "identifier of the Hub"),
        ({"datasets": ["no such name!"]}, "datasets"),
        ({"metrics": [{"loss": 1.0}]}, "glem eval prints"),
        ({"metrics": [{"accuracy": 0.5, "bits": 5}]}, "5 bits"),
        ({"metrics": ["nowhere.json"]}, "nowhere.json"),
    ],
)
def test_facts_that_cannot_be_used(facts: dict, words: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        model_card(tiny_model(), "org/flow", CardFacts(**facts))


# ---- commands ----------------------------------------------------------------------------------------------------


def test_commands_take_names_on_the_hub(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.save(tmp_path / "flow")

    def glem(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main([str(arg) for arg in argv]) == 0
        return capsys.readouterr().out

    listed = json.loads(glem("push", tmp_path / "flow", "org/flow", "--dry-run", tmp_path / "look", "--license", "mit"))
    assert set(listed["files"]) == {CONFIG, WEIGHTS, "README.md", "samples.png"} == set(os.listdir(tmp_path / "look"))
    assert not server.repos
    glem("push", tmp_path / "flow", "org/flow", "--dry-run", tmp_path / "look", "--license", "mit")  # once more
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    assert main(["push", str(tmp_path / "flow"), "org/flow", "--dry-run", str(tmp_path / "project")]) == 2
    assert os.listdir(tmp_path / "project") == ["README.md"]
    assert (tmp_path / "project" / "README.md").read_text() == "mine" and not server.repos
    out = json.loads(glem("push", tmp_path / "flow", "org/flow", "--private", "--license", "mit", "--message", "Mine"))
    repo = server.repo("org/flow")
    assert repo.private and repo.messages[-1] == (out["commit"], "Mine")
    pinned = out["pinned"]
    facts = json.loads(glem("info", "org/flow", "--json"))
    assert facts["hub"] == {"repo": "org/flow", "commit": out["commit"]}
    assert f"org/flow, commit {out['commit']}" in glem("info", pinned)
    generated = json.loads(
        glem("generate", pinned, "--per-class", "2", "--out", tmp_path / "images", "--device", "cpu")
    )
    assert generated["images"] == 6
    measured = glem("eval", "org/flow", tmp_path / "images", "--device", "cpu", "--round-trip", "0")
    assert json.loads(measured)["n"] == 6
    small = ["--flow", "depth=[1,1]", "--flow", "blocks=[1,1]", "--flow", "width=[6,6]", "--epochs", "1", "--quiet"]
    glem("train", tmp_path / "images", "--init", pinned, "--out", tmp_path / "run", "--sample-every", "0", *small)
    assert (tmp_path / "run" / WEIGHTS).is_file()
    assert main(["info", "org/nothing"]) == 2
    assert "no model repository 'org/nothing'" in capsys.readouterr().err


def test_push_says_the_full_name(server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    model.save(tmp_path / "flow")
    assert main(["push", str(tmp_path / "flow"), "mine", "--license", "mit", "--no-samples"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["repo"] == "org/mine" and out["pinned"] == f"org/mine@{out['commit']}"
    assert same(GLEM.from_pretrained(out["pinned"]), model)


@pytest.mark.parametrize("name", ["org/flow--x", "a/b/c", "org/flow.git", "org/flow@v1", "hf-hub:org/flow", ""])
def test_a_dry_run_refuses_the_names_that_a_push_refuses(
    server: HubServer, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--dry-run", str(tmp_path / "look")], ["--create-pr"], []):
        assert main(["push", "bundled:fashion-mnist", name, *options]) == 2
        assert "is no name of a repository" in capsys.readouterr().err
    with pytest.raises(HubError, match="is no name of a repository"):
        tiny_model().push_to_hub(name, license="mit", create_pr=True)
    assert not server.requests and not (tmp_path / "look").exists()


SESSION = """
import sys
from glem_augment.cli.main import main
codes = [main(line.split()) for line in sys.stdin]
print(codes)
"""


def test_the_environment_alone_is_enough(server: HubServer, tmp_path: Path) -> None:
    """Push and pull, then offline, in processes that know the Hub from their environment."""
    tiny_model().save(tmp_path / "flow")
    (tmp_path / "work").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def session(*lines: str, **extra: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", SESSION],
            input="\n".join(lines),
            env={**env, **extra},
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "hf_" not in done.stdout + done.stderr
        return done.stdout, done.stderr

    push = f"push {tmp_path / 'flow'} org/flow --license mit --no-samples"
    out, _ = session(push, "info org/flow", HF_TOKEN=TOKEN)
    commit = server.repo("org/flow").refs["main"]
    assert out.endswith("[0, 0]\n") and f"org/flow@{commit}" in out and f"org/flow, commit {commit}" in out
    assert (tmp_path / "home" / "hub" / "models--org--flow" / "snapshots" / commit / WEIGHTS).is_file()
    server.requests.clear()
    out, error = session("info org/flow", "info org/other", HF_HUB_OFFLINE="1")
    assert out.endswith("[0, 2]\n") and commit in out
    assert error.count("\n") == 1 and "'org/other'" in error and "HF_HUB_OFFLINE" in error
    assert not server.requests


# ---- data sets ---------------------------------------------------------------------------------------------------


def push_images(dataset: SyntheticDataset, server: HubServer, **options: object) -> dict[str, bytes]:
    commit = dataset.push_to_hub("org/images", license="mit", **options)
    return {path: blob.data for path, blob in server.repo("org/images", "dataset").commits[commit.oid].items()}


def test_a_data_set_is_pushed_as_an_image_folder(pushed: tuple[HubServer, GLEM, str]) -> None:
    server, model, commit = pushed
    dataset = SyntheticDataset(GLEM.from_pretrained("org/flow"), per_class=3, temperature=0.5, seed=4)
    files = push_images(dataset, server)
    rows = [json.loads(line) for line in files["data/train/metadata.jsonl"].splitlines()]
    assert [row["label"] for row in rows] == dataset.targets and len(rows) == 9
    for row in rows:
        image, label = dataset[row["index"]]
        assert label == row["label"]
        assert Image.open(io.BytesIO(files[f"data/train/{row['file_name']}"])).tobytes() == image.tobytes()
    origin = json.loads(files["glem-provenance.json"])
    assert origin["synthetic"] is True and origin["settings"]["temperature"] == 0.5 and origin["settings"]["seed"] == 4
    assert origin["flow"]["loaded_from"] == f"org/flow@{commit}"
    assert origin["flow"]["weights_sha256"] == server.repo("org/flow").commits[commit][WEIGHTS].sha256
    card = huggingface_hub.DatasetCard(files["README.md"].decode())
    assert {"synthetic", "glem-augment"} <= set(card.data.tags) and card.data.license == "mit"
    assert "These images are synthetic" in card.text and commit in card.text
    # Fewer images than before: the others go, and what is not the export's stays.
    mine = {"data-notes/a.txt": b"mine", "database.txt": b"mine"}
    server.put("org/images", mine, "dataset")
    now = push_images(SyntheticDataset(model, per_class=1), server)
    assert len(now) == len(files) - 6 + len(mine) and mine.items() <= now.items()


def test_an_export_asks_the_hub_for_nothing(pushed: tuple[HubServer, GLEM, str], tmp_path: Path) -> None:
    server, _, commit = pushed
    model = GLEM.from_pretrained("org/flow", cache_dir=tmp_path / "elsewhere")
    server.requests.clear()
    folder = SyntheticDataset(model, per_class=1).export(tmp_path / "out", "webdataset", progress=False)
    assert not server.requests
    flow = json.loads((folder / "glem-provenance.json").read_text())["flow"]
    assert flow["loaded_from"] == f"org/flow@{commit}"


def test_a_model_that_was_changed_is_no_longer_the_one_on_the_hub(pushed: tuple[HubServer, GLEM, str]) -> None:
    server, *_ = pushed
    model = GLEM.from_pretrained("org/flow")
    model.gaussians.mu.add_(0.1)
    origin = json.loads(push_images(SyntheticDataset(model, per_class=1), server)["glem-provenance.json"])
    assert origin["flow"]["loaded_from"] is None


def test_many_images_become_shards(
    pushed: tuple[HubServer, GLEM, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tarfile

    from glem_augment.synthetic import publish as hub_dataset

    server, model, _ = pushed
    monkeypatch.setattr(hub_dataset, "SHARD", 4)
    monkeypatch.setattr(hub_dataset, "MAX_FILES_IN_FOLDER", 2)
    dataset = SyntheticDataset(model, per_class=3)
    with pytest.raises(hub_dataset.DataError, match="webdataset"):
        push_images(dataset, server, format="imagefolder")
    files = push_images(dataset, server)
    found: dict[str, bytes] = {}
    for i in range(3):
        with tarfile.open(fileobj=io.BytesIO(files[f"data/train-{i:05d}-of-00003.tar"])) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert len(found) == 18
    for i in range(9):
        image, label = dataset[i]
        assert found[f"{i:08d}.cls"] == str(label).encode()
        assert Image.open(io.BytesIO(found[f"{i:08d}.png"])).tobytes() == image.tobytes()
    assert {path: data for path, data in push_images(dataset, server).items()} == files  # the same bytes again


LOAD = """
import json, sys
from datasets import load_dataset
data = load_dataset("org/images", split="train")
image, label = ("image", "label") if "image" in data.column_names else ("png", "cls")
rows = sorted((x["index"] if image == "image" else int(x["__key__"]), x[label], x[image].tobytes().hex()) for x in data)
streamed = sum(1 for _ in load_dataset("org/images", split="train", streaming=True))
print(json.dumps([data.features[label].names, streamed, rows]))
"""


@pytest.mark.parametrize("format", ["imagefolder", "webdataset"])
def test_datasets_loads_what_was_exported(
    pushed: tuple[HubServer, GLEM, str],
    format: str,  # noqa: A002
    tmp_path: Path,
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    server, model, _ = pushed
    dataset = SyntheticDataset(model, per_class=3)
    push_images(dataset, server, format=format)
    env = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names, streamed, rows = json.loads(done.stdout)
    assert names == dataset.classes and streamed == 9
    assert rows == [[i, dataset[i][1], dataset[i][0].tobytes().hex()] for i in range(9)]
