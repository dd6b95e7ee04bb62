"""The Hugging Face Hub: models are validated on arrival and uploaded with a card, in one commit or not at all.

The client `huggingface_hub` provides the cache, tokens, retries and offline mode. Two checks are added. The config is
read before the weights are fetched, so that models of other libraries fail early. The weights are compared with the
SHA-256 that the Hub states, since the client compares sizes only.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitInfo,
    HfApi,
    RepoCard,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as client_errors
from torchvision.utils import save_image

from glem_augment.errors import GLEMError, HubError, ModelFileError
from glem_augment.hub.cards import LIBRARY, SAMPLES, CardFacts, model_card
from glem_augment.io import atomic_write, expand, file_sha256
from glem_augment.model.config import records
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import CONFIG, WEIGHTS, bundled_models, read_config
from glem_augment.tensors import evaluating

PREFIX, CARD = "hf-hub:", "README.md"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
# A card with this line was generated and is replaced by the next push. A card without it was edited by hand.
_GENERATED = "<!-- Written by glem-augment. Remove this line to keep your edits when you push again. -->"
_ROWS, _COLUMNS = 16, 8  # of the picture of samples
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubName:
    """A repository `org/name` and, if one was given, a branch, tag or commit hash."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


# ---- downloads -------------------------------------------------------------------------------------------------------


def download_model(text: str | os.PathLike[str], *, revision: str | None = None, **settings: Any) -> tuple[Path, str]:
    """Download a model, or find it in the cache. `settings` are `cache_dir` and `token` of `GLEM.from_pretrained`.

    Returns:
        The folder with both files, and `org/name@commit`, under which exactly these files can be loaded again.

    Raises:
        ModelFileError: the text is no name on the Hub. Its subclass `HubError`: the files can't be had, arrived
            damaged, or hold no model that this library can read.
    """
    name, client = _name(text, revision), _client(**settings)
    # A mistyped folder looks like a name on the Hub.
    hint = "" if os.fspath(text).startswith(PREFIX) else f"there is no folder {os.fspath(text)!r} here, and "
    with hub_errors(name, hint=hint):
        commit = _commit(name, client)

        def fetch(file: str, revision: str | None) -> Path:
            here = {"local_files_only": commit is None, **client}
            return Path(str(hf_hub_download(name.repo_id, file, revision=revision, **here)))

        config = fetch(CONFIG, commit or name.revision)
        found = HubName(name.repo_id, config.parent.name)
        try:
            read_config(config.parent)
        except ModelFileError as error:
            raise HubError(f"{found} holds no model that {LIBRARY} can read: {error}") from None
        weights = fetch(WEIGHTS, found.revision)
        if commit is not None:
            _check_digest(found, weights)
            # The name now stands for this commit in the cache. After a failed update it stands for the earlier model.
            fetch(CONFIG, name.revision)
    return config.parent, str(found)


def download_weights(text: str, **settings: Any) -> tuple[Path, str]:
    """As `download_model`, for the weights of an autoencoder.

    Returns:
        The only safetensors file of the repository, with config.json beside it if there is one; `org/name@commit`.
    """
    name = _name(text, None)
    with hub_errors(name):
        wanted = ["*.safetensors", CONFIG]
        client = _client(**settings)
        folder = Path(str(snapshot_download(name.repo_id, revision=name.revision, allow_patterns=wanted, **client)))
        found, files = HubName(name.repo_id, folder.name), sorted(folder.glob("*.safetensors"))
        files = [file for file in files if file.name == "diffusion_pytorch_model.safetensors"] or files
        if len(files) != 1:
            raise HubError(f"{found} has {len(files)} safetensors files: the file of the weights is not clear")
        _check_digest(found, files[0])
    return files[0], str(found)


def _name(text: str | os.PathLike[str], revision: str | None) -> HubName:
    """Read `org/name` or `org/name@revision`, with or without `hf-hub:` before it."""
    plain = text.removeprefix(PREFIX) if isinstance(text, str) else ""  # a path always means a folder
    prefixed = isinstance(text, str) and text.startswith(PREFIX)
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
    return HubName(found["repo_id"], revision or found["revision"])


def _client(cache_dir: str | os.PathLike[str] | None = None, token: str | bool | None = None) -> dict[str, Any]:
    cache = None if cache_dir is None else str(expand(cache_dir))
    return {"cache_dir": cache, "token": token, "library_name": LIBRARY}


def _commit(name: HubName, client: dict[str, Any]) -> str | None:
    """The commit that the revision stands for; None if the model is to come from the cache.

    A commit never changes, so a cached commit needs no request. Otherwise the cache is used if the Hub fails.
    """
    found = (try_to_load_from_cache(name.repo_id, f, client["cache_dir"], name.revision) for f in (CONFIG, WEIGHTS))
    cached = all(isinstance(path, str) for path in found)
    if cached and re.fullmatch(r"[0-9a-f]{40}", name.revision or ""):
        return None
    try:
        api = HfApi(library_name=LIBRARY, token=client["token"])
        return api.model_info(name.repo_id, revision=name.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except Exception as error:  # see `hub_errors`
        missing = client_errors.RepositoryNotFoundError, client_errors.RevisionNotFoundError
        if not cached or isinstance(error, missing):
            raise
        if not constants.HF_HUB_OFFLINE:
            _log.warning("the Hub gave no answer for %s (%s); using the cache", name, type(error).__name__)
        return None


def _check_digest(found: HubName, weights: Path) -> None:
    """Compare the weights with the SHA-256 that the Hub states; the cache names large files by it."""
    stated = weights.resolve().name
    if not re.fullmatch(r"[0-9a-f]{64}", stated):
        return
    if file_sha256(weights) != stated:
        weights.resolve().unlink()  # the snapshot holds a link to it
        weights.unlink()
        raise HubError(f"{weights.name} of {found} arrived damaged and was removed from the cache: load it again")


# ---- uploads ---------------------------------------------------------------------------------------------------------


def push_to_hub(
    model: GLEM,
    repo_id: str,
    *,
    samples: bool = True,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Sequence[Mapping[str, Any]] = (),
    **target: Any,
) -> CommitInfo:
    """Upload weights, config, a model card and a picture of samples to the Hugging Face Hub, in one commit.

    Args:
        model: the model; its weights must be finite.
        repo_id: `org/name`, or `name` under the token's own user; made if it does not exist.
        samples: draw the picture of samples, which takes seconds to minutes, depending on the size of the model.
        license, license_name, license_link, datasets, metrics: for the card, see `CardFacts`.
        target: `commit_message`, `private`, `token` and `revision`, see `upload`.

    Returns:
        The commit; `from_pretrained(repo_id, revision=info.oid)` loads exactly these weights.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        ModelFileError: the weights are not finite. ValueError: metrics that `glem eval` did not write, or a name or a
            link of a licence that the Hub knows.
    """
    facts = CardFacts(license, license_name, license_link, datasets, metrics)
    model_card(model, repo_id, facts, samples)  # refuses wrong facts before a repository is made
    return upload(repo_id, "model", partial(write_repository, model, facts, samples=samples), **target)


def write_repository(model: GLEM, facts: CardFacts, repo_id: str, folder: Path, samples: bool = True) -> None:
    """Write the files of a push to an empty folder; see `push_to_hub`."""
    for record in records(model.config.training):
        if str(Path.home()) in str(record.get("data")):
            _log.warning("config.json names the folder of the training images, %s, and is uploaded", record["data"])
    card = model_card(model, repo_id, facts, samples)
    model.save(folder)
    GLEM.from_pretrained(folder)  # weights that can't be loaded again are refused
    if samples:
        classes = torch.linspace(0, model.num_classes - 1, min(model.num_classes, _ROWS)).long()  # evenly spread
        with evaluating(model):
            images = model.sample(classes.repeat_interleave(_COLUMNS), generator=torch.Generator().manual_seed(0))
        save_image(images, folder / SAMPLES, nrow=_COLUMNS)
    write_card(card, folder)


def write_card(card: RepoCard, folder: Path) -> None:
    """Write a card to `folder`, marked as generated; warn if it has to say that the licence is unknown."""
    if card.data.get("license") is None:
        _log.warning(
            "no licence is given, so the card says that it is unknown. Samples inherit the licence of the images that "
            "the model was trained on: state it with license= (--license)"
        )
    with atomic_write(folder / CARD, "w") as file:
        file.write(f"{card}\n{_GENERATED}\n")


def upload(
    repo_id: str,
    repo_type: str,
    write: Callable[[str, Path], object],
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    replace: str | None = None,
) -> CommitInfo:
    """Commit the files that `write(repository, folder)` makes, all at once; after a HubError nothing was committed.

    A card that was written or edited by hand is kept, with a warning.

    Args:
        repo_id, repo_type: `org/name` or `name`, and "model" or "dataset".
        commit_message: by default a message that names the library.
        private: the visibility of the repository; an existing repository must have it already. None accepts either.
        token: a token with write access; by default the stored token.
        revision: the branch to commit to, which starts from `main` if it is new; None means `main`.
        replace: a pattern such as "data/*"; files of the repository that match it and are not written are deleted.
    """
    asked = HubName(repo_id, revision)
    with hub_errors(asked, repo_type):
        # Permissions are checked before the files are written, which may take hours.
        api = HfApi(token=token, library_name=LIBRARY)
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        # The client leaves an existing repository as it is. Private files must not end up in a public one.
        if private is not None and api.repo_info(repo_id, repo_type=repo_type).private != private:
            raise HubError(
                f"{repo_id!r} exists and is {'public' if private else 'private'}: change that in the settings on its "
                "page, or choose another name; nothing was uploaded"
            )
        if revision not in (None, constants.DEFAULT_REVISION):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="glem-push-") as folder:
        write(repo_id, Path(folder))
        with hub_errors(asked, repo_type):
            branch: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type, "revision": revision}
            ignored = None
            if api.file_exists(filename=CARD, **branch):
                # The user's cache may hold an older card.
                card = Path(api.hf_hub_download(filename=CARD, force_download=True, **branch))
                if _GENERATED not in card.read_text(encoding="utf-8", errors="replace"):
                    _log.warning("%s has a card written by hand: it is kept, and may no longer fit the rest", repo_id)
                    ignored = CARD
            return api.upload_folder(
                folder_path=folder,
                commit_message=commit_message or f"Upload with {LIBRARY}",
                ignore_patterns=ignored,
                delete_patterns=replace,
                **branch,
            )


# ---- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(name: HubName, repo_type: str = "model", hint: str = "") -> Iterator[None]:
    """Turn any error of the Hub's client inside the `with` block into a HubError of one sentence that names `name`.

    `hint` comes first, where the name may have been meant for something else than a repository.
    """
    try:
        yield
    except GLEMError:
        raise
    except Exception as error:  # the client's errors depend on its version and on the HTTP library below it
        raise HubError(hint + _without_secrets(_explain(error, name, repo_type))) from error


def _explain(error: Exception, name: HubName, repo_type: str) -> str:
    host, at = constants.ENDPOINT, f"the {repo_type} {str(name)!r}"
    if isinstance(error, client_errors.HFValidationError):
        return f"{name.repo_id!r} is no name of a repository: {error}"
    if constants.HF_HUB_OFFLINE:
        return f"offline mode is on, and {at} is not in the cache: unset HF_HUB_OFFLINE"
    if isinstance(error, client_errors.EntryNotFoundError) and getattr(error, "response", None) is not None:
        return f"{at} lacks a file, so it holds no model of {LIBRARY}: {error}"
    cause: BaseException | None = error
    while cause is not None:
        if status := getattr(getattr(cause, "response", None), "status_code", None):
            fix = "check the name, and log in with `hf auth login`, set HF_TOKEN, or pass token="
            fix = f"; {fix} for a token with access" if status in (401, 403, 404) else ""
            return f"{host} answered {status} for {at}: {getattr(cause, 'server_message', None) or cause}{fix}"
        cause = cause.__cause__ or cause.__context__
    return f"{at} can't be had from {host} ({error}): check the connection, the proxy and HF_ENDPOINT"


def _without_secrets(text: str) -> str:
    """The text on one line, without tokens, passwords in addresses, and queries (the signatures of download links)."""
    text = re.sub(r"(?<=://)[^\s/?#'\"]*@", "", text)
    text = re.sub(r"\?[^\s'\"()]*=[^\s'\"()]*", "", text)
    text = re.sub(r"\bhf_\w+", "hf_...", re.sub(r"Bearer \S+", "Bearer ...", text))
    return " ".join(text.split())
