"""Reading a model from the Hub: its files at one commit, and proof that they arrived whole.

The client (``huggingface_hub``) brings the cache, the tokens, the retries and the environment variables. Added here:
both files come from one commit, the config is judged before the weights are fetched, and every file is compared with
its checksum on every load, since the client compares sizes alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

from glem_augment.errors import ModelFileError
from glem_augment.hub.errors import Kind, classify, endpoint, explain
from glem_augment.hub.names import HubError, HubName
from glem_augment.io import atomic_write, expand, write_json

LIBRARY = "glem-augment"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A folder with a repository's files as of one commit."""

    folder: Path
    repo_id: str
    commit: str


@dataclass(frozen=True)
class _Listing:
    """What the Hub says about a revision: size and checksum of each file, None where it says nothing."""

    commit: str
    library: str | None
    files: dict[str, tuple[int | None, str | None]] | None = field(default=None)


def library_version() -> str:
    from glem_augment import __version__

    return __version__


def usable_token(token: str | bool | None, repo_id: str) -> str | bool | None:
    """``token`` as it can be sent: what is read from a file ends in a line break.

    Raises:
        HubError: it can't be one; the message does not show it.
    """
    if not isinstance(token, str):
        return token
    token = token.strip()
    if re.fullmatch(r"[!-~]+", token) is None:
        what = "holds characters that no token has (blanks, line breaks or others than ASCII)" if token else "is empty"
        raise HubError(f"the token for {repo_id!r} {what}: pass it as the Hub shows it, or leave it out")
    return token


def fetch(
    name: HubName,
    files: tuple[str, str],
    check: Callable[[Path], Any],
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
) -> Snapshot:
    """Bring ``files`` of a repository into the cache, or find them there.

    Args:
        name: what to fetch; without a revision, the head of ``main``.
        files: names of the config and of the weights.
        check: called with the folder once the config is there; raises ModelFileError where this is not our model, so
            that nobody waits for the weights of another library.
        cache_dir: in place of the client's own cache (HF_HOME).
        token: of the user, True for the stored one, False for none; None: the stored one if there is one.

    Returns:
        The folder, with both files from one commit, each with the checksum that the Hub states. Where an update can't
        be fetched, that of the commit that the cache had before, with a warning.

    Raises:
        HubError: see `_hub_errors.Kind`; a ModelFileError naming repository, revision and fix.
        ModelFileError: from ``check``, with the repository's name before it.
    """
    client = _Client(name, cache_dir, usable_token(token, name.repo_id))
    listing = None if client.pinned_in_cache(files) else client.ask(files)
    if listing is not None and listing.files is not None:
        _check_listing(name, listing, files)
    if listing is None:
        return client.snapshot(files, name.revision, check)
    # By the commit: asked for by the name of a branch, the first file would move that name in the cache at once, and an
    # update that fails half-way would leave no model under it.
    try:
        got = client.snapshot(files, listing.commit, check, listing)
    except HubError as error:
        # What has a cause is the transfer's; what came whole and is no good model is refused.
        if error.__cause__ is None or not client.has_earlier(files, listing.commit):
            raise
        _log.warning("%s; using the copy in the cache", error)
        client.local_only = True
        return client.snapshot(files, name.revision, check)
    client.point_to(got)
    return got


class _Client:
    """One repository through the client, with one cache and one token."""

    def __init__(self, name: HubName, cache_dir: str | os.PathLike[str] | None, token: str | bool | None) -> None:
        self.name = name
        self.cache_dir = None if cache_dir is None else str(expand(cache_dir))
        self.token = token
        # Set where the Hub could not be reached but the cache has everything: asking again would only take time.
        self.local_only = False

    def cached(self, filename: str, revision: str | None) -> Path | None:
        found = try_to_load_from_cache(self.name.repo_id, filename, self.cache_dir, revision)
        return Path(found) if isinstance(found, str) else None

    def has_earlier(self, files: tuple[str, str], commit: str) -> bool:
        """Whether the cache has a model under the name, of another commit than this one."""
        paths = [self.cached(filename, self.name.revision) for filename in files]
        return all(path is not None and path.parent.name != commit for path in paths)

    def pinned_in_cache(self, files: tuple[str, str]) -> bool:
        """A commit never changes: with both files and their checksums at hand, nothing needs to be asked."""
        if self.name.revision is None or _COMMIT.fullmatch(self.name.revision) is None:
            return False
        paths = [self.cached(filename, self.name.revision) for filename in files]
        return all(path is not None and _checksum_in_cache(path) is not None for path in paths)

    def ask(self, files: tuple[str, str]) -> _Listing | None:
        """Commit, files and checksums in one request. None where the Hub does not say, but the cache or the client's
        own retries may still help."""
        try:
            info = HfApi(library_name=LIBRARY, library_version=library_version()).model_info(
                self.name.repo_id,
                revision=self.name.revision,
                files_metadata=True,
                token=self.token,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            return _listing(info)
        except Exception as error:  # the client's errors depend on its version and on the HTTP library below it
            kind, link = classify(error)
            if kind is Kind.OFFLINE:
                self.local_only = True
                return None
            if kind in (Kind.BAD_NAME, Kind.NO_REVISION, Kind.NO_TOKEN):
                raise explain(error, *self._what()) from error
            if all(self.cached(filename, self.name.revision) for filename in files):
                _log.warning("%s; using the copy in the cache", explain(error, *self._what(), cached=True))
                self.local_only = True
                return None
            if kind in (Kind.GATED, Kind.NO_REPOSITORY, Kind.NETWORK):
                raise explain(error, *self._what()) from error
            return None

    def snapshot(
        self,
        files: tuple[str, str],
        revision: str | None,
        check: Callable[[Path], Any],
        listing: _Listing | None = None,
    ) -> Snapshot:
        """Both files, of one commit, with ``check`` between them; see `fetch`."""
        config_name, weights_name = files
        config = self.file(config_name, revision, listing)
        commit = config.parent.name
        try:
            check(config.parent)
        except ModelFileError as error:
            made_by = f" (its card says: library {listing.library})" if listing and _foreign(listing) else ""
            raise HubError(f"{self.name.repo_id}@{commit} can't be used{made_by}: {error}") from None
        self.file(weights_name, commit, listing)
        return Snapshot(config.parent, self.name.repo_id, commit)

    def point_to(self, got: Snapshot) -> None:
        """Let the branch or tag in the cache stand for what was fetched, as the client does with what it is asked for
        by such a name. Not through the client: it would ask again, and the branch may have moved on."""
        revision = self.name.revision or constants.DEFAULT_REVISION
        ref = got.folder.parent.parent / "refs" / revision
        with suppress(OSError):  # a cache that can only be read
            if revision != got.commit and not (ref.is_file() and ref.read_text() == got.commit):
                with atomic_write(ref, "w") as file:
                    file.write(got.commit)

    def file(self, filename: str, revision: str | None, listing: _Listing | None) -> Path:
        """One file in the cache, with the right checksum.

        A transfer that was damaged on the way is made once more; what is still wrong then is removed from the cache.
        """
        path = self._download(filename, revision)
        wanted = _checksum(path, listing)
        if wanted is None or _has_checksum(path, wanted):
            return path
        what = f"{filename} of {self.name.repo_id!r} at revision {path.parent.name}"
        if self.local_only or constants.HF_HUB_OFFLINE:
            raise HubError(f"{what} is damaged ({path}): load it again while online")
        _log.warning("%s does not have the checksum that the Hub states; downloading it again", what)
        before = _sha256(path)
        try:
            # Without symbolic links, as on Windows, the client keeps what stands there.
            if not path.is_symlink():
                with suppress(OSError):  # a cache that can only be read
                    path.unlink()
            path = self._download(filename, path.parent.name, force=True)
        except HubError as error:
            raise HubError(f"{what} is damaged ({path}), and could not be fetched again: {error}") from error
        if _has_checksum(path, wanted):
            return path
        if listing is not None and listing.files is None and _sha256(path) == before:
            # A server that states no checksums, and whose ETags look like some but are none: twice the same bytes.
            _log.warning("%s can't be compared with a checksum: %s states none", what, endpoint())
            _Etags(path).add(before)
            return path
        _discard(path)
        raise HubError(
            f"{what} does not have the checksum {wanted[:12]}... that the Hub states, in two downloads: "
            "nothing was loaded, and it was removed from the cache; try again later, or over another connection"
        )

    def _download(self, filename: str, revision: str | None, force: bool = False) -> Path:
        try:
            path = hf_hub_download(
                self.name.repo_id,
                filename,
                revision=revision,
                cache_dir=self.cache_dir,
                token=self.token,
                force_download=force,
                local_files_only=self.local_only and not constants.HF_HUB_OFFLINE,
                library_name=LIBRARY,
                library_version=library_version(),
            )
        except Exception as error:  # see `ask`
            raise explain(error, *self._what(), cache_dir=self.cache_dir) from error
        return Path(path)

    def _what(self) -> tuple[str, str | None]:
        return self.name.repo_id, self.name.revision


def _listing(info: Any) -> _Listing | None:
    if not isinstance(info.sha, str) or _COMMIT.fullmatch(info.sha) is None:
        return None
    if not info.siblings:
        return _Listing(info.sha, info.library_name)
    files: dict[str, tuple[int | None, str | None]] = {}
    for entry in info.siblings:
        lfs = entry.lfs
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        files[entry.rfilename] = entry.size, sha256 or entry.blob_id
    return _Listing(info.sha, info.library_name, files)


def _check_listing(name: HubName, listing: _Listing, files: tuple[str, str]) -> None:
    from glem_augment.model.config import MAX_CONFIG_BYTES

    assert listing.files is not None
    for filename in files:
        if filename not in listing.files:
            has = ", ".join(sorted(listing.files)[:8]) or "no files"
            made_by = f"; its card says: library {listing.library}" if _foreign(listing) else ""
            raise HubError(
                f"{name.repo_id!r} at revision {name.revision or 'main'!r} has no {filename}, so it holds no model of "
                f"{LIBRARY} ({has}{made_by}): check the name"
            )
    size = listing.files[files[0]][0]
    if size is not None and size > MAX_CONFIG_BYTES:
        raise HubError(f"{name.repo_id!r}: {files[0]} has {size} bytes, more than a model's config can need")


def _foreign(listing: _Listing | None) -> bool:
    return listing is not None and listing.library not in (None, LIBRARY)


# ---- checksums ---------------------------------------------------------------------------------------------------


def _checksum(path: Path, listing: _Listing | None) -> str | None:
    """What the Hub states for a file in the cache, as hexadecimal; None where it is not known here."""
    stated = None
    if listing is not None and listing.files is not None and listing.commit == path.parent.name:
        stated = listing.files.get(path.name, (None, None))[1]
    return stated if stated is not None and _is_checksum(stated) else _checksum_in_cache(path)


def _checksum_in_cache(path: Path) -> str | None:
    """The client names a blob by its ETag: the SHA-256 of a large file, git's SHA-1 of any other. A snapshot links to
    it, except where the system has no symbolic links."""
    try:
        name = os.path.basename(os.readlink(path))
    except OSError:
        return None
    return _Etags(path).get(name) if _is_checksum(name) else None


class _Etags:
    """What has been learned about a server whose ETags are no checksums: a file in the repository's cache folder with
    the SHA-256 that belongs to each, so that damage is still found.

    Args:
        path: of a file in a snapshot.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.parent.parent.parent / "glem-etags.json"

    def _read(self) -> dict[str, str]:
        try:
            table = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return table if isinstance(table, dict) else {}

    def get(self, etag: str) -> str:
        known = self._read().get(etag)
        return known if isinstance(known, str) and _is_checksum(known) else etag

    def add(self, sha256: str) -> None:
        with suppress(OSError):  # no links here, or a cache that can only be read
            write_json(self.file, {**self._read(), os.path.basename(os.readlink(self.path)): sha256})


def _is_checksum(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) is not None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _has_checksum(path: Path, wanted: str) -> bool:
    size = path.stat().st_size
    if len(wanted) == 64:
        digests = [hashlib.sha256()]
    else:
        # git hashes a header with the content; servers other than the Hub may leave it out.
        digests = [hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), hashlib.sha1(usedforsecurity=False)]
    with open(path, "rb") as file:
        while part := file.read(2**20):
            for digest in digests:
                digest.update(part)
    return wanted in [digest.hexdigest() for digest in digests]


def _discard(path: Path) -> None:
    """Take a file out of the cache: the snapshot's link, and the blob of this repository that it points to."""
    with suppress(OSError):
        blob = path.parent / os.readlink(path) if path.is_symlink() else None
        path.unlink()
        if blob is not None:
            blob.unlink()
