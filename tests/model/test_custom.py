"""Flows of other libraries, and a bijection of the user's, inside a GLEM."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import FrEIA.framework as ff
import FrEIA.modules as fm
import normflows as nf
import pytest
import torch
from torch import Tensor, nn

from glem_augment import GLEM, GLEMAugment, ModelFileError, SyntheticDataset
from glem_augment.flows import CustomFlow

SHAPE = (3, 8, 8)


def network(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, n_out, 3, padding=1))


class Own(nn.Module):
    """Gain and shift per pixel; its inverse gives no log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(SHAPE) * 0.1), nn.Parameter(torch.randn(SHAPE))
        self.register_buffer("turns", torch.ones((), dtype=torch.int32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.gain.exp() + self.shift, self.gain.sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return (z - self.shift) * (-self.gain).exp()


def freia() -> nn.Module:
    """Two parts of latents."""
    nodes = [ff.InputNode(*SHAPE)]
    nodes.append(ff.Node(nodes[-1], fm.IRevNetDownsampling, {}))
    for _ in range(2):
        nodes.append(ff.Node(nodes[-1], fm.GLOWCouplingBlock, {"subnet_constructor": network}))
        nodes.append(ff.Node(nodes[-1], fm.PermuteRandom, {"seed": 0}))
    half = ff.Node(nodes[-1], fm.Split, {"section_sizes": [4, 8], "dim": 0})
    return ff.GraphINN([*nodes, half, ff.OutputNode(half.out0), ff.OutputNode(half.out1)])


def freia_sequence() -> nn.Module:
    flow = ff.SequenceINN(*SHAPE)
    flow.append(fm.IRevNetDownsampling)
    flow.append(fm.GLOWCouplingBlock, subnet_constructor=network)
    return flow


def normflows() -> nn.Module:
    flows = [nf.flows.GlowBlock(12, 16, scale=True, split_mode="channel") for _ in range(2)]
    flows.append(nf.flows.Squeeze())  # the first on the way from the image
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian((12, 4, 4), trainable=False), flows)
    flow.inverse_and_log_det(torch.rand(16, *SHAPE) - 0.5)  # its ActNorms
    return flow


@pytest.mark.parametrize("make", [Own, freia, freia_sequence, normflows])
def test_a_foreign_flow_is_adapted_and_augments(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make()
    model = GLEM.from_bijection(module, SHAPE)
    images = torch.randint(0, 256, (60, *SHAPE), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    x = torch.rand(2, *SHAPE).double() - 0.5
    flow = GLEM.from_bijection(make().double(), SHAPE).flow
    z, logdet = flow(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0]).reshape(192, 192)
    assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(logdet[0].item(), abs=1e-4)
    back, back_logdet = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(back_logdet, -logdet, rtol=0, atol=1e-4)
    assert model.check_invertibility(images)["within_half_step"] == 1.0

    adapted = model.adapt((images, labels.numpy()), rank=4, progress=False)
    adapted.save(tmp_path)
    with pytest.raises(ModelFileError, match="pass it as module=$"):
        GLEM.from_pretrained(tmp_path)
    torch.manual_seed(1)
    again = GLEM.from_pretrained(tmp_path, module=make())
    assert torch.equal(again.log_prob(images), adapted.log_prob(images))
    moved, _ = GLEMAugment(again, p=1.0, seed=0)(images, labels)
    assert moved.shape == images.shape and bool((moved != images).any())
    assert SyntheticDataset(again, per_class=2, seed=0)[5][1] == 2


def test_a_module_keeps_its_statistics_and_its_precision(tmp_path: Path) -> None:
    class Normed(Own):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x + 0 * self.norm(x))

    module = Normed().double()
    model = GLEM.from_bijection(module, SHAPE)
    assert module.norm.num_batches_tracked == 0
    x = torch.rand(2, *SHAPE)
    assert model.log_prob(x).dtype == torch.float64
    model.save(tmp_path)
    again = GLEM.from_pretrained(tmp_path, module=Normed().double())
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_what_is_no_flow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear has no `inverse`"):
        GLEM.from_bijection(nn.Linear(2, 2), SHAPE)

    class Half(Own):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :1], x.sum((1, 2, 3))

    with pytest.raises(ValueError, match="192 numbers"):
        GLEM.from_bijection(Half(), SHAPE)

    class Off(Own):
        def inverse(self, z: Tensor) -> Tensor:
            return 1.05 * super().inverse(z)

    class Broken(Own):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, logdet = super().forward(x)
            return z / 0.0, logdet

    for module, message in ((Off(), "the inverse of Off does not give"), (Broken(), "not finite for random images")):
        with pytest.raises(ValueError, match=message):
            GLEM.from_bijection(module, SHAPE)
    with pytest.raises(ValueError, match="leave memory at 'stored'"):
        GLEM.from_bijection(Own(), SHAPE).flow.set_memory("reversible")
    GLEM.create("glow_tiny", (1, 8, 8), ["a"], depth=[1], blocks=[1], width=[8]).save(tmp_path)
    with pytest.raises(ModelFileError, match="leave module= out"):
        GLEM.from_pretrained(tmp_path, module=Own())


@pytest.mark.parametrize("make", [Own, freia, normflows])
@pytest.mark.parametrize("factor", [-1.0, 1 / 16])  # the wrong way, and a mean over the latent's pixels for their sum
def test_a_log_determinant_of_another_map_is_refused(make: Callable[[], nn.Module], factor: float) -> None:
    torch.manual_seed(0)

    class Wrong(nn.Module):
        """The images three times as large, which is where their logdet comes from."""

        def __init__(self, factor: float) -> None:
            super().__init__()
            self.flow, self.factor = CustomFlow(make(), SHAPE), factor

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, logdet = self.flow(3 * x)
            return z, self.factor * (logdet + 192 * math.log(3))

        def inverse(self, z: Tensor) -> Tensor:
            return self.flow.inverse(z)[0] / 3

    GLEM.from_bijection(Wrong(1.0), SHAPE)
    with pytest.raises(ValueError, match="the log-determinant of Wrong is .* nats for a random image"):
        GLEM.from_bijection(Wrong(factor), SHAPE)


def test_a_module_that_initialises_itself_is_left_to_the_users_images() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8)
    nodes = [ff.InputNode(*SHAPE)]
    nodes.append(ff.Node(nodes[-1], fm.ActNorm, {}))
    actnorm = ff.GraphINN([*nodes, ff.OutputNode(nodes[-1])])
    glow = nf.NormalizingFlow(
        nf.distributions.DiagGaussian((3, 8, 8), trainable=False), [nf.flows.GlowBlock(3, 8, scale=True)]
    )
    for module in (actnorm, glow):
        z, _ = GLEM.from_bijection(module, SHAPE).encode(x)
        assert bool(z.isfinite().all())
        assert z.unflatten(1, SHAPE).std((0, 2, 3)).tolist() == pytest.approx([1.0] * 3, rel=0.2)
