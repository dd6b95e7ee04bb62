"""What GLEMAugment keeps on each device: the flow with the modes of the basis, and the class lookups."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from glem_augment.devices import WeightsVersion, check_worker_device
from glem_augment.latent.modes import ClassModes, nearest_classes
from glem_augment.model.glem import GLEM


@dataclass
class FlowOnDevice:
    """The model on one device (the user's own, or a copy of it), and the top modes of the basis there.

    directions are [K, k, d] and scales [K, k]; [k, d] and [k] for the shared basis. counts int64 [K] or []: the
    modes of a class that have any length. `source` is the ClassModes that they were made from, `version` that of the
    weights that they depend on: after a new fit, or more training, they are out of date.
    """

    model: GLEM
    source: ClassModes
    directions: Tensor
    scales: Tensor
    counts: Tensor
    version: WeightsVersion

    @property
    def fitted(self) -> ClassModes:
        """All modes, on this device."""
        assert self.model.modes is not None
        return self.model.modes

    def is_current(self, model: GLEM, device: torch.device) -> bool:
        """Whether the user's model is as it was: its modes, its device, and the weights that were copied from it."""
        same = self.source is model.modes and self.directions.device == self.model.device == device
        return same and self.version == _version(model, device)


def _version(model: GLEM, device: torch.device) -> WeightsVersion:
    if model.device != device:
        return WeightsVersion(model)
    return WeightsVersion(model.gaussians, *([] if model.modes is None else [model.modes]))


def flow_on_device(model: GLEM, device: torch.device, basis: str, modes: int, neighbours: int) -> FlowOnDevice:
    """The model on `device`, copied if it lives elsewhere, with the top `modes` of a basis: class, near or
    shared.

    Raises:
        RuntimeError: for a model on CUDA in a forked DataLoader worker.
    """
    check_worker_device(model.device)
    check_worker_device(device)
    source, version = model.modes, _version(model, device)
    if model.device != device:
        model = copy.deepcopy(model).to(device)
    fitted = model.modes
    assert source is not None and fitted is not None
    if basis == "near":
        directions, scales = fitted.near(model.gaussians.kld_matrix().detach(), neighbours)
    elif basis == "shared":
        directions, scales = fitted.shared_directions, fitted.shared_scales
    else:
        directions, scales = fitted.directions, fitted.scales
    scales = scales[..., :modes]
    return FlowOnDevice(model, source, directions[..., :modes, :], scales, (scales > 0).sum(dim=-1), version)


@dataclass
class ClassTables:
    """Class lookups, K flow classes and K' data classes; -1 = none.

    to_flow [K'], flow class of each data class; to_data [K], the first data class of each flow class; share
    [K'], the part of its flow class's probability that is a data class's; mapped, the data classes that the
    flow knows; neighbours [K, m], closest flow classes first.
    """

    to_flow: Tensor
    to_data: Tensor
    share: Tensor
    mapped: Tensor
    neighbours: Tensor

    def to(self, device: torch.device) -> ClassTables:
        """The tables on a device."""
        return ClassTables(**{name: value.to(device) for name, value in vars(self).items()})

    def data_class(self, cls: Tensor, own_cls: Tensor, own_data: Tensor) -> Tensor:
        """The data class by which an image drawn for the flow classes cls [n] goes: the row's own, own_data [n], where
        its flow class own_cls [n] is the same, else the first of the class."""
        return torch.where(cls == own_cls, own_data, self.to_data[cls.clamp(min=0)])

    def data_probability(self, flow_probability: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of data classes [n, K'] from those of flow classes [n, K], and whether they say
        anything [n].

        They do not where all the probability is on flow classes that the data does not have.
        """
        new = flow_probability[:, self.to_flow.clamp(min=0)] * self.share
        total = new.sum(dim=1, keepdim=True)
        return new / total.clamp(min=torch.finfo(total.dtype).tiny), total[:, 0] > 0

    def partners(
        self, partner: str, rows: Tensor, cls_all: Tensor, data_all: Tensor, pick: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which batch rows may be partners, bool [n, B], and the flow class to draw from where none is, [n].

        Args:
            partner: "same" (data class, of which a flow class may hold several), "near" or "any"; rows [n]: the
            changed ones; cls_all, data_all [B]: flow and data classes of all; pick: [n] uniform in [0, 1).
        """
        cls = cls_all[rows]
        if partner == "same":
            return data_all == data_all[rows][:, None], cls
        if partner == "near":
            near = self.neighbours[cls.clamp(min=0)]
            choice = (pick * near.shape[1]).long().clamp(max=near.shape[1] - 1)
            return (near[:, :, None] == cls_all).any(dim=1), near.gather(1, choice[:, None])[:, 0]
        # A batch of one has no other row: its partner is then a draw from any class of the data.
        choice = (pick * len(self.mapped)).long().clamp(max=len(self.mapped) - 1)
        allowed = torch.ones(len(cls), len(cls_all), dtype=torch.bool, device=cls.device)
        return allowed, self.to_flow[self.mapped[choice]]


def class_tables(model: GLEM, class_map: tuple[int, ...] | None, neighbours: int) -> ClassTables:
    """The lookups of a checked class_map (None: data and flow classes are the same), on the CPU.

    Raises:
        ValueError: if neighbours are wanted and the data has fewer than 2 of the flow's classes.
    """
    check_worker_device(model.device)
    flow_classes = model.num_classes
    to_flow = torch.tensor(range(flow_classes) if class_map is None else class_map, device="cpu")
    mapped = (to_flow >= 0).nonzero()[:, 0]
    to_data = torch.full((flow_classes,), -1, device="cpu")
    # Reversed, so that the first of several data classes with one flow class names it.
    for data_class in reversed(mapped.tolist()):
        to_data[to_flow[data_class]] = data_class
    several = torch.bincount(to_flow[mapped], minlength=flow_classes)
    share = (to_flow >= 0) / several[to_flow.clamp(min=0)].clamp(min=1)
    near = torch.zeros(flow_classes, 0, dtype=torch.int64, device="cpu")
    if neighbours:
        # Only classes that the data has, or the label of a drawn partner could not be named.
        kld = model.gaussians.kld_matrix().detach().cpu()
        near = nearest_classes(kld, neighbours, allowed=to_data >= 0)
        if near.shape[1] == 0:
            raise ValueError("partner='near' needs a class_map with at least 2 flow classes: use partner='same'")
    return ClassTables(to_flow, to_data, share, mapped, near)
