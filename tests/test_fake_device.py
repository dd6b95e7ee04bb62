"""A device that computes on the CPU and refuses what a GPU would refuse: operands of two devices.

The test runs this file as a script, because a process can name such a device once. It needs a torch whose PrivateUse1
backend can be written in Python. Arguments: names of `PARTS`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from glem_augment import GLEM, Adversarial, GLEMAugment, Mixup, Noise, SyntheticDataset
from glem_augment.images.dataset import ImageData
from glem_augment.training import TrainConfig, Trainer

aten = torch.ops.aten
# Calls that make the host wait for a device.
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default)
waits: Counter[str] = Counter()


class Fake(Tensor):
    """A tensor of the device "fake", with the numbers in the CPU tensor `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Fake:
        facts = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        out = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="fake:0", **facts)  # type: ignore[attr-defined]
        out.inner = inner
        return out

    def tolist(self) -> Any:  # type: ignore[override]
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Fake({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in WAITS:
            waits[func.name()] += 1
        if func is aten._to_copy.default:
            target = kwargs.pop("device", None)
            here = target is None or torch.device(target).type == "fake"
            if not here:
                waits["copy to the host"] += 1
            out = func(inner(args[0]), **{**kwargs, "pin_memory": False})
            return Fake(out) if here else out
        if func is aten.copy_.default:
            if not isinstance(args[0], Fake):
                waits["copy to the host"] += 1
            args[0].inner.copy_(inner(args[1])) if isinstance(args[0], Fake) else args[0].copy_(inner(args[1]))
            return args[0]
        strangers = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, Fake)]
        if any(t.ndim for t in strangers):
            shapes = [list(t.shape) for t in strangers]
            raise RuntimeError(f"{func} got tensors of two devices; on the CPU are {shapes}")
        if "device" in kwargs and torch.device(kwargs["device"] or "fake").type == "fake":
            kwargs["device"] = "cpu"
        plain_args, plain_kwargs = tree_map(inner, (args, kwargs))
        out = tree_map(lambda t: Fake(t) if isinstance(t, Tensor) else t, func(*plain_args, **plain_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, out)


def inner(value: Any) -> Any:
    return value.inner if isinstance(value, Fake) else value


class Backend:
    """What torch asks of a device's module."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


def start() -> torch.device:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend("fake", Backend())
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        return Fake(
            torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format, device="cpu")
        )

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return Fake(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source: Tensor, target: Tensor, *_: Any) -> Tensor:  # torch.tensor(..., device="fake") asks for it
        inner(target).copy_(inner(source))
        return target

    def arange(*numbers: Any, dtype: Any = None, **_: Any) -> Tensor:
        return Fake(torch.arange(*numbers, dtype=dtype, device="cpu"))

    for name in ("arange", "arange.start", "arange.start_step"):
        library.impl(name, arange, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    start.library = library  # type: ignore[attr-defined]  # which lives as long as the process
    return torch.device("fake:0")


# ---- what runs on it ---------------------------------------------------------------------------------------------


def close(found: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    assert isinstance(found, Fake), "the result is on the CPU"
    torch.testing.assert_close(found.inner, wanted, atol=atol, rtol=1e-4)


def refuses_mixtures(device: torch.device) -> None:
    try:
        torch.ones(3).to(device) + torch.ones(3)
    except RuntimeError as error:
        assert "two devices" in str(error)
    else:
        raise AssertionError("tensors of two devices were added")


POLICIES: list[dict[str, Any]] = [
    {"policy": Mixup()}, {"policy": Mixup(partner="any")}, {"policy": Noise()}, {"policy": Adversarial()},
    {"policy": Noise(), "class_map": [0, None, 1]},
]  # fmt: skip


def moves(host: GLEM, data: ImageData, device: torch.device, policies: list[dict[str, Any]] = POLICIES) -> None:
    """Latents, densities, samples and policies: as on the CPU."""
    there, x, y = copy.deepcopy(host).to(device), data.tensor()[:12], torch.from_numpy(data.targets[:12])
    fx, fy = x.to(device), y.to(device)
    z = host.encode(x)[0]
    close(there.encode(fx)[0], z)
    close(there.decode(z.to(device)), host.decode(z))
    close(there.log_prob(fx, fy), host.log_prob(x, y), atol=1e-2)
    close(there.posterior(fx), host.posterior(x))
    for source in ("gaussian", "rfcm"):
        draws = [
            m.sample(labels, 0.9, torch.Generator().manual_seed(0), source) for m, labels in ((there, fy), (host, y))
        ]
        close(*draws)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(host.image_shape), host.num_classes))
    fake_net = copy.deepcopy(net).to(device)
    for settings in policies:
        for batch in (x, x[:2].float() / 255):  # in a batch of two, partners are drawn
            labels = y[: len(batch)]
            made = [GLEMAugment(m, p=1.0, seed=0, **settings) for m in (there, host, host)]  # a copy goes to the device
            if settings["policy"].wants_classifier:
                for aug, network in zip(made, (fake_net, net, fake_net), strict=True):
                    aug.attach(network)
            wanted, target = made[1](batch, labels)
            for aug in (made[0], made[2]):
                out, soft = aug(batch.to(device), labels.to(device))
                close(out.float(), wanted.float(), atol=1.001 if batch.dtype == torch.uint8 else 1e-4)
                close(soft, target)
                assert aug.stats == made[1].stats


def waits_once(host: GLEM, data: ImageData, device: torch.device) -> None:
    """An ordinary call waits for the device once, to have the labels on the CPU."""
    x, y = data.tensor()[:12].to(device), torch.from_numpy(data.targets[:12]).to(device)
    fitted = host.adapt(data, rank=4)
    soft = torch.nn.functional.one_hot(y, host.num_classes).float()
    for model, policy in product((host, fitted), (Mixup(partner="any"), Mixup(), Noise(0.1))):
        for labels in (y, soft):
            aug = GLEMAugment(copy.deepcopy(model).to(device), policy, p=1.0, seed=0, mean=0.0, std=1.0)
            normalised = x.float() / 255
            aug(normalised, labels)
            assert aug.stats["rejected"] == 0  # which reads the counts
            waits.clear()
            aug(normalised, labels)
            assert waits == {"copy to the host": 1}, (policy, waits)


def moves_of_fitted_classes(host: GLEM, data: ImageData, device: torch.device) -> None:
    moves(host.adapt(data, rank=4), data, device)


def behind_an_autoencoder(_: GLEM, data: ImageData, device: torch.device) -> None:
    x = data.tensor().repeat(1, 3, 2, 2)
    host = GLEM.create("identity", (3, 16, 16), data.classes, autoencoder="taef2")
    host = host.adapt((x, data.targets), classes=data.classes, rank=4)
    moves(host, ImageData.from_tensors(x, data.targets, data.classes), device, [{"policy": Adversarial()}])


def synthetic_sets(host: GLEM, data: ImageData, device: torch.device) -> None:
    for source in ("gaussian", "rfcm"):
        here, there = (
            SyntheticDataset(m, per_class=2, seed=0, source=source) for m in (host, copy.deepcopy(host).to(device))
        )
        wanted, found = (s.images(range(len(s))) for s in (here, there))
        assert (found.cpu().int() - wanted.int()).abs().max() <= 1


class TorchWithoutGenerators:
    """torch, with generators on the CPU: a backend in Python has none."""

    Generator = staticmethod(lambda device: torch.Generator())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def training(_: GLEM, data: ImageData, device: torch.device) -> None:
    losses = []
    for where in ("cpu", device):
        config = TrainConfig(
            preset="glow_tiny", flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[6, 6]), epochs=2, batch_size=16,
            warmup_steps=2, modes_rank=2, sample_every=0, augment=["flip", "crop"],
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as out:
            with patch("timm.utils.model_ema.torch", TorchWithoutGenerators()):
                trainer = Trainer(data, config, out, device=where)
            model = trainer.fit()
            assert model.device.type == torch.device(where).type
            rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
            losses.append([row["loss"] for row in rows if row["kind"] == "epoch"])
    np.testing.assert_allclose(*losses, rtol=1e-3)


PARTS = {
    "moves": moves,
    "parts": moves_of_fitted_classes,
    "waits": waits_once,
    "autoencoder": behind_an_autoencoder,
    "synthetic": synthetic_sets,
    "training": training,
}


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch can't have a backend in Python",
)
@pytest.mark.parametrize("parts", [["waits"], pytest.param([*PARTS], marks=pytest.mark.slow)], ids=["short", "all"])
def test_everything_stays_on_its_device_and_an_augmented_batch_waits_for_it_once(parts: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, *parts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if " " not in line] == ["mixtures", *parts]


def main() -> None:
    device = start()
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    x = (torch.randint(0, 120, (60, 1, 8, 8)) + 40 * y[:, None, None, None]).to(torch.uint8)
    data = ImageData.from_tensors(x, y.numpy(), ["a", "b", "c"])
    host = GLEM.create("glow_tiny", (1, 8, 8), ["a", "b", "c"], depth=[1, 1], blocks=[1, 1], width=[6, 6]).eval()
    host.flow.initialise(host.numbers(x))
    host.fit_modes(data, rank=4)
    host.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuses_mixtures(device)
        print("mixtures", flush=True)
        for name in sys.argv[1:]:
            PARTS[name](host, data, device)
            print(name, flush=True)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)  # torch aborts when it takes a backend in Python down
