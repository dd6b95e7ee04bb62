"""GLEMAugment(cuda_graphs=True): what is recorded when, with a recorder in the place of CUDA's; on a GPU, with that."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from glem_augment import GLEM, GLEMAugment, _graphs

CLASSES = ["ant", "bee", "cat"]


def make_model(device: str = "cpu") -> GLEM:
    torch.manual_seed(0)
    model = GLEM.create("mef_tiny", (1, 8, 8), CLASSES, depth=[2, 1], width=[8, 8])
    images = torch.randint(60, 196, (90, 1, 8, 8), dtype=torch.uint8)
    model.initialise(images[:32])
    for p in model.flow.parameters():
        if p.ndim == 4 and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    model.fit_modes((images, torch.arange(90) % 3), rank=8)
    return model.eval().requires_grad_(False).to(device)


def batch(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, 1, 8, 8), generator=g, dtype=torch.uint8), torch.arange(n) % 3


def pair(model: GLEM, policy: str = "noise", p: float = 0.5) -> list[GLEMAugment]:
    """The same transform without graphs and with them."""
    return [GLEMAugment(model, policy=policy, p=p, seed=0, modes=8, cuda_graphs=on) for on in (False, True)]


def agree(plain: GLEMAugment, aug: GLEMAugment, numbers: range, n: int = 16) -> None:
    """On so many batches, which are different ones."""
    for number in numbers:
        x, y = batch(n, seed=number)
        assert torch.equal(aug(x, y)[0], plain(x, y)[0])


class Recorder:
    """What a graph does: replays into the memory it was recorded in."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0

    def __call__(self, function: _graphs.Pass, x: Tensor) -> _graphs.Pass:
        given = x.clone()
        found = function(given)
        assert not found.requires_grad and not found.is_inference()
        self.shapes.append(tuple(x.shape))

        def run(x: Tensor) -> Tensor:
            self.replays += 1
            given.copy_(x)
            found.copy_(function(given))
            return found.clone()

        return run


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(_graphs, "_record", made)
    monkeypatch.setattr(_graphs, "_can_be_recorded", lambda x: not torch.is_grad_enabled())
    return made


@pytest.mark.parametrize("policy", ["mixup", "noise"])
def test_the_same_images_from_the_third_time_on_by_graphs(recorder: Recorder, policy: str) -> None:
    model = make_model()
    plain, aug = pair(model, policy)
    results = []
    for number in range(6):
        x, y = batch(seed=number)
        (wanted, _), (got, _) = plain(x, y), aug(x, y)
        assert torch.equal(got, wanted)
        results.append((got, wanted))
        assert (recorder.replays > 0) == (number >= 2)
    assert recorder.shapes.count((8, 64)) == 1  # decoding
    # No result is overwritten by a later call.
    assert all(torch.equal(got, wanted) for got, wanted in results)


def test_only_where_it_is_asked_for(recorder: Recorder) -> None:
    aug = GLEMAugment(make_model(), seed=0, modes=8)
    for number in range(4):
        aug(*batch(seed=number))
    assert not recorder.shapes and not aug.cuda_graphs


def test_not_on_a_cpu() -> None:
    aug = GLEMAugment(make_model(), seed=0, modes=8, cuda_graphs=True)
    for number in range(4):
        aug(*batch(seed=number))
    assert not aug._graphs._on


def test_where_a_pass_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    x, capturing = SimpleNamespace(is_cuda=True), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    assert torch.is_grad_enabled() and not _graphs._can_be_recorded(x)  # type: ignore[arg-type]
    with torch.no_grad():
        assert _graphs._can_be_recorded(x)  # type: ignore[arg-type]
        assert not _graphs._can_be_recorded(torch.zeros(1))
        capturing.append(True)
        assert not _graphs._can_be_recorded(x)  # type: ignore[arg-type]
        capturing.clear()
        monkeypatch.setattr(_graphs, "is_compiling", lambda: True)
        assert not _graphs._can_be_recorded(x)  # type: ignore[arg-type]


def test_a_flow_in_training_is_not_recorded(recorder: Recorder) -> None:
    """A fused optimizer changes weights, and their versions do not tell."""
    model = make_model()
    plain, aug = pair(model)
    for wanted in (False, True):
        model.flow.requires_grad_(not wanted)
        agree(plain, aug, range(4))
        assert bool(recorder.shapes) is wanted


def test_changed_weights_are_recorded_anew_once_they_stay(recorder: Recorder) -> None:
    model = make_model()
    plain, aug = pair(model)
    agree(plain, aug, range(3))
    assert len(recorder.shapes) == 2
    with torch.no_grad():
        next(p for p in model.flow.parameters() if p.ndim == 4).mul_(1.5)
    agree(plain, aug, range(2))
    assert len(recorder.shapes) == 2
    agree(plain, aug, range(1))
    assert len(recorder.shapes) == 4
    for _ in range(4):  # always others
        with torch.no_grad():
            next(p for p in model.flow.parameters() if p.ndim == 4).mul_(1.01)
        agree(plain, aug, range(1))
    assert len(recorder.shapes) == 4
    model.flow.set_autocast(torch.bfloat16)
    agree(plain, aug, range(3))
    assert len(recorder.shapes) == 6


def test_a_graph_has_a_flow_of_its_own(recorder: Recorder) -> None:
    model = make_model()
    aug = GLEMAugment(model, policy="noise", seed=0, modes=8, cuda_graphs=True)
    for number in range(3):
        aug(*batch(seed=number))
    own = aug._graphs._on[torch.device("cpu")].model
    assert own is not None and own.flow is not model.flow and own.gaussians is model.gaussians
    mine = {p.data_ptr() for p in model.flow.parameters()}
    assert not mine & {p.data_ptr() for p in own.flow.parameters()}


def test_no_more_graphs_than_there_is_room_for(recorder: Recorder) -> None:
    model = make_model()
    plain, aug = pair(model, p=1.0)
    for n in range(4, 14):
        agree(plain, aug, range(3), n)
    assert len(recorder.shapes) == _graphs._MOST


def test_under_inference_mode_and_after_it(recorder: Recorder) -> None:
    model = make_model()
    plain, aug = pair(model)
    for number in range(8):
        with torch.inference_mode(number < 4):
            agree(plain, aug, range(number, number + 1))
    assert recorder.replays > 6


def test_what_cannot_be_recorded_goes_on_without(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:  # what the end of a recording makes of it
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(_graphs, "_record", fail)
    model = make_model()
    plain, aug = pair(model, "mixup")
    for number in range(5):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            agree(plain, aug, range(number, number + 1))
        assert len(told) == (number == 2)
        assert all("not permitted when stream is capturing" in str(w.message) for w in told)


def test_copies_and_the_config_keep_the_wish_and_leave_the_graphs(recorder: Recorder) -> None:
    model = make_model()
    aug = GLEMAugment(model, policy="noise", seed=0, modes=8, cuda_graphs=True)
    for number in range(3):
        aug(*batch(seed=number))
    assert aug._graphs._on
    for other in (pickle.loads(pickle.dumps(aug)), copy.deepcopy(aug), GLEMAugment.from_config(aug.to_config(), model)):
        assert other.cuda_graphs and not other._graphs._on
    x, y = batch(seed=9)
    assert torch.equal(copy.deepcopy(aug)(x, y)[0], aug(x, y)[0])
    with pytest.raises(AttributeError, match="cuda_graphs can't be changed"):
        aug.cuda_graphs = False
    with pytest.raises(TypeError, match="cuda_graphs must be True or False"):
        GLEMAugment(model, cuda_graphs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["mef_tiny", "mef_small", "glow_tiny", "glow_fast"])
def test_no_pass_of_a_frozen_flow_looks_at_a_number(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would be a wait, which a graph can't record. A meta tensor has no numbers to look at."""
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and known(*kind))
    model = GLEM.create(preset, (3, 32, 32), CLASSES)
    model.initialise(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8))
    model = model.eval().requires_grad_(False).to("meta")
    with torch.no_grad():
        z = _graphs.encode(model, torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta"))
        assert z.shape == (4, 3072) and _graphs.decode(model, z).shape == (4, 3, 32, 32)
        with pytest.raises(RuntimeError, match="meta"):
            z.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["mixup", "noise"])
def test_on_a_gpu(policy: str) -> None:
    model = make_model("cuda")
    plain, aug = pair(model, policy)
    for number in range(6):
        x, y = (t.cuda() for t in batch(seed=number))
        x = x / 255
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = aug(x, y)[0]
        torch.testing.assert_close(got, plain(x, y)[0], rtol=0, atol=1e-5)
    assert len(aug._graphs._on[x.device].graphs) >= 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        aug(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
