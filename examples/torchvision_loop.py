"""A torchvision training loop with GLEMAugment: v2 transforms, a DataLoader, a torchvision network.

    python examples/torchvision_loop.py --root photos/ --flow runs/photos        # photos/{train,val}/<class>/*
    python examples/torchvision_loop.py --smoke

--where selects one of three places for the transform: in the collate function of the loader's workers, around the
loader, or in the loop, in a chain of v2 transforms before CutMix.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from _common import BUNDLED, bundled_folders, check_classes
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from glem_augment import GLEM, Adversarial, GLEMAugment, Mixup, Noise
from glem_augment.images import match_classes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICIES = {"mixup": Mixup, "noise": Noise, "adversarial": Adversarial}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with train/ and val/ image folders (default: bundled images)")
    parser.add_argument("--flow", default=BUNDLED)
    parser.add_argument("--where", default="chain", choices=("collate", "wrap", "chain"))
    parser.add_argument("--policy", default="noise", choices=tuple(POLICIES))
    parser.add_argument("--p", type=float, default=0.5)
    parser.add_argument("--strength", type=float, help="of noise (default: 0.5) and adversarial (default: 0.25)")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a quick run; sets --size, --epochs and --workers")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            args.size, args.epochs, args.workers = 32, 2, 0
        run(args, args.root or bundled_folders(Path(folder)), device)


def datasets(root: Path, size: int) -> tuple[ImageFolder, ImageFolder]:
    """The images of root/train and root/val, labelled alike: by the classes of root/train."""
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    train = ImageFolder(
        str(root / "train"),
        v2.Compose([v2.RandomResizedCrop(size, scale=(0.5, 1)), v2.RandomHorizontalFlip(), *to_tensor]),
    )
    val = ImageFolder(str(root / "val"), v2.Compose([v2.Resize(size), v2.CenterCrop(size), *to_tensor]))
    check_classes(root / "val", val.classes, train.classes)
    # ImageFolder numbers the classes in val/. If val/ lacks a class, these numbers differ from train/.
    val.target_transform = [train.class_to_idx[name] for name in val.classes].__getitem__
    return train, val


def run(args: argparse.Namespace, root: Path, device: torch.device) -> None:
    train, val = datasets(root, args.size)
    net = torchvision.models.resnet18(num_classes=len(train.classes)).to(device)
    model = GLEM.from_pretrained(args.flow)
    # Folders are sorted by name, unlike the model's classes, so classes are matched by name.
    class_map = match_classes(model, train, partial=True).tolist()
    aug = GLEMAugment(
        model,
        POLICIES[args.policy](**({} if args.strength is None else {"strength": args.strength})),
        p=args.p,
        mean=MEAN,
        std=STD,
        class_map=class_map,
        seed=args.seed,
    )
    if aug.policy.wants_classifier:
        aug.attach(net)

    # 1. In the workers: the model runs on their CPUs.
    collate = aug.collate_fn() if args.where == "collate" else default_collate
    loader = DataLoader(
        train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers, collate_fn=collate
    )
    if len(loader) == 0:
        raise SystemExit(f"{len(train)} training images make no batch of {args.batch_size}: lower --batch-size")
    # 2. After the loader, on the training device.
    batches = aug.wrap(loader, device=device) if args.where == "wrap" else loader
    # 3. In the loop, before or after other transforms of batches.
    chain = v2.Compose(
        [aug.as_transform(), v2.RandomChoice([v2.CutMix(num_classes=len(train.classes)), v2.Identity()])]
    )

    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    for epoch in range(args.epochs):
        net.train()
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            if args.where == "chain":
                x, y = chain(x, y)
            loss = F.cross_entropy(net(x), y, label_smoothing=0.1)  # integer and soft labels
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.inference_mode():
            right = sum(
                int((net(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in DataLoader(val, args.batch_size)
            )
        print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {100 * right / len(val):.1f} %", flush=True)
    if args.where != "collate":  # workers count their own images
        print(f"augmented: {aug.stats}")


if __name__ == "__main__":
    main()
