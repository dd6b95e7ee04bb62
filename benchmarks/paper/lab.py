"""What `paper.py` measures with: data, oracles, flows, samples and classifiers, each made once and kept.

Everything lies in a work folder and is found again by a name made from its settings, so a run that was stopped goes on
where it was, and tables share flows and measurements.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import machine
from benchmarks.paper.scales import SCALES, DataSpec, Scale
from benchmarks.paper.tables import Cell
from glem_augment import GLEM, ImageData, open_data
from glem_augment.data.pixels import in_range
from glem_augment.errors import DataError
from glem_augment.evaluation import (
    Classifier,
    Recipe,
    continuum_correlation,
    coverage,
    feature_fid,
    train_classifier,
)
from glem_augment.evaluation.codes import ClassCodes, balance_by_rejection, code_agreement
from glem_augment.evaluation.metrics import evaluate
from glem_augment.io import write_json
from glem_augment.latent.rfcm import ThinCovariances
from glem_augment.training import TrainConfig, Trainer
from glem_augment.training.checkpoint import AFTER_THE_STEPS, FREE, RULES, Checkpoints
from glem_augment.training.interrupt import TimeUpError
from glem_augment.training.methods import METHODS, method, prepare

# Part of every name: changes with the steps of training, and when the same settings come to mean something else here.
_CHANGES = 0
_VERSION = RULES + 100 * _CHANGES
_CHUNK = 256
# Generated sets that are kept in memory between epochs of one classifier; others are drawn again.
_KEEP_BYTES = 4 * 2**30


def _name(*parts: Any) -> str:
    """Twelve hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def version_of(*parts: Any) -> str:
    """A name for what depends on ``parts``, another one where the benchmark has changed."""
    return _name(_VERSION, *parts)


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Fitted:
    """A trained flow: ``weights`` is the SHA-256 of its file; ``folder`` holds it and what was measured with it."""

    model: GLEM
    codes: ClassCodes | None
    weights: str
    folder: Path
    monomodal: bool


@dataclass(frozen=True)
class Number:
    """A measured number: ``weights``, the SHA-256 of its flow's file; ``key``, a name made from all that it depends on
    (settings of flow, data, samples and classifiers, seed), by which it is found in the results of earlier runs;
    ``processor``: on which it was measured."""

    metric: str
    value: float
    weights: str
    key: str
    processor: str


class Lab:
    """Makes and keeps.

    Args:
        scale: sizes. name: of the scale. work: the folder. device: of everything. until: on the clock of
            ``time.monotonic``; later than that nothing new is begun, and training stops with a checkpoint.
        known: numbers of earlier runs, which are not measured again.
    """

    def __init__(
        self,
        scale: Scale,
        name: str,
        work: Path,
        device: str,
        until: float | None = None,
        known: Iterable[Number] = (),
    ) -> None:  # fmt: skip
        self.scale, self.name, self.work = scale, name, work / name
        self.device, self.until = torch.device(device), until
        self.known: dict[str, dict[str, Number]] = {}
        self.learn(known)
        about = machine()
        self.processor: str = about["processor"] if self.device.type == "cpu" else about["accelerator"] or device
        self._data: dict[str, tuple[ImageData, ImageData]] = {}
        self._oracles: dict[str, Classifier] = {}
        self._real: dict[str, tuple[Tensor, Tensor]] = {}
        self.rejection: dict[str, float] = {}  # of the last samples of a monomodal flow, in %

    def spec(self, role: str) -> DataSpec:
        return self.scale.main if role == "main" else self.scale.second

    def learn(self, numbers: Iterable[Number]) -> None:
        """Know these, in place of what was known of the same: a table that is written again keeps its own."""
        for number in numbers:
            self.known.setdefault(number.key, {})[number.metric] = number

    def check_time(self) -> None:
        """Raises TimeUpError once the time is over."""
        if self.until is not None and time.monotonic() >= self.until:
            raise TimeUpError("the minutes are over; the same command goes on from here")

    # ---- data and oracles ----------------------------------------------------------------------------------------

    def data(self, role: str) -> tuple[ImageData, ImageData]:
        """Training and test images."""
        if role not in self._data:
            spec = self.spec(role)
            train, test = (self._open(spec, split) for split in ("train", "test"))
            if spec.per_class is not None:
                rows = [np.flatnonzero(train.targets == c)[: spec.per_class] for c in range(len(train.classes))]
                train = train.subset(np.sort(np.concatenate(rows)))
            self._data[role] = train, test
        return self._data[role]

    def _open(self, spec: DataSpec, split: str) -> ImageData:
        """Decoded once; thousands of small files take minutes."""
        path = self.work / "data" / f"{_name(asdict(spec) | {'per_class': 0})}-{split}.npz"
        if path.exists():
            with np.load(path) as file:
                x, y, classes, ids = (file[key] for key in ("x", "y", "classes", "ids"))
            return ImageData.from_tensors(torch.from_numpy(x), y, classes.tolist(), ids.tolist(), spec.name)
        data = open_data(spec.spec, split, spec.image_size)
        pixels = data.tensor()
        if pixels is None:
            raise DataError(f"{spec.spec} does not fit in memory")
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = path.with_suffix(".tmp.npz")
        np.savez(waiting, x=pixels.numpy(), y=data.targets, classes=data.classes, ids=data.class_ids)
        waiting.replace(path)
        return ImageData.from_tensors(pixels, data.targets, data.classes, data.class_ids, spec.name)

    def oracle(self, role: str) -> Classifier:
        """The ResNet18 of the real training set; ``facts["test_accuracy"]``."""
        if role not in self._oracles:
            recipe, spec = self.scale.oracle, self.spec(role)
            path = self.work / "oracles" / f"{role}-{version_of(asdict(recipe), asdict(spec))}.safetensors"
            if not path.exists():
                self.check_time()
                train, test = self.data(role)
                net = train_classifier(
                    (train.tensor(), torch.from_numpy(train.targets)), len(train.classes), recipe, self.device
                )
                net.facts["test_accuracy"] = net.accuracy(test.tensor(), torch.from_numpy(test.targets))
                net.facts["processor"] = self.processor
                path.parent.mkdir(parents=True, exist_ok=True)
                net.save(path)
            self._oracles[role] = Classifier.load(path, self.device)
        return self._oracles[role]

    def real(self, role: str) -> tuple[Tensor, Tensor]:
        """The oracle's features and logits of the test images (evenly spread, at most ``measured``)."""
        if role not in self._real:
            self._real[role] = self.oracle(role).run(self.data(role)[1].tensor()[self._real_rows(role)])
        return self._real[role]

    def _real_rows(self, role: str) -> Tensor:
        total = len(self.data(role)[1])
        count = min(total, self.scale.measured)
        return (torch.arange(count) * total) // count

    # ---- flows ---------------------------------------------------------------------------------------------------

    def flow(self, cell: Cell, seed: int) -> Fitted:
        """The cell's flow, trained now or before."""
        train, _ = self.data(cell.data)
        settings = {**self.scale.flow, **cell.changes, "seed": seed}
        ready = prepare(cell.method, train, **settings)
        # The defaults as well as what was asked for.
        label = version_of(_learned(ready.config), asdict(self.spec(cell.data)))
        folder = self.work / "flows" / f"{cell.data}-{cell.method}-{label}"
        if not (folder / "finished.json").exists():
            self.check_time()
            if self.until is not None:
                ready.config.max_minutes = max(0.01, (self.until - time.monotonic()) / 60)
            resume = Checkpoints(folder).exist()
            trainer = Trainer(ready.data, ready.config, folder, resume, device=self.device)
            trainer.fit()
            if ready.codes is not None:
                ready.codes.save(folder)
            write_json(folder / "finished.json", {"seconds": trainer.seconds(), "steps": trainer.total_steps})
        model = GLEM.from_pretrained(folder, self.device)
        codes = ready.codes
        return Fitted(model, codes, _file_hash(folder / "model.safetensors"), folder, METHODS[cell.method].monomodal)

    # ---- samples -------------------------------------------------------------------------------------------------

    def samples(self, fitted: Fitted, cell: Cell, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
        """``per_class`` images of each class, uint8 [N,C,H,W] without codes, and labels int64 [N]."""
        model, codes = fitted.model, fitted.codes
        g = torch.Generator().manual_seed(seed)
        if fitted.monomodal:
            assert codes is not None

            def draw(n: int) -> Tensor:
                return in_range(model.sample(torch.zeros(n, dtype=torch.int64), cell.tau, g))

            x, y, facts = balance_by_rejection(draw, codes, per_class, _CHUNK)
            self.rejection = {"kept": 100 * facts["acceptance"], "rarest class": 100 * facts["rarest"]}
            return x, y
        y = torch.arange(model.num_classes).repeat_interleave(per_class)
        thin = self._rfcm(fitted, cell) if cell.source == "rfcm" else None
        parts = []
        for part in y.split(_CHUNK):
            if thin is None:
                x = model.sample(part, cell.tau, g)
            else:
                x = model.decode(thin.sample(part, cell.tau, g))
            x = in_range(x).cpu()
            parts.append(((codes.split(x)[0] if codes is not None else x) * 255).round().to(torch.uint8))
        return torch.cat(parts), y

    def _rfcm(self, fitted: Fitted, cell: Cell) -> ThinCovariances:
        """The exact covariances of the latents of all training images; kept beside the model."""
        if fitted.codes is not None:
            raise DataError("RFCM is measured for flows without codes")
        if not (fitted.folder / "rfcm.safetensors").exists():
            fitted.model.fit_rfcm(self.data(cell.data)[0]).save(fitted.folder, fitted.weights)
        return ThinCovariances.load(fitted.folder, fitted.weights).to(self.device)

    def trained_on_samples(self, fitted: Fitted, cell: Cell, recipe: Recipe, seed: int) -> Classifier:
        """A classifier that has seen no real image. Epoch e trains on set e mod ``size`` of as many generated images as
        the training set has, so every size takes the same number of steps."""
        train, _ = self.data(cell.data)
        classes = len(train.classes)
        per_class = len(train) // classes
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def epoch_data(epoch: int) -> tuple[Tensor, Tensor]:
            index = epoch % cell.size
            if index not in kept:
                images = self.samples(fitted, cell, per_class, _seed(seed, 1, index))
                if (len(kept) + 1) * images[0].numel() > _KEEP_BYTES:
                    return images
                kept[index] = images
            return kept[index]

        return train_classifier(epoch_data, classes, recipe, self.device)

    # ---- measurements --------------------------------------------------------------------------------------------

    def kept(self, fitted: Fitted, key: str, make: Callable[[], dict[str, float]]) -> tuple[dict[str, float], str]:
        """What ``make`` gives, measured now or before with the same weights, and on which processor; stored beside the
        flow."""
        store = fitted.folder / "measured.json"
        known: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
        if known.get("weights") != fitted.weights:
            known = {"weights": fitted.weights, "values": {}}
        if key not in known["values"]:
            self.check_time()
            known["values"][key] = make()
            known.setdefault("processors", {})[key] = self.processor
            write_json(store, known)
        return known["values"][key], known.get("processors", {}).get(key, self.processor)

    def measure(self, cell: Cell, seed: int) -> list[Number]:
        """The cell's metrics, in the paper's units (accuracies, Cov and L-R in %)."""
        result: list[Number] = []
        for group, wanted in _groups(cell):
            make = partial(self._measure, group, cell=cell, seed=seed)
            found = self.numbers(cell, seed, self._key(group, cell), make, wanted)
            names = {*wanted, *(f"{name} p" for name in wanted), "kept", "rarest class"}
            result += [number for number in found if number.metric in names]
        return result

    def has(self, cell: Cell, seed: int, about: str) -> bool:
        """Whether that of the cell's flow (see ``numbers``) is known."""
        return self.key(cell, seed, about) in self.known

    def knows(self, cell: Cell, seed: int) -> bool:
        """Whether nothing of the cell need be measured."""
        keys = [(self.key(cell, seed, self._key(group, cell)), wanted) for group, wanted in _groups(cell)]
        return all(set(self.known.get(key, ())) >= set(wanted) for key, wanted in keys)

    def numbers(
        self,
        cell: Cell,
        seed: int,
        about: str,
        make: Callable[[Fitted], dict[str, float]],
        wanted: Iterable[str] = (),
    ) -> list[Number]:
        """What ``make`` gives for the cell's flow: known, if all that is ``wanted`` is, or measured, now or before.

        Args:
            about: names what is measured, with everything that it depends on besides the flow.
        """
        key = self.key(cell, seed, about)
        known = self.known.get(key)
        if known is None or not set(known) >= set(wanted):
            fitted = self.flow(cell, seed)
            values, where = self.kept(fitted, about, partial(make, fitted))
            found = [Number(metric, value, fitted.weights, key, where) for metric, value in values.items()]
            known = self.known[key] = {number.metric: number for number in found}
        return list(known.values())

    def key(self, cell: Cell, seed: int, about: str) -> str:
        """``Number.key``, from settings alone: neither data nor flow need be there, nor be where they were."""
        changes = {**self.scale.flow, **cell.changes, "seed": seed}
        learned = _learned(method(cell.method).config(**changes))
        return version_of(cell.method, learned, self._data_key(cell.data), about)

    def _data_key(self, role: str) -> tuple[Any, ...]:
        """Without the path of the scale's own data, which is another one on every machine."""
        spec = asdict(self.spec(role))
        path = spec.pop("spec")
        own = getattr(SCALES[self.name], role).spec
        return role, spec, "" if path == own else path

    def oracle_accuracy(self, role: str) -> Number:
        """The oracle's accuracy on the test images, in %."""
        key = version_of("oracle", asdict(self.scale.oracle), self._data_key(role))
        found = self.known.get(key, {}).get("accuracy")
        if found is None:
            facts = self.oracle(role).facts
            where = facts.get("processor", self.processor)
            found = Number("accuracy", 100 * facts["test_accuracy"], "", key, where)
        return found

    def _key(self, group: tuple[str, ...], cell: Cell) -> str:
        """What a measurement depends on besides the flow."""
        scale, sampling = self.scale, (cell.source, cell.tau)
        about: dict[str, Any] = {
            "NF-A": cell.source,
            "FID": (sampling, scale.measured, scale.neighbours, asdict(scale.oracle)),
            "CNN-A": (sampling, cell.size, asdict(scale.cnn)),
            "ViT-A": (sampling, cell.size, asdict(scale.vit)),
            "Agree": (sampling, scale.measured),
            "rho-distance": (scale.measured, asdict(scale.oracle)),
        }
        return f"{group[0]} {version_of(about[group[0]])}"

    def _measure(self, group: tuple[str, ...], fitted: Fitted, cell: Cell, seed: int) -> dict[str, float]:
        """A group of metrics that are measured together."""
        train, test = self.data(cell.data)
        y = torch.from_numpy(test.targets)
        if group[0] == "NF-A":
            return self._flow_metrics(fitted, cell, test)
        if group[0] == "FID":
            count = max(1, self.scale.measured // len(train.classes))
            x, labels = self.samples(fitted, cell, count, _seed(seed, 2))
            features, logits = self.oracle(cell.data).run(x)
            real = self.real(cell.data)[0]
            cover = coverage(real, features, self.scale.neighbours)
            right = (logits.argmax(1) == labels).double().mean()
            extra = self.rejection if fitted.monomodal else {}
            return {
                "FID": feature_fid(real, features), "Cov": 100 * cover["coverage"], "L-R": 100 * float(right),
                "generated": len(x), "real": len(real), "k": self.scale.neighbours, **extra,
            }  # fmt: skip
        if group[0] in ("CNN-A", "ViT-A"):
            recipe = self.scale.cnn if group[0] == "CNN-A" else self.scale.vit
            recipe = Recipe(**{**asdict(recipe), "seed": seed})
            net = self.trained_on_samples(fitted, cell, recipe, seed)
            return {group[0]: 100 * net.accuracy(test.tensor(), y)}
        if group[0] == "Agree":
            assert fitted.codes is not None
            per_class = max(1, self.scale.measured // len(train.classes))
            return {"Agree": 100 * code_agreement(fitted.model, fitted.codes, per_class, cell.tau, seed)["agreement"]}
        features, logits = self.real(cell.data)
        rho = continuum_correlation(
            fitted.model.gaussians.kld_matrix(), logits, features, y[self._real_rows(cell.data)]
        )
        return {
            "rho-distance": rho.distance, "rho-distance p": rho.distance_p,
            "rho-confusion": rho.confusion, "rho-confusion p": rho.confusion_p,
        }  # fmt: skip

    def _flow_metrics(self, fitted: Fitted, cell: Cell, test: ImageData) -> dict[str, float]:
        """NF accuracy, bits/dim (5 bits where the flow has 5) and calibration on the test images.

        With class codes the test images get random ones, as in the paper's Table 1; with RFCM the accuracy is that of
        the re-estimated Gaussians, scored with their full covariances.
        """
        if fitted.codes is not None:
            coded = fitted.codes.append_random(test.tensor(), torch.Generator().manual_seed(0))
            test = ImageData.from_tensors(coded, test.targets, test.classes, test.class_ids, test.name)
        found = evaluate(fitted.model, test, round_trip=0, progress=False)
        accuracy = found["accuracy"]
        if cell.source == "rfcm":
            thin, right = self._rfcm(fitted, cell), 0
            with torch.no_grad():
                z = torch.cat([fitted.model.encode(x)[0] for x in test.tensor().split(_CHUNK)])
            right = int((thin.log_prob(z).argmax(1).cpu() == torch.from_numpy(test.targets)).sum())
            accuracy = right / len(test)
        return {"NF-A": 100 * accuracy, "BPD": found["bits_per_dim"], "ECE": 100 * (found["ece"] or 0.0)}


# Metrics that are measured together.
_GROUPS = (
    ("NF-A", "BPD", "ECE"), ("FID", "Cov", "L-R"), ("CNN-A",), ("ViT-A",), ("Agree",),
    ("rho-distance", "rho-confusion"),
)  # fmt: skip


def _learned(config: TrainConfig) -> dict[str, Any]:
    """The settings that a flow depends on."""
    free = FREE - AFTER_THE_STEPS
    return {name: value for name, value in config.to_dict().items() if name not in free}


def _groups(cell: Cell) -> list[tuple[tuple[str, ...], list[str]]]:
    """The groups that the cell asks for, with what it wants of each."""
    groups = [(group, [name for name in group if name in cell.metrics]) for group in _GROUPS]
    return [(group, wanted) for group, wanted in groups if wanted]


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def describe(numbers: Iterable[Number]) -> str:
    """One line for the log."""
    return ", ".join(f"{number.metric} {number.value:.4g}" for number in numbers)
