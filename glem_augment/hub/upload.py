"""Publishing a model: its files, its card and a picture of samples, uploaded in one commit or not at all."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torchvision.utils import save_image

from glem_augment.errors import ModelFileError
from glem_augment.hub.cards import GENERATED, SAMPLES, CardFacts, model_card, records
from glem_augment.hub.files import LIBRARY, HubError, HubName, hub_errors
from glem_augment.io import atomic_write
from glem_augment.model.glem import GLEM

__all__ = [
    "CARD",
    "check_name",
    "check_new_folder",
    "commit_folder",
    "open_repository",
    "push_to_hub",
    "warn_without_licence",
    "write_card",
    "write_repository",
]

CARD = "README.md"
_ROWS, _COLUMNS = 16, 8  # of the picture of samples
_log = logging.getLogger(__name__)


def push_to_hub(
    model: GLEM,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Sequence[Any] = (),
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    samples: bool = True,
) -> CommitInfo:
    """Upload weights, config, a model card and a picture of samples to the Hugging Face Hub, in one commit.

    Args:
        model: the model.
        repo_id: `org/name`; made if it does not exist.
        license, license_name, license_link, datasets, metrics: facts for the card, see `CardFacts`.
        commit_message: by default one that names the library.
        private: whether a new repository is private; an existing one of the other kind is refused.
        token: a token with write access, by default the stored one.
        revision: the branch to commit to, made if it does not exist; by default `main`.
        create_pr: open a pull request instead of committing.
        samples: draw the picture of samples, which takes seconds to minutes, depending on the size of the flow.

    Returns:
        The commit; `from_pretrained(repo_id, revision=info.oid)` loads these very weights.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        ModelFileError: the weights are not finite. ValueError, FileNotFoundError: metrics that can't be read.
    """
    facts = CardFacts(license, license_name, license_link, datasets, metrics)
    target: dict[str, Any] = dict(token=token, revision=revision, create_pr=create_pr)
    warn_without_licence(facts, repo_id)
    _warn_of_home_folder(model)
    # Everything that can be wrong with the model and the arguments is found before the Hub is asked, and everything
    # that the Hub can refuse before samples are drawn.
    _check_finite(model)
    model_card(model, repo_id, facts)
    repo_id = open_repository(repo_id, "model", private=private, **target)
    with tempfile.TemporaryDirectory(prefix="glem-push-") as name:
        write_repository(model, Path(name), repo_id, facts, samples)
        message = commit_message or f"Upload a flow of {model.num_classes} classes with {LIBRARY}"
        return commit_folder(repo_id, "model", Path(name), message, **target)


def write_repository(
    model: GLEM, folder: Path, repo_id: str, facts: CardFacts, samples: bool = True
) -> dict[str, Path]:
    """Write what a push would upload: weights, config, card and a picture of samples.

    Args:
        model: the model; its weights must be finite.
        folder: an empty folder, made if missing.
        repo_id: `org/name`, for the card.
        facts: what the model does not know about itself, above all the licence.
        samples: whether to draw `samples.png`.

    Returns:
        Names in the repository -> files.

    Raises:
        ModelFileError: the weights are not finite.
        ValueError, FileNotFoundError: the metrics can't be read.
        FileExistsError: the folder is not empty.
    """
    check_new_folder(folder)
    _check_finite(model)
    card = model_card(model, repo_id, facts, samples)
    model.save(folder)
    if samples:
        _draw_samples(model, folder / SAMPLES)
    write_card(card, folder)
    return {path.name: path for path in sorted(folder.iterdir())}


def check_new_folder(folder: Path) -> None:
    """Raise FileExistsError for a folder that is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder, so that nothing is lost")


def check_name(repo_id: str) -> None:
    """Raise HubError for text that can't be the name of a repository."""
    with hub_errors(HubName(repo_id)):
        validate_repo_id(repo_id)


def open_repository(
    repo_id: str,
    repo_type: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Make sure that there is a repository and a branch to commit to.

    Args:
        repo_id: `org/name`, or `name` under the token's own user.
        repo_type: "model" or "dataset".
        private: the visibility of a new repository; an existing one must have it already. None accepts either.
        token: a token with write access; None means the stored one.
        revision: the branch to commit to, which starts from `main` if it is new.
        create_pr: a pull request will be opened, so the repository exists and may be somebody else's.

    Returns:
        The repository's full name.

    Raises:
        HubError: the Hub refuses, or the repository has another visibility.
    """
    with hub_errors(HubName(repo_id, revision), repo_type):
        api = HfApi(token=token, library_name=LIBRARY)
        if not create_pr:
            repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        # The client leaves an existing repository as it is. Private weights must not end up in a public one.
        if private is not None and bool(api.repo_info(repo_id, repo_type=repo_type).private) != private:
            there, wanted = ("public", "private") if private else ("private", "public")
            raise HubError(
                f"{repo_id!r} exists and is {there}, not {wanted} as asked: change that in the settings on its page, "
                "or choose another name; nothing was uploaded"
            )
        if not create_pr and revision not in (None, constants.DEFAULT_REVISION):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    return repo_id


def commit_folder(
    repo_id: str,
    repo_type: str,
    folder: Path,
    message: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    replace: str | None = None,
) -> CommitInfo:
    """Commit all files of `folder` at once. A card that somebody wrote or edited by hand is kept, with a warning.

    Args:
        replace: a pattern such as "data/*"; files of the repository that match it and are not in `folder` are deleted.

    Raises:
        HubError: nothing has been committed.
    """
    with hub_errors(HubName(repo_id, revision), repo_type):
        api = HfApi(token=token, library_name=LIBRARY)
        keep_card = _has_own_card(api, repo_id, repo_type, revision)
        if keep_card:
            _log.warning("%s has a card written by hand: it is kept, and may no longer fit the rest", repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[CARD] if keep_card else None,
            delete_patterns=replace,
        )


def write_card(card: object, folder: Path) -> None:
    """Write a card to `folder`, marked as generated."""
    with atomic_write(folder / CARD, "w") as file:
        file.write(f"{card}\n{GENERATED}\n")


def warn_without_licence(facts: CardFacts, repo_id: str) -> None:
    """Warn that the card will say that the licence is unknown."""
    if facts.license is None:
        _log.warning(
            "no licence is given, so the card of %s says that it is unknown. Samples inherit the licence of the "
            "images that the flow was trained on: state it with license= (glem push --license)",
            repo_id,
        )


def _has_own_card(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> bool:
    # In a cache of its own: from the user's cache the client would return an older card if the Hub fails.
    with tempfile.TemporaryDirectory(prefix="glem-card-") as cache:
        try:
            path = api.hf_hub_download(repo_id, CARD, repo_type=repo_type, revision=revision, cache_dir=cache)
        except LocalEntryNotFoundError:  # a kind of EntryNotFoundError: the Hub gave no answer
            raise
        except EntryNotFoundError:
            return False
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    return bool(text.strip()) and GENERATED not in text


def _check_finite(model: GLEM) -> None:
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelFileError(f"{name} holds values that are not finite: the model could not be loaded again")


def _warn_of_home_folder(model: GLEM) -> None:
    at_home = re.compile(rf"(^|@){re.escape(str(Path.home()))}(/|$)")
    for record in records(model.config.training):
        data = str(record.get("data") or "")
        if at_home.search(data):
            _log.warning("config.json names the folder of the training images, %s, and will be uploaded", data)


def _draw_samples(model: GLEM, path: Path) -> None:
    """Draw one row of samples per class; of many classes, some that are spread evenly over all."""
    classes = torch.linspace(0, model.num_classes - 1, min(model.num_classes, _ROWS)).long()
    was_training = model.training
    model.eval()
    try:
        images = model.sample(classes.repeat_interleave(_COLUMNS), generator=torch.Generator().manual_seed(0))
    finally:
        model.train(was_training)
    save_image(images, path, nrow=_COLUMNS)
