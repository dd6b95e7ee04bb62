"""The package's own errors.

Each one is also the built-in error that fits it, so ``except ValueError`` keeps working for callers that do
not know this package.
"""

from __future__ import annotations

__all__ = ["BadImageError", "ClassMismatchError", "DataError", "GLEMError", "ModelFileError", "TrainingError"]


class GLEMError(Exception):
    """Base class of every error that this package raises on purpose."""


class DataError(GLEMError, ValueError):
    """Images or labels that cannot be used: unreadable, empty, of the wrong size, missing a split, ..."""


class BadImageError(DataError):
    """One image of a data set that cannot be used; the others may be fine (``open_data(..., skip_bad=True)``)."""


class ClassMismatchError(DataError):
    """The classes of a data set and those of a flow cannot be matched one to one."""


class ModelFileError(GLEMError, ValueError):
    """A saved model or checkpoint that is incomplete, damaged, or not what this version reads."""


class TrainingError(GLEMError, RuntimeError):
    """Training cannot go on (for example, the loss stayed non-finite over several steps)."""
