"""The objectives and baselines: each loss by its definition, each method by what it leaves alone and what it learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from glem_augment.training.objective import augmented, e_step_loss, encode
from torch import Tensor

from glem_augment import GLEM, ImageData
from glem_augment.latent.gaussians import ClassGaussians
from glem_augment.training import TrainConfig, Trainer
from glem_augment.training.methods import METHODS, method, prepare

SMALL: dict[str, Any] = dict(
    preset="mef_tiny",
    flow_options=dict(depth=[1, 1], blocks=[1, 1], width=[8, 8]),
    epochs=2,
    batch_size=40,
    warmup_steps=2,
    lr=3e-3,
    modes_rank=0,
    sample_every=0,
    val_fraction=0.1,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> ImageData:
    """240 noisy 8x8 images of three classes."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    base = torch.randint(40, 200, (3, 1, 8, 8), generator=g)
    x = (base[y] + torch.randint(-30, 30, (240, 1, 8, 8), generator=g)).clamp(0, 255).to(torch.uint8)
    return ImageData.from_tensors(x, y, ["a", "b", "c"])


def fit(name: str, data: ImageData, out: Path, **changes: Any) -> tuple[GLEM, Trainer]:
    ready = prepare(name, data, **{**SMALL, **changes})
    trainer = Trainer(ready.data, ready.config, out, progress=False)
    return trainer.fit(), trainer


def random_gaussians(k: int = 4, d: int = 6) -> tuple[ClassGaussians, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    gaussians = ClassGaussians(k, d)
    with torch.no_grad():
        gaussians.mu.copy_(torch.randn(k, d, generator=g))
        gaussians.s.copy_(torch.randn(k, d, generator=g))
    z = torch.randn(9, d, generator=g, requires_grad=True)
    return gaussians, z, torch.randn(9, generator=g), torch.arange(9) % k


def dense_scores(gaussians: ClassGaussians, z: Tensor) -> Tensor:
    mu, std = gaussians.mu, gaussians.variance().sqrt()
    return torch.distributions.Normal(mu, std).log_prob(z[:, None]).sum(2)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("likelihood", ["class", "marginal"])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_e_step_losses_equal_their_definitions(joint: bool, likelihood: str, beta: float) -> None:
    gaussians, z, logdet, y = random_gaussians()
    config = TrainConfig(
        objective="hybrid" if beta else "mle",
        repulsion="none",
        beta=beta,
        likelihood=likelihood,
        joint=joint,
        label_smoothing=0.1,
        ce_scale=0.5,
    )
    loss = e_step_loss(gaussians, z, logdet, y, config, beta)
    scores = dense_scores(gaussians, z)
    own = scores.logsumexp(1) - math.log(4) if likelihood == "marginal" else scores[torch.arange(9), y]
    expected = -(own + logdet).mean() / 6
    if beta:
        log_posterior = F.log_softmax(0.5 * scores, 1)
        target = torch.full((9, 4), 0.1 / 4)
        target[torch.arange(9), y] += 0.9
        expected = expected + beta * -(target * log_posterior).sum(1).mean()
    assert torch.allclose(loss, expected, rtol=1e-5)
    wanted = torch.autograd.grad(expected, [z, gaussians.mu, gaussians.s], retain_graph=True)
    loss.backward()
    assert torch.allclose(z.grad, wanted[0], rtol=1e-4, atol=1e-6)
    if joint:
        assert torch.allclose(gaussians.mu.grad, wanted[1], rtol=1e-4, atol=1e-6)
        assert torch.allclose(gaussians.s.grad, wanted[2], rtol=1e-4, atol=1e-6)
    else:
        assert gaussians.mu.grad is None and gaussians.s.grad is None


def test_gaussian_dequantisation_has_its_spread_and_keeps_the_units(data: ImageData) -> None:
    model = GLEM.create("identity", (1, 8, 8), data.classes)
    x = data.tensor()
    g = torch.Generator().manual_seed(0)
    quiet, volume = encode(model, x, TrainConfig(noise_std=1e-6), g)
    middle, same = model.encode(x)
    assert torch.allclose(quiet, middle, atol=1e-6) and torch.allclose(volume, same)
    noisy, _ = encode(model, x, TrainConfig(noise_std=3.0), g)
    assert float((noisy - middle).std()) == pytest.approx(3.0 / 256, rel=0.05)
    uniform, _ = encode(model, x, TrainConfig(), g)
    assert float((uniform - middle).abs().max()) <= 0.5 / 256 + 1e-7


def test_augmentation_leaves_the_code_alone(data: ImageData) -> None:
    ready = prepare("ceglem", data, **SMALL, augment=("flip", "crop", "rotate", "jitter"))
    codes = ready.codes
    assert codes is not None and ready.config.code_rows == codes.rows == 4 and ready.data.image_shape == (1, 12, 8)
    x = ready.data.tensor()[:60]
    out = augmented(x, ready.config, torch.Generator().manual_seed(0))
    assert out.shape == x.shape and torch.equal(codes.split(out)[1], codes.split(x)[1])
    assert not torch.equal(codes.split(out)[0], codes.split(x)[0])
    assert torch.equal(codes.read(out)[0], torch.from_numpy(data.targets[:60]))


LEARNS = {  # method: means, variances
    "glem": (True, True),
    "lambda0": (True, True),
    "lambda0-psi": (True, True),
    "no-psi": (True, True),
    "ce": (False, False),
    "ceglem": (True, True),
    "only-mu": (True, False),
    "only-sigma": (False, True),
    "random": (False, False),
    "flowgmm": (False, False),
    "ib-inn": (True, False),
    "ulcgm": (True, True),
    "hybrid": (True, True),
    "hybrid-joint": (True, True),
    "saturating": (True, True),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_learns_what_it_says(name: str, data: ImageData, tmp_path: Path) -> None:
    ready = prepare(name, data, **{**SMALL, "epochs": 1, "val_fraction": 0.05})
    trainer = Trainer(ready.data, ready.config, tmp_path / "run", progress=False)
    mu, s = trainer.model.gaussians.mu.clone(), trainer.model.gaussians.s.clone()
    weights = [p.clone() for p in trainer.model.flow.parameters()]
    model = trainer.fit()
    gaussians = model.gaussians
    assert (not torch.equal(gaussians.mu, mu), not torch.equal(gaussians.s, s)) == LEARNS[name]
    assert any(not torch.equal(a, b) for a, b in zip(weights, trainer.model.flow.parameters(), strict=True))
    assert gaussians.num_classes == (1 if METHODS[name].monomodal else 3)
    if name in ("flowgmm", "ib-inn", "ce"):
        assert torch.equal(gaussians.variance(), torch.ones_like(gaussians.s))  # identity covariance
    if name == "flowgmm":
        assert float(mu.std()) == pytest.approx(1.0, abs=0.15)  # N(0, I)
    if name == "random":
        assert float(gaussians.variance().std()) > 0.05
    again = GLEM.from_pretrained(tmp_path / "run")
    x = ready.data.tensor()[:5]
    assert torch.allclose(again.log_prob_per_class(x), model.log_prob_per_class(x))


def test_joint_training_resumes_to_the_same_weights(data: ImageData, tmp_path: Path) -> None:
    whole, _ = fit("ib-inn", data, tmp_path / "whole")
    ready = prepare("ib-inn", data, **SMALL)
    trainer = Trainer(ready.data, ready.config, tmp_path / "cut", progress=False)
    trainer.save_checkpoint(good=True)
    calls = 0
    step = trainer.e_step

    def killed(x: Tensor, y: Tensor) -> float:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return step(x, y)

    trainer.e_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = Trainer(ready.data, ready.config, tmp_path / "cut", resume=True, progress=False)
    assert 0 < resumed.step < resumed.total_steps
    again = resumed.fit()
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_joint_training_sees_all_of_the_data_and_follows_the_flows_schedule(data: ImageData, tmp_path: Path) -> None:
    ready = prepare("ulcgm", data, **{**SMALL, "warmup_steps": 4})
    trainer = Trainer(ready.data, ready.config, tmp_path, progress=False)
    assert trainer.frozen_from == 0
    x, y = next(iter(trainer.images(trainer.split.nf, 40)))
    trainer.e_step(x, y)
    first = trainer.m_optimizer.param_groups[0]["lr"]
    assert first == pytest.approx(1e-2 * trainer.flow_optimizer.param_groups[0]["lr"] / 3e-3) and first < 1e-2
    trainer.fit()
    assert trainer.m_done == 0


def test_methods_give_way_to_explicit_settings(data: ImageData) -> None:
    assert method("glem").config().kld_weight == 10.0
    assert method("glem").config(kld_weight=3.0, psi=(5.0, 0.2, 0.05)).kld_weight == 3.0
    assert method("ib-inn").config(beta=0.2).beta == 0.2
    with pytest.raises(ValueError, match="one of glem, .*flowgmm.*got 'vae'"):
        method("vae")
    with pytest.raises(ValueError, match="unknown training settings"):
        prepare("glem", data, lambda0=3)
    assert prepare("glem", data).data is data and prepare("glem", data).codes is None


def test_new_settings_are_checked() -> None:
    for bad, match in (
        (dict(joint=True), "joint=True has no M-step"),
        (dict(likelihood="joint"), "likelihood"),
        (dict(label_smoothing=1.0), "label_smoothing"),
        (dict(noise_std=-1.0), "noise_std"),
        (dict(sigma_init=2.0), "sigma_init must be a variance that psi can give, 0.05 to 0.55"),
        (dict(sigma_init=0.0, psi=None), "sigma_init"),
        (dict(sigma_init=0.01, psi=None), "a variance that psi can give, 0.03 to inf"),
        (dict(code_rows=-1), "code_rows"),
        (dict(joint_lr=0.0), "joint_lr"),
    ):
        with pytest.raises(ValueError, match=match):
            TrainConfig(**bad)


def test_the_command_line_takes_a_method_by_name_and_resumes_it(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from glem_augment.cli.main import main
    from glem_augment.evaluation.codes import ClassCodes

    out = tmp_path / "run"
    many = tmp_path / "many"
    for folder in image_folder.iterdir():  # enough images for the split
        (many / folder.name).mkdir(parents=True)
        for i, file in enumerate(sorted(folder.iterdir()) * 8):
            (many / folder.name / f"{i}.png").write_bytes(file.read_bytes())
    command = ["train", str(many), "--out", str(out), "--quiet", "--method", "ceglem", "--epochs", "1"]
    command += ["--flow", "depth=[1,1]", "--flow", "blocks=[1,1]", "--flow", "width=[8,8]", "--modes-rank", "0"]
    assert main([*command, "--kld-weight", "2"]) == 0
    model, codes = GLEM.from_pretrained(out), ClassCodes.load(out)
    assert model.image_shape == codes.coded_shape == (3, 12, 8)
    assert model.config.training["config"]["kld_weight"] == 2.0  # the flag wins over the method
    assert "val_accuracy" not in model.config.training["held_out"]  # the images tell their class
    for argv in (
        ["eval", str(out), str(many)],
        ["generate", str(out), "--per-class", "2", "--out", str(tmp_path / "x")],
    ):
        assert main(argv) == 2 and "for a class code" in capsys.readouterr().err
    other = ["train", str(many), "--out", str(out), "--quiet", "--resume", "--method", "glem"]
    assert main(other) == 2 and "has --method ceglem, not glem" in capsys.readouterr().err
    assert main(["train", str(many), "--out", str(out), "--quiet", "--resume"]) == 0  # finished already
