"""Models by name: folders on this machine, and repositories on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glem_augment.errors import ModelFileError
from glem_augment.hub.names import PREFIX, HubError, HubName, parse_name
from glem_augment.io import expand
from glem_augment.model.weights import CONFIG, WEIGHTS, bundled_models, local_folder, read_config


@dataclass(frozen=True)
class Located:
    """Where a model's files are.

    Attributes:
        folder: with ``model.safetensors`` and ``config.json``.
        repo_id, commit: of the Hub repository that they were downloaded from; None for files of this machine.
    """

    folder: Path
    repo_id: str | None = None
    commit: str | None = None

    @property
    def origin(self) -> str | None:
        """``org/name@commit``, a name under which exactly these files can be loaded again; None if not from the Hub."""
        return None if self.repo_id is None else f"{self.repo_id}@{self.commit}"


def locate(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Path:
    """The folder of a model, downloaded first where it is on the Hub; see :func:`find`."""
    return find(name, cache_dir=cache_dir, token=token, revision=revision).folder


def find(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Located:
    """A model by name, wherever it is. The one place where names of models are understood.

    Args:
        name: tried in this order: ``bundled:<name>``; ``hf-hub:org/name`` (always the Hub); a folder on disk, also one
            that is called like a repository on the Hub; ``org/name`` on the Hub. The Hub's names may end in
            ``@revision``: a branch, a tag, or a commit hash. A ``Path`` always means a folder.
        cache_dir: for downloads, in place of the Hub client's own cache (``HF_HOME``).
        token: for private and gated repositories; True: the stored one, False: none, None: the stored one if any.
        revision: the same as ``@revision`` in the name.

    Raises:
        HubError: a ModelFileError: no network, no such repository or revision, no access, a damaged download, ...
        ModelFileError: no such bundled model or folder, or a file missing in it; the message says what is there.
    """
    text = str(name)
    folder = None if text.startswith(PREFIX) else local_folder(name)
    if folder is None:
        remote = _remote_name(name, revision)
        if remote is None:
            raise ModelFileError(
                f"no model at {text!r}: give a folder with {WEIGHTS} and {CONFIG}, org/name on the Hub, or bundled:"
                f"{'|'.join(bundled_models()) or 'NAME'}"
            )
        # A mistyped folder looks like a name on the Hub.
        mistyped = "" if text.startswith(PREFIX) else f" (and there is no folder {str(expand(text))!r} here)"
        return _download(remote, mistyped, cache_dir, token)
    if revision is not None:
        raise ModelFileError(
            f"{text!r} is a folder on this machine and has no revision {revision!r}; for the Hub write hf-hub:org/name"
        )
    return Located(folder)


def _remote_name(name: str | Path, revision: str | None) -> HubName | None:
    """The name on the Hub that is meant, or None for a folder."""
    if isinstance(name, Path):
        return None
    remote = parse_name(name)
    if remote is None or revision is None:
        return remote
    if remote.revision not in (None, revision):
        raise ModelFileError(f"{name!r} and revision={revision!r} name different revisions: give one of them")
    return HubName(remote.repo_id, revision)


def _download(name: HubName, mistyped: str, cache_dir: str | Path | None, token: str | bool | None) -> Located:
    from glem_augment.hub.download import fetch
    from glem_augment.hub.errors import Kind, classify

    try:
        got = fetch(name, (CONFIG, WEIGHTS), read_config, cache_dir, token)
    except HubError as error:
        if not mistyped or classify(error)[0] not in (Kind.NO_REPOSITORY, Kind.NETWORK, Kind.OFFLINE):
            raise
        raise HubError(f"{error}{mistyped}") from error
    return Located(got.folder, got.repo_id, got.commit)
