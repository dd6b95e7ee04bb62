"""Fill up the rare classes of a long-tailed data set with synthetic images, or repeat the rare images.

    python examples/long_tail.py --data photos/ --flow runs/photos        # photos/{train,test}/<class>/*

The bundled images, or with --imbalance above 1 the images of --data, are made long-tailed first. The bundled model was
trained on all 60,000 training images of Fashion-MNIST, so its gain here proves nothing. With a flow of the long-tailed
images alone, repetition was better (docs/what_was_tried.md).
"""

from __future__ import annotations

import numpy as np
import torch
from _common import BUNDLED, arguments, batches, check_classes, check_splits, predictions, tensors, train

from glem_augment import GLEM, RealAndSynthetic, SyntheticDataset, open_data
from glem_augment.images import ImageData, match_classes


def long_tailed(data: ImageData, imbalance: float) -> ImageData:
    """The first images of each class. Sizes fall geometrically from the first class to the last, by `imbalance`."""
    k, head = len(data.classes), int(np.bincount(data.targets).min())
    kept = [max(2, round(head * imbalance ** (-c / max(1, k - 1)))) for c in range(k)]
    return data.subset(np.concatenate([np.flatnonzero(data.targets == c)[: kept[c]] for c in range(k)]))


def repeated(data: ImageData) -> ImageData:
    """The images of each class, repeated up to the size of the largest class."""
    classes = [np.flatnonzero(data.targets == c) for c in range(len(data.classes))]
    largest = max(map(len, classes))
    return data.subset(np.concatenate([np.resize(rows, largest) for rows in classes if len(rows)]))


def rarest_third(trained: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """The third of the tested classes (at least one) that has the fewest training images. Arguments are labels."""
    classes = np.unique(tested)
    counts = np.bincount(trained, minlength=classes.max() + 1)
    return classes[np.argsort(counts[classes])[: max(1, len(classes) // 3)]]


class AsFloat(torch.utils.data.Dataset):
    """An ImageData with float images, like the synthetic set."""

    def __init__(self, data: ImageData) -> None:
        self.data, self.targets, self.classes = data, data.targets, data.classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.data[index]
        return image.float() / 255, label


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--imbalance", type=float, help="make the data long-tailed: size of the head / size of the tail"
    )
    parser.add_argument("--source", choices=("gaussian", "rfcm"))
    parser.add_argument("--temperature", type=float, default=0.9)
    args = parser.parse_args()
    if args.smoke:
        args.epochs = 3

    check_splits(args.data)
    model = GLEM.from_pretrained(args.flow)
    shape = {"image_size": model.image_shape[1:], "channels": model.image_shape[0]}
    tail = open_data(args.data, "train", **shape)
    imbalance = args.imbalance or (20.0 if args.data == BUNDLED else 1.0)
    if imbalance != 1:
        tail = long_tailed(tail, imbalance)
    test = open_data(args.data, "test", **shape)
    check_classes(args.data, test.class_ids, tail.class_ids)
    # If the test images lack a class, their labels differ from the training labels.
    label_of = match_classes(tail, test)
    if args.adapt:
        model = model.adapt(tail)

    synthetic = SyntheticDataset(
        model,
        per_class="balance",
        real=tail,
        source=args.source,
        temperature=args.temperature,
        seed=args.seed,
        transform=tensors,
    )
    balanced = RealAndSynthetic(AsFloat(tail), synthetic)
    print(f"{len(tail)} real images, {np.bincount(tail.targets).tolist()} per class; {len(synthetic)} synthetic images")

    x, y = test.tensor().float() / 255, torch.from_numpy(label_of[test.targets])
    rare = torch.from_numpy(rarest_third(tail.targets, y.numpy()))
    arms = {"long tail": AsFloat(tail), "repeated": AsFloat(repeated(tail)), "filled up": balanced}
    for name, data in arms.items():
        print(name, flush=True)
        # All arms have the same number of steps, so a larger set has fewer epochs.
        epochs = max(1, round(args.epochs * len(balanced) / len(data)))
        net = train(batches(data, args.batch_size, args.seed), len(tail.classes), x.shape[1], epochs, args.seed)
        right = predictions(net, x) == y
        print(
            f"  accuracy {100 * right.float().mean():.1f} %, "
            f"on the rarest third of the classes {100 * right[torch.isin(y, rare)].float().mean():.1f} %"
        )


if __name__ == "__main__":
    main()
