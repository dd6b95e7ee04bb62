"""Latents of earlier images, per class, from which partners come where the batch has none of the class."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class LatentBank:
    """The last `capacity` latents of every class, on one device; nothing in it waits for the device.

    Args:
        num_classes: K; capacity: latents per class; dim: d. Takes K * capacity * d * 4 bytes.
        device: where.

    Attributes:
        latents: float32 [K * capacity + 1, d]; the last row takes what is not kept.
        counts: int64 [K], latents ever added.
    """

    def __init__(self, num_classes: int, capacity: int, dim: int, device: torch.device) -> None:
        self.capacity = capacity
        self.latents = torch.zeros(num_classes * capacity + 1, dim, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self.latents.device

    def to(self, device: torch.device) -> LatentBank:
        """A copy on another device."""
        other = copy.copy(self)
        other.latents, other.counts = self.latents.to(device), self.counts.to(device)
        return other

    def add(self, z: Tensor, cls: Tensor) -> None:
        """Keep latents z [n, d] of classes cls int64 [n] (-1: not kept), in place of the oldest."""
        num_classes = len(self.counts)
        known = cls >= 0
        cls = cls.clamp(min=0)
        # How many rows of its class stand after (before) a row: the last `capacity` of a class are kept.
        same = (cls[:, None] == cls) & known
        after, before = same.triu(1).sum(dim=1), same.tril(-1).sum(dim=1)
        slot = cls * self.capacity + (self.counts[cls] + before) % self.capacity
        slot = torch.where(known & (after < self.capacity), slot, num_classes * self.capacity)
        self.latents.index_copy_(0, slot, z.detach().to(self.latents.dtype))
        self.counts.index_add_(0, cls, known.to(torch.int64))

    def pick(self, cls: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A stored latent of each class, every one equally likely.

        Args:
            cls: int64 [n] (-1: none); uniform: [n] in [0, 1).

        Returns:
            latents [n, d], and bool [n], whether the class has any (elsewhere the row means nothing).
        """
        there = self.counts[cls.clamp(min=0)].clamp(max=self.capacity)
        index = torch.minimum((uniform * there).long(), (there - 1).clamp(min=0))
        return self.latents[cls.clamp(min=0) * self.capacity + index], (there > 0) & (cls >= 0)
