"""Writing to the Hub: a repository, a branch, and one commit with all files, or none of them."""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.utils import validate_repo_id

from glem_augment.hub.download import LIBRARY, library_version, usable_token
from glem_augment.hub.errors import Kind, chain, classify, endpoint, explain, status
from glem_augment.hub.names import HubError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CARD = "README.md"
# A card with this line was generated and is written anew with the next push; one without it is somebody's own.
GENERATED = "<!-- Written by glem-augment. Remove this line to keep your edits when you push again. -->"
_log = logging.getLogger(__name__)


def check_name(repo_id: str) -> None:
    """HubError for what the client would not take as the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise explain(error, repo_id, None, writing=True) from error


def prepare(
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Make sure that there is a repository, and a branch, to commit to. Asks what can be refused before work is done.

    Args:
        repo_id: ``org/name``, or ``name`` under the token's own user.
        repo_type: "model" or "dataset".
        private: of a new repository; of one that exists, what it has to be. None: public if new (or as the owner's
            organisation has set it), and anything if it exists.
        token: with write access; None or True: the stored one.
        revision: branch to commit to, started from ``main`` where it does not exist; None: ``main``.
        create_pr: a pull request will be opened: the repository is somebody else's, and is there.

    Returns:
        The repository's full name.

    Raises:
        HubError: naming repository, revision and fix.
    """
    if token is False:
        raise HubError(f"writing to {repo_id!r} takes a token: give token=, or leave it out to use the stored one")
    check_name(repo_id)
    api = _api(repo_id, token)
    try:
        if not create_pr:
            visibility = {} if private is None else {"private": private}
            repo_id = api.create_repo(repo_id, repo_type=repo_type, exist_ok=True, **visibility).repo_id
        _check_visibility(api, repo_id, repo_type, private)
        if not create_pr and revision is not None and revision != constants.DEFAULT_REVISION:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    except HubError:
        raise
    except Exception as error:  # the client's errors depend on its version and on the HTTP library below it
        raise explain(error, repo_id, revision, repo_type=repo_type, writing=True) from error
    return repo_id


def commit(
    repo_id: str,
    files: Mapping[str, Path],
    message: str,
    *,
    repo_type: str = "model",
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    delete_others_in: str | None = None,
) -> CommitInfo:
    """Commit ``files`` (path in the repository -> file on disk) to a repository that `prepare` has named.

    A card that somebody wrote or edited by hand is left as it is, with a warning.

    Args:
        delete_others_in: a folder of the repository, from which files that are not among ``files`` are removed.

    Returns:
        The commit: ``oid`` (its hash), ``commit_url``, ``pr_url``.

    Raises:
        HubError: naming repository, revision and fix; nothing has been committed then.
    """
    files, api = dict(files), _api(repo_id, token)
    try:
        if CARD in files and _own_card(api, repo_id, repo_type, revision):
            _log.warning("%s has a card written by hand: it is kept, and may no longer fit the rest", repo_id)
            del files[CARD]
        others: list[Any] = []
        if delete_others_in is not None:
            present = api.list_repo_files(repo_id, revision=revision, repo_type=repo_type)
            left = [name for name in present if name.startswith(f"{delete_others_in}/") and name not in files]
            others = [CommitOperationDelete(name) for name in left]

        def send(sources: Mapping[str, Any]) -> CommitInfo:
            return api.create_commit(
                repo_id,
                [*(CommitOperationAdd(name, source) for name, source in sources.items()), *others],
                commit_message=message,
                repo_type=repo_type,
                revision=revision,
                create_pr=create_pr,
            )

        try:
            return send({name: str(path) for name, path in files.items()})
        except Exception as error:
            if not _without_xet(error):
                raise
            _log.info("%s does not speak Xet; uploading through Git LFS", endpoint())
            with contextlib.ExitStack() as stack:
                # The client sends open files through Git LFS, and all others through Xet wherever it is installed.
                return send({name: stack.enter_context(open(path, "rb")) for name, path in files.items()})
    except HubError:
        raise
    except Exception as error:  # see `prepare`
        raise explain(error, repo_id, revision, repo_type=repo_type, writing=True) from error


class _Api(HfApi):
    """The client, for servers too that cannot judge the metadata of a card: it asks before every commit of one."""

    def _validate_yaml(self, content: str, **options: Any) -> None:
        try:
            super()._validate_yaml(content, **options)
        except Exception as error:
            # What the server finds wrong with the card begins so; all else is about the question, not the card.
            if str(error).startswith("Invalid metadata") or not _unknown_address(error):
                raise
            _log.info("%s does not validate cards", endpoint())


def _unknown_address(error: BaseException) -> bool:
    """404 or 405, or an answer that is not JSON."""
    return any(status(link) in (404, 405) or type(link).__name__ == "JSONDecodeError" for link in chain(error))


def _api(repo_id: str, token: str | bool | None) -> HfApi:
    return _Api(library_name=LIBRARY, library_version=library_version(), token=usable_token(token, repo_id))


def _without_xet(error: BaseException) -> bool:
    """Whether large files were refused because the server has no Xet storage. The Hub has it; others that speak its
    protocol often have Git LFS alone, and the client, which does not ask, is told that there is no such address."""
    texts = [str(link) for link in chain(error)]
    return any("xet-write-token" in text and re.search(r"\b(400|404|405|410|501)\b", text) for text in texts)


def _own_card(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    """Whether the card that is there now is somebody's own.

    Raises:
        HubError: that can't be told.
    """
    # A cache of its own: from the user's the client would give an older card where the Hub fails, and there it would
    # move the branch to a commit whose weights the cache does not have.
    with tempfile.TemporaryDirectory(prefix="glem-card-") as cache:
        try:
            path = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision, cache_dir=cache)
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except Exception as error:
            kind, link = classify(error)
            # The Hub says what is missing; other servers may say 404 alone. That the repository is there is known.
            if kind is Kind.NO_FILE or (kind is Kind.HTTP and status(link) == 404):
                return False
            why = explain(error, repo_id, revision, repo_type=repo_type, writing=True, cache_dir=cache)
            raise HubError(
                f"the present card of {repo_id!r} can't be read, and may hold edits that a push must not overwrite: "
                f"nothing was uploaded; {why}"
            ) from error
    return bool(text.strip()) and GENERATED not in text


def _check_visibility(api: HfApi, repo_id: str, repo_type: str, private: bool | None) -> None:
    """The client leaves a repository that exists as it is: private weights must not end up in a public one."""
    if private is None:
        return
    if bool(api.repo_info(repo_id, repo_type=repo_type).private) != private:
        there, wanted = ("public", "private") if private else ("private", "public")
        raise HubError(
            f"{repo_id!r} exists and is {there}, not {wanted} as asked: change that in the settings on its page, or "
            "choose another name; nothing was uploaded"
        )
