"""Files from strangers: whatever the bytes, the outcome is a model or one GLEMError, in bounded memory and time."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_cases import images, tiny_model
from safetensors.torch import load, save
from torch import Tensor

from glem_augment import GLEM
from glem_augment.classes.classes import Classes
from glem_augment.classes.fit import fit_modes
from glem_augment.classes.statistics import class_statistics
from glem_augment.cli.info import model_facts
from glem_augment.errors import ModelFileError
from glem_augment.hub.cards import model_card
from glem_augment.model.files import CONFIG, WEIGHTS

# Beside twice the file: what Python's own objects may take, the parsed config above all.
SLACK = 128 * 2**20
SECONDS = 10

Pair = tuple[bytes, bytes]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Real files: config and weights of small models of every kind."""
    small = dict(depth=[1, 1], blocks=[1, 1], width=[4, 4])
    bottleneck = tiny_model("mef_tiny", subnet="bottleneck", depth=[1], blocks=[1], width=[16])
    models = [tiny_model(**small), tiny_model("glow_tiny", psi=None, **small), tiny_model("identity"), bottleneck]
    # full covariances of the first format, a whitened flow of an autoencoder's latents, and fitted classes
    full, z = tiny_model("identity"), images(150)
    z = [full.encode(z[torch.arange(150) % 3 == y])[0] for y in range(3)]
    modes = fit_modes(class_statistics(z.__getitem__, range(3), full.dim, full.dim), full.dim)  # all of the space
    full.latent_classes = Classes(full.gaussians, modes, full=True)
    latent = tiny_model("latent", (3, 16, 16), autoencoder="taef2", whiten=4, **small)
    fitted = GLEM.fit((images(9, (3, 16, 16)), torch.arange(9) % 3), "taef2")
    models += [full, latent, fitted]
    pairs = []
    for index, model in enumerate(models):
        if index % 2 == 0 and model not in (full, fitted):
            model.fit_modes((images(12), torch.arange(12) % 3), rank=2)
        model.config.training = {"data": "/data/pets", "images": 12, "config": {"beta": 0.3, "milestones": [1, 2]}}
        folder = tmp_path_factory.mktemp("seed")
        model.save(folder)
        pairs.append(((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()))
    return pairs


# ---- bounds ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded(extra: int) -> Iterator[None]:
    """Any allocation beyond `extra` bytes fails, and so does whatever takes longer than ten seconds."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still at it after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path, pair: Pair, show: bool = True) -> str:
    """Load a pair of files: "loaded" or "refused". Raises for anything but a ModelFileError that names the folder, and
    for a model that gives NaN; with `show` it is also saved, loaded and described."""
    (folder / CONFIG).write_bytes(pair[0])
    (folder / WEIGHTS).write_bytes(pair[1])
    with bounded(2 * sum(map(len, pair)) + SLACK):
        try:
            model = GLEM.from_pretrained(folder)
        except ModelFileError as error:
            assert str(folder) in str(error) and len(str(error)) < 2000
            return "refused"
    for tensor in model.state_dict().values():
        assert tensor.device.type == "cpu" and (not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()))
    assert bool((model.gaussians.variance() > 0).all())
    assert model.gaussians.psi is not None or bool((model.gaussians.s > 0).all())
    assert model.modes is None or all(bool((t >= 0).all()) for t in (model.modes.rest, model.modes.scales))
    # First uses raise nothing.
    assert bool(model.posterior(images(2, model.image_shape)).isfinite().all())
    model.sample(torch.zeros(2, dtype=torch.int64), source="gaussian" if model.modes is None else "rfcm")
    if not show:
        return "loaded"
    model.save(folder / "again")
    assert GLEM.from_pretrained(folder / "again").config == model.config
    assert yaml.safe_dump(model_facts(str(folder))) and model_card(model, "org/flow").text
    return "loaded"


# ---- mutations of real files -------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    *(None, True, 0, -1, 3, 4097, 2**63, 10**30, -0.0, 1e-300, 1e308, 1.5, "", "0", "\x1b[31m", "\ud800", "é" * 2000),
    *("../../x", [], {}, [[]], [1] * 9, [4096] * 8, ["cat"] * 3, {"a": {"b": []}}),
]
ENTRIES = {  # of a header of safetensors
    "dtype": ["F64", "F32", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "C64", "X", None],
    "shape": [[], [0], [2**40], [2**62, 4], [1] * 60, [-1], "x", None],
    "data_offsets": [[0, 0], [0, 2**63], [8, 4], [2**64, 2**65], [0], None],
}
FLOATS = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e-45, 0.0, -1.0, 88.0, 1000.0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in items for place in [(value, key), *_places(part)]]


def _change_json(rng: random.Random, data: bytes) -> bytes:
    """Values scaled, replaced, renamed and dropped."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = _places(value)
        container, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.4 and isinstance(container[key], int | float):
            container[key] = container[key] * rng.choice([-1, 0, 2, 10, 1000]) + rng.choice([-1, 0, 1])
        elif kind < 0.8:
            container[key] = copy.deepcopy(rng.choice([*HOSTILE, rng.choice(places)[0]]))
        elif kind < 0.9 and isinstance(container, dict):
            container[rng.choice(["__class__", "exec", key.upper(), key + " "])] = container.pop(key)
        else:
            del container[key]
    return json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")


def _change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Pieces replaced or cut, half of the time in the first bytes alone, where a header is."""
    out, first = bytearray(data), rng.choice([1000, len(data)])
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(max(1, min(len(out), first))), rng.choice([0, 1, 2, 16, 200])
        out[at : at + size] = rng.choice([b"", rng.randbytes(size), b"9", b"-", b'"', b"{", b"]", b"\\", b"\0"])
    return bytes(out)


def _change_header(rng: random.Random, data: bytes) -> bytes:
    """The header of a safetensors file as JSON, its length put right (or not)."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.15:
        length = rng.choice([0, length - 1, length + 1, len(data), 2**31, 2**64 - 1, 10**8])
        return length.to_bytes(8, "little") + header + body
    table = json.loads(header)
    name = rng.choice([key for key in table if key != "__metadata__"])
    kind = rng.choice([*ENTRIES, "drop", "rename"])
    if kind in ENTRIES:
        table[name][kind] = rng.choice(ENTRIES[kind])
    elif kind == "drop":
        del table[name]
    else:
        table[rng.choice(["x", "flow." + name, name + "\0", "a" * 70_000])] = table.pop(name)
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def _change_values(rng: random.Random, data: bytes) -> bytes:
    """Numbers in the tensors, in place."""
    start = 8 + int.from_bytes(data[:8], "little")
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        at = start + 4 * rng.randrange((len(data) - start) // 4)
        out[at : at + 4] = struct.pack("<f", rng.choice(FLOATS))
    return bytes(out)


def mutant(rng: random.Random, seeds: list[Pair]) -> Pair:
    config, weights = rng.choice(seeds)
    kind = rng.randrange(7)
    if kind < 2:
        return _change_json(rng, config), weights
    if kind == 2:
        return _change_bytes(rng, config), weights
    if kind == 3:
        return rng.choice(seeds)[0], weights
    change = (_change_bytes, _change_header, _change_values)[kind - 4]
    return config, change(rng, weights)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_mutants(tmp_path: Path, seeds: list[Pair], count: int) -> None:
    counts: Counter[str] = Counter()
    for number in range(count):  # each number is one mutant, always the same
        try:
            counts[outcome(tmp_path, mutant(random.Random(number), seeds), show=number % 5 == 0)] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {number}") from error
    # Both outcomes occur, or the mutations are too wild or too tame to find anything.
    assert counts["loaded"] > count / 50 and counts["refused"] > count / 2


# ---- single values -----------------------------------------------------------------------------------------------

FULL, LATENT = 4, 5  # of `seeds`


def first(value: float) -> Callable[[Tensor], Tensor]:
    """Set the first number."""
    return lambda tensor: torch.cat([torch.full((1,), value, dtype=tensor.dtype), tensor.flatten()[1:]]).view_as(tensor)


@pytest.mark.parametrize(
    ("seed", "name", "change"),
    [
        (LATENT, "autoencoder.std", first(0.0)),
        (LATENT, "flow.whiten.scale", first(1e-38)),
        (LATENT, "flow.flow.levels.0.layers.3.net.head.bias", first(1e12)),
        (FULL, "modes.shared_scales", torch.zeros_like),
        (FULL, "modes.shared_directions", lambda t: t[:1].expand_as(t)),
        (FULL, "modes.scales", first(3e38)),
        (FULL, "modes.directions", first(1e8)),
        (FULL, "modes.counts", torch.zeros_like),
        (FULL, "modes.directions", lambda t: t * 1e6),
        (0, "flow.levels.1.layers.1.log_scale", lambda t: t * 1e6),
        (0, "flow.levels.0.layers.2.weight", lambda t: t * 1e6),
        (0, "flow.levels.0.layers.3.net.tail.weight", lambda t: t * 1e6),
    ],
)
def test_tensors_that_would_fail_at_the_first_use(
    tmp_path: Path, seeds: list[Pair], seed: int, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    config, weights = seeds[seed]
    state = load(weights)
    assert outcome(tmp_path, (config, save({**state, name: change(state[name]).contiguous()}))) == "refused"


def test_a_flow_that_loses_images_of_some_classes(tmp_path: Path) -> None:
    """Near a class's mean this coupling is as exact as before."""
    GLEM.from_pretrained("bundled:cifar10").save(tmp_path)
    state, name = load((tmp_path / WEIGHTS).read_bytes()), "flow.flow.levels.1.layers.9.net.blocks.0.conv2.weight"
    assert outcome(tmp_path, ((tmp_path / CONFIG).read_bytes(), save({**state, name: state[name] * 1e6}))) == "refused"


def test_shapes_that_do_not_fit(tmp_path: Path, seeds: list[Pair]) -> None:
    config = json.loads(seeds[LATENT][0])
    for part, shape in (("autoencoder", [3, 16384, 16384]), ("autoencoder", [2, 16, 16]), ("flow", [32, 4, 2])):
        changed = json.dumps({**config, part: {**config[part], "image_shape": shape}}).encode()
        assert outcome(tmp_path, (changed, seeds[LATENT][1])) == "refused"


def test_a_large_file_takes_twice_its_size_at_most(tmp_path: Path) -> None:
    """24 MiB of weights; the file itself is mapped, which is no allocation but counts in the address space."""
    GLEM.create("identity", (3, 32, 32), [str(i) for i in range(1024)], psi=None).save(tmp_path)
    tensors = load((tmp_path / WEIGHTS).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(save({name: tensor.double() for name, tensor in tensors.items()}))
    del tensors
    with bounded(3 * (tmp_path / WEIGHTS).stat().st_size + 2**23):
        assert GLEM.from_pretrained(tmp_path).num_classes == 1024
