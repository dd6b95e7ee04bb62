"""`glem explore`: a local web page to explore a model."""

from __future__ import annotations

import argparse
import signal

from glem_augment.cli import common

DESCRIPTION = """\
Start a local web page to explore a model: samples, images of DATA (without it: samples) or files moved along the modes
of their classes, lines between two images, and the likelihoods of DATA. Needs the extra "explore".
"""
BUNDLED = "bundled:fashion-mnist"
EXAMPLES = "  glem explore bundled:fashion-mnist\n  glem explore runs/photos photos/ --split val\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser, nargs="?", default=BUNDLED)
    common.add_data(parser, split=None, nargs="?")
    common.add_class_map(parser)
    common.add_count(parser, "--limit", "images per split", 1000)
    common.add_machine(parser)


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from glem_augment.apps.explore import opened_gradio, serve
    from glem_augment.apps.explorer import Explorer, drawn
    from glem_augment.evaluation import spread
    from glem_augment.images.sources import without_splits

    real = args.data is not None or args.model == BUNDLED
    if not real and (args.split or args.class_map):
        raise ValueError(f"DATA is missing: name its images, for example glem explore {args.model} photos/")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the command as Ctrl-C does
    name, split = args.data or args.model, args.split or "test"
    with opened_gradio() as gr:
        model = common.load_model(args)
        if real:
            common.uncovered(args, model)
        sets = [] if real else [drawn(model, args.limit)]
        splits = [split] if split == "train" or without_splits(name) else [split, "train"]
        for each in splits if real else []:
            data = common.open_for(model, name, each, args.class_map)
            sets.append(data.subset(spread(len(data), min(args.limit, len(data)))))
        serve(gr, Explorer(model, sets), real, common.note)
