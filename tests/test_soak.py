"""What runs for long: memory, files and threads that must not grow, and one data set read from many sides at once."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from augment_cases import images as pixels
from augment_cases import labels as any_labels
from model_cases import tiny_model
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from glem_augment import GLEM, GLEMAugment, SyntheticDataset

CLASSES = ["ant", "bee", "cat"]
labels = partial(any_labels, classes=len(CLASSES))
PROC = Path("/proc/self")
MIB = 2**20

SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))
needs_proc = pytest.mark.skipif(not (PROC / "statm").exists(), reason="needs Linux's /proc")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@pytest.fixture(scope="module", autouse=True)
def _frozen_garbage() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # objects of earlier tests need not be looked through again and again
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model() -> GLEM:
    """A flow with random weights, small enough that a batch takes milliseconds."""
    model = tiny_model(shape=(1, 8, 8), classes=CLASSES, depth=[1], blocks=[1], width=[4])
    model.fit_modes((pixels(90), labels(90)), rank=8)
    return model


def footprint() -> dict[str, int]:
    """What this process holds after a collection of garbage: resident bytes, small Python objects, tensors, open
    descriptors, threads, and anonymous memory that forked workers would share."""
    gc.collect()
    gc.collect()  # what finalizers let go of
    return {
        "resident": int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "blocks": sys.getallocatedblocks(),
        # Not isinstance, which asks every object for its __class__: some answer by importing something.
        "tensors": sum(issubclass(type(item), Tensor) for item in gc.get_objects()),
        "descriptors": len(os.listdir(PROC / "fd")),
        "threads": len(os.listdir(PROC / "task")),
        "mappings": (PROC / "maps").read_text().count("/dev/zero"),
    }


def assert_no_growth(before: dict[str, int], after: dict[str, int], **allowed: int) -> None:
    """Nothing has grown but what caches may still take: the `allowed` bytes and objects."""
    grown = {name: after[name] - count for name, count in before.items() if after[name] - count > allowed.get(name, 0)}
    assert not grown, (before, after)


@needs_proc
@pytest.mark.parametrize(
    ("policy", "epochs"),
    [("adversarial", 8), *(pytest.param(policy, 500, marks=SLOW) for policy in ("mixup", "noise", "adversarial"))],
)
def test_memory_stays_constant(model: GLEM, policy: str, epochs: int) -> None:
    """Through a wrapped loader and in the place of timm's mixup_fn, with batches of 8 and of 4."""
    loader = DataLoader(TensorDataset(pixels(60) / 255, labels(60)), batch_size=8, shuffle=True)
    aug, net = GLEMAugment(model, p=0.9, modes=4, seed=0, policy=policy), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    if policy == "adversarial":
        aug.attach(net)
    wrapped = aug.wrap(loader)
    mixup = aug.as_mixup_fn(smoothing=0.1, mixup=Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3))
    for epoch in range(epochs):
        for batch in wrapped:
            del batch
        for x, y in loader:
            mixup(x, y)
        if epoch == epochs // 2 - 1:
            before = footprint()
    # In the slow runs one number kept per batch would be more.
    assert_no_growth(before, footprint(), resident=4 * MIB, blocks=1000 if epochs > 100 else 300)
    moved, stats = 120 * epochs, aug.stats
    assert moved * 0.7 < stats["selected"] < moved and stats["rejected"] < 0.1 * moved
    assert all(p.grad is None for p in net.parameters())


def read_at_random(data: SyntheticDataset, expected: np.ndarray, seed: int) -> None:
    """Read in every way there is, and compare with what a serial reader got."""
    rng = np.random.default_rng(seed)
    for turn in range(9):
        rows = rng.integers(0, len(data), rng.integers(1, 12))
        if turn % 3 == 0:
            got = data.images(rows)[:, 0].numpy()
        elif turn % 3 == 1:
            got = np.stack([image for image, _ in data.__getitems__(rows.tolist())])
        else:
            got = np.stack([data[int(i)][0] for i in rows])
        assert np.array_equal(got, expected[rows]), (seed, turn)


@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore:SyntheticDataset decodes")
@pytest.mark.parametrize("cache_bytes", [3 * 4 * 64, *(pytest.param(n, marks=SLOW) for n in (0, 2**20))])
def test_threads_read_what_a_serial_reader_reads(
    model: GLEM, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    monkeypatch.setattr("glem_augment.synthetic.draws.BLOCKS", (4, 4))
    serial, data = (
        SyntheticDataset(copy.deepcopy(model), per_class=20, seed=1, cache_bytes=size, transform=np.array)
        for size in (2**20, cache_bytes)
    )
    expected = serial.images(range(60))[:, 0].numpy()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns far more often than they would by themselves
    try:
        with ThreadPoolExecutor(6) as pool:
            for result in [pool.submit(read_at_random, data, expected, seed) for seed in range(6)]:
                result.result(100)
    finally:
        sys.setswitchinterval(interval)


def _data_sets(model: GLEM) -> None:
    for options in ({"cache_bytes": 0}, {"source": "rfcm"}):
        data = SyntheticDataset(model, per_class=4, **options)
        data.images([0, 11, 5])
        copy.deepcopy(data)[3]


def _workers(model: GLEM) -> None:
    context = {"num_workers": 1, "multiprocessing_context": "fork"}
    plain = TensorDataset(pixels(12), labels(12))
    aug = GLEMAugment(model, p=1.0, modes=4, seed=0)
    for loader in (
        DataLoader(SyntheticDataset(model, per_class=4, transform=np.asarray), batch_size=4, **context),
        DataLoader(plain, batch_size=4, collate_fn=aug.collate_fn(), persistent_workers=True, **context),
        aug.wrap(DataLoader(plain, batch_size=4, **context)),
    ):
        assert len(list(loader)) == 3
        next(iter(loader))  # and an epoch that is left in its middle


@needs_proc
@pytest.mark.parametrize("task", [_data_sets, pytest.param(_workers, marks=(*SLOW, needs_fork))])
def test_nothing_is_left_open(model: GLEM, task: Callable[[GLEM], None]) -> None:
    rounds = 4 if task is _workers else 10
    for index in range(rounds + 2):
        task(model)
        if index == 1:  # the first rounds import and cache
            before = footprint()
    # A queue to a worker that has ended is closed by another thread, which may still be running.
    deadline = time.monotonic() + 20
    while any(footprint()[name] > before[name] for name in ("threads", "descriptors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    # safetensors' `get_tensor` keeps two numbers of every tensor for ever; a flow has some twenty tensors.
    assert_no_growth(before, footprint(), resident=8 * MIB, blocks=200 * rounds)
    assert multiprocessing.active_children() == []
