"""Which images train the flow (D_nf), which the Gaussians (D_g), and which only measure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glem_augment.errors import DataError


@dataclass(frozen=True)
class Split:
    """Disjoint, sorted int64 indices into the data set."""

    nf: np.ndarray
    g: np.ndarray
    val: np.ndarray


def stratified_split(
    targets: np.ndarray, num_classes: int, g_fraction: float, val_fraction: float, val_max: int, seed: int
) -> Split:
    """Split every class in the same proportions (GLEM, Sec. 4.3: |D_g| = 0.1 |D|).

    Every class keeps at least one image in ``nf`` and ``g``, and gets one in ``val`` when it has three.

    Args:
        targets: int64 [N] class indices.
        num_classes: K.
        g_fraction, val_fraction: shares of each class; ``val_max`` limits the total of ``val``.
        seed: the same seed gives the same split.

    Raises:
        DataError: a class with fewer than two images.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    counts = np.bincount(targets, minlength=num_classes)
    if counts.min() < 2:
        few = np.nonzero(counts < 2)[0][:5].tolist()
        raise DataError(f"every class needs at least 2 images to fit a Gaussian; classes {few} have fewer")
    scale = min(1.0, val_max / max(1.0, val_fraction * len(targets)))
    parts: dict[str, list[np.ndarray]] = {"nf": [], "g": [], "val": []}
    for index in range(num_classes):
        members = rng.permutation(np.nonzero(targets == index)[0])
        n = len(members)
        n_val = min(max(1, round(n * val_fraction * scale)), n - 2) if val_fraction > 0 and n >= 3 else 0
        n_g = min(max(1, round((n - n_val) * g_fraction)), n - n_val - 1)
        parts["val"].append(members[:n_val])
        parts["g"].append(members[n_val : n_val + n_g])
        parts["nf"].append(members[n_val + n_g :])
    return Split(**{name: np.sort(np.concatenate(value)).astype(np.int64) for name, value in parts.items()})


def epoch_order(indices: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """[steps, B] indices of the batches of one epoch: a function of seed and epoch alone, so that a resumed run
    sees what the killed one would have. The incomplete last batch is dropped; a set smaller than a batch is one."""
    order = np.random.default_rng([seed, 0xE90C, epoch]).permutation(indices)
    batch = min(batch_size, len(order))
    steps = len(order) // batch
    return order[: steps * batch].reshape(steps, batch)
