"""Names of models on the Hub, and the one place where errors of the Hub's client become errors of this library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import constants
from huggingface_hub import errors as client

from glem_augment.errors import GLEMError, HubError

LIBRARY, PREFIX = "glem-augment", "hf-hub:"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


@dataclass(frozen=True)
class HubName:
    """A repository `org/name` and, if one was given, a branch, tag or commit hash."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def parse_name(text: str) -> HubName | None:
    """Read `org/name` or `org/name@revision`, with or without `hf-hub:` before it; None for any other text.

    Raises:
        HubError: `hf-hub:` is followed by something else.
    """
    repo_id, at, revision = text.removeprefix(PREFIX).partition("@")
    # A few old repositories have no owner. They can only be named with the prefix.
    pattern = f"({_WORD}/)?{_WORD}" if text.startswith(PREFIX) else f"{_WORD}/{_WORD}"
    if re.fullmatch(pattern, repo_id) and (not at or re.fullmatch(r"[^\s@]+", revision)):
        return HubName(repo_id, revision or None)
    if text.startswith(PREFIX):
        raise HubError(f"{text!r} is no name on the Hub: write {PREFIX}org/name or {PREFIX}org/name@revision")
    return None


@contextmanager
def hub_errors(name: HubName, repo_type: str = "model", hint: str = "") -> Iterator[None]:
    """Turn any error of the Hub's client inside the `with` block into a HubError of one sentence that names `name`.

    `hint` is added where the name may have been meant for something else than a repository.
    """
    try:
        yield
    except GLEMError:
        raise
    except Exception as error:  # the client's errors depend on its version and on the HTTP library below it
        raise HubError(_without_secrets(_explain(error, name, repo_type, hint))) from error


def _explain(error: Exception, name: HubName, repo_type: str, hint: str) -> str:
    host, at = constants.ENDPOINT, f"the {repo_type} {str(name)!r}" if name.repo_id else "the list of models"
    if isinstance(error, client.HFValidationError):
        return f"{name.repo_id!r} is no name of a repository: {error}"
    if constants.HF_HUB_OFFLINE:
        return f"offline mode is on, and {at} is not in the cache: unset HF_HUB_OFFLINE{hint}"
    cause: BaseException | None = error
    while cause is not None:
        if status := getattr(getattr(cause, "response", None), "status_code", None):
            fix = "check the name, and log in with `hf auth login`, set HF_TOKEN, or pass token="
            fix = f"; {fix} for a token with access{hint}" if status in (401, 403, 404) else ""
            return f"{host} answered {status} for {at}: {getattr(cause, 'server_message', None) or cause}{fix}"
        cause = cause.__cause__ or cause.__context__
    return f"{at} can't be had from {host} ({error}): check the connection, the proxy and HF_ENDPOINT{hint}"


def _without_secrets(text: str) -> str:
    """The text on one line, without tokens, passwords in addresses, and queries (the signatures of download links)."""
    text = re.sub(r"(?<=://)[^\s/?#'\"]*@", "", text)
    text = re.sub(r"\?[^\s'\"()]*=[^\s'\"()]*", "", text)
    text = re.sub(r"\bhf_\w+", "hf_...", re.sub(r"Bearer \S+", "Bearer ...", text))
    return " ".join(text.split())
