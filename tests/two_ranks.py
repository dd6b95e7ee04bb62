"""What `test_two_ranks` starts under torchrun: one start of two ranks for several checks, since it takes seconds.

Arguments: a folder for the results, a folder of images with train/ and val/.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from glem_augment import GLEM, Adversarial, GLEMAugment, Noise, open_data
from glem_augment.cli import main
from glem_augment.distributed import gather

EXAMPLES = Path(__file__).parents[1] / "examples"


def finetune() -> None:
    """The example, started as timm's own script is. It forms the group that the rest uses."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("finetune_timm", EXAMPLES / "finetune_timm.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    fixed = ["--smoke", "--data", str(DATA), "--device", "cpu", "--model", "test_resnet", "--img-size", "32"]
    sys.argv = ["finetune_timm.py", *fixed, "--batch-size", "4", "--out", str(OUT / "run"), "--epochs", "1"]
    example.main()


def generate(out: Path) -> None:
    """Three blocks of images."""
    for form in ("imagefolder", "webdataset"):
        options = ["--per-class", "Bag=66,Coat=3", "--device", "cpu"]
        assert main(["generate", "bundled:fashion-mnist", *options, "--format", form, "--out", str(out / form)]) == 0


class Classifier(nn.Sequential):
    """With dropout and running statistics, which the adversary's passes must leave alone."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, 4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(196, 4))


def classify(data: TensorDataset, flow: GLEM, epochs: range, file: Path) -> list[Tensor]:
    """Epochs of a classifier in DistributedDataParallel, from the end of the last one on; the moved images.

    Rank 0 alone writes the checkpoint after each epoch.
    """
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    aug = GLEMAugment(flow, Adversarial(0.5), p=0.7, seed=3)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "aug": aug}
    if epochs.start:
        for name, state in torch.load(file, weights_only=True).items():
            parts[name].load_state_dict(state)
    model = DistributedDataParallel(net)
    aug.attach(model)
    sampler: DistributedSampler[Any] = DistributedSampler(data)
    seen = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # of the dropout, which is not resumed here
        for x, y in aug.wrap(DataLoader(data, 2, sampler=sampler)):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(x)
        distribute_bn(net, 2, reduce=True)  # otherwise rank 1 would go on with the statistics that rank 0 has saved
        if distributed.get_rank() == 0:
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)
            # One rank alone moves images, as for a picture: no other one is waited for.
            aug.replay(x, y, aug.draw(x, y, torch.Generator().manual_seed(0)))
        distributed.barrier()
    seen.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return seen


def augment() -> None:
    """A resumed run goes on as the whole one, on each rank; ranks draw differently and have the same weights."""
    flow = GLEM.from_pretrained("bundled:fashion-mnist")
    images = open_data("bundled:fashion-mnist", "train").subset(range(7))  # which two does not divide
    data = TensorDataset(images.tensor() / 255, torch.arange(7) % 4)
    whole = classify(data, flow, range(2), OUT / "a.pt")
    parts = [*classify(data, flow, range(1), OUT / "b.pt")[:-1], *classify(data, flow, range(1, 2), OUT / "b.pt")]
    assert len(whole) == len(parts) == 5 and all(map(torch.equal, whole, parts))
    eps = GLEMAugment(flow, Noise(), seed=3).draw(*data[:]).drawn["eps"]
    (first, weights), (second, others) = gather((eps, whole[-1]))
    assert torch.equal(weights, others) and not torch.equal(first, second)


if __name__ == "__main__":
    torch.set_num_threads(1)
    OUT, DATA = map(Path, sys.argv[1:])
    finetune()
    generate(OUT)
    augment()
    distributed.destroy_process_group()
