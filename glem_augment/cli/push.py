"""`glem push`: upload a model to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from typing import Any

from glem_augment.cli import common

DESCRIPTION = """\
Upload a model to the Hugging Face Hub in one commit: weights, config, a model card from the model's records, and a
picture of samples. A missing repository is made. Prints a JSON summary. Its "pinned" is a name for MODEL that always
means the same weights.

The token comes from HF_TOKEN, or from hf auth login. HF_ENDPOINT chooses another Hub.
"""
EXAMPLES = """\
  glem push runs/photos org/photos --license cc-by-4.0 --private
  glem push runs/photos org/photos --license cc-by-4.0 --metrics eval.json --message "Trained longer"
  glem push bundled:fashion-mnist org/fashion --license mit --dataset zalando-datasets/fashion_mnist --dry-run look/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser)
    parser.add_argument("repo", metavar="ORG/NAME", help="repository to upload to")
    parser.add_argument("--private", action="store_true", help="a private repository; one that exists must be private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if missing (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    card = parser.add_argument_group("the card")
    card.add_argument("--license", metavar="ID", help="of the training images, as the Hub names it: mit, other, ...")
    card.add_argument("--license-name", metavar="NAME", help="with --license other")
    card.add_argument("--license-link", metavar="URL", help="with --license other")
    several: dict[str, Any] = {"action": "append", "default": []}
    datasets = "training data on the Hub; repeatable"
    card.add_argument("--dataset", dest="datasets", metavar="ID", help=datasets, **several)
    metrics = "written by glem eval --out; repeatable"
    card.add_argument("--metrics", type=common.table, metavar="FILE", help=metrics, **several)
    card.add_argument("--no-samples", action="store_true", help="no picture of samples")
    dry = "write the files of the upload to DIR, and upload nothing"
    parser.add_argument("--dry-run", type=common.out_folder, metavar="DIR", help=dry)


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    from glem_augment.hub import push_to_hub, write_repository
    from glem_augment.hub.cards import CardFacts
    from glem_augment.model.glem import GLEM

    validate_repo_id(args.repo)
    names = ("license", "license_name", "license_link", "datasets", "metrics")
    card = {name: getattr(args, name) for name in names}
    samples = not args.no_samples
    model = GLEM.from_pretrained(args.model)
    if args.dry_run is not None:
        if args.dry_run.exists() and any(args.dry_run.iterdir()):
            raise FileExistsError(f"{args.dry_run} is not empty: give a new folder")
        write_repository(model, CardFacts(**card), args.repo, args.dry_run, samples)
        common.note("nothing was uploaded")
        files = {path.name: path.stat().st_size for path in sorted(args.dry_run.iterdir())}
        common.print_json({"repo": args.repo, "files": files})
        return
    target = {"private": args.private or None, "revision": args.revision, "commit_message": args.message}
    commit = push_to_hub(model, args.repo, samples=samples, **card, **target)
    repo, oid = commit.repo_url.repo_id, commit.oid
    common.print_json({"repo": repo, "commit": oid, "pinned": f"{repo}@{oid}", "url": str(commit.commit_url)})
