"""``glem push``: a flow to the Hugging Face Hub, with its card."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from glem_augment.cli import new_parser
from glem_augment.cli.common import add_model, add_threads, note, print_json
from glem_augment.hub.cards import CardFacts
from glem_augment.io import expand
from glem_augment.model.glem import GLEM

DESCRIPTION = """\
Upload a flow to the Hugging Face Hub in one commit: weights, config, a model card written from what the flow records,
and a picture of samples. The repository is made where there is none. Prints a JSON summary; "pinned" in it names these
very weights, wherever a command asks for MODEL.

The token comes from HF_TOKEN, or from hf auth login. HF_ENDPOINT chooses another Hub.
"""
EXAMPLES = """\
  glem push runs/photos org/photos-flow --license cc-by-4.0 --private
  glem push runs/photos org/photos-flow --license cc-by-4.0 --metrics eval.json --message "Trained longer"
  glem push bundled:fashion-mnist org/fashion --license mit --dataset zalando-datasets/fashion_mnist --dry-run look/
"""


def add_parser(subparsers: Any) -> None:
    parser = new_parser(subparsers, "push", DESCRIPTION, EXAMPLES, run)
    add_model(parser)
    parser.add_argument("repo", metavar="ORG/NAME", help="repository to upload to")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private", action="store_const", const=True, help="a private repository; one that exists must be private"
    )
    visibility.add_argument(
        "--public", dest="private", action="store_const", const=False, help="a public one, likewise"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if missing (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of committing")
    card = parser.add_argument_group("the card")
    card.add_argument(
        "--license", metavar="ID", help="of the training images, as the Hub names it: mit, cc-by-4.0, ..., other"
    )
    card.add_argument("--license-name", metavar="NAME", help="with --license other")
    card.add_argument("--license-link", metavar="URL", help="with --license other")
    card.add_argument(
        "--dataset", metavar="ID", action="append", default=[], help="training data on the Hub; may be given again"
    )
    card.add_argument(
        "--metrics", metavar="FILE", action="append", default=[], help="written by glem eval --out; may be given again"
    )
    card.add_argument("--no-samples", action="store_true", help="no picture of samples")
    parser.add_argument("--dry-run", metavar="DIR", help="write what would be uploaded to DIR, and upload nothing")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    from glem_augment.hub.upload import write_repository

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    facts: dict[str, Any] = {
        "license": args.license,
        "license_name": args.license_name,
        "license_link": args.license_link,
        "datasets": args.dataset,
        "metrics": args.metrics,
    }
    samples = not args.no_samples
    model = GLEM.from_pretrained(args.model)
    if args.dry_run is not None:
        files = write_repository(model, expand(args.dry_run), args.repo, CardFacts(**facts), samples)
        note("nothing was uploaded")
        print_json({"repo": args.repo, "files": {name: path.stat().st_size for name, path in files.items()}})
        return 0
    commit = model.push_to_hub(
        args.repo,
        **facts,
        commit_message=args.message,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        samples=samples,
    )
    repo = commit.repo_url.repo_id
    print_json(
        {
            "repo": repo,
            "commit": commit.oid,
            "pinned": f"{repo}@{commit.oid}",
            "url": str(commit.commit_url),
            "pull_request": commit.pr_url,
        }
    )
    return 0
