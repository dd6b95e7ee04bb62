"""Model folders: ``model.safetensors`` + ``config.json``, found by name, written atomically, read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from glem_augment.errors import ModelFileError
from glem_augment.hub.names import PREFIX, HubError, HubName, parse_name
from glem_augment.io import atomic_write, expand
from glem_augment.model.config import FORMAT_VERSION, GLEMConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Names of 200,000 classes fit. A parsed value takes up to 30 times its text, so that their number is bounded too.
MAX_CONFIG_BYTES, MAX_CONFIG_VALUES = 8 * 2**20, 600_000


def bundled_models() -> list[str]:
    """Names of the flows shipped inside the package, as used after ``bundled:``."""
    root = resources.files("glem_augment") / "bundled" / "models"
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []


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
    if text.startswith("bundled:"):
        wanted = text.removeprefix("bundled:")
        if wanted not in bundled_models():
            raise ModelFileError(f"no bundled model {wanted!r}; bundled are: {', '.join(bundled_models()) or 'none'}")
        folder = Path(str(resources.files("glem_augment") / "bundled" / "models" / wanted))
    else:
        folder = expand(text)
        if folder.is_file():
            raise ModelFileError(f"{text!r} is a file; give its folder, {str(folder.parent)!r}")
        remote = _remote_name(name, folder, revision)
        if remote is not None:
            # A mistyped folder looks like a name on the Hub.
            mistyped = "" if text.startswith(PREFIX) else f" (and there is no folder {str(folder)!r} here)"
            return _download(remote, mistyped, cache_dir, token)
    if revision is not None:
        raise ModelFileError(
            f"{text!r} is a folder on this machine and has no revision {revision!r}; for the Hub write hf-hub:org/name"
        )
    if not folder.is_dir():
        raise ModelFileError(
            f"no model at {text!r}: give a folder with {WEIGHTS} and {CONFIG}, org/name on the Hub, or bundled:"
            f"{'|'.join(bundled_models()) or 'NAME'}"
        )
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise ModelFileError(f"{folder} is not a model folder: it has no {file}")
    return Located(folder)


def _remote_name(name: str | Path, folder: Path, revision: str | None) -> HubName | None:
    """The name on the Hub that is meant, or None for a folder."""
    if isinstance(name, Path):
        return None
    remote = parse_name(name)
    if remote is None or (folder.is_dir() and not name.startswith(PREFIX)):
        return None
    if revision is None:
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


def write_model(folder: str | Path, config: GLEMConfig, state: dict[str, Tensor]) -> None:
    """Write both files, each to a temporary name first, weights before the config that announces them.

    Both are on the disk in full before either takes its name, so that a save that fails leaves the old pair whole.
    """
    folder = expand(folder)
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        _parse(text.encode())  # what could not be loaded again is not written
    except (UnicodeEncodeError, ModelFileError) as error:
        raise ModelFileError(f"the model's config can't be saved to {folder}: {error}") from None
    weights = weights_bytes(state)
    failure: OSError | None = None
    try:
        with atomic_write(folder / CONFIG, "w") as config_file:
            config_file.write(text)
            config_file.flush()
            os.fsync(config_file.fileno())
            try:
                with atomic_write(folder / WEIGHTS) as file:
                    file.write(weights)
            except OSError as error:
                failure = error
                raise
    except OSError as error:
        raise failure or error from None  # the outer one would name the config


def weights_bytes(state: dict[str, Tensor]) -> bytes:
    """The content of ``model.safetensors`` for a state dict: equal weights give equal bytes.

    Their SHA-256 names the weights: it is what ``sha256sum model.safetensors`` prints, and what the Hub shows.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # One entry: safetensors writes several in random order.
    return safetensors_bytes(tensors, metadata={"format": "pt"})


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the ``model.safetensors`` that saving ``model`` would write, hexadecimal."""
    return hashlib.sha256(weights_bytes(model.state_dict())).hexdigest()


def read_config(folder: Path) -> GLEMConfig:
    """Read and check ``config.json``. Raises ModelFileError naming the file and the field."""
    path = folder / CONFIG
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ModelFileError(f"it has {path.stat().st_size} bytes, more than a model's config can need")
        return _parse(data)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error}; download or save the model again") from None
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _parse(data: bytes) -> GLEMConfig:
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > MAX_CONFIG_VALUES:
        raise ModelFileError("it holds more values than a model's config can need")
    try:
        values = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"it can't be read as JSON: {error}; download or save the model again") from None
    _check_ours(values)
    return GLEMConfig.from_dict(values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal names they believe."""
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ModelFileError(f"it gives {ascii(twice)[:80]} twice")
    return table


def _no_constant(text: str) -> float:
    raise ModelFileError(f"it holds {text}, which is no number in JSON")


def _check_ours(values: Any) -> None:
    """Say so where a config is another library's, or of a later version, before its fields are judged one by one."""
    if not isinstance(values, dict):
        return
    version = values.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ModelFileError(
            f"it has format_version {version}, this glem-augment reads {FORMAT_VERSION}: install a newer version "
            "(pip install -U glem-augment), or load an older revision of the model"
        )
    if not {"flow", "class_ids", "format_version"} & set(values):
        hints = ("model_type", "architectures", "architecture", "_class_name", "library_name")
        what = ", ".join(f"{key} {str(values[key])[:60]}" for key in hints if key in values)
        raise ModelFileError(f"it is no config of glem-augment{f' ({what})' if what else ''}: check the name")
