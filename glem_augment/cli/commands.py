"""The commands `adapt`, `eval`, `preview`, `info` and `push`."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import yaml

from glem_augment.augment.moves import MOST_PUT_BACK
from glem_augment.checks import POLICIES
from glem_augment.cli.common import (
    finite,
    load_model,
    note,
    open_for,
    open_resized,
    print_json,
    read_class_map,
    without_splits,
)
from glem_augment.data.dataset import ImageData
from glem_augment.evaluation import metrics, moves_put_back
from glem_augment.evaluation.preview import preview as draw_preview
from glem_augment.hub.cards import CardFacts
from glem_augment.hub.upload import write_repository
from glem_augment.io import save_png, write_json
from glem_augment.model.glem import GLEM
from glem_augment.model.weights import CONFIG, WEIGHTS


def adapt(args: argparse.Namespace) -> None:
    folder = args.out
    if not args.overwrite and any((folder / name).exists() for name in (WEIGHTS, CONFIG)):
        raise FileExistsError(f"{folder} holds a model already: give another folder, or --overwrite")
    model = load_model(args)
    data = open_resized(model, args.data, args.split, skip_bad=args.skip_bad, progress=not args.quiet)
    began = time.monotonic()
    names = ("rank", "shrinkage", "max_per_class", "seed")
    adapted = model.adapt(data, progress=not args.quiet, **{name: getattr(args, name) for name in names})
    adapted.save(folder)
    record = adapted.config.training
    result = {
        "out": str(folder),
        "model": args.model,
        "model_sha256": record["adapted_from"]["weights_sha256"],
        "data": args.data,
        "split": args.split,
    }
    if args.skip_bad:
        result["skipped"] = len(data.skipped)
    result |= {
        "images": record["images"],
        "images_per_class": record["images_per_class"],
        "classes": adapted.classes,
        "modes_per_class": adapted.modes.fewest_and_most if adapted.modes else (0, 0),
        "psi": adapted.config.psi,
        "psi_is_the_flows": adapted.config.psi == model.config.psi,
        "moves_put_back": moves(adapted, data),
        "seconds": round(time.monotonic() - began, 3),
    }
    print_json(result)


def evaluate(args: argparse.Namespace) -> None:
    class_map = read_class_map(args.class_map)
    model = load_model(args)
    whole_folder = without_splits(args.data)
    if whole_folder and args.split is not None:
        raise ValueError(f"{args.data} has no splits, such as train/ and test/ folders: leave --split out")
    reading = {"skip_bad": args.skip_bad, "progress": not args.quiet}
    data = open_for(model, args.data, args.split or "test", class_map, **reading)
    if whole_folder and data.name == model.config.training.get("data"):
        note(f"these may be the images that the flow was trained on ({data.name}): their accuracy says little")
    if args.limit is not None and args.limit < len(data):
        data = data.subset(metrics.spread(len(data), args.limit))
    result = {"model": args.model, "data": args.data, "split": None if whole_folder else args.split or "test"}
    if args.skip_bad:
        result["skipped"] = len(data.skipped)
    result |= metrics.evaluate(model, data, args.batch_size, args.round_trip, progress=not args.quiet)
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


def preview(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {args.out}")
    class_map = read_class_map(args.class_map)
    model = load_model(args)
    if args.modes is not None and model.modes is None:
        raise ValueError(f"{args.model} has no modes stored; leave --modes out, or train with --modes-rank")
    reading = {"skip_bad": args.skip_bad, "progress": not args.quiet}
    data = open_for(model, args.data, args.split, class_map, **reading)
    policies = POLICIES if args.policy == "all" else (args.policy,)
    picture = draw_preview(model, data, rows=args.rows, policies=policies, modes=args.modes, seed=args.seed)
    save_png(picture, args.out)
    note(f"wrote {args.out} ({picture.width}x{picture.height})")


def info(args: argparse.Namespace) -> None:
    facts = model_facts(args.model)
    if args.json:
        print_json(facts)
    else:
        print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None), end="")


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
            "parameters": {
                "flow": sum(p.numel() for p in model.flow.parameters()),
                "gaussians": sum(p.numel() for p in model.gaussians.parameters()),
                "modes": 0 if model.modes is None else sum(b.numel() for b in model.modes.buffers()),
            },
            "files": {
                file.name: file.stat().st_size for file in (model.origin_file, folder / CONFIG) if file.is_file()
            },
            "psi": None if config.psi is None else list(config.psi),
            "num_classes": model.num_classes,
            "classes": model.classes,
            "class_ids": model.class_ids,
            "modes_per_class": (0, 0) if model.modes is None else model.modes.fewest_and_most,
            "training": config.training,
        }
    )


def push(args: argparse.Namespace) -> None:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = ("license", "license_name", "license_link", "datasets", "metrics")
    facts: dict[str, Any] = {name: getattr(args, name) for name in names}
    samples = not args.no_samples
    model = GLEM.from_pretrained(args.model)
    if args.dry_run is not None:
        files = write_repository(model, args.dry_run, args.repo, CardFacts(**facts), samples)
        note("nothing was uploaded")
        print_json({"repo": args.repo, "files": {name: path.stat().st_size for name, path in files.items()}})
        return
    target = {"private": args.private or None, "revision": args.revision, "create_pr": args.create_pr}
    commit = model.push_to_hub(args.repo, **facts, commit_message=args.message, samples=samples, **target)
    repo, oid = commit.repo_url.repo_id, commit.oid
    links = {"url": str(commit.commit_url), "pull_request": commit.pr_url}
    print_json({"repo": repo, "commit": oid, "pinned": f"{repo}@{oid}", **links})
