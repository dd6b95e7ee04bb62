"""Publishing a model: files, card and a picture of samples, uploaded in one commit or not at all."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, RepoCard, constants
from torchvision.utils import save_image

from glem_augment.devices import evaluating
from glem_augment.errors import HubError
from glem_augment.hub.cards import SAMPLES, CardFacts, model_card, records
from glem_augment.hub.download import LIBRARY, HubName, hub_errors
from glem_augment.io import atomic_write
from glem_augment.model.glem import GLEM

CARD = "README.md"
# A card with this line was generated and is replaced by the next push. A card without it was edited by hand.
_GENERATED = "<!-- Written by glem-augment. Remove this line to keep your edits when you push again. -->"
_ROWS, _COLUMNS = 16, 8  # of the picture of samples
_log = logging.getLogger(__name__)


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
        samples: draw the picture of samples, which takes seconds to minutes, depending on the size of the flow.
        license, license_name, license_link, datasets, metrics: for the card, see `CardFacts`.
        target: `commit_message`, `private`, `token` and `revision`, see `upload`.

    Returns:
        The commit; `from_pretrained(repo_id, revision=info.oid)` loads exactly these weights.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        ModelFileError: the weights are not finite. ValueError: metrics that `glem eval` did not write.
    """
    facts = CardFacts(license, license_name, license_link, datasets, metrics)
    return upload(repo_id, "model", partial(write_repository, model, facts, samples=samples), **target)


def write_repository(model: GLEM, facts: CardFacts, repo_id: str, folder: Path, samples: bool = True) -> None:
    """Write what a push would upload to an empty folder; see `push_to_hub`."""
    for record in records(model.config.training):
        if str(Path.home()) in str(record.get("data")):
            _log.warning("config.json names the folder of the training images, %s, and is uploaded", record["data"])
    card = model_card(model, repo_id, facts, samples)
    model.save(folder)
    GLEM.from_pretrained(folder)  # weights that can't be loaded again are refused
    if samples:
        _draw_samples(model, folder / SAMPLES)
    write_card(card, folder)


def _draw_samples(model: GLEM, path: Path) -> None:
    """Draw one row of samples per class, of at most 16 evenly spread classes."""
    classes = torch.linspace(0, model.num_classes - 1, min(model.num_classes, _ROWS)).long()
    with evaluating(model):
        images = model.sample(classes.repeat_interleave(_COLUMNS), generator=torch.Generator().manual_seed(0))
    save_image(images, path, nrow=_COLUMNS)


def write_card(card: RepoCard, folder: Path) -> None:
    """Write a card to `folder`, marked as generated; warn if it has to say that the licence is unknown."""
    if card.data.get("license") is None:
        _log.warning(
            "no licence is given, so the card says that it is unknown. Samples inherit the licence of the images that "
            "the flow was trained on: state it with license= (--license)"
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
        # Before the files are written, which may take hours: a missing permission should show first.
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
            card: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
            keep_card = False
            if api.file_exists(repo_id, CARD, **card):
                # The user's cache may hold an older one.
                path = api.hf_hub_download(repo_id, CARD, **card, force_download=True)
                text = Path(path).read_text(encoding="utf-8", errors="replace")
                keep_card = _GENERATED not in text
            if keep_card:
                _log.warning("%s has a card written by hand: it is kept, and may no longer fit the rest", repo_id)
            return api.upload_folder(
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=folder,
                commit_message=commit_message or f"Upload with {LIBRARY}",
                revision=revision,
                ignore_patterns=[CARD] if keep_card else None,
                delete_patterns=replace,
            )
