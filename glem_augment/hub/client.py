"""Models from and to the Hugging Face Hub.

The client `huggingface_hub` has the cache, tokens and offline mode.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

from glem_augment.errors import GLEMError, HubError, ModelFileError
from glem_augment.evaluation.pictures import Section, compose, unit
from glem_augment.hub.cards import LIBRARY, SAMPLES, model_card
from glem_augment.io import expand, save_png
from glem_augment.model.config import licence_id
from glem_augment.model.files import CONFIG, WEIGHTS, bundled_models, read_config
from glem_augment.model.glem import GLEM
from glem_augment.tensors import evaluating

PREFIX, CARD = "hf-hub:", "README.md"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_ROWS, _COLUMNS = 16, 8  # of the picture of samples
_log = logging.getLogger(__name__)


# ---- downloads -------------------------------------------------------------------------------------------------------


def download_model(text: str | os.PathLike[str], *, revision: str | None = None, **settings: Any) -> tuple[Path, str]:
    """Download a model, or find it in the cache. `settings` are `cache_dir` and `token` of `GLEM.from_pretrained`.

    Returns:
        The folder with both files, and `org/name@commit`, under which exactly these files can be loaded again.

    Raises:
        ModelFileError: the text is no name on the Hub. Its subclass `HubError`: the files can't be downloaded, or hold
            no model that this library can read.
    """
    (repo_id, revision), client = _name(text, revision), _client(**settings)
    # A mistyped folder looks like a name on the Hub.
    hint = "" if os.fspath(text).startswith(PREFIX) else f"there is no folder {os.fspath(text)!r} here, and "
    with hub_errors(f"the model {_full(repo_id, revision)!r} can't be downloaded", hint):
        if not isinstance(try_to_load_from_cache(repo_id, CONFIG, client["cache_dir"], revision), str):
            # It fails where nothing answers. The download would try five more times, for half a minute.
            HfApi(token=client["token"]).file_exists(repo_id, CONFIG, revision=revision)
        folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision, **client)).parent
        found = _full(repo_id, folder.name)
        try:
            read_config(folder)  # before the weights of another library are downloaded
        except ModelFileError as error:
            raise HubError(f"{found} holds no model that {LIBRARY} can read: {error}") from None
        hf_hub_download(repo_id, WEIGHTS, revision=folder.name, **client)
    return folder, found


def download_weights(text: str, **settings: Any) -> tuple[Path, str]:
    """As `download_model`, for the weights of an autoencoder.

    Returns:
        The only safetensors file of the repository, with config.json beside it if there is one; `org/name@commit`.
    """
    repo_id, revision = _name(text, None)
    with hub_errors(f"the autoencoder {_full(repo_id, revision)!r} can't be downloaded"):
        wanted = ["*.safetensors", CONFIG]
        client = _client(**settings)
        folder = Path(
            str(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns="*/*", **client))
        )
    found, files = _full(repo_id, folder.name), sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name == "diffusion_pytorch_model.safetensors"] or files
    if len(files) != 1:
        raise HubError(f"{found} has {len(files)} safetensors files: the file of the weights is not clear")
    return files[0], found


def _name(text: str | os.PathLike[str], revision: str | None) -> tuple[str, str | None]:
    """Read `org/name` or `org/name@revision`, with or without `hf-hub:` before it."""
    prefixed = isinstance(text, str) and text.startswith(PREFIX)
    plain = text.removeprefix(PREFIX) if isinstance(text, str) else ""  # a path always means a folder
    # A few old repositories have no owner. They can only be named with the prefix.
    owner = f"({_WORD}/)?" if prefixed else f"{_WORD}/"
    found = re.fullmatch(rf"(?P<repo_id>{owner}{_WORD})(@(?P<revision>[^\s@]+))?", plain)
    if found is None:
        if prefixed:
            raise HubError(f"{text!r} is no name on the Hub: write {PREFIX}org/name or {PREFIX}org/name@revision")
        raise ModelFileError(
            f"no model at {os.fspath(text)!r}: give a folder with {WEIGHTS} and {CONFIG}, org/name on the Hub, or "
            f"bundled:{'|'.join(bundled_models())}"
        )
    if revision is not None and found["revision"] not in (None, revision):
        raise ModelFileError(f"{text!r} and revision={revision!r} name different revisions: give a single revision")
    return found["repo_id"], revision or found["revision"]


def _full(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id}@{revision}"


def _client(cache_dir: str | os.PathLike[str] | None = None, token: str | bool | None = None) -> dict[str, Any]:
    cache = None if cache_dir is None else str(expand(cache_dir))
    return {"cache_dir": cache, "token": token, "library_name": LIBRARY}


# ---- uploads ---------------------------------------------------------------------------------------------------------


def push_to_hub(
    model: GLEM,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload weights, config, a model card and a picture of samples to the Hugging Face Hub, in one commit.

    A card that is in the repository already is kept.

    Args:
        model: the model; its weights must be finite.
        repo_id: `org/name`, or `name` under the token's own user; made if it does not exist.
        license: of the training images, as the Hub names it; by default the licence in the record of the training.
        commit_message: by default a message that names the library.
        private: the visibility of the repository; an existing repository must have it already. None accepts either.
        token: a token with write access; by default the stored token.

    Returns:
        The commit; `from_pretrained(repo_id, revision=info.oid)` loads exactly these weights.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        ModelFileError: the weights are not finite. ValueError: a licence that is no identifier.
    """
    if license is not None and licence_id(license) is None:
        raise ValueError(f"license must be as the Hub names it, such as mit, cc-by-4.0 or other, got {license!r}")
    with tempfile.TemporaryDirectory(prefix="glem-push-") as name, hub_errors(f"{repo_id!r} was not uploaded"):
        folder, api = Path(name), HfApi(token=token, library_name=LIBRARY)
        write_repository(model, repo_id, folder, license)  # what can't be uploaded leaves no empty repository behind
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # The client leaves an existing repository as it is. A private model must not end up in a public one.
        if private is not None and api.model_info(repo_id).private != private:
            raise HubError(
                f"{repo_id!r} exists and is {'public' if private else 'private'}: change that in the settings on its "
                "page, or choose another name; nothing was uploaded"
            )
        if kept := api.file_exists(repo_id, CARD):
            _log.warning("%s has a card already, which is kept: remove its %s to get a new one", repo_id, CARD)
        else:
            model_card(model, repo_id, license).save(folder / CARD)  # with the name of the owner
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload with {LIBRARY}",
            ignore_patterns=[CARD] if kept else None,
        )


def write_repository(model: GLEM, repo_id: str, folder: Path, license: str | None = None) -> None:  # noqa: A002
    """Write the files of a push to an empty folder; see `push_to_hub`."""
    model.save(folder)
    GLEM.from_pretrained(folder)  # weights that can't be loaded again are refused
    classes = torch.linspace(0, model.num_classes - 1, min(model.num_classes, _ROWS)).long()  # evenly spread
    with evaluating(model):
        images = model.sample(classes.repeat_interleave(_COLUMNS), generator=torch.Generator().manual_seed(0))
    cells = unit(images, model.pixel_range).unflatten(0, (-1, _COLUMNS))
    picture = compose("", [Section("", cells, rows=[model.classes[k] for k in classes])])
    save_png(picture, folder / SAMPLES)
    model_card(model, repo_id, license).save(folder / CARD)


# ---- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(failed: str, hint: str = "") -> Iterator[None]:
    """Turn an error of the Hub's client inside the `with` block into a HubError of one line.

    It says which request `failed`, why, and the fix. `hint` comes first, where a name may have meant a folder.
    """
    try:
        yield
    except GLEMError:
        raise
    except Exception as error:  # the client's errors depend on its version and on the HTTP library below it
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = " ".join(str(getattr(cause, "server_message", None) or cause).split())
        if constants.HF_HUB_OFFLINE:
            reason, fix = "offline mode is on, and the cache lacks it", "unset HF_HUB_OFFLINE"
        elif status in (401, 403, 404):
            reason = f"{constants.ENDPOINT} answered {status} ({reason})"
            fix = "check the name, and give a token with access: `hf auth login`, HF_TOKEN or token="
        elif status is not None:
            reason, fix = f"{constants.ENDPOINT} answered {status} ({reason})", "try again later"
        elif isinstance(cause, ValueError):
            fix = "write org/name"
        else:
            reason = f"no connection to {constants.ENDPOINT} ({reason})"
            fix = "check the network, the proxy and HF_ENDPOINT; set HF_HUB_DISABLE_XET=1 where a server lacks Xet"
        raise HubError(f"{hint}{failed}: {reason}; {fix}") from error
