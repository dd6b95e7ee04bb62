"""`glem compare`: does augmentation help on your images?"""

from __future__ import annotations

import argparse

from glem_augment.cli import common

DESCRIPTION = """\
Train one network on your images with several stacks of augmentation: crop + flip; ordinary stacks (TrivialAugment,
RandAugment, RandomErasing, Mixup, CutMix); and moves along the modes of the pixels, of an autoencoder's latents and,
with --model, of a flow, by GLEMAugment's Noise(strength=0.5), the setting to start with, Noise(strength=1) and Mixup().
Held-out training images choose the best stack of each kind. The chosen stacks are measured on
the test images with several seeds. Prints a table with 95 % intervals and one sentence of advice, which may be to leave
augmentation out. DIR gets report.json and moves.png.
"""
EXAMPLES = """\
  glem compare photos/ photos-test/ --out runs/compare
  glem compare photos/ --image-size 96 --minutes 30 --seeds 8 --out runs/compare   # holds a quarter out as test images
  glem compare photos/ photos-test/ --network efficientnet_lite0 --pretrained --image-size 128 --out runs/compare
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.describe(parser, DESCRIPTION, EXAMPLES)
    parser.add_argument("data", metavar="DATA", help=common.DATA_HELP)
    test = "test images (default: the test split of DATA, or a quarter of DATA)"
    parser.add_argument("test", metavar="TEST", nargs="?", help=test)
    common.add_image_size(parser, "default: 64")
    minutes = "time for everything, about (default: %(default)g)"
    parser.add_argument("--minutes", type=common.number(0.1), default=10.0, metavar="X", help=minutes)
    seeds = "trainings of each stack, 2 to 10 (default: %(default)s)"
    parser.add_argument("--seeds", type=common.number(2, 10, int), default=5, metavar="N", help=seeds)
    parser.add_argument("--model", metavar="MODEL", help="a flow to compare as well (default: none)")
    autoencoder = "taef2, or hub:ORG/NAME (default: taef2)"
    parser.add_argument("--autoencoder", default="taef2", metavar="NAME", help=autoencoder)
    network = "network of timm (default: %(default)s)"
    parser.add_argument("--network", default="test_resnet", metavar="NAME", help=network)
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights (default: from scratch)")
    common.add_out(parser, "folder for report.json and moves.png")
    common.add_machine(parser)


def run(args: argparse.Namespace) -> None:
    from glem_augment.evaluation.compare import compare, parted, picture
    from glem_augment.images.dataset import open_data
    from glem_augment.io import save_png, write_json
    from glem_augment.model.glem import GLEM

    common.pick_device(args)
    size, reading = common.height_and_width(args.image_size) or (64, 64), dict(progress=not args.quiet)
    train = open_data(args.data, "train", size, **reading)
    if args.test is not None:
        test = open_data(args.test, "test", size, train.image_shape[0], **reading)
    else:
        test = open_data(args.data, "test", size, train.image_shape[0], **reading)
        if len(test) == len(train) and test.name == train.name:  # there is one folder of images alone
            train, test = parted(train, 4)
    flow = None if args.model is None else GLEM.from_pretrained(args.model)
    result = compare(
        train, test, args.minutes, args.seeds, args.autoencoder, flow, args.network, args.pretrained, not args.quiet
    )
    args.out.mkdir(parents=True, exist_ok=True)
    save_png(picture(train, result.pop("pictures")), args.out / "moves.png")
    write_json(args.out / "report.json", result)
    c, h, w = result["image_shape"]
    print(
        f"{result['train']} training and {result['test']} test images, {c}x{h}x{w}, {result['classes']} classes; "
        f"{args.network}, {result['steps']} steps of {result['batch']}, {result['seeds']} seeds; 95 % intervals\n"
    )
    width = max(len(row["name"]) for row in result["rows"])
    print(f"{'stack':<{width}}  accuracy      over crop + flip")
    for row in result["rows"]:
        gain = f"{row['gain']:+5.1f} ± {row['gain_interval']:.1f}" if row["kind"] != "plain" else ""
        print(f"{row['name']:<{width}}  {row['mean']:5.1f} ± {row['interval']:.1f}   {gain}")
    print(f"\n{result['advice']}")
