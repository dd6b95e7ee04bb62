"""Weights of `jet-pytorch`, read as they are.

The package (PyPI, Apache-2.0) saves a `state_dict` as one safetensors file, with neither configuration nor classes. The
configuration follows from shapes and orders of tokens, except for three things, which are assumed as in the published
weights: heads have 64 channels by default; scales are twice a sigmoid; couplings of channels and tokens alternate as in
`flows.jet.KINDS`. The model has one class, a standard normal, until it is adapted.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.errors import ModelFileError
from glem_augment.flows import Flow, build_flow, resolve_preset
from glem_augment.flows.jet import KINDS, PATTERNS, order_of_tokens
from glem_augment.images.matching import ONE_CLASS
from glem_augment.io import copy_checked, expand, file_sha256, open_tensors
from glem_augment.model.config import GLEMConfig
from glem_augment.model.weights import hub

PREFIX = "jet:"
# Names of the projections in the file, by the half that a coupling splits.
_SPLITS = {"channels": "channel", "tokens": "spatial"}
_HEAD, _MOST_HEADER = 64, 2**22
# Parts of names there and here.
_NAMES = {
    "init_proj": "head", "final_proj": "tail", "encoder.blocks": "blocks", "encoder.ln": "norm", "ln1": "norm1",
    "ln2": "norm2", "mha.in_proj_": "qkv.", "mha.out_proj": "attend", "mlp.in_proj": "expand",
    "mlp.out_proj": "project", "pos_emb": "position",
}  # fmt: skip


def open_jet(text: str, build: Callable[..., Any], heads: int | None = None, **client: Any) -> Any:
    """The model with the flow in the file `text`, or in the repository of that name on the Hub.

    `build` makes it from config, flow and Gaussians. Without `heads` a warning gives the assumed number.
    """
    path, origin, licence = expand(text), None, None
    if not path.is_file():
        path, origin, licence = hub().download_weights(text, **client)
    config, flow = load_jet(path, heads)
    if heads is None:
        warnings.warn(
            f"{path} does not say how many heads its transformers have: {config.flow['heads']} are assumed, of {_HEAD} "
            "channels as in the published weights, and a scale of 2 sigmoid; give heads= if you know their number",
            stacklevel=3,
        )
    config.training = {"data": f"the images that {origin or path.name} was trained on", "license": licence}
    gaussians = ClassGaussians(1, math.prod(config.image_shape), None, initial_variance=1.0)
    model = build(config, flow, gaussians).eval().requires_grad_(False)
    model.origin, model.origin_file, model.jet = origin, path, (origin or str(path.absolute()), path)
    return model


def reference(model: Any) -> dict[str, str]:
    """For `GLEMConfig.base`: the Jet that has the flow of `model`, as it is now. ValueError: none has."""
    if model.jet is None:
        raise ValueError("weights='reference' is for flows that were loaded as jet:...; this one is not: save a copy")
    name, path = model.jet
    stored = load_jet(path)[1].state_dict()
    if not all(torch.equal(tensor.to(stored[key]), stored[key]) for key, tensor in model.flow.state_dict().items()):
        raise ValueError(f"weights='reference': the flow is no longer the flow of jet:{name}; save a copy")
    return {"jet": name, "sha256": file_sha256(path)}


def open_base(config: GLEMConfig, base: dict[str, str], build: Callable[..., Any], **client: Any) -> Any:
    """The Jet that a config refers to. ModelFileError: it is not there, or has changed."""
    name, digest = base["jet"], base["sha256"]
    try:
        model = open_jet(name, build, config.flow.get("heads"), **client)
        if (file_sha256(model.origin_file), model.config.flow) != (digest, config.flow):
            raise ModelFileError("the file has changed, or holds another flow")
    except (ValueError, OSError) as error:
        raise ModelFileError(f"the flow is stored in jet:{name} alone, which can't be used: {error}") from None
    return model


def load_jet(path: Path, heads: int | None = None) -> tuple[GLEMConfig, Flow]:
    """The flow in a safetensors file with the `state_dict` of `jet_pytorch.Jet`, on the CPU, and its config.

    `heads` is the number of heads of its transformers; None: width / 64. ModelFileError: no such file, a truncated or
    foreign one, or values that are not finite.
    """
    with open_tensors(path, _MOST_HEADER) as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
        orders = {over: _orders(file.get_tensor(f"{name}_projections")) for over, name in _SPLITS.items()}
        config = _config(shapes, orders, heads)
        with torch.device("meta"):  # shapes without memory
            flow = build_flow(config.flow)
        _check(path, shapes, flow.state_dict())
        target = flow.to_empty(device="cpu").state_dict()
        for name, tensor in _tensors(file, shapes, orders):
            copy_checked(path, name, tensor, target[name])
    return config, flow


def _config(shapes: dict[str, list[int]], orders: dict[str, Tensor], heads: int | None) -> GLEMConfig:
    """The configuration that shapes and orders imply. Raises KeyError or ValueError where they imply none."""
    depth = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d{1,3})\.", name)))
    blocks = 1 + max(
        int(found[1]) for name in shapes if (found := re.match(r"blocks\.0\.dnn\.encoder\.blocks\.(\d{1,3})\.", name))
    )
    _, tokens, width = shapes["blocks.0.dnn.pos_emb"]
    size = 2 * shapes["blocks.0.dnn.init_proj.weight"][1]
    channels = 3 if size % 3 == 0 and math.isqrt(size // 3) ** 2 == size // 3 else 1
    patch = math.isqrt(size // channels)
    if channels * patch * patch != size:
        raise ValueError(f"tokens of {size} numbers are no square patches of an image")
    wanted = Counter(KINDS[index % len(KINDS)] for index in range(depth))
    if {over: len(order) for over, order in orders.items()} != {over: wanted[over] for over in orders}:
        raise ValueError(f"the order of its couplings is not {', '.join(KINDS)} over and over")
    rows, columns = _grid(orders["tokens"], tokens)
    options = dict(depth=[depth], blocks=[blocks], width=[width], heads=heads or max(1, width // _HEAD), patch=patch)
    flow = resolve_preset("jet_imagenet64", (channels, rows * patch, columns * patch), **options)
    return GLEMConfig(flow=flow, bits=8, psi=None, class_ids=[ONE_CLASS], class_names=[ONE_CLASS])


def _grid(orders: Tensor, tokens: int) -> tuple[int, int]:
    """Rows and columns of an image's patches, from orders of its tokens, int64 [n, tokens]; square if possible.

    ValueError: orders of no such grid.
    """
    side = math.isqrt(tokens)
    for columns in (side, *range(1, tokens + 1)):
        if tokens % columns == 0:
            known = [order_of_tokens(tokens // columns, columns, pattern) for pattern in PATTERNS]
            if all(any(torch.equal(order, one) for one in known) for order in orders):
                return columns, tokens // columns  # the published code takes the height for the width in its patterns
    raise ValueError(f"its orders of {tokens} tokens belong to no image")


def _check(path: Path, shapes: dict[str, list[int]], expected: dict[str, Tensor]) -> None:
    """Compare the header with the model, before memory is taken."""
    wanted = {name: tensor.numel() for name, tensor in expected.items() if "order" not in name}
    numbers = {_ours(name): math.prod(shape) for name, shape in shapes.items() if not name.endswith("_projections")}
    if numbers != wanted:
        differ = sorted(name for name in {*numbers, *wanted} if numbers.get(name) != wanted.get(name))
        raise ModelFileError(f"{path} is no Jet of jet-pytorch: {len(differ)} tensors differ, {differ[:3]}")


def _ours(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(f".{theirs}", f".{ours}")
    return name.replace("blocks.", "couplings.", 1).replace(".dnn.", ".net.")


def _tensors(file: Any, shapes: dict[str, list[int]], orders: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and values for `JetFlow`. Linear maps are 1x1 convolutions there, and tokens a column of pixels."""
    for name in shapes:
        if name.endswith("_projections"):
            continue
        tensor = file.get_tensor(name)
        if name.endswith("pos_emb"):
            tensor = tensor.transpose(1, 2).unsqueeze(3)  # [1, T, width] -> [1, width, T, 1]
        elif name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        yield _ours(name), tensor
    left = {over: iter(order) for over, order in orders.items()}
    for index in range(sum(len(order) for order in orders.values())):
        yield f"couplings.{index}.order", next(left[KINDS[index % len(KINDS)]])


def _orders(projections: Tensor) -> Tensor:
    """Permutation matrices [n, m, m] as indices, int64 [n, m]: column j holds a 1 in the row of the j-th index."""
    orders = projections.argmax(1)
    ones = torch.ones_like(projections[:, 0])
    again = torch.zeros_like(projections).scatter_(1, orders.unsqueeze(1), 1.0)
    if not torch.equal(again, projections) or not torch.equal(projections.sum(2), ones):
        raise ValueError("a projection is no permutation")
    return orders
