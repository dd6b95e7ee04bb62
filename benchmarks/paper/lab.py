"""The measurements of `paper.py`: data, oracles, flows, samples and classifiers, each made once and kept.

Everything lies in a work folder, under a name made from the settings. A stopped run resumes from this folder, and
tables share flows and measurements.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.classifier import Classifier, Recipe, train_classifier
from benchmarks.paper.continuum import continuum_correlation
from benchmarks.paper.methods import CODED, METHODS, PAPER
from benchmarks.paper.research import ResearchTrainer, most_likely, split_settings
from benchmarks.paper.rfcm import ThinCovariances, fit_covariances
from benchmarks.paper.scales import DataSpec, Scale
from benchmarks.paper.tables import Cell
from examples._quality import coverage, feature_fid, label_reliability
from glem_augment import GLEM, open_data
from glem_augment.codec.pixel_range import UINT8
from glem_augment.evaluation import evaluate
from glem_augment.evaluation.metrics import spread
from glem_augment.images.dataset import ImageData
from glem_augment.io import atomic_write, write_json
from glem_augment.training import TrainConfig
from glem_augment.training.batches import stratified_split
from glem_augment.training.checkpoint import has_checkpoint
from glem_augment.training.moments import LatentStatistics

# Part of every name. Raise the number when the meaning of a setting changes.
_VERSION = 1
_CHUNK = 256
# The control of Table 3. Its variances have the best of these lower bounds, since pixels vary less than latents.
PIXELS = dict(objective="mle", psi=None)
# A hybrid whose M-steps move the Gaussians, to compare with `hybrid-joint`.
HYBRID = PAPER | dict(objective="hybrid")
FLOORS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
# Generated sets that stay in memory between epochs of one classifier; further sets are drawn again.
_KEEP_BYTES = 4 * 2**30
# Metrics that are measured together, by the name of the first.
_GROUPS = {
    metrics[0]: metrics
    for metrics in (
        ("NF-A", "BPD", "ECE"), ("FID", "Cov", "L-R"), ("CNN-A",), ("ViT-A",),
        ("rho-distance", "rho-confusion"),
    )
}  # fmt: skip


def version_of(*parts: Any) -> str:
    """Twelve hex digits that identify `parts`, which must be JSON values."""
    text = json.dumps([_VERSION, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class Fitted:
    """A trained flow. `weights` is the SHA-256 of its file in `folder`."""

    model: GLEM
    weights: str
    folder: Path


@dataclass(frozen=True)
class Number:
    """A measured number.

    Attributes:
        weights: the first 16 digits of the SHA-256 of the flow's file.
        key: a name made from everything that the number depends on (settings of flow, data, samples and classifiers,
            seed). The lab finds earlier results by their keys.
        run: of an earlier result, in runs.csv.
    """

    metric: str
    value: float
    weights: str
    key: str
    run: str = ""


class Lab:
    """Makes data, oracles, flows, samples and classifiers, and keeps them in the work folder.

    Args:
        name: of the scale. work: the folder. known: numbers of earlier runs, which are not measured again.
    """

    def __init__(self, scale: Scale, name: str, work: Path, device: str, known: Iterable[Number] = ()) -> None:
        self.scale, self.work = scale, work / name
        self.device = torch.device(device)
        self.known: dict[str, dict[str, Number]] = {}
        self.learn(known)
        self._data: dict[str, tuple[ImageData, ImageData]] = {}
        self._oracles: dict[str, Classifier] = {}
        self._real: dict[str, tuple[Tensor, Tensor]] = {}

    def spec(self, role: str) -> DataSpec:
        return self.scale.main if role == "main" else self.scale.second

    def learn(self, numbers: Iterable[Number]) -> None:
        """Add these numbers; they replace earlier numbers of the same key."""
        for number in numbers:
            self.known.setdefault(number.key, {})[number.metric] = number

    # ---- data and oracles ----------------------------------------------------------------------------------------

    def data(self, role: str) -> tuple[ImageData, ImageData]:
        """Training and test images."""
        if role not in self._data:
            spec = self.spec(role)
            train, test = (open_data(spec.spec, split, spec.image_size) for split in ("train", "test"))
            if spec.per_class is not None:
                rows = [np.flatnonzero(train.targets == c)[: spec.per_class] for c in range(len(train.classes))]
                train = train.subset(np.sort(np.concatenate(rows)))
            self._data[role] = train, test
        return self._data[role]

    def oracle(self, role: str) -> Classifier:
        """The ResNet18 of the real training set; `facts["test_accuracy"]`."""
        if role not in self._oracles:
            recipe, spec = self.scale.oracle, self.spec(role)
            path = self.work / "oracles" / f"{role}-{version_of(asdict(recipe), asdict(spec))}.safetensors"
            if not path.exists():
                train, test = self.data(role)
                images = train.tensor(), torch.from_numpy(train.targets)
                net = train_classifier(lambda epoch: images, len(train.classes), recipe, self.device)
                net.facts["test_accuracy"] = net.accuracy(test.tensor(), torch.from_numpy(test.targets))
                path.parent.mkdir(parents=True, exist_ok=True)
                net.save(path)
            self._oracles[role] = Classifier.load(path, self.device)
        return self._oracles[role]

    def oracle_accuracy(self, role: str) -> Number:
        """The oracle's accuracy on the test images, in %."""
        key = version_of("oracle", asdict(self.scale.oracle), self._data_key(role))
        if key not in self.known:
            self.learn([Number("accuracy", 100 * self.oracle(role).facts["test_accuracy"], "", key)])
        return self.known[key]["accuracy"]

    def real(self, role: str) -> tuple[Tensor, Tensor]:
        """The oracle's features and logits of the test images (evenly spread, at most `measured`)."""
        if role not in self._real:
            self._real[role] = self.oracle(role).run(self.data(role)[1].tensor()[self._real_rows(role)])
        return self._real[role]

    def _real_rows(self, role: str) -> Tensor:
        total = len(self.data(role)[1])
        return torch.from_numpy(spread(total, min(total, self.scale.measured)))

    # ---- flows ---------------------------------------------------------------------------------------------------

    def _settings(self, cell: Cell, seed: int) -> dict[str, Any]:
        """The settings of the cell's flow in addition to its method."""
        settings = {**self.scale.flow, **cell.changes, "seed": seed}
        own = method_settings(cell.method)
        return {name: value for name, value in settings.items() if name not in own or own[name] != value}

    def flow(self, cell: Cell, seed: int) -> Fitted:
        """The cell's flow, trained if it is not in the work folder."""
        train, _ = self.data(cell.data)
        settings = self._settings(cell, seed)
        name = version_of(cell.method, settings, asdict(self.spec(cell.data)))
        folder = self.work / "flows" / f"{cell.data}-{cell.method}-{name}"
        own, research = split_settings({**method_settings(cell.method), **settings, "equal_steps": True})
        config = TrainConfig(**own)
        if cell.method == "pixels":
            return self._control(train, config, folder)
        if not (folder / "finished.json").exists():
            trainer = ResearchTrainer(
                train, config, folder, has_checkpoint(folder), device=self.device, research=research
            )
            trainer.fit()
            write_json(folder / "finished.json", {"steps": trainer.total_steps})
        return self._fitted(GLEM.from_pretrained(folder, self.device), folder)

    def _control(self, train: ImageData, config: TrainConfig, folder: Path) -> Fitted:
        """The most likely Gaussians of the pixels.

        Of the lower bounds `FLOORS` of the variances, held-out images choose the one with the fewest bits/dim.
        """
        model = GLEM.create("identity", train.image_shape, train.classes, bits=config.bits, psi=None).to(self.device)
        split = stratified_split(train.targets, len(train.classes), 0.05, config.seed)
        held_out, gaussians = train.subset(split.val), model.gaussians

        def statistics(rows: np.ndarray) -> LatentStatistics:
            found, g = LatentStatistics(model.num_classes, model.dim, device=self.device), torch.Generator()
            for x, y in train.batches(rows, _CHUNK):
                found.add(model.encode(x, g)[0], y.to(self.device), torch.zeros(len(x), device=self.device))
            return found

        def fit(found: LatentStatistics, floor: float) -> float:
            gaussians.lowest_variance = floor
            most_likely(found, gaussians)
            return evaluate(model, held_out, round_trip=0)["bits_per_dim"]

        most = statistics(np.concatenate([split.nf, split.g]))
        floor = min(FLOORS, key=lambda value: fit(most, value))
        fit(statistics(np.arange(len(train))), floor)
        model.save(folder)
        return self._fitted(model, folder)

    @staticmethod
    def _fitted(model: GLEM, folder: Path) -> Fitted:
        return Fitted(model, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), folder)

    # ---- samples -------------------------------------------------------------------------------------------------

    def samples(self, fitted: Fitted, cell: Cell, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
        """`per_class` images of each class, uint8 [N,C,H,W], and labels int64 [N]."""
        model, g = fitted.model, torch.Generator().manual_seed(seed)
        y = torch.arange(model.num_classes).repeat_interleave(per_class)
        rfcm = self._rfcm(fitted, cell) if cell.source == "rfcm" else None
        parts = []
        for part in y.split(_CHUNK):
            x = model.sample(part, cell.tau, g) if rfcm is None else model.decode(rfcm.sample(part, cell.tau, g))
            parts.append((UINT8.clamp(x).cpu() * 255).round().to(torch.uint8))
        return torch.cat(parts), y

    def _rfcm(self, fitted: Fitted, cell: Cell) -> ThinCovariances:
        """The exact covariances of the latents of all training images, kept beside the model."""
        path = fitted.folder / f"rfcm-{fitted.weights[:16]}.pt"
        if not path.exists():
            data, model = self.data(cell.data)[0], fitted.model
            latents = model.latents_of_classes(data, data.rows_of_classes(), seed=0)
            thin = fit_covariances(latents, model.num_classes)
            with atomic_write(path) as file:
                torch.save(vars(thin), file)
        return ThinCovariances(**torch.load(path, weights_only=True)).to(self.device)

    def trained_on_samples(self, fitted: Fitted, cell: Cell, recipe: Recipe, seed: int) -> Classifier:
        """A classifier trained on samples alone.

        A generated set has as many images as the training set, and epoch e trains on set e mod `cell.size`. So every
        size takes the same number of steps.
        """
        train, _ = self.data(cell.data)
        classes = len(train.classes)
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def epoch_data(epoch: int) -> tuple[Tensor, Tensor]:
            index = epoch % cell.size
            if index in kept:
                return kept[index]
            x, y = self.samples(fitted, cell, len(train) // classes, _seed(seed, 1, index))
            if (len(kept) + 1) * x.numel() <= _KEEP_BYTES:
                kept[index] = x, y
            return x, y

        return train_classifier(epoch_data, classes, recipe, self.device)

    # ---- numbers -------------------------------------------------------------------------------------------------

    def measure(self, cell: Cell, seed: int) -> list[Number]:
        """The cell's metrics, in the paper's units (accuracies, Cov and L-R in %)."""
        result: list[Number] = []
        for group, wanted in _groups(cell):
            make = partial(self._measure, group, cell=cell, seed=seed)
            found = self.numbers(cell, seed, self._about(group, cell), make, wanted)
            names = {*wanted, *(f"{name} p" for name in wanted)}
            result += [number for number in found if number.metric in names]
        return result

    def knows(self, cell: Cell, seed: int) -> bool:
        """Whether all numbers of the cell are known."""
        keys = [(self.key(cell, seed, self._about(group, cell)), wanted) for group, wanted in _groups(cell)]
        return all(set(self.known.get(key, ())) >= set(wanted) for key, wanted in keys)

    def numbers(
        self, cell: Cell, seed: int, about: str, make: Callable[[Fitted], dict[str, float]], wanted: Iterable[str] = ()
    ) -> list[Number]:
        """The result of `make` for the cell's flow, measured unless everything `wanted` is known.

        Args:
            about: names the measurement, with everything that it depends on besides the flow.
        """
        key = self.key(cell, seed, about)
        known = self.known.get(key)
        if known is None or not set(known) >= set(wanted):
            fitted = self.flow(cell, seed)
            self.learn(Number(name, value, fitted.weights[:16], key) for name, value in make(fitted).items())
        return list(self.known[key].values())

    def key(self, cell: Cell, seed: int, about: str) -> str:
        """`Number.key`, from settings alone: neither data nor flow need exist."""
        return version_of(cell.method, self._settings(cell, seed), self._data_key(cell.data), about)

    def _data_key(self, role: str) -> tuple[Any, ...]:
        """The data's key, without its path, which differs between machines."""
        spec = asdict(self.spec(role))
        del spec["spec"]
        return role, spec, ""

    def _about(self, group: str, cell: Cell) -> str:
        """Everything that a measurement depends on besides the flow."""
        scale, sampling = self.scale, (cell.source, cell.tau)
        about: dict[str, Any] = {
            "NF-A": cell.source,
            "FID": (sampling, scale.measured, scale.neighbours, asdict(scale.oracle)),
            "CNN-A": (sampling, cell.size, asdict(scale.cnn)),
            "ViT-A": (sampling, cell.size, asdict(scale.vit)),
            "rho-distance": (scale.measured, asdict(scale.oracle)),
        }
        return f"{group} {version_of(about[group])}"

    # ---- measurements --------------------------------------------------------------------------------------------

    def _measure(self, group: str, fitted: Fitted, cell: Cell, seed: int) -> dict[str, float]:
        """A group of metrics that are measured together."""
        train, test = self.data(cell.data)
        y = torch.from_numpy(test.targets)
        per_class = max(1, self.scale.measured // len(train.classes))
        if group == "NF-A":
            return self._flow_metrics(fitted, cell, test)
        if group == "FID":
            x, labels = self.samples(fitted, cell, per_class, _seed(seed, 2))
            features, logits = self.oracle(cell.data).run(x)
            real = self.real(cell.data)[0]
            cover = coverage(real, features, self.scale.neighbours)
            reliability = 100 * label_reliability(logits, labels)
            return {"FID": feature_fid(real, features), "Cov": 100 * cover["coverage"], "L-R": reliability}
        if group in ("CNN-A", "ViT-A"):
            recipe = replace(self.scale.cnn if group == "CNN-A" else self.scale.vit, seed=seed)
            net = self.trained_on_samples(fitted, cell, recipe, seed)
            return {group: 100 * net.accuracy(test.tensor(), y)}
        features, logits = self.real(cell.data)
        rows = self._real_rows(cell.data)
        return continuum_correlation(fitted.model.gaussians.kld_matrix(), logits, features, y[rows])

    def _flow_metrics(self, fitted: Fitted, cell: Cell, test: ImageData) -> dict[str, float]:
        """NF accuracy, bits/dim (at the flow's bits) and calibration on the test images.

        With RFCM, the accuracy is the accuracy of the re-estimated Gaussians with full covariances.
        """
        fitted.model.latent_classes.temperature = 1.0  # methods are compared by the posteriors that they give
        found = evaluate(fitted.model, test, round_trip=0)
        accuracy = found["accuracy"]
        if cell.source == "rfcm":
            rfcm = self._rfcm(fitted, cell)
            with torch.no_grad():
                scores = [rfcm.log_prob(fitted.model.encode(x)[0]).cpu() for x in test.tensor().split(_CHUNK)]
            accuracy = label_reliability(torch.cat(scores), torch.from_numpy(test.targets))
        return {"NF-A": 100 * accuracy, "BPD": found["bits_per_dim"], "ECE": 100 * found["ece"]}


def method_settings(name: str) -> dict[str, Any]:
    """Settings of a method of the library, the control, or the hybrid with M-steps."""
    return {**METHODS, "pixels": PIXELS, "hybrid": HYBRID, **CODED}[name]


def _groups(cell: Cell) -> list[tuple[str, list[str]]]:
    """The groups of the cell's metrics, with the wanted metrics of each."""
    groups = [(group, [name for name in metrics if name in cell.metrics]) for group, metrics in _GROUPS.items()]
    return [(group, wanted) for group, wanted in groups if wanted]


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
