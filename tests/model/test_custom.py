"""A user's flow or coupling inside a GLEM, and the check of the contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glem_augment import GLEM, GLEMAugment, SyntheticDataset
from glem_augment.classes import ClassModel, register_class_model
from glem_augment.classes.classes import Classes
from glem_augment.codec import Codec, register_codec, to_unit
from glem_augment.errors import ModelFileError
from glem_augment.flows import Coupling, Flow, check_flow, create_flow, register_coupling, register_flow
from glem_augment.images.dataset import ImageData
from glem_augment.parts import kinds
from glem_augment.training import TrainConfig, Trainer

SHAPE = (3, 8, 8)


class GainAndShift(Flow):
    """Gain and shift per pixel."""

    def __init__(self) -> None:
        super().__init__(SHAPE)
        self.gain, self.shift = nn.Parameter(torch.randn(SHAPE) * 0.1), nn.Parameter(torch.randn(SHAPE))
        self.register_buffer("turns", torch.ones((), dtype=torch.int32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * self.gain.exp() + self.shift).flatten(1), self.gain.sum().expand(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = (z.unflatten(1, SHAPE) - self.shift) * (-self.gain).exp()
        return x, -self.gain.sum().expand(len(z))


def test_a_users_flow_is_adapted_and_augments(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, *SHAPE), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    model = GLEM.from_bijection(GainAndShift(), SHAPE)
    assert model.classes == ["image"] and model.check_invertibility(images)["within_half_step"] == 1.0

    adapted = model.adapt((images, labels.numpy()), rank=4)
    adapted.save(tmp_path)
    with pytest.raises(ModelFileError, match="module="):
        GLEM.from_pretrained(tmp_path)
    torch.manual_seed(1)
    again = GLEM.from_pretrained(tmp_path, module=GainAndShift())
    assert torch.equal(again.log_prob(images), adapted.log_prob(images))
    moved, _ = GLEMAugment(again, p=1.0, seed=0)(images, labels)
    assert moved.shape == images.shape and bool((moved != images).any())
    assert SyntheticDataset(again, per_class=2, seed=0)[5][1] == 2


def test_a_users_flow_is_trained(tmp_path: Path) -> None:
    x, y = torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8), torch.arange(40) % 2
    start = GLEM.from_bijection(GainAndShift(), SHAPE)
    before = start.flow.gain.clone()
    config = TrainConfig(epochs=1, batch_size=8, objective="mle")
    found = Trainer(ImageData.from_tensors(x, y, ["a", "b"]), config, tmp_path / "run", init_model=start).fit()
    assert torch.equal(start.flow.gain, before) and not torch.equal(found.flow.gain, before)
    again = GLEM.from_pretrained(tmp_path / "run", module=GainAndShift())
    assert torch.equal(again.encode(x)[0], found.encode(x)[0])


def test_a_flow_keeps_its_statistics_and_its_precision(tmp_path: Path) -> None:
    class Normed(GainAndShift):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x + 0 * self.norm(x))

    flow = Normed().double()
    model = GLEM.from_bijection(flow, SHAPE)
    assert flow.norm.num_batches_tracked == 0
    x = torch.rand(2, *SHAPE)
    assert model.log_prob(x).dtype == torch.float64
    model.save(tmp_path)
    again = GLEM.from_pretrained(tmp_path, module=Normed().double())
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_a_flow_that_initialises_itself_is_left_to_the_users_images() -> None:
    class Normalising(GainAndShift):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if self.turns > 0:
                self.turns.zero_()
                self.shift.data.copy_(-x.mean(0) * self.gain.exp())
            return super().forward(x)

    x = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8)
    z, _ = GLEM.from_bijection(Normalising(), SHAPE).encode(x)
    assert float(z.mean(0).abs().max()) < 1e-5


class Other(GainAndShift):
    """Returns other results: `change(forward)` and `undo(inverse)`, each a function of the right pair."""

    def __init__(self, change: Callable[..., Any] = lambda *pair: pair, undo: Callable[..., Any] = lambda *pair: pair):
        super().__init__()
        self.change, self.undo = change, undo

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.change(*super().forward(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.undo(*super().inverse(z))


class Multiplied(GainAndShift):
    """A product of matrices that follows the caller's autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = super().forward(x)
        return z @ torch.eye(192), logdet


WRONG: list[tuple[nn.Module, str]] = [
    (nn.Linear(2, 2), "Linear"),
    (create_flow("identity", (1, 8, 8)), r"\[1, 8, 8\]"),
    (Other(lambda z, d: (z[:, :64], d)), r"forward of Other .*\[2, 64\]"),
    (Other(lambda z, d: z), "forward of Other"),
    (Other(lambda z, d: (z, d.sum())), "log-determinants"),
    (Other(undo=lambda x, d: x), "inverse of Other"),
    (Other(lambda z, d: (z / 0.0, d)), "not finite"),
    (Other(undo=lambda x, d: (1.05 * x, d)), "inverse of Other"),
    (Other(undo=lambda x, d: (x, d + 9)), "do not cancel"),
    # of the wrong way, and a mean over the pixels for their sum
    (Other(lambda z, d: (z, 9 - d), lambda x, d: (x, -9 - d)), "Jacobian"),
    (Multiplied(), "autocast"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_flow_is_refused(number: int) -> None:
    flow, message = WRONG[number]
    with pytest.raises((TypeError, ValueError), match=message):
        GLEM.from_bijection(flow, SHAPE)


def test_flows_of_the_library_keep_the_contract_and_users_flows_have_limits(tmp_path: Path) -> None:
    for preset, shape in (("glow_tiny", SHAPE), ("identity", SHAPE), ("latent", (32, 4, 4))):
        check_flow(create_flow(preset, shape), shape)
    GLEM.create("glow_tiny", (1, 8, 8), ["a"], depth=[1], blocks=[1], width=[8]).save(tmp_path)
    with pytest.raises(ModelFileError, match="module="):
        GLEM.from_pretrained(tmp_path, module=GainAndShift())


# ---- parts that are registered -----------------------------------------------------------------------------------


class Stretch(Flow):
    """z = gain x + shift, with a shift per pixel that is learned."""

    def __init__(self, image_shape: tuple[int, int, int], gain: float = 1.0) -> None:
        super().__init__(image_shape)
        self.shift = nn.Parameter(torch.zeros(image_shape))
        self.register_buffer("gain", torch.tensor(gain), persistent=False)  # the file does not hold it

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.gain * x + self.shift).flatten(1), (self.gain.log() * self.shift.numel()).expand(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = (z.unflatten(1, self.image_shape) - self.shift) / self.gain
        return x, -(self.gain.log() * self.shift.numel()).expand(len(z))


class Scaling(Codec):
    """Pixels times a number."""

    exact = True

    def __init__(self, image_shape: tuple[int, int, int], by: float = 2.0) -> None:
        super().__init__(image_shape, image_shape)
        self.by = by

    def encode(self, x: Tensor, noise: Any = None) -> Tensor:
        return to_unit(x, self.dtype) * self.by

    def decode(self, h: Tensor) -> Tensor:
        return h / self.by


@pytest.fixture
def registered() -> Iterator[None]:
    register_flow("stretch")(Stretch)
    register_codec("scaling")(Scaling)
    yield
    kinds("flow").pop("stretch", None)
    kinds("codec").pop("scaling", None)


def test_registered_flows_and_codecs_are_made_saved_loaded_and_trained_by_name(
    registered: None, tmp_path: Path
) -> None:
    x, y = torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8), torch.arange(40) % 2
    data = ImageData.from_tensors(x, y, ["a", "b"])
    given = GLEM.from_bijection(Stretch(SHAPE, 3), SHAPE, autoencoder=Scaling(SHAPE, by=0.5)).adapt(data, rank=2)
    named = GLEM.create("stretch", SHAPE, ["a", "b"], gain=3.0, autoencoder=Scaling(SHAPE, 0.5))
    named = named.eval().adapt(data, rank=2)
    assert given.config.flow == {"preset": "stretch", "image_shape": [3, 8, 8], "coupling": "stretch", "gain": 3}
    assert given.config.autoencoder["options"] == {"by": 0.5}
    for model in (given, named):
        model.save(tmp_path / "model")
        again = GLEM.from_pretrained(tmp_path / "model")
        assert torch.equal(again.log_prob(x), model.log_prob(x)) and again.codec.by == 0.5 and again.flow.gain == 3
    whitened = GLEM.create("stretch", SHAPE, ["a", "b"], whiten=4)
    whitened.save(tmp_path / "whitened")
    assert type(GLEM.from_pretrained(tmp_path / "whitened").flow.flow) is Stretch
    config = TrainConfig(preset="stretch", flow_options={"gain": 2.0}, epochs=1, batch_size=8, objective="mle")
    trained = Trainer(data, config, tmp_path / "run").fit()
    assert bool(trained.flow.shift.any())
    assert torch.equal(GLEM.from_pretrained(tmp_path / "run").encode(x)[0], trained.encode(x)[0])
    with pytest.raises(ValueError, match="'stretc'.*did you mean stretch"):
        TrainConfig(preset="stretc")
    text = (tmp_path / "model" / "config.json").read_text()
    for old, new, wrong in (('"gain": 3.0', '"gain": []', "gain"), ('"by": 0.5', '"to": 0.5', "'to'")):
        (tmp_path / "model" / "config.json").write_text(text.replace(old, new))
        with pytest.raises(ModelFileError, match=f"config.json: .*{wrong}"):
            GLEM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    del kinds("flow")["stretch"]
    with pytest.raises(ModelFileError, match="'stretch': import the module"):
        GLEM.from_pretrained(tmp_path / "model")


def test_what_could_not_be_built_again_is_not_saved(tmp_path: Path) -> None:
    class Mixture(Classes):
        pass

    model = GLEM.create("identity", SHAPE, ["a", "b"])
    model.latent_classes = Mixture(model.gaussians)
    with pytest.raises(ModelFileError, match="Mixture would be loaded as Classes"):
        model.save(tmp_path)
    model = GLEM.create("identity", SHAPE, ["a", "b"])
    model.flow = Stretch(SHAPE)
    with pytest.raises(ModelFileError, match="Stretch would be loaded as FlatIdentity"):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- couplings -------------------------------------------------------------------------------------------------------


class Scaled(Coupling):
    """y2 = gain (x2 + b(x1))."""

    def __init__(
        self,
        channels: int,
        shape: tuple[int, int, int],
        subnet: Callable[[int, int], nn.Module],
        index: int,
        gain: float = 2.0,
        sign: int = 1,
    ) -> None:
        super().__init__(channels)
        self.net, self.gain, self.place = subnet(self.n, self.n), gain * sign, (index, shape)

    def transform(self, x2: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        shift = params.transpose(0, 1)
        logdet = x2.new_full((x2.shape[1],), math.log(abs(self.gain)) * x2[:, 0].numel())
        return (x2 / self.gain - shift, -logdet) if inverse else (self.gain * (x2 + shift), logdet)


@pytest.fixture
def scaled() -> Iterator[None]:
    register_coupling("scaled")(Scaled)
    yield
    kinds("coupling").pop("scaled", None)


def test_a_users_coupling_is_used_saved_and_missed(scaled: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GLEM.create("glow_fast", SHAPE, ["a", "b"], coupling="scaled", sign=-1, depth=[2, 1])
    spec, couplings = model.config.flow, [part for part in model.flow.modules() if isinstance(part, Scaled)]
    assert [part.place for part in couplings] == [(0, (12, 4, 4)), (1, (12, 4, 4)), (2, (24, 2, 2))]
    assert (spec["coupling"], spec["gain"], spec["sign"]) == ("scaled", 2.0, -1) and "bound" not in spec
    for weight in model.flow.parameters():
        nn.init.normal_(weight, std=0.05)
    check_flow(model.flow, SHAPE)
    x = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    model.save(tmp_path)
    assert torch.equal(GLEM.from_pretrained(tmp_path).log_prob(x), model.log_prob(x))
    del kinds("coupling")["scaled"]
    with pytest.raises(ModelFileError, match="config.json: .*'scaled'"):
        GLEM.from_pretrained(tmp_path)


def test_options_and_names_of_couplings_are_checked(scaled: None) -> None:
    for options in ({"gain": "2"}, {"sign": 1.0}, {"bound": 1.0}, {"coupling": "scaledd"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            create_flow("glow_fast", SHAPE, **{"coupling": "scaled", **options})
    register_coupling("scaled")(Scaled)  # a cell of a notebook that runs twice
    for name in ("affine", "a b"):
        with pytest.raises(ValueError, match=name):
            register_coupling(name)(Scaled)
    for init in (lambda self, channels, subnet, depth=1: None, lambda self, channels, subnet, gain: None):
        with pytest.raises(ValueError, match="'depth'|'gain'"):
            register_coupling("many")(type("Many", (Coupling,), {"__init__": init}))
    with pytest.raises(TypeError, match="Linear"):
        register_coupling("many")(nn.Linear)


@register_class_model("heavy")
class Student(ClassModel):
    """Classes with heavy tails."""

    def __init__(self, num_classes: int, shape: tuple[int, int, int], freedom: int = 5) -> None:
        super().__init__()
        self.freedom, self.dim = freedom, math.prod(shape)
        self.noise_size = self.dim + freedom
        self.register_buffer("mean", torch.zeros(num_classes, self.dim))
        self.register_buffer("scale", torch.ones(num_classes, self.dim))

    def fit(self, latents: Callable[[int], Tensor]) -> None:
        for y in range(len(self.mean)):
            z = latents(y)
            self.mean[y], self.scale[y] = z.mean(0), z.std(0) * math.sqrt(1 - 2 / self.freedom)

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.distributions.StudentT(self.freedom, self.mean, self.scale).log_prob(z[:, None]).sum(2)

    def sample_from_noise(self, y: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        normal, chi = noise[:, : self.dim], noise[:, self.dim :].square().mean(1, keepdim=True)
        return self.mean[y] + temperature * self.scale[y] * normal / chi.sqrt()


def test_a_users_class_model_is_fitted_saved_and_drawn_from(tmp_path: Path) -> None:
    x, y = torch.randint(0, 256, (40, *SHAPE), dtype=torch.uint8), torch.arange(40) % 2
    x[y == 1] = x[y == 1] // 4
    model = GLEM.fit(ImageData.from_tensors(x, y, ["bright", "dark"]), class_model="heavy")
    assert model.config.classes == {"kind": "heavy", "freedom": 5}
    model.save(tmp_path)
    again = GLEM.from_pretrained(tmp_path)
    assert torch.equal(again.log_prob(x), model.log_prob(x)) and bool((again.predict(x) == y).all())
    assert (
        SyntheticDataset(again, 3).images([0]).float().mean()
        > 2 * SyntheticDataset(again, 3).images([5]).float().mean()
    )
    again.fit_modes((x, y), rank=3)
    assert isinstance(again.latent_classes.fitted, Student) and again.modes is not None and again.modes.rank == 3
    kinds("class model").pop("heavy")
    with pytest.raises(ModelFileError, match="no class model 'heavy': import the module"):
        GLEM.from_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="Student would be loaded as ClassModel"):
        model.save(tmp_path)
    register_class_model("heavy")(Student)
