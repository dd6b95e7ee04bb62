"""`glem eval`: measure a model on labelled images."""

from __future__ import annotations

import argparse

from glem_augment.cli import common

DESCRIPTION = """\
Classify labelled images with a model, and measure its likelihoods. Prints one JSON object:

  accuracy, top5      share of images whose class is the most likely (among the 5 most likely) under the model
  bits_per_dim        -log2 p(image | its class) per pixel and channel, at the model's bit depth ("bits"); with an
                      autoencoder or floats: nats_per_number, -log p per latent or pixel
  bits_per_dim_marginal  the same for p(image), all classes equally likely
  ece                 expected calibration error of the posterior, 15 bins
  round_trip          image -> latent -> image without clamping: errors in uint8 steps, share within half a step

Images are converted to the model's size and channels.
"""
EXAMPLES = """\
  glem eval bundled:fashion-mnist bundled:fashion-mnist
  glem eval runs/photos photos/ --split val
  glem eval runs/cifar torch/cifar10@data --limit 1000 --class-map order
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    common.add_model(parser)
    common.add_data(parser)
    common.add_class_map(parser)
    common.add_count(parser, "--limit", "use N images, evenly spread (default: all)")
    common.add_count(parser, "--round-trip", "images for the round trip, evenly spread; 0 for none", 1000)
    common.add_device(parser)


def run(args: argparse.Namespace) -> None:
    from glem_augment.checks import check_whole
    from glem_augment.evaluation import metrics
    from glem_augment.images.dataset import images_for
    from glem_augment.images.sources import without_splits

    limit = None if args.limit is None else check_whole("--limit", args.limit, 1)
    round_trip = check_whole("--round-trip", args.round_trip, 0)
    model = common.load_model(args)
    common.uncovered(args, model)
    whole_folder = without_splits(args.data)
    data = images_for(model, args.data, args.class_map, split=args.split)
    if whole_folder and data.name == model.config.training.get("data"):
        common.note(f"the model may have been trained on these images ({data.name}): measure it on other images")
    if limit is not None and limit < len(data):
        data = data.subset(metrics.spread(len(data), limit))
    result = {"model": args.model, "data": args.data, "split": None if whole_folder else args.split}
    result |= metrics.evaluate(model, data, round_trip=round_trip)
    common.print_json(result)
