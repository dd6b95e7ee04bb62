"""The checkpoints of a run's folder, and whether one belongs to the run at hand.

Three names, each always a whole file or absent:

- ``checkpoint.safetensors``: the newest state;
- ``checkpoint.previous.safetensors``: the one before, in case the newest is damaged;
- ``checkpoint.good.safetensors``: the state that a diverged run returns to. It is written at step 0 and at ends of
  epochs, never by the clock, so that where a run returns to does not depend on how fast or how often killed it was.

States that are the same are one file with two names, where the file system has hard links.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from glem_augment.data.dataset import ImageData
from glem_augment.errors import TrainingError
from glem_augment.io import atomic_write
from glem_augment.training.config import TrainConfig
from glem_augment.training.statefile import DamagedFileError, from_bytes, to_bytes

NEWEST, PREVIOUS, GOOD = (
    "checkpoint.safetensors",
    "checkpoint.previous.safetensors",
    "checkpoint.good.safetensors",
)
# Written by versions up to 0.1: a pickle, which this version does not read.
_PICKLED = "checkpoint.pt"
_FINGERPRINT_IMAGES = 16
# Settings that do not change what is learned may differ between the two halves of a run; of these, some change the
# order of additions, and with it the last bits.
_LAST_BITS = ("threads", "memory", "compile")
AFTER_THE_STEPS = {"refit_steps", "refit_beta", "modes_rank"}  # they change the model, but no step of the training
FREE = {
    "checkpoint_minutes", "max_minutes", "sample_every", "workers", "max_bad_steps", "max_rollbacks", *_LAST_BITS,
    *AFTER_THE_STEPS,
}  # fmt: skip
# What the steps of the same settings are. Since 2: the sum of the KLDs is divided by K d rather than by the number of
# pairs, and a flow whose Gaussians are fixed trains on all images from the start.
RULES = 2
# What glem_augment.io.atomic_write leaves behind when its process is killed.
_LEFT_OVER = re.compile(
    r"\.(checkpoint|metrics|model|config|run|skipped|codes|curves|epoch_\d+)\..*\.\d+-[0-9a-f]+\.tmp"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: ``facts`` (JSON: settings, counters) and ``tensors`` (on the CPU)."""

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run, as ``TrainConfig.to_dict`` gave them."""
        return self.facts["config"]

    @property
    def step(self) -> int:
        """E-steps taken."""
        return self.facts["step"]


class Checkpoints:
    """The checkpoints in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._newest_is_damaged = False

    def exist(self) -> bool:
        """Whether there is anything to resume from, damaged or not, of this version or an older one."""
        return any((self.folder / name).exists() for name in (NEWEST, PREVIOUS, GOOD, _PICKLED))

    def written_at(self) -> int:
        """When the newest was written, in ns. Raises FileNotFoundError where there is none."""
        return (self.folder / NEWEST).stat().st_mtime_ns

    def clean(self) -> None:
        """Remove the unfinished files that killed processes left behind; each may be as large as a checkpoint."""
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("samples/.*.tmp")]:
            if _LEFT_OVER.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor], good: bool = False) -> None:
        """Write the newest checkpoint; the newest so far becomes the previous one.

        Args:
            facts, tensors: see ``statefile.to_bytes``.
            good: a diverged run may return to this one.

        Raises:
            OSError: full disk, vanished folder and the like, naming the path; all checkpoints stay as they were.
        """
        require_folder(self.folder)
        data, path = to_bytes(facts, tensors), self.folder / NEWEST
        try:
            with atomic_write(path) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                # All is on the disk; from here on there are only renames. A kill between them can leave a good one that
                # is ahead of the newest: the run that goes on writes the same again.
                if good and not self._also_call(Path(file.name), GOOD):
                    with atomic_write(self.folder / GOOD) as second:
                        second.write(data)
                if path.exists() and not self._newest_is_damaged and not self._also_call(path, PREVIOUS):
                    os.replace(path, self.folder / PREVIOUS)
        except FileNotFoundError:
            require_folder(self.folder)  # the better message, where that is why
            raise
        self._newest_is_damaged = False

    def _also_call(self, path: Path, name: str) -> bool:
        """Give a file a second name, in place of what had it. False, changing nothing, where that can't be done."""
        link = self.folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            os.link(path, link)
            os.replace(link, self.folder / name)
        except OSError:
            return False
        finally:
            # Renaming one name of a file to another of its names is defined to do nothing.
            with suppress(OSError):
                link.unlink()
        return True

    def load(self) -> Checkpoint:
        """The newest checkpoint that can be read; a warning says so where that is not the newest there is.

        Raises:
            FileNotFoundError: there is none.
            TrainingError: there is none that can be read: all damaged, foreign, or of another version.
            OSError: one can't be opened (permissions, for example).
        """
        problems: list[str] = []
        for name in (NEWEST, PREVIOUS, GOOD):
            path = self.folder / name
            if not path.is_file():
                continue
            try:
                checkpoint = _read(path)
            except DamagedFileError as error:
                problems.append(f"{path} can't be used: {error}")
                continue
            if problems:
                self._newest_is_damaged = True
                warnings.warn(
                    f"{'; '.join(problems)}. Going on from the one before, {path} (step {checkpoint.step})",
                    stacklevel=3,
                )
            return checkpoint
        if problems:
            raise TrainingError(f"{'; '.join(problems)}. Restore one, or start over in another folder")
        if (self.folder / _PICKLED).exists():
            raise TrainingError(
                f"{self.folder / _PICKLED} was written by an older version of glem-augment, as a pickle, which this "
                "version does not read; finish that run with the older version, or start over in another folder"
            )
        raise FileNotFoundError(errno.ENOENT, f"no checkpoint at {self.folder / NEWEST}; start without --resume")

    def load_good(self) -> Checkpoint:
        """The state to return to after a divergence; the newest one, with a warning, where that was lost.

        Raises:
            TrainingError: neither can be read.
        """
        path = self.folder / GOOD
        try:
            return _read(path)
        except (FileNotFoundError, DamagedFileError) as error:
            why = "there is none" if isinstance(error, FileNotFoundError) else error
            warnings.warn(f"{path} can't be used ({why}); going on from the newest checkpoint", stacklevel=3)
        try:
            return self.load()
        except FileNotFoundError as error:
            raise TrainingError(f"the run diverged, and there is no checkpoint left in {self.folder}") from error


def _read(path: Path) -> Checkpoint:
    try:
        data = path.read_bytes()
    except OSError as error:
        if error.errno != errno.EIO:  # a bad sector is damage like any other
            raise
        raise DamagedFileError(f"it can't be read ({error.strerror})") from None
    facts, tensors = from_bytes(data)
    if not isinstance(facts.get("config"), dict) or type(facts.get("step")) is not int or facts["step"] < 0:
        raise DamagedFileError("it holds no settings or no step")
    return Checkpoint(path, facts, tensors)


def load_checkpoint(folder: Path) -> Checkpoint:
    """``Checkpoints(folder).load()``."""
    return Checkpoints(folder).load()


def require_folder(folder: Path) -> None:
    """Raise FileNotFoundError where the output folder has vanished, instead of starting a new one half-way."""
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"the output folder {folder} has vanished (removed, renamed or unmounted); the run can't go on",
        )


def data_fingerprint(data: ImageData) -> str:
    """A digest of shape, classes, labels and a few images, so that other pictures with the same labels are noticed."""
    digest = hashlib.sha256()
    digest.update(repr((data.image_shape, data.class_ids, len(data))).encode())
    digest.update(np.ascontiguousarray(data.targets).tobytes())
    rows = np.linspace(0, len(data) - 1, _FINGERPRINT_IMAGES).astype(np.int64)
    for x, _ in data.batches(rows, _FINGERPRINT_IMAGES):
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def check_same_run(checkpoint: Checkpoint, config: TrainConfig, fingerprint: str, data_name: str) -> None:
    """Raise TrainingError, naming what differs, unless ``checkpoint`` is of a run with these settings on these data.

    Settings that only change the order of additions are warned about: the last bits will differ, not what is learned.
    """
    folder = checkpoint.path.parent
    now = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in the file
    try:
        # A setting that did not exist yet was at what is its default now.
        then = TrainConfig.from_dict(checkpoint.config).to_dict()
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{checkpoint.path} holds settings that this version can't use: {error}") from None
    changed = [key for key in now if key not in FREE and then[key] != now[key]]
    if changed:
        pairs = ", ".join(f"{key}: {then[key]!r} then, {now[key]!r} now" for key in changed)
        raise TrainingError(f"{folder} holds a run with other settings ({pairs}); use the same or another folder")
    fixed = not (config.learn_mu or config.learn_sigma)
    if checkpoint.facts.get("rules", 1) != RULES and (config.repulsion == "kld" or fixed):
        raise TrainingError(
            f"{folder} holds a run of another version, whose steps were other ones with these settings; start again in "
            "another folder"
        )
    for key in _LAST_BITS:
        if then[key] != now[key]:
            warnings.warn(
                f"{folder} was trained with {key}={then[key]}, now {now[key]}: sums are taken in another order, so "
                "the weights will not be those of an uninterrupted run to the last bit",
                stacklevel=3,
            )
    if checkpoint.facts.get("fingerprint") != fingerprint:
        raise TrainingError(f"{folder} holds a run on other data than {data_name}; use another folder")


def init_of_run(checkpoint: Checkpoint, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the run of ``checkpoint`` started from, for the record: None, or the model's digest and name.

    Warns where ``given``, the model that is named now, is another one: the run goes on from its own weights.
    """
    if "init_from" not in checkpoint.facts:
        return given  # of an older version
    known = checkpoint.facts["init_from"]
    if known is not None and not (isinstance(known, dict) and isinstance(known.get("weights_sha256"), str)):
        raise TrainingError(f"{checkpoint.path} is damaged: init_from is {known!r:.100}")
    if given is not None and (known is None or known["weights_sha256"] != given["weights_sha256"]):
        began = "new weights" if known is None else f"the weights {known['weights_sha256'][:12]}"
        warnings.warn(
            f"the run in {checkpoint.path.parent} started from {began}, not from {given['weights_sha256'][:12]}, which "
            "is given now (--init): it goes on from its own checkpoint, and its record stays as it is",
            stacklevel=4,
        )
    return known
