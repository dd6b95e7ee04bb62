"""What an export holds, shard by shard: the manifest of a finished one, the journal of one under way, and the check
that the files are still those.

A shard is a block of images of one class, ``count`` files from number ``first``. Its hash is the SHA-256 of these files
one after another, what ``cat 000064.png 000065.png ... | sha256sum`` prints. The manifest is written at the end, and
says so; until then every finished shard has a line in the journal, so that a run that was killed knows what it has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glem_augment.io import atomic_write

__all__ = ["JOURNAL", "Journal", "Shard", "differences", "digest", "intact", "read_manifest"]

JOURNAL = ".glem-export.jsonl"
# What must agree for two exports to be one. Of the record of its training nothing comes out in an image.
_IDENTITY = ("synthetic", "generator", "count", "settings", "classes", "weights_sha256", "model")


@dataclass(frozen=True)
class Shard:
    """``count`` images of the class in folder ``folder``, from number ``first``; see the module."""

    folder: str
    first: int
    count: int
    sha256: str
    not_finite: int

    def paths(self, root: Path) -> list[Path]:
        return [root / self.folder / image_name(number) for number in range(self.first, self.first + self.count)]


def image_name(number: int) -> str:
    return f"{number:06d}.png"


def digest(files: Iterable[bytes]) -> str:
    """Of the files' contents, one after another."""
    total = hashlib.sha256()
    for data in files:
        total.update(data)
    return total.hexdigest()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In what two manifests describe different images, for people: "temperature 0.8 (not 0.9)", ..."""
    found = []
    for key in _IDENTITY:
        x, y = (_plain(table.get(key), key) for table in (a, b))
        if x != y:
            if key == "settings" and isinstance(x, dict) and isinstance(y, dict):
                found += [f"{k} {x.get(k)} (not {y.get(k)})" for k in sorted({*x, *y}) if x.get(k) != y.get(k)]
            elif key in ("count", "generator"):
                found.append(f"{key} {x} (not {y})")
            else:
                found.append({"weights_sha256": "weights"}.get(key, key))
    return found


def _plain(value: Any, key: str) -> Any:
    if key == "model" and isinstance(value, dict):
        value = {name: part for name, part in value.items() if name != "training"}
    return json.loads(json.dumps(value, default=str))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at ``path``; None where there is none that can be read."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None


def shards_of(manifest: dict[str, Any]) -> list[Shard]:
    """The shards that a finished export lists."""
    entries = manifest.get("shards")
    return [shard for entry in entries if (shard := _shard(entry))] if isinstance(entries, list) else []


def _shard(entry: Any) -> Shard | None:
    """None for what is no shard: manifests and journals may be damaged, or somebody else's."""
    kinds = {"folder": str, "first": int, "count": int, "sha256": str, "not_finite": int}
    if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != kinds:
        return None
    return Shard(**entry)


def intact(root: Path, shards: Sequence[Shard], threads: int) -> Iterator[bool]:
    """Of every shard, in order, whether its files are there and have its hash."""

    def check(shard: Shard) -> bool:
        try:
            return digest(path.read_bytes() for path in shard.paths(root)) == shard.sha256
        except OSError:
            return False

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(check, shards)


class Journal:
    """The finished shards of an export under way, one line each; a line that a kill cut short is no line.

    Args:
        folder: of the export.
        identity: the manifest that the export will have, without results: a journal of another export is not believed.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path = folder / JOURNAL
        plain = {key: _plain(identity.get(key), key) for key in _IDENTITY}
        self.key = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        self._file: int | None = None

    def read(self) -> list[Shard]:
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
            entries = [json.loads(line) for line in lines]
        except (OSError, ValueError, RecursionError):
            return []
        if not entries or entries[0] != {"export": self.key}:
            return []
        return [shard for entry in entries[1:] if (shard := _shard(entry))]

    def start(self, shards: Iterable[Shard]) -> None:
        """Begin anew with ``shards``, which are known to be intact."""
        with atomic_write(self.path, "w") as file:
            file.write(json.dumps({"export": self.key}) + "\n")
            file.writelines(_line(shard) for shard in shards)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def add(self, shard: Shard) -> None:
        assert self._file is not None
        data = _line(shard).encode()
        if os.write(self._file, data) != len(data):
            raise OSError(f"cannot write {self.path}: the disk is full, or the quota used up")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def remove(self) -> None:
        self.close()
        with suppress(FileNotFoundError):
            self.path.unlink()


def _line(shard: Shard) -> str:
    return json.dumps(asdict(shard), ensure_ascii=False) + "\n"
