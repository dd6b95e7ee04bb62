"""Private sets: classes fitted to differentially private releases."""

from glem_augment.privacy.mechanism import Privacy, delta_of, epsilon_of, total

__all__ = ["Privacy", "delta_of", "epsilon_of", "total"]
