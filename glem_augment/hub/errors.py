"""What went wrong with the Hub, in one sentence that names the repository, the revision and the fix.

The client wraps causes in each other and changes its HTTP library between major versions, so that an error is
recognised anywhere along its chain of causes, and transport errors by the names of their classes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from enum import Enum

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from glem_augment.hub.names import HubError

__all__ = ["Kind", "chain", "classify", "endpoint", "explain", "status"]

LOGIN = "log in with `hf auth login`, set HF_TOKEN, or pass token="
_DISK = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
}


class Kind(Enum):
    """What an error of the client comes down to."""

    GATED = "gated"
    NO_REPOSITORY = "no repository"
    NO_REVISION = "no revision"
    NO_FILE = "no file"
    OFFLINE = "offline"
    HTTP = "http"
    BAD_NAME = "bad name"
    NO_TOKEN = "no token"
    BAD_TOKEN = "bad token"
    DISK = "disk"
    CUT_OFF = "cut off"
    NETWORK = "network"
    NOT_CACHED = "not cached"
    OTHER = "other"


def classify(error: BaseException) -> tuple[Kind, BaseException]:
    """What ``error`` comes down to, and the link of its chain of causes that says so."""
    links = list(chain(error))
    # A gated repository is also "not found" to the client, a missing file on disk also a "missing entry".
    for kind, types in (
        (Kind.GATED, GatedRepoError),
        (Kind.NO_REPOSITORY, RepositoryNotFoundError),
        (Kind.NO_REVISION, RevisionNotFoundError),
        (Kind.BAD_NAME, HFValidationError),
        (Kind.OFFLINE, OfflineModeIsEnabled),
    ):
        for link in links:
            if isinstance(link, types):
                return kind, link
    for link in links:
        if isinstance(link, EntryNotFoundError) and not isinstance(link, LocalEntryNotFoundError):
            return Kind.NO_FILE, link
    for link in links:
        if isinstance(link, HfHubHTTPError | ConnectionError) and status(link):
            return Kind.HTTP, link
    for link in links:
        if type(link).__name__ == "LocalTokenNotFoundError":
            return Kind.NO_TOKEN, link
        if _no_header(link):
            return Kind.BAD_TOKEN, link
        if _cut_off(link):
            return Kind.CUT_OFF, link
        if _transport(link):
            return Kind.NETWORK, link
        if isinstance(link, OSError) and link.errno in _DISK:
            return Kind.DISK, link
    for link in links:
        if isinstance(link, LocalEntryNotFoundError):
            return Kind.NOT_CACHED, link
    return Kind.OTHER, error


def explain(
    error: BaseException,
    repo_id: str,
    revision: str | None,
    *,
    repo_type: str = "model",
    writing: bool = False,
    cached: bool = False,
    cache_dir: str | None = None,
) -> HubError:
    """The error to raise for ``error``, met while reading (or ``writing``) ``repo_id`` at ``revision``, of which the
    cache (in ``cache_dir``, or the client's own) has a copy or not.

    Neither tokens nor passwords appear in it, nor the queries of addresses.
    """
    kind, link = classify(error)
    host, at = endpoint(), f"{repo_id!r} at revision {revision or 'main'!r}"
    what = "dataset repository" if repo_type == "dataset" else "model repository"
    page = f"{host}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    if kind is Kind.GATED:
        text = f"{at} is gated: ask for access at {page}, then {LOGIN}"
    elif kind is Kind.NO_REPOSITORY:
        text = (
            f"there is no {what} {repo_id!r} on {host} (looked for revision {revision or 'main'!r}), or it is private "
            f"and the token, if any, does not open it: check the name, or {LOGIN}"
        )
    elif kind is Kind.NO_REVISION:
        text = (
            f"{what} {repo_id!r} has no revision {revision or 'main'!r}: give a branch, a tag or a full commit hash; "
            f"{page}/commits/main lists the commits"
        )
    elif kind is Kind.NO_FILE:
        text = f"{at} lacks a file: {_message(link)}"
    elif kind is Kind.OFFLINE:
        text = f"{at} is not in the cache, and offline mode is on: unset HF_HUB_OFFLINE, or load it once while online"
        if writing:
            text = f"{repo_id!r} can't be written to while offline mode is on: unset HF_HUB_OFFLINE"
    elif kind is Kind.BAD_NAME:
        text = f"{repo_id!r} is no name of a repository: {_message(link)}"
    elif kind is Kind.NO_TOKEN:
        text = f"no token is stored on this machine for {at}: {LOGIN}"
    elif kind is Kind.BAD_TOKEN:
        text = f"the token for {at} holds characters that no token has: {LOGIN}"
    elif kind is Kind.HTTP:
        text = _http(status(link), link, at, host, writing)
    elif kind is Kind.DISK:
        assert isinstance(link, OSError)
        where = link.filename or cache_dir or constants.HF_HUB_CACHE
        space = "free some space, or " if link.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        text = (
            f"{at} can't be written to the disk ({where}: {_DISK[link.errno or 0]}): {space}choose another folder with "
            "cache_dir= or HF_HOME"
        )
    elif kind is Kind.CUT_OFF:
        text = f"the transfer of {at} was cut off ({_message(link)}): try again"
    elif kind is Kind.NETWORK:
        lost = "" if writing or cached else ", which is not in the cache"
        text = (
            f"{host} can't be reached for {at}{lost} ({_message(link)}): check the connection, the proxy settings and "
            "HF_ENDPOINT"
        )
    elif kind is Kind.NOT_CACHED:
        text = f"{at} is not complete in the cache, and {host} gave no answer that helps: {_message(link)}"
    else:
        text = f"{at} on {host}: {type(error).__name__}: {_message(error)}"
    return HubError(_without_userinfo(text))


def endpoint() -> str:
    """The Hub's address, for people: without the name and password that HF_ENDPOINT may hold."""
    return _without_userinfo(constants.ENDPOINT)


def status(error: BaseException) -> int:
    """The HTTP status of an error of the client, 0 where it has none."""
    code = int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
    # Xet storage has a client of its own, whose every error is a ConnectionError with words alone.
    said = re.search(r"HTTP status (?:client|server) error \((\d{3})\b", str(error))
    return code or (int(said[1]) if said else 0)


def _http(code: int, error: BaseException, at: str, host: str, writing: bool) -> str:
    said = _message(error)
    if code == 401:
        return f"{host} refused the token for {at} (401): {LOGIN}; {said}"
    if code == 403:
        need = "a token that may write there" if writing else "a token that may read it"
        return f"{host} forbids access to {at} (403): use {need}; {said}"
    if code == 429:
        return f"{host} limits requests (429), after retries too, for {at}: try again later, or {LOGIN}; {said}"
    if code >= 500:
        return f"{host} failed with {code} for {at}: try again later; {said}"
    if code == 404:
        return f"{host} knows nothing at the address of {at} (404): check the name and HF_ENDPOINT; {said}"
    return f"{host} answered {code} for {at}: {said}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from, or while handling."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop(0)
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            waiting += [link.__cause__, link.__context__]


def _transport(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & {"TransportError", "RequestException"})


def _no_header(error: BaseException) -> bool:
    """What was to be sent can't stand in a header: of those that are sent, only the token is the user's."""
    names = {cls.__name__ for cls in type(error).__mro__}
    encoded = not isinstance(error, UnicodeEncodeError) or error.encoding == "utf-8"
    return not encoded or "InvalidHeader" in names or "Illegal header value" in str(error)


def _cut_off(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    short = isinstance(error, OSError) and "consistency check failed" in str(error).lower()
    return short or bool(names & {"RemoteProtocolError", "ChunkedEncodingError", "IncompleteRead", "ReadError"})


def _message(error: BaseException) -> str:
    """One line, without request ids and what is secret: tokens, passwords in addresses, and the queries of addresses,
    which hold the signatures of download links."""
    text = re.sub(r"\((?:Request ID|Amzn Trace ID|Amz CF ID)[^)]*\)", "", str(error))
    text = re.sub(r"\?[^\s'\"()]*=[^\s'\"()]*", "", text)
    text = re.sub(r"\bhf_\w+", "hf_...", re.sub(r"Bearer \S+", "Bearer ...", _without_userinfo(text)))
    text = " ".join(text.replace("Please retry with `force_download=True`.", "").split())
    return text if len(text) <= 300 else text[:297] + "..."


def _without_userinfo(text: str) -> str:
    """Addresses in it without ``user:password@``."""
    return re.sub(r"(?<=://)[^\s/?#'\"]*@", "", text)
