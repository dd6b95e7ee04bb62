"""Autoencoders by name: `taef2`, which ships with the package, and `hub:org/name[@revision]`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from glem_augment.autoencoders.taesd import load_taesd
from glem_augment.errors import ModelFileError
from glem_augment.io import file_sha256

HUB = "hub:"
_BUNDLED = Path(__file__).parents[1] / "bundled" / "autoencoders"
_DIFFUSERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
_MOST_CONFIG = 2**20

# From a name on the Hub to the weights file, beside its config.json if there is one, and `org/name@commit`.
Fetch: TypeAlias = Callable[[str], tuple[Path, str]]


def open_autoencoder(name: str, fetch: Fetch, sha256: str | None = None) -> tuple[nn.Module, dict[str, str]]:
    """A published autoencoder, in eval mode and frozen, and what a model's config says of it.

    Args:
        name: `taef2`; or `hub:org/name` or `hub:org/name@revision`: weights of the TAESD family (`madebyollin/taesd`,
            `taesdxl`, `taesd3`, `taef1`, `taef2`), or, with the extra `diffusers`, any AutoencoderKL, AutoencoderTiny
            or AutoencoderDC.
        fetch: downloads from the Hub.
        sha256: of the weights file, where it is known; None: whatever is there.

    Returns:
        The module, and {"name", "sha256"}; the name is pinned to the commit that was found.

    Raises:
        ModelFileError: no such name, or a file that is damaged, foreign, or not the expected one. Its subclass
            `HubError`: it can't be had. ImportError: it needs diffusers.
    """
    bundled = sorted(entry.name for entry in _BUNDLED.iterdir() if entry.is_dir())
    if name in bundled:
        path, pinned = _BUNDLED / name / "model.safetensors", name
    elif name.startswith(HUB):
        path, found = fetch(name.removeprefix(HUB))
        pinned = HUB + found
    else:
        raise ModelFileError(f"no autoencoder {name!r}: give {', '.join(bundled)}, or {HUB}org/name")
    digest = file_sha256(path)
    if sha256 not in (None, digest):
        raise ModelFileError(f"the autoencoder {name} is not the one that the model was made with: {path} has changed")
    config = _config(path.with_name("config.json"))
    kind = config.get("_class_name", "AutoencoderTiny")
    # The TAESD family needs no further package. Its blocks all have 64 channels.
    ours = kind == "AutoencoderTiny" and set(config.get("encoder_block_out_channels", [64])) == {64}
    if not ours and kind not in _DIFFUSERS:
        raise ModelFileError(f"{name} is {str(kind)[:80]!r}; the autoencoders that can be used are {_DIFFUSERS}")
    module = load_taesd(path) if ours else _from_diffusers(path.parent, kind)
    return module, {"name": pinned, "sha256": digest}


def _config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ValueError("it is larger than a config can be")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise ModelFileError(f"{path} can't be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _from_diffusers(folder: Path, kind: str) -> nn.Module:
    try:
        from glem_augment.autoencoders.diffusers import load_diffusers
    except ImportError as error:
        raise ImportError(f"{kind} needs diffusers: pip install 'glem-augment[diffusers]' ({error})") from None
    return load_diffusers(folder, kind)
