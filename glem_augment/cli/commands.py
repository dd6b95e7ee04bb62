"""The commands `adapt`, `eval`, `generate`, `preview`, `info`, `list` and `push`."""

from __future__ import annotations

import argparse
import shlex
import time
from functools import partial
from typing import Any

import yaml

from glem_augment.augment.moves import MOST_PUT_BACK
from glem_augment.checks import POLICIES
from glem_augment.cli.common import finite, load_model, note, open_for, open_resized, print_json
from glem_augment.data.dataset import ImageData
from glem_augment.data.sources import without_splits
from glem_augment.distributed import is_primary
from glem_augment.evaluation import metrics, moves_put_back
from glem_augment.evaluation.preview import preview as draw_preview
from glem_augment.evaluation.quality import quality_report
from glem_augment.hub.cards import CardFacts, summary
from glem_augment.hub.download import flows_on_hub
from glem_augment.hub.upload import upload, write_repository, write_space
from glem_augment.io import save_png, write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import CONFIG, WEIGHTS, bundled_models, local_folder, read_config
from glem_augment.synthetic.dataset import SyntheticDataset
from glem_augment.synthetic.export import export_set
from glem_augment.synthetic.manifest import check_folder


def adapt(args: argparse.Namespace) -> None:
    folder = args.out
    if not args.overwrite and any((folder / name).exists() for name in (WEIGHTS, CONFIG)):
        raise FileExistsError(f"{folder} holds a model already: give another folder, or --overwrite")
    model = load_model(args)
    data = open_resized(model, args.data, args.split, skip_bad=args.skip_bad, progress=not args.quiet)
    began = time.monotonic()
    names = ("rank", "shrinkage", "max_per_class", "seed")
    adapted = model.adapt(data, progress=not args.quiet, **{name: getattr(args, name) for name in names})
    if not is_primary():
        return
    adapted.save(folder, args.weights)
    record = adapted.config.training
    result = {
        "out": str(folder),
        "model": args.model,
        "model_sha256": record["adapted_from"]["weights_sha256"],
        "data": args.data,
        "split": args.split,
        "skipped": len(data.skipped),
        "images": record["images"],
        "images_per_class": record["images_per_class"],
        "classes": adapted.classes,
        "modes_per_class": adapted.modes.fewest_and_most if adapted.modes else (0, 0),
        "psi": adapted.config.psi,
        "posterior_temperature": adapted.config.posterior_temperature,
        "moves_put_back": moves(adapted, data),
        "seconds": round(time.monotonic() - began, 3),
    }
    print_json(result)


def evaluate(args: argparse.Namespace) -> None:
    model = load_model(args)
    whole_folder = without_splits(args.data)
    if whole_folder and args.split is not None:
        raise ValueError(f"{args.data} has no splits, such as train/ and test/ folders: leave --split out")
    reading = {"skip_bad": args.skip_bad, "progress": not args.quiet}
    data = open_for(model, args.data, args.split or "test", args.class_map, **reading)
    if whole_folder and data.name == model.config.training.get("data"):
        note(f"these may be the images that the flow was trained on ({data.name}): their accuracy says little")
    if args.limit is not None and args.limit < len(data):
        data = data.subset(metrics.spread(len(data), args.limit))
    split = None if whole_folder else args.split or "test"
    result = {"model": args.model, "data": args.data, "split": split, "skipped": len(data.skipped)}
    result |= metrics.evaluate(model, data, args.batch_size, args.round_trip, progress=not args.quiet)
    if not is_primary():
        return
    result["moves_put_back"] = moves(model, data)
    if args.out is not None:  # before the result is printed to a pipe whose reader may have left
        write_json(args.out, finite(result))
    print_json(result)


def moves(model: GLEM, data: ImageData) -> dict[str, Any] | None:
    """See `moves_put_back`; None without modes. A sentence on stderr says so where more than a few are put back."""
    if model.modes is None:
        return None
    found = moves_put_back(model, data)
    mixup, strongest = found["mixup"], max(found["noise"])
    noise = found["noise"][strongest]
    if max(mixup, noise) > MOST_PUT_BACK:
        note(
            f"glem: GLEMAugment would put back {100 * mixup:.0f} % of these images after mixup and {100 * noise:.0f} % "
            f"after noise of strength {strongest:g}, as implausible; strength='auto' takes {found['strength']:g}"
        )
    return found


def generate(args: argparse.Namespace) -> None:
    _check_together(args)
    check_folder(args.out)  # a folder that cannot be used is refused before any work
    model = load_model(args)
    progress = is_primary() and not args.quiet
    real = None
    if args.real is not None:
        real = open_resized(model, args.real, args.split or "train", progress=progress)
    given = ("temperature", "modes", "alpha")
    options = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    options |= {"real": real, "class_map": args.class_map}
    dataset = SyntheticDataset(model, args.per_class, seed=args.seed, source=args.source, **options)
    began = time.monotonic()
    unseen = None
    if args.report is not None and is_primary() and not without_splits(args.real):
        unseen = open_resized(model, args.real, "test", progress=progress)
    command = shlex.join(["glem", *args.argv])
    writing = {"overwrite": args.overwrite, "progress": progress, "distributed": True, "command": f"run: {command}"}
    try:
        facts = CardFacts(args.license)
        manifest = export_set(dataset.plan, dataset.draw, args.out, args.format, facts, **writing)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{args.out} is not complete; to finish it, run: {command}") from None
    if not is_primary():
        return
    # At the end, when no other rank waits any more: how long the report takes is not limited.
    report = None
    if args.report is not None:
        judging = {"progress": progress, "class_map": args.class_map}
        report = quality_report(dataset, real, unseen, args.report, **judging)
    result = {
        "out": str(args.out),
        "format": args.format,
        "images": len(dataset),
        "per_class": {dataset.classes[i]: dataset.counts[i] for i in dataset.plan.order if dataset.counts[i]},
        "model": args.model,
        "source": dataset.source,
        "temperature": None if args.source == "mixup" else dataset.temperature,
        "seed": args.seed,
        "real": args.real,
        "implausible": len(manifest["implausible"]),
        "report": report,
    }
    print_json({**result, "seconds": round(time.monotonic() - began, 3)})


def _check_together(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that would have no effect, or that lacks another one."""
    balance, mixup = args.per_class == "balance", args.source == "mixup"
    if (balance or mixup or args.report) and args.real is None:
        option = "--per-class balance" if balance else "--source mixup" if mixup else "--report"
        raise ValueError(f"{option} needs real images: give --real DATA")
    for name, needed, there in (
        ("real", "--per-class balance, --source mixup or --report", balance or mixup or args.report),
        ("temperature", "--source gaussian or rfcm", not mixup),
        ("modes", "--source mixup", mixup),
        ("alpha", "--source mixup", mixup),
        ("split", "--real", args.real is not None),
        ("class_map", "--real", args.real is not None),
    ):
        if getattr(args, name) is not None and not there:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without {needed}")


def preview(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {args.out}")
    model = load_model(args)
    reading = {"skip_bad": args.skip_bad, "progress": not args.quiet}
    data = open_for(model, args.data, args.split, args.class_map, **reading)
    policies = POLICIES if args.policy == "all" else (args.policy,)
    picture = draw_preview(model, data, rows=args.rows, policies=policies, modes=args.modes, seed=args.seed)
    save_png(picture, args.out)
    note(f"wrote {args.out} ({picture.width}x{picture.height})")


def info(args: argparse.Namespace) -> None:
    show(model_facts(args.model), args.json)


def model_facts(name: str) -> dict[str, Any]:
    """Everything that `glem info` shows, as JSON can hold it. Raises ModelFileError for a damaged model."""
    model = GLEM.from_pretrained(name)
    assert model.origin_file is not None
    folder, config = model.origin_file.parent, model.config
    repo, _, commit = (model.origin or "").partition("@")
    return finite(
        {
            "model": name,
            "folder": str(folder),
            "hub": {"repo": repo, "commit": commit} if model.origin else None,
            "image_shape": list(model.image_shape),
            "bits": model.bits,
            "flow": config.flow,
            "base": config.base,
            "parameters": {
                "flow": sum(p.numel() for p in model.flow.parameters()),
                "gaussians": sum(p.numel() for p in model.gaussians.parameters()),
                "modes": 0 if model.modes is None else sum(b.numel() for b in model.modes.buffers()),
            },
            "files": {
                file.name: file.stat().st_size for file in (model.origin_file, folder / CONFIG) if file.is_file()
            },
            "psi": None if config.psi is None else list(config.psi),
            "posterior_temperature": config.posterior_temperature,
            "num_classes": model.num_classes,
            "classes": model.classes,
            "class_ids": model.class_ids,
            "modes_per_class": (0, 0) if model.modes is None else model.modes.fewest_and_most,
            "training": config.training,
        }
    )


def list_flows(args: argparse.Namespace) -> None:
    flows = {}
    for name in (f"bundled:{each}" for each in bundled_models()):
        if folder := local_folder(name):
            flows[name] = summary(read_config(folder), (folder / WEIGHTS).stat().st_size)
    show(flows | (flows_on_hub(progress=not args.quiet) if args.hub else {}), args.json)


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as YAML for people, or as JSON."""
    if as_json:
        print_json(facts)
    else:
        print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None), end="")


def push(args: argparse.Namespace) -> None:
    facts = CardFacts(args.license, args.license_name, args.license_link, args.datasets, args.metrics)
    model = GLEM.from_pretrained(args.model)
    if args.space and (args.metrics or args.no_samples or model.origin is None or model.jet is not None):
        raise ValueError("--space takes a MODEL by its name on the Hub (push it first), no --metrics, no --no-samples")
    writer = write_space if args.space else partial(write_repository, samples=not args.no_samples)
    write = partial(writer, model, facts)
    if args.dry_run is not None:
        if args.dry_run.exists() and any(args.dry_run.iterdir()):
            raise FileExistsError(f"{args.dry_run} is not empty: give a new folder, so that nothing is lost")
        write(args.repo, args.dry_run)
        note("nothing was uploaded")
        files = {path.name: path.stat().st_size for path in sorted(args.dry_run.iterdir())}
        print_json({"repo": args.repo, "files": files})
        return
    target = {"private": args.private or None, "revision": args.revision, "commit_message": args.message}
    commit = upload(args.repo, "space" if args.space else "model", write, **target)
    repo, oid = commit.repo_url.repo_id, commit.oid
    pinned = model.origin if args.space else f"{repo}@{oid}"
    print_json({"repo": repo, "commit": oid, "pinned": pinned, "url": str(commit.commit_url)})
