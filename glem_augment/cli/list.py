"""`glem list`: the models inside the package."""

from __future__ import annotations

import argparse

from glem_augment.cli import common

DESCRIPTION = """\
List the models inside the package. Accuracy and likelihood are measured on test images. The
licence is the licence of the training images, which samples inherit.
"""
EXAMPLES = """\
  glem list
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)


def run(args: argparse.Namespace) -> None:
    from glem_augment.hub.cards import table_row
    from glem_augment.model.files import bundled_models
    from glem_augment.model.glem import GLEM

    names = [f"bundled:{name}" for name in bundled_models()]
    rows = [{"name": name, **table_row(GLEM.from_pretrained(name))} for name in names]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        common.say("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
