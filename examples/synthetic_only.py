"""Train a classifier on synthetic images alone, and test it on real images.

    python examples/synthetic_only.py --flow runs/photos --data photos/        # photos/{train,test}/<class>/*

The bundled flow was trained on Fashion-MNIST's training images, and not on the test images.
"""

from __future__ import annotations

import torch
from _common import arguments, batches, check_splits, predictions, tensors, train

from glem_augment import GLEM, SyntheticDataset, open_data
from glem_augment.images.matching import match_classes


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--source", default="rfcm", choices=("gaussian", "rfcm"))
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--export", help="also write the images to this folder, as an ImageFolder")
    args = parser.parse_args()
    if args.smoke:
        args.per_class, args.epochs, args.batch_size = 60, 6, 32

    check_splits(args.data)
    flow = GLEM.from_pretrained(args.flow)
    shape = {"image_size": flow.image_shape[1:], "channels": flow.image_shape[0]}
    if args.adapt:
        flow = flow.adapt(open_data(args.data, "train", **shape))
    data = SyntheticDataset(
        flow,
        per_class=args.per_class,
        source=args.source,
        temperature=args.temperature,
        seed=args.seed,
        transform=tensors,
    )
    if args.export:
        data.export(args.export)
    print(data)
    net = train(
        batches(data, args.batch_size, args.seed), len(data.classes), data.image_shape[0], args.epochs, args.seed
    )

    test = open_data(args.data, "test", **shape)
    label_of = torch.from_numpy(match_classes(flow, test))
    right = predictions(net, test.tensor().float() / 255) == label_of[torch.from_numpy(test.targets)]
    print(f"accuracy on {len(test)} real test images: {100 * right.float().mean():.1f} %")


if __name__ == "__main__":
    main()
