"""`glem push`: upload a model to the Hugging Face Hub."""

from __future__ import annotations

import argparse

from glem_augment.cli import common

DESCRIPTION = """\
Upload a model to the Hugging Face Hub in one commit: weights, config, a model card from the model's records, and a
picture of samples. A missing repository is made. A card that is there already is kept. Prints a JSON summary. Its
"pinned" is a name for MODEL that always means the same weights.

The token comes from HF_TOKEN, or from hf auth login. HF_ENDPOINT chooses another Hub.
"""
EXAMPLES = """\
  glem push runs/photos org/photos --license cc-by-4.0 --private
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser)
    parser.add_argument("repo", metavar="ORG/NAME", help="repository to upload to")
    parser.add_argument("--private", action="store_true", help="a private repository; one that exists must be private")
    common.add_license(parser)


def run(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import validate_repo_id

    from glem_augment.hub.client import push_to_hub
    from glem_augment.model.glem import GLEM

    validate_repo_id(args.repo)
    common.note_licence(args.license)
    model = GLEM.from_pretrained(args.model)
    commit = push_to_hub(model, args.repo, license=args.license, private=args.private or None)
    repo, oid = commit.repo_url.repo_id, commit.oid
    common.print_json({"repo": repo, "commit": oid, "pinned": f"{repo}@{oid}", "url": str(commit.commit_url)})
