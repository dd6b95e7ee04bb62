"""`glem compare`: does augmentation help on your images?"""

from __future__ import annotations

import argparse
import time
from typing import Any

from glem_augment.cli import common

DESCRIPTION = """\
Train one network on your images with several stacks of augmentation: crop + flip; ordinary stacks (TrivialAugment,
RandAugment, RandomErasing, Mixup, CutMix); ColorJitter alone, with CutMix and with Mixup; and moves along the modes of
the pixels, of an autoencoder's latents and of --model. Moves are GLEMAugment's Noise(strength=0.5), the setting to
start with, Noise(strength=1) and Mixup(); along the pixels' modes also Adversarial(). Held-out training images choose
the best stack of each kind. The chosen stacks, and Noise(strength=0.5) along the pixels' modes, are measured on
the test images with several seeds. Prints a table with 95 % intervals and one sentence of advice, which may be to leave
augmentation out. There is no advice from networks that have learned too little: then the sentence says how many minutes
it takes.

It ends after --minutes: it plans again after every training, and says which seeds and trials it cut. Finished trainings
are stored, so the same command resumes a stopped comparison. DIR gets report.json and moves.png.
"""
EXAMPLES = """\
  glem compare photos/ photos-test/ --out runs/compare
  glem compare photos/ --image-size 96 --minutes 30 --seeds 8 --out runs/compare   # holds a quarter out as test images
  glem compare photos/ photos-test/ --pretrained efficientnet_lite0 --image-size 128 --out runs/compare
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    parser.add_argument("data", metavar="DATA", help=common.DATA_HELP)
    test = "test images (default: the test split of DATA, or a quarter of DATA)"
    parser.add_argument("test", metavar="TEST", nargs="?", help=test)
    common.add_skip_bad(parser)
    common.add_image_size(parser, "default: 64")
    minutes = "time for everything (default: %(default)g)"
    parser.add_argument("--minutes", type=common.number(0.1), default=10.0, metavar="X", help=minutes)
    seeds = "trainings of each stack, 2 to 10 (default: %(default)s)"
    parser.add_argument("--seeds", type=common.number(2, 10, int), default=5, metavar="N", help=seeds)
    parser.add_argument("--model", metavar="MODEL", help="try moves in the latents of its flow, too (default: none)")
    autoencoder = "taef2, or hub:ORG/NAME (default: taef2)"
    parser.add_argument("--autoencoder", default="taef2", metavar="NAME", help=autoencoder)
    networks = parser.add_mutually_exclusive_group()
    network = "network of timm, trained from scratch (default: %(default)s)"
    networks.add_argument("--network", default="test_resnet", metavar="NAME", help=network)
    networks.add_argument("--pretrained", metavar="NAME", help="network of timm, fine-tuned from timm's weights")
    common.add_out(parser, "folder for report.json, moves.png and finished trainings")
    common.add_machine(parser)


def run(args: argparse.Namespace) -> None:
    began = time.monotonic()  # imports and reading count
    from glem_augment.evaluation.compare import check_network, compare, parted, picture
    from glem_augment.images.dataset import open_data
    from glem_augment.images.sources import without_test
    from glem_augment.io import finite, save_png, write_json
    from glem_augment.model.glem import GLEM

    common.pick_device(args)
    network = args.pretrained or args.network
    size = common.height_and_width(args.image_size) or (64, 64)
    check_network(network, bool(args.pretrained), (3, *size))
    reading: dict[str, Any] = dict(progress=not args.quiet, skip_bad=args.skip_bad)
    train = open_data(args.data, "train", size, **reading)
    common.name_skipped(train)
    if args.test is None and without_test(args.data):
        train, test = parted(train, 4)
    else:
        channels = train.image_shape[0] if train.image_shape[0] in (1, 3) else None
        test = open_data(args.test or args.data, "test", size, channels, **reading)
        common.name_skipped(test)
    flow = None
    if args.model is not None:
        flow = GLEM.from_pretrained(args.model)
        common.uncovered(args, flow, args.out)
    options: dict[str, Any] = dict(progress=not args.quiet, folder=args.out, began=began)
    try:
        result = compare(
            train, test, args.minutes, args.seeds, args.autoencoder, flow, network, bool(args.pretrained), **options
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on after the last finished training") from None
    pictures = result.pop("pictures")
    print_result(result)  # before files are written, which may fail
    write_json(args.out / "report.json", finite(result))
    if pictures:
        save_png(picture(train, pictures), args.out / "moves.png")


def print_result(result: dict[str, Any]) -> None:
    """Print the table, the cuts and the advice."""
    c, h, w = result["image_shape"]
    print(
        f"{result['train']} training and {result['test']} test images, {c}x{h}x{w}, {result['classes']} classes; "
        f"{result['network']}, {result['steps']} steps of {result['batch']}, {result['seeds']} seeds; 95 % intervals\n"
    )
    width = max((len(row["name"]) for row in result["rows"]), default=0)
    if result["rows"]:
        print(f"{'stack':<{width}}  accuracy      over crop + flip   time of a step")
    for row in result["rows"]:
        gain = f"{row['gain']:+5.1f} ± {row['gain_interval']:<4.1f}" if row["kind"] != "plain" else ""
        print(
            f"{row['name']:<{width}}  {row['mean']:5.1f} ± {row['interval']:<4.1f}  {gain:<17}  {row['step_cost']:.1f}"
        )
    for cut in result["cut"]:
        print(f"\ncut: {cut}")
    print(f"\n{result['advice']}", flush=True)
