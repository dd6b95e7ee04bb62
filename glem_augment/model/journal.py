"""The releases of a private run, in a file of the model's folder: a run that was interrupted goes on from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from glem_augment.classes.privacy import Privacy
from glem_augment.classes.private import Tensors
from glem_augment.distributed import gather, is_primary
from glem_augment.errors import GLEMError, ModelFileError
from glem_augment.io import atomic_write
from glem_augment.model.weights import CONFIG

RELEASES = "releases.safetensors"  # removed with the model saved


class Journal:
    """The releases of a run. A second release would spend the promise's budget a second time.

    Args:
        path: of the file; None: nothing is kept.
        facts: describe the run; a file of another run is an error.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, json.dumps(facts, sort_keys=True)
        self.found: dict[str, Tensor] = {}
        if path is not None and path.is_file():
            if _facts(path) != json.loads(self.facts):
                raise GLEMError(
                    f"{path} holds the releases of a run with other options. They are spent, so keep the file: give "
                    "another folder (--out), and glem info of both folders says the total"
                )
            warnings.warn(
                f"{path} has releases of an interrupted run, which are used: nothing is released twice. If the images "
                "have changed since, stop, and give another folder (--out)",
                stacklevel=6,  # the caller of GLEM.fit
            )
            self.found = load_file(path)
        self.found = gather(self.found)[0]  # ranks without this folder go on with the same step

    def step(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of the release `name`, from the file or from `make`; kept on the disk before they are used."""
        own = {key.partition("/")[2]: value for key, value in self.found.items() if key.startswith(f"{name}/")}
        if own:
            return own
        made = make()
        self.found.update({f"{name}/{key}": value.contiguous() for key, value in made.items()})
        if self.path is not None and is_primary():
            with atomic_write(self.path) as file:
                file.write(save(self.found, metadata={"facts": self.facts}))
        return made


def unfinished(folder: Path) -> Privacy | None:
    """The promise of a private run in this folder that has released something, and saved no model; None: no such run.

    ModelFileError: its file can't be read.
    """
    path = folder / RELEASES
    return Privacy(*_facts(path)["privacy"]) if path.is_file() and not is_private(folder) else None


def is_private(folder: Path) -> bool:
    """Whether a folder holds a private model."""
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("privacy") is not None
    return False


def _facts(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
            return facts
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} can't be read: {error}; remove it, and count its release as spent") from None
