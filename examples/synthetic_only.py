"""Train a classifier on synthetic images alone, and test it on real images.

    python examples/synthetic_only.py --flow runs/photos --data photos/        # photos/{train,test}/<class>/*
    python examples/synthetic_only.py --epsilon 1 --data photos/   # how much does a private set of these images teach?

With --latents, a perceptron on samples' latents takes the place of the network on images. It is better for models
in an autoencoder's latents, and trains in seconds.

The bundled model was trained on Fashion-MNIST's training images, and not on the test images. With --epsilon, a private
model is fitted to the training images, and a second classifier is trained on as many real images, for comparison.
First comes the accuracy of the model's `predict`, which needs no training, and the rate of the most frequent class.
"""

from __future__ import annotations

import torch
from _common import arguments, batches, check_splits, predictions, tensors, train
from torch import nn
from torch.utils.data import TensorDataset

from glem_augment import GLEM, Privacy, SyntheticDataset, open_data
from glem_augment.images import match_classes


def perceptron(z: torch.Tensor, y: torch.Tensor, judged: torch.Tensor, seed: int) -> torch.Tensor:
    """The classes [M] that a small network, trained on latents z [N, d] and labels y, gives latents `judged` [M, d]."""
    torch.manual_seed(seed)
    scale = z.std(0).clamp_min(1e-6)
    net = nn.Sequential(nn.Linear(z.shape[1], 512), nn.ReLU(), nn.Linear(512, int(y.max()) + 1))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(8):
        for rows in torch.randperm(len(z)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(z[rows] / scale), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return net(judged / scale).argmax(1)


def percent(found: torch.Tensor, truth: torch.Tensor) -> str:
    return f"{100 * (found == truth).float().mean():.1f} %"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--source", default="rfcm", choices=("gaussian", "rfcm"))
    parser.add_argument("--temperature", type=float, help="0.9; 1 for a private model")
    parser.add_argument("--epsilon", type=float, help="fit a private model to the training images (delta 1e-6)")
    parser.add_argument("--latents", action="store_true", help="train a perceptron on samples' latents")
    parser.add_argument("--export", help="also write the images to this folder, as an ImageFolder")
    args = parser.parse_args()
    if args.smoke:
        args.per_class, args.epochs, args.batch_size = 60, 6, 32

    check_splits(args.data)
    real = None
    if args.epsilon is None:
        model = GLEM.from_pretrained(args.flow)
    else:
        real = open_data(args.data, "train")
        # For a model to give away, state image_size= and channels= as well: one image must not change them.
        model = GLEM.fit(real, autoencoder="taef2", privacy=Privacy(args.epsilon, 1e-6))
    shape = {"image_size": model.image_shape[1:], "channels": model.image_shape[0]}
    if args.adapt:
        model = model.adapt(open_data(args.data, "train", **shape))
    data = SyntheticDataset(
        model,
        per_class=args.per_class,
        source=args.source,
        temperature=args.temperature,
        seed=args.seed,
        transform=tensors,
    )
    if args.export:
        data.export(args.export)
    print(data)
    test = open_data(args.data, "test", **shape)
    truth = torch.from_numpy(match_classes(model, test))[torch.from_numpy(test.targets)]
    most = truth.bincount().max() / len(truth)
    found = model.predict(test.tensor())
    print(f"accuracy of the model's predict on {len(test)} real test images: {percent(found, truth)}")
    print(f"the most frequent class is {100 * most:.1f} % of them")
    judged = model.encode(test.tensor())[0] if args.latents else test.tensor().float() / 255
    if args.latents:
        y = torch.arange(model.num_classes).repeat(args.per_class)
        z = model.sample_latents(y, data.temperature, torch.Generator().manual_seed(args.seed), args.source)
        found = perceptron(z, y, judged, args.seed)
    else:
        net = train(
            batches(data, args.batch_size, args.seed), len(data.classes), shape["channels"], args.epochs, args.seed
        )
        found = predictions(net, judged)
    print(f"accuracy of a network that was trained on {len(data)} samples alone: {percent(found, truth)}")
    if real is None:
        return
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(args.seed))[: len(data)]
    x, y = real.tensor()[rows], torch.from_numpy(real.targets)[rows]
    if args.latents:
        found = perceptron(model.encode(x)[0], y, judged, args.seed)
    else:
        few = TensorDataset(x.float() / 255, y)
        net = train(
            batches(few, args.batch_size, args.seed), len(data.classes), shape["channels"], args.epochs, args.seed
        )
        found = predictions(net, judged)
    print(f"accuracy of a network that was trained on {len(rows)} real images: {percent(found, truth)}")
    print("The promise does not cover these numbers: they look at real images. Keep them to yourself.")


if __name__ == "__main__":
    main()
