"""Which flow fits an autoencoder's latents, and does whitening help? Nats per number of held-out images.

    GLEM_DATA=... python benchmarks/proof/latent_flows.py
    GLEM_DATA=... python benchmarks/proof/latent_flows.py --objectives
    GLEM_DATA=... python benchmarks/proof/latent_flows.py --sizes
    GLEM_DATA=... python benchmarks/proof/latent_flows.py --other-images
    GLEM_DATA=... python benchmarks/proof/latent_flows.py --photographs

The data are TAEF2's latents of CIFAR-10 at 32 and 64 pixels (4x4 and 8x8, 32 channels) and of Imagenette at 128 pixels
(16x16), their four leading principal components at 16x16, and the pixels of CIFAR-10. Each flow and its class means are
trained with likelihood alone. At the end, the class Gaussians are fitted to the training images once more. Of the
learning rates (two up to 8x8, one above), 500 held-out images choose the better. Its row is measured on 500 others, and
+/- is over these 500. The identity behind a whitening is the linear control. Stored rows are not measured again.

`--objectives` trains as long as a recipe does: the flow of recipes/cifar10.yaml in the latents of all training images
of CIFAR-10, with the settings of the recipe's first run, once for each objective, beside a whitened identity. All have
the same steps, learning rate and views, and no setting is chosen. Full covariances are then fitted to the latents of
the training images. The test images are measured once, with the Gaussians of the training and with full covariances.

`--sizes` asks whether CIFAR-10 should be enlarged to 64 pixels. It trains the flow of recipes/imagenette.yaml, whose
settings were chosen at 64 pixels, on 10,000 training images at both sizes, for equally many steps. Gaussians and modes
are then fitted as in bundle.py. 1,000 of the 10,000 images fit the temperatures; the test images are measured once.

`--other-images` fits the ten classes of Imagenette at 32 pixels through `bundled:cifar10`, through the whitening of
CIFAR-10's latents from `--objectives`, and in TAEF2's latents alone, and measures the validation images.

`--photographs` measures `bundled:imagenette` on the validation images of Imagenette at 64 pixels, beside Gaussians of
the same latents: one per class, as `glem fit` makes them, and one covariance for all classes of the views that the flow
was trained with. It is shrunk towards its diagonal. The images that the flow's training held out choose how far, and
they fit all temperatures.
"""

from __future__ import annotations

import math
import sys
import time
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

from benchmarks.common import ROOT, Rows, find_images, parser, write_results
from glem_augment import GLEM, open_data
from glem_augment.classes.fit import fit_temperature
from glem_augment.classes.statistics import pooled_covariance
from glem_augment.codec.codec import Codec
from glem_augment.evaluation import calibrate, evaluate
from glem_augment.evaluation.metrics import calibration_error
from glem_augment.flows.presets import create_flow
from glem_augment.images.dataset import ImageData
from glem_augment.training.batches import stratified_split
from glem_augment.training.config import TrainConfig
from glem_augment.training.latents import latent_views, model_of_latents
from glem_augment.training.trainer import Trainer

NAME, CLASSES, NOISE, HELD = "latent_flows", 10, 0.1, 500
# Name: (images, side, training images, kept channels or 0 for pixels, learning rates).
KINDS = {
    "4x4, 32 channels": ("cifar10", 32, 9000, 32, (2e-3, 8e-3)),
    "8x8, 32 channels": ("cifar10", 64, 9000, 32, (2e-3, 8e-3)),
    "16x16, 32 channels": ("imagenette128", 128, 1500, 32, (8e-3,)),
    "16x16, 4 channels": ("imagenette128", 128, 1500, 4, (8e-3,)),
    "32x32 pixels": ("cifar10", 32, 9000, 0, (8e-3,)),
}
DENSE, FEW = 3072, 256
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)  # of the diagonal in one covariance for all classes
ONE: dict[str, Any] = dict(depth=[6], blocks=[1], width=[128])
# Name: (preset, options, whitened directions; None: all for up to 3,072 numbers, 256 for more).
FLOWS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "whitening alone": ("identity", {}, None),
    "one level, whitened": ("latent", ONE, None),
    "one level, 256 directions whitened": ("latent", ONE, FEW),
    "one level": ("latent", ONE, 0),
    "two levels, whitened": ("latent", {}, None),
    "two levels": ("latent", {}, 0),
    "one level, squeezed, whitened": ("latent", ONE | dict(patch=2), None),
}
PIXELS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "whitening alone": ("identity", {}, None),
    "glow_fast, whitened": ("glow_fast", {}, None),
    "glow_fast, 256 directions whitened": ("glow_fast", {}, FEW),
    "glow_fast": ("glow_fast", {}, 0),
}
# Settings in place of the recipe's.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mle": dict(objective="mle", beta=None, beta_end=None),
    "glem": dict(objective="glem", beta=None, beta_end=None),
    "hybrid": {},
}
# The settings of the recipe's first run, see its comment.
FIRST: dict[str, Any] = dict(views=6, dropout=0.05, beta_end=0.05)
WHITENED: dict[str, Any] = dict(preset="identity", flow_options={"whiten": 512}, dropout=0.0)
RECIPES = ROOT / "benchmarks" / "recipes"
EVERY = 5  # `--sizes` trains on every fifth image
# The settings of both sizes in place of the recipe's.
SIZES: dict[str, Any] = dict(views=4, epochs=20)


@torch.no_grad()
def numbers(kind: str) -> tuple[Tensor, Tensor]:
    """Standardised latents, or pixels in [0, 1], and labels of the training images and 2 x `HELD` held-out images."""
    folder, side, count, channels, _ = KINDS[kind]
    data = open_data(find_images(NAME, folder, folder), "train", channels=3, image_size=side)
    rows = np.random.default_rng(0).permutation(len(data))[: count + 2 * HELD]
    x, y = data.tensor()[rows], torch.from_numpy(data.targets[rows])
    if channels == 0:
        return x.float() / 256, y
    codec = GLEM.create("identity", data.image_shape, data.classes, autoencoder="taef2").codec
    h = torch.cat([codec.encode(part) for part in x.split(max(1, 2**20 // side**2))])
    h = (h - h.mean((0, 2, 3), keepdim=True)) / h.std((0, 2, 3), keepdim=True)
    if channels < h.shape[1]:
        flat = h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])
        leading = torch.linalg.eigh(flat.T @ flat / len(flat))[1][:, -channels:]
        h = torch.einsum("bchw,ck->bkhw", h, leading)
        h = h / h.std((0, 2, 3), keepdim=True)
    return h, y


def measure(kind: str, name: str, rate: float, steps: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train one flow; nats per number of both held-out parts, and the seconds of a step."""
    torch.manual_seed(0)
    preset, options, whitened = (FLOWS if KINDS[kind][3] else PIXELS)[name]
    shape, dim, pixels = tuple(x.shape[1:]), x[0].numel(), KINDS[kind][3] == 0
    directions = (dim if dim <= DENSE else FEW) if whitened is None else whitened
    flow = create_flow(preset, shape, **options, whiten=directions)  # type: ignore[arg-type]
    train, labels = x[: -2 * HELD], y[: -2 * HELD]

    def noisy(h: Tensor, noise: float = NOISE) -> Tensor:
        return h + torch.rand_like(h) / 256 if pixels else h + noise * torch.randn_like(h)

    whiten = getattr(flow, "whiten", None)
    if whiten is not None:
        rank = len(whiten.gain)
        whiten.fit(*pooled_covariance(lambda k: train[labels == k].flatten(1), range(CLASSES), rank, dim))
    flow.initialise(noisy(train[:512]))
    means = nn.Parameter(torch.zeros(CLASSES, dim))
    learned = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adamax(
        [{"params": learned or [means]}, *([{"params": [means], "lr": 5 * rate}] if learned else [])], lr=rate
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, 5 * rate][: len(optimizer.param_groups)], steps, pct_start=0.1
    )
    batch, began = (16 if x.shape[2] > 16 and not pixels else 32), time.process_time()
    for _ in range(steps if learned else 0):
        chosen = torch.randint(len(train), (batch,))
        h, c = noisy(train[chosen]), labels[chosen]
        if not pixels:
            h = torch.where(torch.rand(len(h), 1, 1, 1) < 0.5, h.flip(3), h)
        z, logdet = flow(h)
        loss = (0.5 * (z - means[c]).square().sum(1) - logdet).mean() / dim
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*learned, means], 1.0)
        optimizer.step()
        schedule.step()
    spent = time.process_time() - began
    with torch.no_grad():
        found = [flow(noisy(part, 0.0)) for part in x.split(250)]
        z, logdet = (torch.cat(part) for part in zip(*found, strict=True))
        own, shown = z[: len(train)], F.one_hot(labels, CLASSES).float()
        centre = shown.T @ own / shown.sum(0)[:, None]
        variance = (own - centre[labels]).square().mean(0)
        nats = 0.5 * ((z - centre[y]).square() / variance + variance.log() + math.log(2 * math.pi)).sum(1) - logdet
        held = (nats / dim)[len(train) :].split(HELD)
    parameters = sum(p.numel() for p in learned)
    return {
        "numbers": kind, "flow": name, "rate": rate, "steps": steps, "parameters": parameters,
        "chosen by": float(held[0].mean()), "held out": float(held[1].mean()),
        "+/-": 1.96 * float(held[1].std()) / math.sqrt(HELD), "seconds per step": spent / steps,
    }  # fmt: skip


class OnceEncoded(Trainer):
    """A run in latents that are kept in a file, so that runs share them. All runs have the same steps."""

    encoded: Path

    def _take_latents(self, data: ImageData) -> GLEM:
        self.model = self._original
        self.model.codec.fit(data.some(1024))
        views = kept(self.encoded / "train.npy", self.model.codec, data, self.config.augment, self.config.views)
        self.batches.data, self.batches.views = data.with_numbers(views[:, 0]), data.with_numbers(views)
        return model_of_latents(self.model)

    def count_steps(self) -> int:
        return len(self.batches.split.nf) // self.config.batch_size  # of the objective with M-steps, which has fewest


def kept(path: Path, codec: Codec, data: ImageData, augment: Any = (), views: int = 1) -> Tensor:
    """The latents of `latent_views`, read from a file, which is written if there is none."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, latent_views(codec, data, augment, views, 0, torch.device("cpu")).numpy())
    return torch.from_numpy(np.load(path))


def train_once(
    data: ImageData, test: ImageData, settings: dict[str, Any], work: Path, name: str, rank: int
) -> dict[str, Any]:
    """Train once; measure the test images, with the Gaussians of the training and with Gaussians fitted after it."""
    OnceEncoded.encoded = work
    settings = settings | dict(sample_every=0, modes_rank=0)
    run = OnceEncoded(data, TrainConfig(**settings), work / name, resume=(work / name / "checkpoint.pt").is_file())
    trained = run.fit()
    numbers = test.with_numbers(kept(work / "test.npy", trained.codec, test)[:, 0])
    model, latents, split = model_of_latents(trained), run.batches.data, run.batches.split
    fitted = model.adapt(latents.subset(np.sort(np.concatenate([split.nf, split.g]))), rank=rank)
    row = {"parameters": sum(p.numel() for p in trained.flow.parameters()), "seconds": run.seconds()}
    for prefix, each in {"": model, "fitted ": fitted}.items():
        calibrate(each, latents.subset(split.val))
        row |= {f"{prefix}{key}": value for key, value in measured(each, numbers).items()}
    return row


def recipe(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return settings


def objectives(args: Any) -> None:
    rows = Rows(args.out / "latent_objectives.json")
    place = find_images(NAME, "cifar10", "cifar10")
    data, test = open_data(place, "train"), open_data(place, "test")
    for flow, objective, seed in product(("identity", "latent"), OBJECTIVES, args.seeds):
        settings = recipe("cifar10") | FIRST | OBJECTIVES[objective] | dict(epochs=args.epochs, seed=seed)
        settings |= WHITENED if flow == "identity" else {}
        name = f"{flow}-{objective}-{args.epochs}-{seed}"
        known = {"flow": flow, "objective": objective, "epochs": args.epochs, "seed": seed}
        rows.row(known, partial(train_once, data, test, settings, args.work, name, 1))


def sizes(args: Any) -> None:
    rows = Rows(args.out / "latent_sizes.json")
    place = find_images(NAME, "cifar10", "cifar10")
    for size, seed in product((32, 64), args.seeds):
        data, test = (open_data(place, split, image_size=size) for split in ("train", "test"))
        settings = recipe("imagenette") | SIZES | dict(seed=seed)
        some = data.subset(np.arange(0, len(data), EVERY))
        known = {"size": size, "images": len(some), **SIZES, "seed": seed}
        work, rank = args.work / f"{size}", settings["modes_rank"]
        rows.row(known, partial(train_once, some, test, settings, work, f"{seed}", rank))


def measured(model: GLEM, data: ImageData) -> dict[str, Any]:
    found = evaluate(model, data, round_trip=0)
    return {"accuracy": found["accuracy"], "nats": found["nats_per_number"], "ece": found["ece"], "n": found["n"]}


def other_images(args: Any) -> None:
    rows = Rows(args.out / "latent_other_images.json")
    place = find_images(NAME, "imagenette128", "imagenette128")
    fitted = {
        "bundled:cifar10": dict(flow="bundled:cifar10"),
        "whitening of CIFAR-10": dict(flow=args.work / "identity-mle-5-0"),
        "TAEF2 alone": dict(autoencoder="taef2", image_size=32),
    }
    for name, options in fitted.items():

        def measure(options: dict[str, Any] = options) -> dict[str, Any]:
            return measured(GLEM.fit(place, **options), open_data(place, "val", image_size=32))

        rows.row({"images": "imagenette128", "fitted": name}, measure)


class OneCovariance:
    """log N(x; mean of the class, (1 - share) S + share diag S) + `logdet` of flat latents [n, d], float64."""

    def __init__(self, mean: Tensor, covariance: Tensor, share: float, logdet: float) -> None:
        shrunk = (1 - share) * covariance + share * covariance.diag().diag()
        self.root, self.mean, self.temperature = torch.linalg.cholesky(shrunk), mean, 1.0
        self.constant = logdet - float(self.root.diag().log().sum()) - len(covariance) / 2 * math.log(2 * math.pi)

    def __call__(self, x: Tensor) -> Tensor:
        x, centre = (torch.linalg.solve_triangular(self.root, each.T, upper=False).T for each in (x, self.mean))
        return self.constant - torch.cdist(x, centre).square() / 2

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        scores = self(x)
        sure, guess = (scores / self.temperature).softmax(1).max(1)
        nats = -scores.gather(1, y[:, None]).mean() / x.shape[1]
        return {
            "accuracy": float((guess == y).double().mean()), "nats": float(nats),
            "ece": calibration_error(sure, guess == y), "n": len(y),
        }  # fmt: skip


def photographs(args: Any) -> None:
    rows = Rows(args.out / "latent_photographs.json")
    place, model = find_images(NAME, "imagenette128", "imagenette128"), GLEM.from_pretrained("bundled:imagenette")
    train, test = (open_data(place, split, image_size=64) for split in ("train", "val"))
    settings = model.config.training["config"]
    split = stratified_split(train.targets, CLASSES, settings["val_fraction"], settings["seed"])
    used, held = np.sort(np.concatenate([split.nf, split.g])), split.val

    def per_class() -> dict[str, Any]:
        fitted = GLEM.fit(train.subset(used), autoencoder="taef2")
        calibrate(fitted, train.subset(held))
        return measured(fitted, test)

    def one_covariance() -> dict[str, Any]:
        views = kept(args.work / "photographs.npy", model.codec, train, settings["augment"], settings["views"])
        y, x = torch.from_numpy(train.targets), views.flatten(2).double()
        mean = torch.stack([x[used][y[used] == k].flatten(0, 1).mean(0) for k in range(CLASSES)])
        centred = (x[used] - mean[y[used], None]).flatten(0, 1)
        covariance, logdet = centred.T @ centred / len(centred), float(model.codec.logdet())
        tried = [OneCovariance(mean, covariance, share, logdet) for share in SHARES]
        best = min(tried, key=lambda each: each.measure(x[held, 0], y[held])["nats"])
        best.temperature = fit_temperature(best(x[held, 0]), y[held])
        shown = torch.cat([model.codec.encode(x) for x, _ in test.batches(np.arange(len(test)), 100)])
        return best.measure(shown.flatten(1).double(), torch.from_numpy(test.targets)) | {
            "share": SHARES[tried.index(best)]
        }

    for name, measure in {
        "one Gaussian per class": per_class,
        "one covariance for all classes": one_covariance,
        "`bundled:imagenette`": lambda: measured(model, test),
    }.items():
        rows.row({"images": "imagenette128", "size": 64, "fitted": name}, torch.no_grad()(measure))


def main() -> None:
    args = parser(__doc__)
    args.set_defaults(threads=1)
    args.add_argument("--photographs", action="store_true", help="measure bundled:imagenette beside Gaussians")
    args.add_argument("--objectives", action="store_true", help="train as the recipe of bundled:cifar10")
    args.add_argument("--sizes", action="store_true", help="train on images of 32 and 64 pixels")
    args.add_argument("--other-images", action="store_true", help="fit other images through bundled:cifar10")
    args.add_argument("--epochs", type=int, default=5, help="of --objectives (%(default)s)")
    args.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --objectives (%(default)s)")
    args.add_argument("--work", type=Path, default=Path("runs/latents"), help="of latents and runs (%(default)s)")
    args.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of numbers (all)")
    args.add_argument("--steps", type=int, default=200, help="of each training (%(default)s)")
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    chosen = [study for study in (objectives, sizes, other_images, photographs) if getattr(args, study.__name__)]
    if chosen:
        chosen[0](args)
        return
    trials = Rows(args.out / f"{NAME}.json", "trials")
    for kind in args.kinds:
        data = cache(partial(numbers, kind))
        for name in FLOWS if KINDS[kind][3] else PIXELS:
            for rate in KINDS[kind][4][: 1 if name == "whitening alone" else None]:
                known = {"numbers": kind, "flow": name, "rate": rate, "steps": args.steps}
                trials.row(known, lambda: measure(kind, name, rate, args.steps, *data()))  # noqa: B023
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in trials.all():
        key = row["numbers"], row["flow"]
        best[key] = min(best.get(key, row), row, key=lambda r: r["chosen by"])
    rows = [{k: v for k, v in row.items() if k not in ("chosen by", "processor", "torch")} for row in best.values()]
    write_results(
        args.out, NAME, "Flows of an autoencoder's latents: nats per number, held out", rows, {"trials": trials.all()}
    )


if __name__ == "__main__":
    main()
