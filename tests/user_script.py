"""A user's small script, for mypy (`make lint`): it needs no cast, and each line with an ignored error must be one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from glem_augment import GLEM, GLEMAugment, GLEMError, Noise, SyntheticDataset, open_data
from glem_augment.classes.gaussians import ClassGaussians
from glem_augment.images.dataset import ImageData


def train(classifier: nn.Module, loader: DataLoader[tuple[Tensor, ...]], augment: GLEMAugment) -> float:
    loss = torch.zeros(())
    for images, labels in loader:
        x, y = augment(images, labels)
        loss = nn.functional.cross_entropy(classifier(x), y)
    return loss.item()


def main() -> None:
    model: GLEM = GLEM.from_pretrained("bundled:fashion-mnist")
    data: ImageData = open_data("bundled:fashion-mnist", "train")
    images: Tensor = data.tensor()
    labels = torch.from_numpy(data.targets)
    z, logdet = model.encode(images[:8])
    decoded: Tensor = model.decode(z)
    gaussians: ClassGaussians = model.gaussians
    bits = model.bits_per_dim(images[:8], labels[:8]).mean().item() - float(logdet[0])
    aug = GLEMAugment(model, Noise(strength=0.5), p=0.5, modes=64)
    loader = DataLoader(TensorDataset(images, labels), batch_size=32)
    loss: float = train(nn.Flatten(), loader, aug)
    synthetic = SyntheticDataset(model, per_class=10, seed=0)
    try:
        synthetic.export("folder", format="imagefolder")
    except GLEMError as error:
        print(error, decoded.shape, gaussians, bits, loss, len(synthetic))

    GLEMAugment(model, policy="mixpu")  # type: ignore[arg-type]
    Noise(alpha=0.5)  # type: ignore[call-arg]
    SyntheticDataset(model, per_class=10, source="rcfm")  # type: ignore[arg-type]
    synthetic.export("folder", format="zip")  # type: ignore[arg-type]
    open_data("photos", "train", imagesize=32)  # type: ignore[call-arg]
    model.nothing()  # type: ignore[operator]
