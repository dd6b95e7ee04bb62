"""Publishing a flow: the files of its repository, and their way to the Hub."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glem_augment.hub.cards import SAMPLES, CardFacts, model_card, records
from glem_augment.io import atomic_write, save_png
from glem_augment.model.weights import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from glem_augment.model.glem import GLEM

__all__ = ["check_repository_folder", "push_model", "write_repository"]

_log = logging.getLogger(__name__)


def write_repository(
    model: GLEM, folder: Path, repo_id: str, facts: CardFacts | None = None, samples: bool = True
) -> dict[str, Path]:
    """Write what a push would upload: weights, config, card and a picture of samples.

    Args:
        model: any GLEM; it is read back from ``folder`` and checked before anything else is done.
        folder: made if missing; see ``check_repository_folder``.
        repo_id: "org/name", for the card.
        facts: what the model does not know, above all the licence.
        samples: draw ``samples.png``: a few seconds to minutes, by the size of the flow.

    Returns:
        Names in the repository -> files.

    Raises:
        ModelFileError: weights that could not be loaded again (values that are not finite).
        ValueError, FileNotFoundError: metrics that can't be read. OSError: the folder can't be written to.
        FileExistsError: it holds files of these names that an earlier call did not write.
    """
    check_repository_folder(folder)
    # The card first: it is what can be wrong about the arguments.
    card = model_card(model, repo_id, facts, samples)
    files = _write_model(model, folder)
    if samples:
        files |= _write_samples(model, folder, repo_id)
    return files | _write_card(card, folder)


def check_repository_folder(folder: Path) -> None:
    """FileExistsError where ``write_repository`` would write over files that it has not written."""
    from glem_augment.hub.upload import CARD, GENERATED

    there = [name for name in (CARD, CONFIG, WEIGHTS, SAMPLES) if (folder / name).exists()]
    card = folder / CARD
    if there and not (card.is_file() and GENERATED in card.read_text(encoding="utf-8", errors="replace")):
        raise FileExistsError(f"{folder / there[0]} is there already: give a new folder, for nothing to be lost")


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
        model: the flow.
        repo_id: `org/name`; made if missing.
        license, license_name, license_link: licence of the training images, which passes on to what the model draws, as
            an identifier of the Hub. Without it the card names none, and a warning says so.
        datasets: identifiers of the training data on the Hub.
        metrics: results of `glem eval`, as tables or JSON files.
        commit_message: by default one that names the library.
        private: whether a new repository is private; an existing one of the other kind is refused.
        token: one with write access, by default the stored one.
        revision: branch to commit to, made if missing; by default `main`.
        create_pr: open a pull request instead of committing.
        samples: draw the picture of samples.

    Returns:
        `huggingface_hub.CommitInfo`; `from_pretrained(repo_id, revision=info.oid)` loads these very weights.

    Raises:
        HubError: no network, no permission, ...; nothing has been committed then.
        ValueError, FileNotFoundError: a licence or metrics that can't be used.
    """
    facts = CardFacts(license, license_name, license_link, datasets, metrics)
    return push_model(
        model, repo_id, facts=facts, commit_message=commit_message, private=private, token=token, revision=revision,
        create_pr=create_pr, samples=samples,
    )[1]  # fmt: skip


def push_model(
    model: GLEM,
    repo_id: str,
    *,
    facts: CardFacts | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    samples: bool = True,
) -> tuple[str, CommitInfo]:
    """Upload ``model`` with its card, in one commit; see ``GLEM.push_to_hub``.

    Returns:
        The repository's full name, and the commit.
    """
    from glem_augment.hub.upload import commit, prepare

    facts = facts or CardFacts()
    if facts.license is None:
        _log.warning(
            "no licence is given, so the card of %s says that it is unknown. Samples inherit the licence of the "
            "training images: state it with license= (glem push --license)",
            repo_id,
        )
    at_home = re.compile(rf"(^|@){re.escape(str(Path.home()))}(/|$)")
    for record in records(model.config.training):
        data = str(record.get("data") or "")
        if at_home.search(data):
            _log.warning("config.json names the folder of the training images, %s, and will be uploaded", data)
    with tempfile.TemporaryDirectory(prefix="glem-push-") as name:
        folder = Path(name)
        model_card(model, repo_id, facts, samples)
        files = _write_model(model, folder)
        # Before the samples, which may take minutes: a missing permission should not.
        repo_id = prepare(repo_id, private=private, token=token, revision=revision, create_pr=create_pr)
        if samples:
            files |= _write_samples(model, folder, repo_id)
        files |= _write_card(model_card(model, repo_id, facts, samples), folder)
        message = commit_message or f"Upload a flow of {model.num_classes} classes with glem-augment"
        return repo_id, commit(repo_id, files, message, token=token, revision=revision, create_pr=create_pr)


def _write_model(model: GLEM, folder: Path) -> dict[str, Path]:
    model.save(folder)
    type(model).from_pretrained(folder)  # what could not be loaded again is not pushed
    return {name: folder / name for name in (CONFIG, WEIGHTS)}


def _write_samples(model: GLEM, folder: Path, repo_id: str) -> dict[str, Path]:
    from glem_augment.evaluation import preview

    was_training = model.training
    model.eval()
    try:
        picture = preview.compose(f"Samples of {repo_id}", "", [preview.samples(model, seed=0)])
    finally:
        model.train(was_training)
    save_png(picture, folder / SAMPLES)
    return {SAMPLES: folder / SAMPLES}


def _write_card(card: object, folder: Path) -> dict[str, Path]:
    from glem_augment.hub.upload import CARD, GENERATED

    with atomic_write(folder / CARD, "w") as file:
        file.write(f"{card}\n{GENERATED}\n")
    return {CARD: folder / CARD}
