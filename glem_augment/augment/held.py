"""What GLEMAugment holds on each device, made at the first batch there and again when it is out of date."""

from __future__ import annotations

from typing import Any

import torch

from glem_augment.augment.bank import LatentBank
from glem_augment.augment.lookup import ClassTables, FlowOnDevice, class_tables, flow_on_device
from glem_augment.devices import WeightsVersion
from glem_augment.latent.modes import ClassModes
from glem_augment.model.glem import GLEM

NEIGHBOURS = 3  # classes that count as "near"


class Holdings:
    """The flow, the class lookups and the bank of latents on every device that batches have come from.

    Args:
        model: the user's; basis: whose modes; modes: how many of them.
        class_map: flow class of every data class, -1 for none; None: they are the same; near: whether the lookups know
            which classes are close.
        num_classes: data classes; bank: latents of each that are kept.
    """

    def __init__(
        self,
        model: GLEM,
        basis: str,
        modes: int,
        class_map: tuple[int, ...] | None,
        near: bool,
        num_classes: int,
        bank: int,
    ) -> None:
        self.model, self.basis, self.modes = model, basis, modes
        self.class_map, self.num_classes, self.capacity = class_map, num_classes, bank
        self.neighbours = NEIGHBOURS if near else 0
        self._bank: tuple[LatentBank, WeightsVersion] | None = None
        self._flows: dict[torch.device, FlowOnDevice] = {}
        self._tables: dict[torch.device, tuple[WeightsVersion | None, ClassTables]] = {}

    def fitted_modes(self) -> ClassModes:
        """The model's modes, which must still be as many."""
        self.model.checked_modes(self.modes)
        return self.model.modes

    def flow(self, device: torch.device) -> FlowOnDevice:
        """The model and its basis on a device, made again after a new fit."""
        self.fitted_modes()
        if self.model.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the flow's weights are {self.model.dtype}, in which it is not invertible: use flow.float(); its "
                "subnets alone may run in less (flow.flow.set_autocast)"
            )
        found = self._flows.get(device)
        if found is not None and found.is_current(self.model, device):
            return found
        # What is made under inference_mode could take no part in a later call's graph, nor be overwritten outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._flows[device] = flow_on_device(self.model, device, self.basis, self.modes, NEIGHBOURS)
        return self._flows[device]

    def tables(self, device: torch.device) -> ClassTables:
        """Class lookups on a device, made again when the classes have moved."""
        # For a lookup of neighbours the flow must know which classes are close.
        version = WeightsVersion(self.model.gaussians) if self.neighbours else None
        if device not in self._tables or self._tables[device][0] != version:
            with torch.inference_mode(False), torch.no_grad():
                made = class_tables(self.model, self.class_map, self.neighbours).to(device)
                self._tables[device] = version, made
        return self._tables[device][1]

    def has_tables(self, device: torch.device) -> bool:
        """Whether a batch with labels has come from this device before."""
        return device in self._tables

    @property
    def latents(self) -> LatentBank | None:
        """The bank where it is, if there is one and its latents are those of the flow as it is now."""
        if self._bank is not None and self._bank[1] != WeightsVersion(self.model.flow):
            self._bank = None
        return None if self._bank is None else self._bank[0]

    def bank(self, device: torch.device) -> LatentBank:
        """The bank of latents, moved to a device."""
        found = self.latents
        if found is None or found.device != device:
            with torch.inference_mode(False):  # see `flow`
                if found is None:
                    found = LatentBank(self.num_classes, self.capacity, self.model.dim, device)
                else:
                    found = found.to(device)
            self._bank = found, WeightsVersion(self.model.flow)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Copies on accelerators are made again where they are needed. A version is one of this process's weights.
        latents = self.latents
        return {**self.__dict__, "_flows": {}, "_tables": {}, "_bank": None, "_sent": latents}

    def __setstate__(self, state: dict[str, Any]) -> None:
        latents = state.pop("_sent")
        self.__dict__.update(state)
        if latents is not None:
            self._bank = latents, WeightsVersion(self.model.flow)
