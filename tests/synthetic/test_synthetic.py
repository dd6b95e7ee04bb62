"""SyntheticDataset: item i is a function of seed, class and place in the class; and its export."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from glem_augment import locks as _locks
from glem_augment.data.classes import match_classes
from glem_augment.devices import check_worker_device
from glem_augment.model.glem import GLEM
from glem_augment.synthetic import blocks as _blocks
from glem_augment.synthetic import export as _export
from glem_augment.synthetic import shared_memory as _shared_memory
from glem_augment.synthetic.blocks import BlockStore
from glem_augment.synthetic.dataset import SyntheticDataset, to_pil
from glem_augment.synthetic.provenance import class_folders

NAMES = ["T-shirt/top", "Ankle boot", "Bag"]


def make_model(shape: tuple[int, int, int] = (1, 8, 8), classes: list[str] = NAMES) -> GLEM:
    model = GLEM.create("identity", shape, classes=classes, class_ids=[str(i) for i in range(len(classes))])
    n = 20 * len(classes)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(60, 196, (n, *shape), generator=g, dtype=torch.uint8)
    model.fit_modes((x, torch.arange(n) % len(classes)), rank=8)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GLEM:
    return make_model()


def test_it_looks_like_a_torchvision_data_set(model: GLEM) -> None:
    data = SyntheticDataset(model, per_class=5)
    assert len(data) == 15 and data.classes == NAMES and data.class_to_idx == {n: i for i, n in enumerate(NAMES)}
    assert data.targets == [0] * 5 + [1] * 5 + [2] * 5
    image, label = data[7]
    assert isinstance(image, Image.Image) and image.mode == "L" and image.size == (8, 8) and label == 1
    assert type(label) is int and data[-1][1] == 2
    data.transform = np.asarray
    data.target_transform = lambda y: y + 10
    assert isinstance(data[0][0], np.ndarray) and data[0][1] == 10
    assert [y for _, y in data] == [t + 10 for t in data.targets]  # plain iteration ends
    rgb = SyntheticDataset(make_model((3, 4, 6)), per_class=2)[0][0]
    assert rgb.mode == "RGB" and rgb.size == (6, 4)


@pytest.mark.parametrize("source", ["gaussian", "rfcm"])
def test_a_latent_depends_on_seed_class_and_place_alone(model: GLEM, source: str) -> None:
    data = SyntheticDataset(model, per_class=40, seed=3, source=source)
    z = data.latents(range(120))
    order = torch.randperm(120).tolist()
    assert torch.equal(data.latents(order), z[order])
    assert all(torch.equal(data.latents([i])[0], z[i]) for i in (0, 15, 16, 39, 40, 119))
    more = SyntheticDataset(model, per_class=100, seed=3, source=source, block=7)
    for c in range(3):
        assert torch.equal(more.latents(range(100 * c, 100 * c + 40)), z[40 * c : 40 * c + 40])
    assert not torch.equal(SyntheticDataset(model, per_class=40, seed=4, source=source).latents(range(120)), z)
    # nothing is drawn twice: classes, blocks and seeds have noise of their own
    spread = (z.reshape(3, 40, -1) - z.reshape(3, 40, -1).mean(1, keepdim=True)).flatten(0, 1)
    correlation = torch.corrcoef(spread) - torch.eye(120)
    assert correlation.abs().max() < 0.75


def test_latents_have_the_law_of_the_class(model: GLEM) -> None:
    n = 3000
    with torch.no_grad():
        model.gaussians.mu[1] = 0.2
    data = SyntheticDataset(model, per_class=n, temperature=0.5)
    z = data.latents(range(n, 2 * n))
    variance = model.gaussians.variance()[1].detach()
    assert torch.allclose(z.mean(0), model.gaussians.mu[1].detach(), atol=0.03)
    assert torch.allclose(z.var(0), 0.25 * variance, rtol=0.15)
    full = SyntheticDataset(model, per_class=n, temperature=1.0, source="rfcm").latents(range(n))
    modes = model.modes
    total = (modes.scales[0, :, None] * modes.directions[0]).square().sum(0) + modes.rest[0]
    assert torch.allclose(full.var(0), total, rtol=0.15)
    assert torch.equal(SyntheticDataset(model, per_class=2, temperature=0.0).latents([0, 1])[0], model.gaussians.mu[0])


@pytest.mark.parametrize("cache_bytes", [0, 2**28])
def test_images_are_the_same_in_any_order(model: GLEM, cache_bytes: int) -> None:
    data = SyntheticDataset(model, per_class=10, block=4, cache_bytes=cache_bytes)
    whole = data.images(range(30))
    assert whole.dtype == torch.uint8 and whole.shape == (30, 1, 8, 8)
    order = torch.randperm(30).tolist()
    assert torch.equal(data.images(order), whole[order])
    assert torch.equal(data.images(torch.tensor([3, 3, -1])), whole[[3, 3, 29]])
    for (image, label), i in zip(data.__getitems__(order), order, strict=True):
        assert np.array_equal(np.asarray(image), whole[i, 0]) and label == i // 10
        assert np.array_equal(np.asarray(data[i][0]), whole[i, 0])
    prefix = SyntheticDataset(model, per_class=4, block=4).images(range(12))
    assert torch.equal(prefix, whole.reshape(3, 10, 1, 8, 8)[:, :4].flatten(0, 1))
    decoded = model.decode(data.latents(range(4))).detach()
    assert (decoded * 255 - whole[:4]).abs().max() <= 0.5 + 1e-3


def test_blocks_are_decoded_once_and_the_cache_is_bounded(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    decode = GLEM.decode
    monkeypatch.setattr(GLEM, "decode", lambda m, z, **k: calls.append(len(z)) or decode(m, z, **k))
    data = SyntheticDataset(model, per_class=10, block=4)
    for i in range(30):
        data[i]
    assert calls == [4, 4, 2] * 3
    calls.clear()
    small = SyntheticDataset(model, per_class=10, block=4, cache_bytes=2 * 4 * 64)
    for i in [0, 4, 0, 8, 0]:  # block 1 was used least recently when block 2 came
        small[i]
    assert calls == [4, 4, 2] and small._store._images.nbytes <= 2 * 4 * 64
    for i in [12, 0, 4]:
        small[i]
    assert calls[3:] == [4, 4]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_items(model: GLEM, context: str) -> None:
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} here")
    data = SyntheticDataset(model, per_class=6, block=4, transform=np.asarray)
    expected = data.images(range(18))[:, 0]
    loader = torch.utils.data.DataLoader(data, batch_size=5, num_workers=2, multiprocessing_context=context)
    images, targets = zip(*loader, strict=True)
    assert torch.equal(torch.cat(images), expected) and torch.cat(targets).tolist() == data.targets


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


def count_decoded(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> Any:
    """Decoded images are counted in every process forked from here; each block takes so long.

    The patience is endless, so that a machine that stands still for a second changes nothing.
    """
    monkeypatch.setattr(_blocks, "PATIENCE", 600.0)
    monkeypatch.setattr(_blocks, "FIRST_PATIENCE", 600.0)
    count = multiprocessing.get_context("fork").Value("q", 0)
    decode = GLEM.decode

    def counted(self: GLEM, z: torch.Tensor, **settings: Any) -> torch.Tensor:
        with count.get_lock():
            count.value += len(z)
        time.sleep(seconds)
        return decode(self, z, **settings)

    monkeypatch.setattr(GLEM, "decode", counted)
    return count


@needs_fork
@pytest.mark.parametrize("shuffle", [False, True])
def test_forked_workers_decode_each_block_once(model: GLEM, shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SyntheticDataset(model, per_class=20, block=8).images(range(60))[:, 0]
    count = count_decoded(monkeypatch, seconds=0.02)
    # batches of 7 and blocks of 8, 8 and 4: nearly every batch needs a block that another worker needs too
    data = SyntheticDataset(model, per_class=20, block=8, transform=np.asarray)
    for _ in range(2):  # new workers find what the last ones decoded
        loader = torch.utils.data.DataLoader(
            _Numbered(data), batch_size=7, shuffle=shuffle, num_workers=2, multiprocessing_context="fork"
        )
        seen, indices = zip(*loader, strict=True)
        assert torch.equal(torch.cat(seen), expected[torch.cat(indices)])
        assert count.value == 60
    assert torch.equal(data.images(range(60))[:, 0], expected) and count.value == 60


@needs_fork
@pytest.mark.parametrize("slots", [0, 16])
def test_workers_with_small_batches_do_not_stand_still(
    model: GLEM, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, decode, pause = multiprocessing.get_context("fork"), GLEM.decode, 0.1
    times, count = fork.Array("d", 200), fork.Value("q", 0)

    def slow(self: GLEM, z: torch.Tensor, **settings: Any) -> torch.Tensor:
        with count.get_lock():
            times[count.value], count.value = time.monotonic(), count.value + 1
        time.sleep(pause)
        return decode(self, z, **settings)

    monkeypatch.setattr(GLEM, "decode", slow)
    memory = {"cache_bytes": slots * 16 * 64} if slots else {}
    data = SyntheticDataset(model, per_class=96, block=16, transform=np.asarray, **memory)
    assert data._store.holds_all == (not slots)
    # Two batches to a block: each worker wants half of every block.
    images, _ = zip(*torch.utils.data.DataLoader(data, 8, num_workers=2, multiprocessing_context="fork"), strict=True)
    started = sorted(times[: count.value])
    # 18 blocks, each decoded once; next to most of them another one begins while they are being decoded.
    assert count.value == 18
    assert sum(b - a < pause for a, b in zip(started, started[1:], strict=False)) >= 7
    monkeypatch.undo()
    assert torch.equal(torch.cat(images), SyntheticDataset(model, per_class=96, block=16).images(range(288))[:, 0])


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7)])
def test_pictures_are_what_pil_makes_of_the_images(shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 256, (4, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        pictures = to_pil(given)
        for picture, image in zip(pictures, images, strict=True):
            expected = Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())
            assert picture.mode == expected.mode and picture.size == (7, 5)
            assert np.array_equal(np.asarray(picture), np.asarray(expected))
        before = images.clone()
        pictures[0].paste(0, (0, 0, 7, 5))  # a user may draw on one
        assert torch.equal(images, before) and np.asarray(pictures[1]).any()
    assert to_pil(images[:0]) == []


class _Numbered(torch.utils.data.Dataset):
    """(image, index), so that a shuffled order is known."""

    def __init__(self, data: SyntheticDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        return [(image, i) for (image, _), i in zip(self.data.__getitems__(indices), indices, strict=True)]


@needs_fork
@pytest.mark.parametrize("slots", [0, 5])
def test_workers_share_a_cache_that_is_too_small(model: GLEM, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SyntheticDataset(model, per_class=20, block=8).images(range(60))[:, 0]
    count = count_decoded(monkeypatch, seconds=0.005)
    for shuffle in (True, False):
        data = SyntheticDataset(model, per_class=20, block=8, cache_bytes=slots * 8 * 64, transform=np.asarray)
        count.value = 0
        for image, index in torch.utils.data.DataLoader(
            _Numbered(data), shuffle=shuffle, batch_size=7, num_workers=2, multiprocessing_context="fork"
        ):
            assert torch.equal(image, expected[index])
    if slots:  # in order, a few blocks are enough, even where one worker lags behind a little
        assert 60 <= count.value <= 80


@needs_fork
def test_images_that_are_not_finite_in_a_worker_are_counted(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = GLEM.decode
    monkeypatch.setattr(GLEM, "decode", lambda m, z, **k: decode(m, z, **k) * torch.tensor(float("nan")))
    data = SyntheticDataset(model, per_class=6, transform=np.asarray)
    for _ in torch.utils.data.DataLoader(data, num_workers=1, batch_size=9, multiprocessing_context="fork"):
        pass
    assert data.non_finite == 18


def started_anew() -> list[str]:
    return [how for how in ("spawn", "forkserver") if how in multiprocessing.get_all_start_methods()]


needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory without a name")


class _Counting(_Numbered):
    """Counts what the worker has decoded, as the third of each item."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int, int]]:
        if not hasattr(self, "decoded"):
            decoder = self.data._decoder
            self.decoded, decode = 0, decoder.decode

            def counted(cls: int, number: int) -> Any:
                self.decoded += 1
                return decode(cls, number)

            decoder.decode = counted
        return [(*item, self.decoded) for item in super().__getitems__(indices)]


@needs_memfd
@pytest.mark.parametrize("how", started_anew())
def test_workers_that_are_not_forked_share_the_cache(model: GLEM, how: str) -> None:
    expected = SyntheticDataset(model, per_class=20, block=8).images(range(60))[:, 0]
    data = SyntheticDataset(model, per_class=20, block=8, transform=np.asarray, min_confidence=0.01)
    plain = SyntheticDataset(model, per_class=20, block=8, transform=np.asarray)
    for judged, given in ((False, plain), (True, data)):
        loader = torch.utils.data.DataLoader(
            _Counting(given), batch_size=7, shuffle=True, num_workers=2, multiprocessing_context=how
        )
        decoded: dict[int, int] = {}
        for number, (image, index, count) in enumerate(loader):
            decoded[number % 2] = int(count.max())
            assert judged or torch.equal(image, expected[index])
        assert sum(decoded.values()) == 9  # blocks of 8, 8 and 4 images of three classes, each of them once
        # Here too they are there.
        given._decoder.decode = None  # type: ignore[assignment]
        assert judged or torch.equal(given.images(range(60))[:, 0], expected)
        assert given._store.decoded_again == 0 and given.non_finite == 0
    assert data.acceptance()["total"]["items"] == 60


@needs_fork
def test_images_of_two_models_are_never_in_one_cache(model: GLEM) -> None:
    changed = copy.deepcopy(model)
    data = SyntheticDataset(changed, per_class=20, block=8, transform=np.asarray)

    first = torch.utils.data.Subset(data, range(8))
    list(torch.utils.data.DataLoader(first, num_workers=1, multiprocessing_context="fork"))
    with torch.no_grad():
        changed.gaussians.mu.add_(1e-3)
    # This process has decoded nothing yet.
    with pytest.raises(RuntimeError, match="have changed since this SyntheticDataset decoded its first images"):
        data[8]
    with pytest.raises(RuntimeError, match="make a new SyntheticDataset"):
        data[8]
    with torch.no_grad():
        changed.gaussians.mu.copy_(model.gaussians.mu)
    assert torch.equal(data.images([8]), SyntheticDataset(model, per_class=20, block=8).images([8]))


def test_pickling_leaves_the_cache_behind(model: GLEM) -> None:
    data = SyntheticDataset(model, per_class=6)
    before = data.images(range(18))
    packed = pickle.dumps(data)
    other = pickle.loads(packed)
    assert data._store.whole(0) is not None and other._store.whole(0) is None
    assert torch.equal(other.images(range(18)), before)


def test_thrashing_is_told_once(model: GLEM, recwarn: pytest.WarningsRecorder) -> None:
    small = SyntheticDataset(model, per_class=50, block=5, cache_bytes=4 * 5 * 64)
    for _ in range(2):
        small.images(range(150))
    assert not recwarn.list  # in order, over and over, is not yet worth a word
    for i in torch.randperm(150, generator=torch.Generator().manual_seed(0)).tolist():
        small[i]
    told = [str(w.message) for w in recwarn.list]
    assert len(told) == 1 and f"9600 bytes of images do not fit cache_bytes={4 * 5 * 64}" in told[0]


def test_a_forked_worker_cannot_use_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    check_worker_device(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"forked DataLoader worker.*model\.to\('cpu'\)"):
        check_worker_device(torch.device("cuda", 0))


def test_decodes_that_are_not_finite_are_counted_and_kept_in_place(
    model: GLEM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = GLEM.decode

    def broken(self: GLEM, z: torch.Tensor, clamp: bool = True) -> torch.Tensor:
        x = decode(self, z, clamp)
        x[1, 0, 0] = float("nan")
        x[2, 0, 0] = float("inf")
        return x

    plain = SyntheticDataset(model, per_class=8).images(range(8))
    monkeypatch.setattr(GLEM, "decode", broken)
    data = SyntheticDataset(model, per_class=8)
    images = data.images(range(8))
    assert data.non_finite == 2
    assert images[1, 0, 0].unique().tolist() == [128] and images[2, 0, 0].unique().tolist() == [255]
    assert torch.equal(images[3:], plain[3:]) and torch.equal(images[:, :, 1:], plain[:, :, 1:])


def test_other_channel_counts_give_tensors_only() -> None:
    data = SyntheticDataset(make_model((2, 4, 4)), per_class=2)
    assert data.images([0, 5]).shape == (2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"1 or 3 channels, this flow 2.*images\(indices\)"):
        data[0]
    with pytest.raises(ValueError, match="1 or 3 channels"):
        data.export("nowhere")
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_class": 0}, "per_class must be at least 1, got 0"),
        ({"per_class": 2.5}, "per_class must be an int, got 2.5"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"block": 0}, "block"),
        ({"source": "vae"}, "'gaussian', 'rfcm', 'mixup'; got 'vae'"),
    ],
)
def test_arguments_are_checked(model: GLEM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SyntheticDataset(model, **settings)


def test_more_checks(model: GLEM) -> None:
    with pytest.raises(TypeError, match="must be a GLEM"):
        SyntheticDataset(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fit_modes\(data\)"):
        SyntheticDataset(GLEM.create("identity", (1, 8, 8), classes=NAMES), source="rfcm")
    data = SyntheticDataset(model, per_class=2)
    with pytest.raises(TypeError, match="indices must be integers, got bool"):
        data.images(torch.tensor([True, False]))
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 6 images"):
            data[index]


# ---- the store of decoded blocks ---------------------------------------------------------------------


def make_store(cache_bytes: int = 2**20, blocks: int = 4) -> BlockStore:
    return BlockStore([3] * blocks, (1, 2, 2), cache_bytes)


def block_of(value: int) -> np.ndarray:
    return np.full((3, 1, 2, 2), value, dtype=np.uint8)


def test_a_block_that_somebody_decodes_is_left_to_him_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(_blocks.time, "monotonic", lambda: now[0])
    store = make_store()
    assert store.claim(np.array([1, 2])) == 1 and store.claim(np.array([1, 2])) == 2
    assert store.claim(np.array([1, 2])) is None
    store.give_up(2)  # its decoding failed
    assert store.claim(np.array([1, 2])) == 2
    now[0] += 4
    store.write(2, block_of(2), 0)  # took 4 s: after twice that, and a little, block 1's process counts as stopped
    assert store.claim(np.array([1, 2])) is None
    now[0] += 5.1
    assert store.claim(np.array([1, 2])) == 1
    assert np.array_equal(store.whole(2), block_of(2)) and store.whole(1) is None


def test_images_that_another_process_decodes_are_waited_for(model: GLEM) -> None:
    data = SyntheticDataset(model, per_class=6, block=3)
    expected = data.images(range(6))
    waiting = SyntheticDataset(model, per_class=6, block=3)
    assert waiting._store.claim(np.array([0])) == 0
    other = threading.Timer(0.1, lambda: waiting._store.write(0, expected[:3].numpy(), 0))
    other.start()
    assert torch.equal(waiting.images(range(6)), expected)
    other.join()


def test_a_failed_decode_frees_its_block(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SyntheticDataset(model, per_class=4)
    with monkeypatch.context() as patch:
        patch.setattr(GLEM, "decode", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data[0]
    began = time.monotonic()
    data[0]
    assert time.monotonic() - began < 5


def test_at_most_one_block_is_decoded_ahead_and_given_once(model: GLEM) -> None:
    decoder = SyntheticDataset(model, per_class=12, block=4)._decoder
    expected = decoder.decode(0, 2).images
    decoder.decode_ahead(0, 1)
    decoder.decode_ahead(0, 2)
    started = decoder._ahead[0, 2]
    decoder.decode_ahead(0, 2)
    assert decoder._ahead == {(0, 2): started}
    assert decoder.decode(0, 2).images is started.images and torch.equal(started.images, expected)
    assert not decoder._ahead


def test_a_lock_held_by_a_dead_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shared_memory, "_file_without_name", lambda: None)  # a lock of a file would be given back
    monkeypatch.setattr(_locks, "LOCK_SECONDS", 0.01)
    store = make_store()
    store._shared._lock.acquire()
    with pytest.raises(RuntimeError, match="make the data set again"):
        store.whole(0)


@pytest.mark.parametrize("kind", ["file", "semaphore"])
def test_an_error_inside_gives_the_lock_back(kind: str, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        lock = _locks.FileLock(file.fileno()) if kind == "file" else _locks.shared_lock("fork")[0]
        with pytest.raises(ZeroDivisionError), _locks.locked(lock, "it is", "wait"):
            1 / 0  # noqa: B018
        assert lock.acquire(timeout=0)


@needs_fork
@pytest.mark.skipif(_locks.fcntl is None, reason="no locks of files")
def test_a_lock_of_a_file_keeps_threads_and_processes_apart_and_survives_kills(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    with open(tmp_path / "file", "wb") as file:
        lock, inside, most = _locks.FileLock(file.fileno()), fork.Value("q", 0, lock=False), fork.Value("q", 0)

        def work() -> None:
            for _ in range(200):
                with _locks.locked(lock, "it is", "wait"):
                    inside.value += 1
                    most.value = max(most.value, inside.value)
                    time.sleep(0)
                    inside.value -= 1

        def threads() -> None:
            both = [threading.Thread(target=work) for _ in range(2)]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()

        processes = [fork.Process(target=threads) for _ in range(2)]
        for process in processes:
            process.start()
        threads()
        for process in processes:
            process.join()
        assert most.value == 1 and inside.value == 0

        # Forked while a thread of the parent holds it, the child waits for the parent; and then it is killed.
        holds = fork.Event()
        lock.acquire()
        child = fork.Process(target=lambda: lock.acquire() and (holds.set() or time.sleep(600)))
        child.start()
        assert not holds.wait(0.2)
        lock.release()
        assert holds.wait(60)
        threading.Timer(0.2, child.kill).start()
        began = time.monotonic()
        with _locks.locked(lock, "it is", "wait"):
            assert time.monotonic() - began > 0.1
        child.join()


def test_a_store_without_fork_and_one_without_memory(model: GLEM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SyntheticDataset(model, per_class=6).images(range(18))
    monkeypatch.setattr(_shared_memory, "_file_without_name", lambda: None)
    assert torch.equal(SyntheticDataset(model, per_class=6).images(range(18)), expected)
    monkeypatch.setattr(_locks.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert torch.equal(SyntheticDataset(model, per_class=6).images(range(18)), expected)
    monkeypatch.undo()

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if _locks.fcntl is not None:
        open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
        with monkeypatch.context() as patch:
            patch.setattr(_locks.fcntl, "lockf", no_locks)
            assert _shared_memory._file_without_name() is None
            assert torch.equal(SyntheticDataset(model, per_class=6).images(range(18)), expected)
        assert open_before is None or len(os.listdir("/proc/self/fd")) == open_before

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(_shared_memory.mmap, "mmap", refuse)
    with pytest.raises(ValueError, match="give a smaller cache_bytes"):
        SyntheticDataset(model, per_class=6)


# ---- export ------------------------------------------------------------------------------------------


def test_export_opens_as_an_image_folder(model: GLEM, tmp_path: Path) -> None:
    data = SyntheticDataset(model, per_class=7, block=3, seed=2, transform=np.asarray)
    folder = data.export(tmp_path / "out", progress=False)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    names = ["Ankle boot", "Bag", "T-shirt_top"]
    assert files == [f"{n}/{i:06d}.png" for n in names for i in range(7)] + ["glem-provenance.json"]
    opened = ImageFolder(folder)
    index = match_classes(model.class_ids, model.classes, opened.classes, opened.classes)
    assert index.tolist() == [1, 2, 0]
    for path, target in opened.samples:
        item = int(Path(path).stem) + 7 * index[target]
        image = Image.open(path)
        assert image.mode == "L" and np.array_equal(np.asarray(image), data.images([item])[0, 0])
    told = json.loads((folder / "glem-provenance.json").read_text())
    assert told["synthetic"] is True and told["complete"] is True and told["count"] == 21
    assert told["settings"]["seed"] == 2 and told["settings"]["per_class"] == 7 and told["images_not_finite"] == 0
    assert told["model"]["class_names"] == NAMES and told["classes"][0]["folder"] == "T-shirt_top"


def test_export_protects_what_is_there(model: GLEM, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "Bag").mkdir(parents=True)
    own = folder / "Bag" / "000000.png"
    own.write_bytes(b"the user's own")
    data = SyntheticDataset(model, per_class=2)
    with pytest.raises(FileExistsError, match="not empty.*overwrite=True"):
        data.export(folder, progress=False)
    with pytest.raises(FileExistsError, match="no earlier export"):
        data.export(folder, progress=False, overwrite=True)
    (folder / "holiday").mkdir()
    with pytest.raises(FileExistsError, match="holiday"):
        data.export(folder, progress=False, overwrite=True)
    assert own.read_bytes() == b"the user's own"
    with pytest.raises(FileExistsError, match="is a file"):
        data.export(own, progress=False)
    with pytest.raises(ValueError, match="'webdataset'; got 'wds'"):
        data.export(tmp_path / "new", format="wds")
    assert not (tmp_path / "new").exists()


def test_overwriting_leaves_nothing_of_a_larger_export(model: GLEM, tmp_path: Path) -> None:
    SyntheticDataset(model, per_class=9, seed=1).export(tmp_path, progress=False)
    data = SyntheticDataset(model, per_class=4)
    data.export(tmp_path, progress=False, overwrite=True)
    files = list(tmp_path.rglob("*.png"))
    assert len(files) == 12
    first = np.asarray(Image.open(tmp_path / "Bag" / "000003.png"))
    assert np.array_equal(first, data.images([11])[0, 0])


def test_a_full_disk_is_one_clear_error(model: GLEM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SyntheticDataset(model, per_class=4)
    usage = _export.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(_export.shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(OSError, match=f"{tmp_path}.*free some space"):
            data.export(tmp_path / "a", progress=False)
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        write(path, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write .*\.png: No space left") as caught:
        data.export(tmp_path / "b", progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert not [p for p in (tmp_path / "b").rglob("*") if p.suffix in (".png", ".tmp")]
    monkeypatch.undo()
    # an export that was cut off is known as one
    assert not json.loads((tmp_path / "b" / "glem-provenance.json").read_text())["complete"]
    data.export(tmp_path / "b", progress=False, overwrite=True)
    assert len(list((tmp_path / "b").rglob("*.png"))) == 12


def test_class_folders() -> None:
    assert class_folders(["n01440764", "n02102040"], ["tench", "spaniel"]) == ["n01440764", "n02102040"]
    assert class_folders(["0", "1"], ["0", "1"]) == ["0", "1"]
    assert class_folders(["0", "1"], ["T-shirt/top", "Dress"]) == ["T-shirt_top", "Dress"]
    assert class_folders(["a/b", "../x", "ok"], ["a/b", "../x", "fine"]) == ["a_b", "x", "ok"]
    assert class_folders(["a/b", "A_b"], ["a/b", "A_b"]) == ["a_b_0", "A_b_1"]
    assert class_folders(["???", "con"], ["???", "con"]) == ["class_0", "con_"]
    mixed = class_folders(*2 * [["cat", "Cat", "cat_0"]])
    assert len({name.casefold() for name in mixed}) == 3 and mixed[2] == "cat_0"
    assert class_folders([".hidden", "x" * 300], [".hidden", "long"]) == ["hidden", "long"]
    for names in (NAMES, ["a/b c", "Ünï/code", "x:y*z"]):
        ids = [str(i) for i in range(len(names))]
        folders = class_folders(ids, names)
        assert match_classes(ids, names, folders, folders).tolist() == list(range(len(names)))


def test_images_of_two_models_never_stand_in_one_set(tmp_path: Path) -> None:
    """Blocks are kept: after more training, the cached ones would be the old model's under the new one's hash."""
    model = make_model()
    data = SyntheticDataset(model, per_class=5)
    first = data.images(range(5))
    with torch.no_grad():
        model.gaussians.mu.add_(0.01)
    for use in (lambda: data.images(range(15)), lambda: data.export(tmp_path / "out")):
        with pytest.raises(RuntimeError, match="make a new SyntheticDataset"):
            use()
    assert not torch.equal(SyntheticDataset(model, per_class=5).images(range(5)), first)
    for change in (
        lambda: setattr(model.gaussians, "mu", torch.nn.Parameter(model.gaussians.mu + 0.01)),
        lambda: torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(model.parameters()) + 0.001, model.parameters()
        ),
    ):
        data = SyntheticDataset(model, per_class=5)
        data.images(range(5))
        change()
        with pytest.raises(RuntimeError, match="make a new SyntheticDataset"):
            data.images(range(15))
    data = SyntheticDataset(model, per_class=5)
    data.images(range(5))
    model.share_memory()  # as it is when it is sent to another process
    data.images(range(15))
    # A copy for another process, and one made before the first image, take the model as it is then.
    data = pickle.loads(pickle.dumps(SyntheticDataset(model, per_class=5)))
    assert data.images(range(5)).shape == (5, 1, 8, 8)
    unused = SyntheticDataset(model, per_class=5, source="rfcm")
    unused.images(range(2))
    model.fit_modes((torch.randint(60, 196, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 3), rank=4)
    with pytest.raises(RuntimeError, match="modes have changed"):
        unused.images(range(15))
