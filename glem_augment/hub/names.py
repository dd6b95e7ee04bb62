"""How models are named on the Hub. Apart from the rest, so that folders load without the Hub's client."""

from __future__ import annotations

import re
from dataclasses import dataclass

from glem_augment.errors import ModelFileError

__all__ = ["PREFIX", "HubError", "HubName", "parse_name"]

PREFIX = "hf-hub:"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


class HubError(ModelFileError):
    """The Hub can't be read from or written to: no network, no such repository, no access, a damaged download, ..."""


@dataclass(frozen=True)
class HubName:
    """``org/name`` and, where one was given, a branch, tag or commit hash."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def parse_name(text: str) -> HubName | None:
    """The Hub name in ``text``: ``org/name``, ``org/name@revision``, or either after ``hf-hub:``. None for other text.

    Raises:
        HubError: ``hf-hub:`` before something that is no name.
    """
    repo_id, at, revision = text.removeprefix(PREFIX).partition("@")
    # With the prefix, the few old repositories without an owner can be named too.
    pattern = f"({_WORD}/)?{_WORD}" if text.startswith(PREFIX) else f"{_WORD}/{_WORD}"
    good = re.fullmatch(pattern, repo_id) is not None and (not at or re.fullmatch(r"[^\s@]+", revision) is not None)
    if not good:
        if text.startswith(PREFIX):
            raise HubError(f"{text!r} is no name on the Hub: write {PREFIX}org/name or {PREFIX}org/name@revision")
        return None
    return HubName(repo_id, revision if at else None)
