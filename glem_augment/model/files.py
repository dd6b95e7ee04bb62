"""Model folders, `model.safetensors` beside `config.json`: written atomically, validated on load.

The files may come from a stranger. A config of a few hundred bytes can describe a model of any size. So the model is
built without memory, and gets memory only once the header of the weights file has its tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from glem_augment.classes.classes import Classes
from glem_augment.classes.gaussians import ClassGaussians, ClassModel
from glem_augment.classes.modes import SHRUNK, ClassModes
from glem_augment.codec.autoencoder import StandardisedAutoencoder, latent_shape
from glem_augment.codec.published import open_autoencoder
from glem_augment.errors import HubError, ModelFileError
from glem_augment.flows.build import flow_class
from glem_augment.io import Limits, atomic_write, expand, load_weights, open_tensors
from glem_augment.model.config import LOWEST_VARIANCE, MAX_CONFIG_BYTES, GLEMConfig
from glem_augment.model.latent_model import largest_change
from glem_augment.parts import CUSTOM, check_options, kind_of, kinds, recorded

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CHECKPOINT = "checkpoint.pt"  # of a run of `glem train`

_LEAST_ENTRY = 50  # bytes of a tensor in a header: `"a":{"dtype":"F16","shape":[],"data_offsets":[0,2]}`
# Errors far above rounding, of half precision too; a flow moves an image only where it gives it back as well.
_PROBE_NOISE, _PROBE_ERROR = 0.01, 0.25 / 255
SCALES = (1e-8, 1e8)  # of standard deviations or their inverses; real ones lie far inside
_BUNDLED = Path(__file__).parents[1] / "bundled" / "models"

Model = TypeVar("Model", bound=nn.Module)


# ---- folders -----------------------------------------------------------------------------------------------------


def bundled_models() -> list[str]:
    """Names of the models shipped inside the package, as used after `bundled:`."""
    return sorted(entry.name for entry in _BUNDLED.iterdir() if entry.is_dir())


def local_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a model on this machine: `bundled:NAME` or a folder; None if there is no such folder.

    ModelFileError: no such bundled model, a path that is a file or nearly the name of a folder beside it, or a folder
    that lacks one of the two files.
    """
    text = os.fspath(name)
    if text.startswith("bundled:"):
        wanted = text.removeprefix("bundled:")
        if wanted not in bundled_models():
            raise ModelFileError(f"no bundled model {wanted!r}; bundled are: {', '.join(bundled_models())}")
        folder = _BUNDLED / wanted
    else:
        folder = expand(text)
    if folder.is_file():
        raise ModelFileError(f"{text!r} is a file; give its folder, {str(folder.parent)!r}")
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        # Only the Hub has revisions.
        near = [] if text.startswith("hf-hub:") or "@" in text else get_close_matches(folder.name, beside, 1)
        if near:
            raise ModelFileError(
                f"no model at {text!r}; did you mean {folder.parent / near[0]}? For the Hub write hf-hub:..."
            )
        return None
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise ModelFileError(_unfinished(folder) or f"{folder} is not a model folder: it has no {file}")
    return folder


def hub() -> Any:
    """The module that downloads from the Hub, imported when it is needed."""
    from glem_augment.hub import client

    return client


def find_folder(name: str | os.PathLike[str], revision: str | None, **client: Any) -> tuple[Path, str | None]:
    """The folder of a model, and `org/name@commit` if it was downloaded. Errors as in `local_folder`, or a HubError."""
    folder = local_folder(name)
    if folder is None:
        return hub().download_model(name, revision=revision, **client)
    if revision is not None:
        raise ModelFileError(
            f"{str(name)!r} is a folder and has no revision {revision!r}; for the Hub write hf-hub:..."
        )
    return folder, None


def find_autoencoder(
    name: str,
    image_shape: Sequence[int],
    sha256: str | None = None,
    options: Mapping[str, Any] | None = None,
    **client: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """`open_autoencoder`, with downloads from the Hub, or a registered codec for images of `image_shape`."""
    if name in kinds("codec") and not sha256:
        check_options(kinds("codec")[name], "codec", options or {})
        codec = kinds("codec")[name]((image_shape[0], image_shape[1], image_shape[2]), **(options or {}))
        return codec, codec_facts(codec)
    return open_autoencoder(name, lambda text: hub().download_weights(text, **client), sha256)


def codec_facts(codec: nn.Module) -> dict[str, Any]:
    """The entry of a user's codec or autoencoder in a config. ValueError: options that a config can't hold."""
    kind = kind_of("codec", codec)
    options = {} if kind is None else recorded(codec)
    return {"name": kind or CUSTOM, "sha256": "", **({"options": options} if options else {})}


def _unfinished(folder: Path) -> str | None:
    """How to finish an unfinished run of `glem train`; None for another folder."""
    if not (folder / CHECKPOINT).exists():
        return None
    return f"{folder} is a run of glem train that has not finished: run the same command with --resume"


def write_model(folder: str | os.PathLike[str], config: GLEMConfig, state: dict[str, Tensor]) -> None:
    """Write both files so that a failed save leaves the old pair whole.

    ModelFileError, TypeError, ValueError: a config that can't be saved. OSError: see `atomic_write`.

    Both are on the disk in full before the weights, then the config, are renamed.
    """
    folder = expand(folder)
    text, weights = config.to_json(), weights_bytes(stored(config, state))
    with atomic_write(folder / CONFIG) as config_file:
        config_file.write(text)
        config_file.flush()
        os.fsync(config_file.fileno())
        with atomic_write(folder / WEIGHTS) as weights_file:
            weights_file.write(weights)


def check_parts(model: Any) -> None:
    """ModelFileError: the flow, the codec or the classes are not of the kinds that the config names."""
    wanted = flow_class(model.config.flow)
    named = model.config.autoencoder
    codec = None if named is None else kinds("codec").get(named["name"], StandardisedAutoencoder)
    pairs: list[tuple[Any, Any]] = [
        (model.latent_classes, Classes),
        (model.gaussians, ClassGaussians),
        (model.modes, ClassModes),
    ]
    if (fitted := model.latent_classes.fitted) is not None:
        pairs.append((fitted, kinds("class model").get(str(kind_of("class model", fitted)), ClassModel)))
    pairs += [(model.flow, wanted), *([] if named is None or named["name"] == CUSTOM else [(model.codec, codec)])]
    for part, kind in pairs:
        if part is not None and kind is not None and type(part) is not kind:
            raise ModelFileError(
                f"{type(part).__name__} would be loaded as {kind.__name__}: register the class of a flow, a codec or a "
                "class model, and make the model with it; other objects can't be saved"
            )


def stored(config: GLEMConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` that the model's file holds, by their names there.

    An autoencoder, which the config names, is not in it. The file's names are older than the model's.
    """
    return {_name_in_file(name): tensor for name, tensor in state.items() if not name.startswith("codec.autoencoder.")}


def _name_in_file(name: str) -> str:
    room, _, rest = name.partition(".")
    return {"latent_classes": rest, "codec": f"autoencoder.{rest}"}.get(room, name)


def weights_bytes(state: dict[str, Tensor]) -> bytes:
    """The content of `model.safetensors` for a state dict. Equal weights give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # A single entry of metadata, because safetensors writes several in random order.
    return safetensors_bytes(tensors, metadata={"format": "pt"})


def weights_sha256(model: Any) -> str:
    """SHA-256 of the `model.safetensors` that saving `model` would write, as `sha256sum` prints it."""
    return hashlib.sha256(weights_bytes(stored(model.config, model.state_dict()))).hexdigest()


def private_sha256(model: Any) -> str:
    """SHA-256 of all that saving a private model writes, weights and config, but for this checksum itself."""
    facts = model.config.to_dict()
    facts["privacy"] = {name: value for name, value in facts["privacy"].items() if name != "sha256"}
    text = json.dumps(facts, sort_keys=True) + weights_sha256(model)
    return hashlib.sha256(text.encode()).hexdigest()


def check_canonical(folder: Path, model: Any) -> None:
    """ModelFileError: the files of a private model are not, byte for byte, what saving it writes.

    Other files could hold more than the record and the weights: a key twice, metadata, or low bits of wider numbers.
    """
    written = {CONFIG: model.config.to_json(), WEIGHTS: weights_bytes(stored(model.config, model.state_dict()))}
    for name, content in written.items():
        if (folder / name).read_bytes() != content:
            raise ModelFileError(f"{folder / name} of a private model is not as its fit wrote it: get the folder again")


# ---- reading -----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> GLEMConfig:
    """Read and check `config.json`. A ModelFileError names the file and the field."""
    path = folder / CONFIG
    try:
        with open(path, "rb") as file:
            return GLEMConfig.from_json(file.read(MAX_CONFIG_BYTES + 1))
    except (OSError, ModelFileError) as error:
        raise ModelFileError(f"{path}: {error}") from None


def load_model(path: Path, config: GLEMConfig, build: Callable[[GLEMConfig], Model]) -> Model:
    """The model of a config, on the CPU, with the weights of a file, which may have any floating-point type.

    `build` makes the model that the config describes, on the device of the surrounding `torch.device`.
    ModelFileError: a truncated or foreign file; missing, extra or misshapen tensors; values that are not finite.
    """
    levels = zip(config.flow.get("depth", ()), config.flow.get("blocks", ()), strict=True)
    tensors = 2 + sum(depth * blocks for depth, blocks in levels)
    try:
        with open(path, "rb") as file:  # a deep flow takes memory as Python objects
            if int.from_bytes(file.read(8), "little") < _LEAST_ENTRY * tensors:
                raise ModelFileError(f"{path} has fewer than the {tensors} tensors of its config: it is damaged")
        if path.stat().st_size < len(config.class_ids) * config.dim:  # a mean per class, whatever the flow is
            raise ModelFileError(f"{path} is too small for the classes and the numbers of its config: it is damaged")
        with torch.device("meta"):  # shapes without memory
            model = build(config)
    except (ValueError, OSError, RuntimeError) as error:  # of the file, or of the flow that the config describes
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path.parent} can't be read: {error}") from None
    with open_tensors(path) as weights:
        # A user's flow and an autoencoder have their weights already.
        load_weights(path, weights, model, partial(stored, config), _limits(config))
    if config.covariance == "full":
        _check_full(path, model.modes)
    _probe(path, model.eval())
    return model


@torch.no_grad()
def _probe(path: Path, model: Any) -> None:
    """ModelFileError: the flow does not give back numbers that are drawn from four of its classes."""
    generator, classes = torch.Generator().manual_seed(0), torch.linspace(0, model.num_classes - 1, 4).long()
    h = model.inverse(model.gaussians.sample(classes, generator=generator))
    # With noise, because rounded numbers are given back even where digits are lost.
    h = h + _PROBE_NOISE * torch.randn(h.shape, generator=generator).to(h)
    if not float(largest_change(h, model.inverse(model.encode_numbers(h)[0])).max()) < _PROBE_ERROR:
        raise ModelFileError(f"{path}: its weights make no invertible flow; download or save the model again")


def _limits(config: GLEMConfig) -> dict[str, Limits]:
    """Lowest and highest values of tensors in the file."""
    limits = dict.fromkeys(("modes.scales", "modes.rest", "modes.shared_scales"), (0.0, math.inf))
    whiten = "fitted.coordinates.whiten"
    for name in ("modes.directions", "modes.shared_directions", "fitted.directions", f"{whiten}.directions"):
        limits[name] = -1.02, 1.02  # of unit vectors, in half precision too
    limits["modes.counts"] = 0.0, 2.0**40
    limits["autoencoder.std"] = SCALES
    if (config.classes or {}).get("kind") == "covariances":
        limits[f"{whiten}.scale"] = limits[f"{whiten}.gain"] = SCALES
        for name in ("variances", "rest", "drawn_variances", "drawn_rest"):
            limits[f"fitted.{name}"] = SCALES
    if config.psi is None:
        limits["gaussians.s"] = LOWEST_VARIANCE, math.inf
    if config.flow.get("whiten"):
        limits["flow.whiten.scale"] = limits["flow.whiten.gain"] = SCALES
    return limits


def _check_full(path: Path, modes: Any) -> None:
    """ModelFileError: covariances of `ClassModes.log_prob` that have no inverse in float64.

    They are the pooled covariance, scaled, plus a covariance of each class. So the least eigenvalue of the first must
    exceed the rounding of the sum.
    """
    own = (modes.scales.square() * modes.directions.square().sum(2)).sum(1) + modes.rest.sum(1)
    largest = float(own.max()) + 4 * float(modes.mean.square().sum(1).max())
    rows = modes.shared_scales[:, None].double() * modes.shared_directions.double()
    pooled = SHRUNK * rows.T @ rows
    rounding = 16 * modes.dim * torch.finfo(torch.float64).eps * (largest + float(pooled.trace()))
    pooled.diagonal().sub_(rounding)
    good = math.isfinite(rounding) and bool((modes.counts > 0).all())
    if not good or int(torch.linalg.cholesky_ex(pooled).info):
        raise ModelFileError(f"{path}: the covariances of its classes can't be inverted; save the model again")


def autoencoder_of(folder: Path, config: GLEMConfig, given: nn.Module | None, **client: Any) -> nn.Module | None:
    """The autoencoder of a saved model: the user's, the one that the config names, or None.

    ModelFileError: it is missing or has changed, or the config has other shapes of images or of numbers.
    """
    path, named = folder / CONFIG, config.autoencoder
    if named is None:
        if given is not None:
            raise ModelFileError(f"{path} names no autoencoder: leave autoencoder= out")
        return None
    shape, options = config.image_shape, named.get("options")
    try:
        if given is None and named["name"] == CUSTOM:
            raise ModelFileError("this model has a codec or an autoencoder of the user's: give it as autoencoder=")
        if given is None:
            given = find_autoencoder(named["name"], shape, named["sha256"], options, **client)[0]
        found: object = latent_shape(given, shape)
    except HubError:
        raise
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    except ValueError as error:
        found = error
    if found != config.flow_shape:
        raise ModelFileError(
            f"{path}: images {list(shape)} and numbers {list(config.flow_shape)} do not belong to the autoencoder: "
            f"{found}"
        )
    return given
