"""The package's errors. Each also derives from a built-in error, so `except ValueError` works too."""

from __future__ import annotations


class GLEMError(Exception):
    """Base class of every error that this package raises on purpose."""


class DataError(GLEMError, ValueError):
    """Images or labels cannot be used: unreadable, empty, of the wrong size, without the wanted split, ..."""


class BadImageError(DataError):
    """One image of a data set cannot be used; the error names it."""


class ClassMismatchError(DataError):
    """The classes of a data set cannot be matched one to one with the classes of a model."""


class ModelFileError(GLEMError, ValueError):
    """A saved model or checkpoint is incomplete, damaged, or not in a format that this version reads."""


class HubError(ModelFileError):
    """The Hub could not be read from or written to: no network, no such repository, no access, a damaged download."""


class TrainingError(GLEMError, RuntimeError):
    """Training cannot go on (for example, the loss stayed non-finite over several steps)."""
