"""`glem push`: upload a flow to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from glem_augment.cli import common

DESCRIPTION = """\
Upload a flow to the Hugging Face Hub in one commit: weights, config, a model card written from what the flow records,
and a picture of samples. The repository is made where there is none. Prints a JSON summary; "pinned" in it names these
very weights, wherever a command asks for MODEL.

The token comes from HF_TOKEN, or from hf auth login. HF_ENDPOINT chooses another Hub.
"""
EXAMPLES = """\
  glem push runs/photos org/photos-flow --license cc-by-4.0 --private
  glem push runs/photos org/photos-flow --license cc-by-4.0 --metrics eval.json --message "Trained longer"
  glem push org/photos-flow org/photos-page --space
  glem push bundled:fashion-mnist org/fashion --license mit --dataset zalando-datasets/fashion_mnist --dry-run look/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser)
    parser.add_argument("repo", metavar="ORG/NAME", help="repository to upload to")
    parser.add_argument("--private", action="store_true", help="a private repository; one that exists must be private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if missing (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--space", action="store_true", help="a Space: the page of glem explore for a MODEL on the Hub")
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
    dry = "write what would be uploaded to DIR, and upload nothing"
    parser.add_argument("--dry-run", type=common.out_folder, metavar="DIR", help=dry)


def run(args: argparse.Namespace) -> None:
    from glem_augment.hub.cards import CardFacts
    from glem_augment.hub.upload import upload, write_repository, write_space
    from glem_augment.model.glem import GLEM

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
        common.note("nothing was uploaded")
        files = {path.name: path.stat().st_size for path in sorted(args.dry_run.iterdir())}
        common.print_json({"repo": args.repo, "files": files})
        return
    target = {"private": args.private or None, "revision": args.revision, "commit_message": args.message}
    commit = upload(args.repo, "space" if args.space else "model", write, **target)
    repo, oid = commit.repo_url.repo_id, commit.oid
    pinned = model.origin if args.space else f"{repo}@{oid}"
    common.print_json({"repo": repo, "commit": oid, "pinned": pinned, "url": str(commit.commit_url)})
