"""The package's own errors. Each is also the built-in error that fits it, so `except ValueError` catches it too."""

from __future__ import annotations


class GLEMError(Exception):
    """Base class of every error that this package raises on purpose."""


class DataError(GLEMError, ValueError):
    """Images or labels that cannot be used: unreadable, empty, of the wrong size, without the wanted split, ..."""


class BadImageError(DataError):
    """One image of a data set cannot be used; the others may be fine (`open_data(..., skip_bad=True)`)."""


class ClassMismatchError(DataError):
    """The classes of a data set and those of a flow cannot be matched one to one."""


class ModelFileError(GLEMError, ValueError):
    """A saved model or checkpoint is incomplete, damaged, or not in a format that this version reads."""


class HubError(ModelFileError):
    """The Hub could not be read from or written to: no network, no such repository, no access, a damaged download."""


class TrainingError(GLEMError, RuntimeError):
    """Training cannot go on (for example, the loss stayed non-finite over several steps)."""
