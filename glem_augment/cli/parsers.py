"""The commands, their options and their help. Nothing here imports torch, so that `--help` answers at once."""

from __future__ import annotations

from typing import Any

from glem_augment.checks import DEFAULT_MODES, FORMATS, POLICIES, SOURCES
from glem_augment.cli.arguments import (
    DATA_HELP,
    add_class_map,
    add_data,
    add_machine,
    add_model,
    add_out,
    add_seed,
    new_parser,
    number,
    out_folder,
    out_path,
    per_class,
    table,
    whole,
)
from glem_augment.cli.settings import add_train

DEMO = """\
Load a flow and the bundled Fashion-MNIST images; measure the flow; write pictures and a small synthetic data set;
then train a small timm network on 1000 images with and without GLEMAugment, with several seeds, and print both
accuracies, whichever is higher. Then draw images of the colour flow, and with --photos adapt it to photographs of yours
and draw moves of them. Needs no network and no GPU; a few minutes on 2 cores.
"""
DEMO_EXAMPLES = """\
  glem demo
  glem demo --model runs/my-flow --quick
  glem demo --photos my-photos/
"""


def add_demo(commands: Any) -> None:
    parser = new_parser(commands, "demo", DEMO, DEMO_EXAMPLES)
    parser.add_argument("--out", type=out_folder, default="demo-out", metavar="DIR", help="(default: demo-out)")
    flow = "a flow of Fashion-MNIST's classes (default: %(default)s)"
    parser.add_argument("--model", default="bundled:fashion-mnist", metavar="MODEL", help=flow)
    photos = "a folder of class folders with photographs, or another name of images as for glem adapt"
    parser.add_argument("--photos", metavar="DATA", help=photos)
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds: few images, numbers mean little")


ADAPT = """\
Make a flow that was trained on other images serve your classes. Every class gets the mean of its images' latents, their
variances (shrunk towards those of all classes together, so that a class may have one or two images) and its principal
modes. The flow itself is not trained, so this takes one pass over the images: seconds to minutes. DIR then holds a
model like any other, with your class names. glem train --init MODEL is the slower way, which trains the flow too.
Images are resized to the flow's size, and converted to its channels. Prints a JSON summary; images_per_class and
modes_per_class are the fewest and the most: n images have at most n - 1 modes, and one image gets those of all classes;
moves_put_back says how far these images can be moved (glem eval --help).
"""
ADAPT_EXAMPLES = """\
  glem adapt bundled:fashion-mnist photos/ --out runs/photos
  glem adapt org/name torch/cifar10@data --max-per-class 500 --out runs/cifar
  glem eval runs/photos photos-test/
"""


def add_adapt(commands: Any) -> None:
    parser = new_parser(commands, "adapt", ADAPT, ADAPT_EXAMPLES)
    add_model(parser)
    add_data(parser, split="train")
    add_out(parser, "folder for the adapted model")
    parser.add_argument("--rank", type=whole(1), default=64, metavar="K", help="modes per class (default: %(default)s)")
    half = "images at which a class's variances are half its own and half all classes' (default: %(default)g)"
    parser.add_argument("--shrinkage", type=number(0), default=10.0, metavar="N", help=half)
    parser.add_argument("--max-per-class", type=whole(1), metavar="N", help="images of a class at most (default: all)")
    add_seed(parser, "the dequantisation noise")
    where = "reference: the folder gets no copy of a Jet's flow, which is loaded from MODEL each time (default: copy)"
    parser.add_argument("--weights", choices=("copy", "reference"), default="copy", help=where)
    parser.add_argument("--overwrite", action="store_true", help="write over a model in DIR")
    add_machine(parser)


EVALUATE = """\
Classify labelled images with a flow, and measure how well it models them. Prints one JSON object:

  accuracy, top5      share of images whose class is the most likely (among the 5 most likely) under the flow
  bits_per_dim        -log2 p(image | its class) per pixel and channel, at the flow's bit depth ("bits")
  bits_per_dim_marginal  the same for p(image), all classes equally likely
  ece                 expected calibration error of the posterior, 15 bins
  round_trip          image -> latent -> image without clamping: errors in uint8 steps, share within half a step
  moves_put_back      share of the moves of 128 images that GLEMAugment would put back by default, as implausible: by
                      mixup, and by noise of several strengths, of which "strength" is what strength="auto" takes
  skipped             images left out, with --skip-bad

Images are resized to the flow's size, and converted to its channels.
"""
EVALUATE_EXAMPLES = """\
  glem eval bundled:fashion-mnist bundled:fashion-mnist
  glem eval runs/photos photos/ --split val --out photos.json
  glem eval runs/cifar torch/cifar10@data --limit 1000 --class-map order
"""


def add_evaluate(commands: Any) -> None:
    parser = new_parser(commands, "eval", EVALUATE, EVALUATE_EXAMPLES)
    add_model(parser)
    add_data(parser, split=None)
    add_class_map(parser)
    parser.add_argument("--batch-size", type=whole(1), default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="use N images, evenly spread (default: all)")
    trip = "images for the round trip, evenly spread; 0 for none (default: %(default)s)"
    parser.add_argument("--round-trip", type=whole(0), default=1000, metavar="N", help=trip)
    parser.add_argument("--out", type=out_path, metavar="FILE", help="write the JSON to FILE too")
    add_machine(parser)


GENERATE = """\
Draw new images of every class from a flow, and write them with glem-provenance.json, which says what drew them and
how. The same seed draws the same images, whichever classes and however many are asked for (pixels may differ by one
step with another number, by rounding). Prints a JSON summary.

  --format imagefolder   PNG files, a folder per class; classes without images get none, and classes.json says which
                         label every class has. The same command again writes what is missing.
  --format webdataset    data/train-*.tar with the classes mixed, and a card; they appear once all are finished.

  --per-class 100                    of each class
  --per-class cat=100,dog=50         of these classes; or a YAML or JSON file with such a table
  --per-class balance --real DATA    fill up every class of DATA to its largest; other classes of the flow get none
"""
GENERATE_EXAMPLES = """\
  glem generate bundled:fashion-mnist --per-class 100 --out synthetic/
  glem generate runs/photos --per-class 1000 --temperature 0.8 --format webdataset --out synthetic/
  glem generate runs/photos --per-class balance --real photos/ --source mixup --out fill/
  glem generate runs/photos --per-class cat=50,dog=50 --seed 1 --out pets/
"""


def add_generate(commands: Any) -> None:
    parser = new_parser(commands, "generate", GENERATE, GENERATE_EXAMPLES)
    add_model(parser)
    counts = "how many images; see above"
    parser.add_argument("--per-class", type=per_class, required=True, metavar="N|TABLE|balance", help=counts)
    add_out(parser, "folder to write to")
    add_seed(parser)
    parser.add_argument("--format", choices=FORMATS, default="imagefolder", help="see above (default: %(default)s)")
    licence = "of the images that the flow was trained on, which its samples inherit, such as mit or cc-by-4.0"
    parser.add_argument("--license", metavar="ID", help=licence)
    parser.add_argument("--overwrite", action="store_true", help="write over an earlier export in DIR")
    add_machine(parser)
    source = parser.add_argument_group("what is drawn")
    source.add_argument(
        "--source",
        choices=SOURCES,
        help="gaussian: the class's own Gaussian; rfcm: mean and covariance of the class's real latents; "
        "mixup: two images of --real mixed along the class's modes (default: rfcm, or gaussian without modes)",
    )
    # None as the default tells whether an option was given, so that one without effect is refused.
    source.add_argument(
        "--temperature",
        type=number(0),
        metavar="T",
        help="of gaussian and rfcm: factor on the standard deviation; lower is cleaner and less varied (default: 0.9)",
    )
    source.add_argument("--modes", type=whole(1), metavar="N", help=f"of mixup (default: {DEFAULT_MODES}, or all)")
    source.add_argument("--alpha", type=number(0), metavar="A", help="of mixup: of its Beta(A, A) (default: 1)")
    parser.add_argument(
        "--report",
        type=out_folder,
        metavar="DIR",
        help="compare up to 5000 of the images with as many of --real, which the flow was trained on: FID, coverage, "
        "label reliability and memorisation, by a small classifier trained on these for about a minute; writes "
        "report.json and report.png, a picture of nearest pairs. Memorisation needs DATA with test images",
    )
    real = parser.add_argument_group("real images, for --per-class balance, --source mixup and --report")
    real.add_argument("--real", metavar="DATA", help=DATA_HELP)
    real.add_argument("--split", metavar="SPLIT", help="of DATA (default: train)")
    add_class_map(real)


PREVIEW = """\
Draw one labelled picture: real images and their augmentations at rising strength, samples of each class at several
temperatures, and interpolations within and between classes. Look at it before you train with a flow: an augmented
image should still be one of its class.
"""
PREVIEW_EXAMPLES = """\
  glem preview bundled:fashion-mnist bundled:fashion-mnist --out preview.png
  glem preview runs/photos photos/ --split val --rows 10 --policy mixup --modes 16 --out preview.png
"""


def add_preview(commands: Any) -> None:
    parser = new_parser(commands, "preview", PREVIEW, PREVIEW_EXAMPLES)
    add_model(parser)
    add_data(parser)
    add_class_map(parser)
    parser.add_argument("--out", type=out_path, required=True, metavar="FILE.png", help="the picture")
    parser.add_argument("--rows", type=whole(1), default=6, metavar="N", help="real images to augment (default: 6)")
    moves = "mixup with an image of the class, noise along the modes, adversarial to the flow itself (default: all)"
    parser.add_argument("--policy", choices=("all", *POLICIES), default="all", help=moves)
    parser.add_argument("--modes", type=whole(1), metavar="N", help="modes to move along (default: all stored ones)")
    add_seed(parser)
    add_machine(parser)


EXPLORE = """\
Serve a page on this machine in which one sees what a flow knows: samples, images of DATA (without it: samples) or files
moved along the modes of their classes, lines between two images, and how the flow sees DATA. Needs the extra "explore".
"""
EXPLORE_EXAMPLES = "  glem explore bundled:fashion-mnist\n  glem explore runs/photos photos/ --split val\n"


def add_explore(commands: Any) -> None:
    parser = new_parser(commands, "explore", EXPLORE, EXPLORE_EXAMPLES)
    add_model(parser, nargs="?", default="bundled:fashion-mnist")
    add_data(parser, split=None, nargs="?")
    add_class_map(parser)
    parser.add_argument("--limit", type=whole(1), default=1000, metavar="N", help="images per split (default: 1000)")
    add_machine(parser)


INFO = """\
Say what a model is: image shape and bits, the numbers of its flow, parameters, files, classes, modes, and the
record of its training. The files are read and checked whole; a model on the Hugging Face Hub is downloaded first.
"""
INFO_EXAMPLES = """\
  glem info bundled:fashion-mnist
  glem info runs/photos --json
  glem info org/name@v1.0
"""


def add_info(commands: Any) -> None:
    parser = new_parser(commands, "info", INFO, INFO_EXAMPLES)
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of YAML")


LIST = """\
List the flows inside the package and, with --hub, those on the Hugging Face Hub that carry the tag glem-augment (the
first 100). Accuracy and bits/dim are those on the held-out part of the training images, as the training recorded them;
size is that of the weights; the licence is that of the training images, which samples inherit.
"""
LIST_EXAMPLES = """\
  glem list
  glem list --json
  glem list --hub
"""


def add_list(commands: Any) -> None:
    parser = new_parser(commands, "list", LIST, LIST_EXAMPLES)
    parser.add_argument("--hub", action="store_true", help="those on the Hub too")
    parser.add_argument("--json", action="store_true", help="one JSON object, with the names of all classes")


PUSH = """\
Upload a flow to the Hugging Face Hub in one commit: weights, config, a model card written from what the flow records,
and a picture of samples. The repository is made where there is none. Prints a JSON summary; "pinned" in it names these
very weights, wherever a command asks for MODEL.

The token comes from HF_TOKEN, or from hf auth login. HF_ENDPOINT chooses another Hub.
"""
PUSH_EXAMPLES = """\
  glem push runs/photos org/photos-flow --license cc-by-4.0 --private
  glem push runs/photos org/photos-flow --license cc-by-4.0 --metrics eval.json --message "Trained longer"
  glem push org/photos-flow org/photos-page --space
  glem push bundled:fashion-mnist org/fashion --license mit --dataset zalando-datasets/fashion_mnist --dry-run look/
"""


def add_push(commands: Any) -> None:
    parser = new_parser(commands, "push", PUSH, PUSH_EXAMPLES)
    add_model(parser)
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
    card.add_argument("--metrics", type=table, metavar="FILE", help=metrics, **several)
    card.add_argument("--no-samples", action="store_true", help="no picture of samples")
    dry = "write what would be uploaded to DIR, and upload nothing"
    parser.add_argument("--dry-run", type=out_folder, metavar="DIR", help=dry)


def add_commands(commands: Any) -> None:
    """All commands, in the order of the overview."""
    adders = (add_demo, add_train, add_adapt, add_evaluate, add_generate, add_preview, add_explore, add_info, add_list)
    for add in (*adders, add_push):
        add(commands)
