"""Downloading a model: `config.json` and `model.safetensors` as of one commit, checked on arrival.

The client `huggingface_hub` provides the cache, tokens, retries and offline mode. Two checks are added. The config is
judged before the weights are fetched, so that nobody waits for the weights of another library. The weights are
compared with the SHA-256 that the Hub states, since the client compares sizes only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from glem_augment.errors import HubError, ModelFileError
from glem_augment.hub.files import LIBRARY, PREFIX, HubName, hub_errors, parse_name
from glem_augment.io import expand
from glem_augment.model.config import MAX_CONFIG_BYTES
from glem_augment.model.weights import CONFIG, WEIGHTS, bundled_models, read_config

_log = logging.getLogger(__name__)


def download_model(
    text: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> tuple[Path, str]:
    """Download a model, or find it in the cache. The arguments are those of `GLEM.from_pretrained`.

    Returns:
        The folder with both files, and `org/name@commit`, under which exactly these files can be loaded again.

    Raises:
        ModelFileError: the text is no name on the Hub. Its subclass `HubError`: the files can't be had, arrived
            damaged, or are not those of a model that this library can read.
    """
    name = _name(text, revision)
    # A mistyped folder looks like a name on the Hub.
    hint = "" if os.fspath(text).startswith(PREFIX) else f" (and there is no folder {os.fspath(text)!r} here)"
    cache = None if cache_dir is None else str(expand(cache_dir))
    client: dict[str, Any] = {"cache_dir": cache, "token": token, "library_name": LIBRARY}
    with hub_errors(name, hint=hint):
        files = _ask(name, cache, token)

        def fetch(file: str, revision: str | None) -> Path:
            options: dict[str, Any] = {**client, "local_files_only": files is None}
            return Path(str(hf_hub_download(name.repo_id, file, revision=revision, **options)))

        if files is not None:
            _check_listing(name, files)
        config = fetch(CONFIG, name.revision if files is None else files.sha)
        found = HubName(name.repo_id, config.parent.name)
        try:
            read_config(config.parent)
        except ModelFileError as error:
            raise HubError(f"{found} can't be used: {error}") from None
        weights = fetch(WEIGHTS, found.revision)
        if files is not None:
            _check_weights(found, weights, _entry(files, WEIGHTS))
            # Only now does the name stand for this commit in the cache. An update that fails half-way leaves the
            # earlier model there for offline use.
            fetch(CONFIG, name.revision)
    return config.parent, str(found)


def download_jet(
    text: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> tuple[Path, str, str | None]:
    """Download weights of `jet-pytorch`, or find them in the cache. The arguments are those of `download_model`.

    Returns:
        The safetensors file, `org/name@commit`, and the licence that the repository's card states, if any.

    Raises:
        ModelFileError, HubError: as `download_model`.
    """
    name = _name(text, revision)
    cache = None if cache_dir is None else str(expand(cache_dir))
    options: dict[str, Any] = {"cache_dir": cache, "token": token, "library_name": LIBRARY}
    with hub_errors(name):
        wanted = ["*.safetensors", "README.md"]
        folder = Path(str(snapshot_download(name.repo_id, revision=name.revision, allow_patterns=wanted, **options)))
        found = HubName(name.repo_id, folder.name)
        files, card = sorted(folder.glob("*.safetensors")), folder / "README.md"
        if len(files) != 1:
            raise HubError(f"{found} has {len(files)} safetensors files, so which one holds a Jet is not clear")
        # The cache names large files by the SHA-256 that the Hub states.
        stated = files[0].resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", stated):
            _check_digest(found, files[0], stated)
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    return files[0], str(found), licence if isinstance(licence, str) else None


def _name(text: str | os.PathLike[str], revision: str | None) -> HubName:
    name = parse_name(text) if isinstance(text, str) else None  # a path always means a folder
    if name is None:
        raise ModelFileError(
            f"no model at {os.fspath(text)!r}: give a folder with {WEIGHTS} and {CONFIG}, org/name on the Hub, or "
            f"bundled:{'|'.join(bundled_models())}"
        )
    if revision is not None and name.revision not in (None, revision):
        raise ModelFileError(f"{text!r} and revision={revision!r} name different revisions: give one of them")
    return HubName(name.repo_id, revision or name.revision)


def _ask(name: HubName, cache: str | None, token: str | bool | None) -> ModelInfo | None:
    """The commit of the revision, with sizes and checksums of its files; None if the model is to come from the cache.

    A commit never changes, so one that is in the cache needs no question. Otherwise the cache stands in for a Hub that
    can't be reached or fails.
    """
    cached = all(
        isinstance(try_to_load_from_cache(name.repo_id, file, cache, name.revision), str) for file in (CONFIG, WEIGHTS)
    )
    if cached and re.fullmatch(r"[0-9a-f]{40}", name.revision or ""):
        return None
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        return HfApi(library_name=LIBRARY, token=token).model_info(
            name.repo_id, revision=name.revision, files_metadata=True, timeout=timeout
        )
    except Exception as error:  # see `hub_errors`
        if not cached or isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            raise
        if not constants.HF_HUB_OFFLINE:
            _log.warning("the Hub gave no answer for %s (%s); using the cache", name, type(error).__name__)
        return None


def _entry(files: ModelInfo, filename: str) -> RepoSibling | None:
    return next((entry for entry in files.siblings or () if entry.rfilename == filename), None)


def _check_listing(name: HubName, files: ModelInfo) -> None:
    """Refuse what is no model of this library before anything is downloaded."""
    config, weights = _entry(files, CONFIG), _entry(files, WEIGHTS)
    if config is None or weights is None:
        has = ", ".join(sorted(entry.rfilename for entry in files.siblings or ())[:8]) or "no files"
        raise HubError(f"{name} has no {CONFIG} with {WEIGHTS}, so it holds no model of {LIBRARY} ({has})")
    if config.size is not None and config.size > MAX_CONFIG_BYTES:
        raise HubError(f"{name}: {CONFIG} has {config.size} bytes, more than a model's config can need")


def _check_weights(found: HubName, weights: Path, entry: RepoSibling | None) -> None:
    """Compare the weights with the SHA-256 that the Hub states for large files."""
    stated = None if entry is None or entry.lfs is None else entry.lfs.sha256
    if stated is not None:
        _check_digest(found, weights, stated)


def _check_digest(found: HubName, weights: Path, stated: str) -> None:
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    if digest.hexdigest() == stated:
        return
    weights.resolve().unlink()  # the snapshot holds a link to it
    weights.unlink(missing_ok=True)
    raise HubError(f"{weights.name} of {found} arrived damaged and was removed from the cache: load it again")
