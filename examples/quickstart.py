"""A short tour with the bundled model and images: classify images, move images, draw a synthetic set.

python examples/quickstart.py
"""

from __future__ import annotations

import torch

from glem_augment import GLEM, GLEMAugment, Noise, SyntheticDataset, open_data


def main() -> None:
    model = GLEM.from_pretrained("bundled:fashion-mnist")
    data = open_data("bundled:fashion-mnist", "test")
    x, y = data.tensor(), torch.from_numpy(data.targets)

    accuracy = (model.predict(x) == y).float().mean()
    bits = model.bits_per_dim(x, y).mean()
    print(f"{model}\ngenerative classifier: {100 * accuracy:.1f} % of {len(y)} test images, {bits:.2f} bits/dim")

    aug = GLEMAugment(model, Noise(strength=0.5), classes=data.classes, seed=0)
    moved, labels = aug(x[:64], y[:64])
    changed = (moved != x[:64]).flatten(1).any(1).sum()
    print(f"{aug}\nmoved {changed} of 64 images; labels are unchanged: {torch.equal(labels, y[:64])}")

    synthetic = SyntheticDataset(model, per_class=10, seed=0)
    image, label = synthetic[0]
    print(f"{len(synthetic)} synthetic images; the first: {image.size} {image.mode}, {synthetic.classes[label]}")


if __name__ == "__main__":
    main()
