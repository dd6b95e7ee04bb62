"""Moves along class modes (PCA jitter per class) and synthetic images for timm and torchvision (GLEM).

Public names and sub-packages (`glem_augment.training`, ...) are imported when they are first used, and torch with them.
So `glem --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers do not follow `__getattr__`
    from glem_augment.augment.policies import *  # noqa: F403
    from glem_augment.augment.transform import *  # noqa: F403
    from glem_augment.errors import *  # noqa: F403
    from glem_augment.images.dataset import *  # noqa: F403
    from glem_augment.model.glem import *  # noqa: F403
    from glem_augment.privacy.mechanism import *  # noqa: F403
    from glem_augment.synthetic.combined import *  # noqa: F403
    from glem_augment.synthetic.dataset import *  # noqa: F403

__version__ = "0.1.0"

_MODULES = {
    "GLEM": "model.glem",
    "GLEMAugment": "augment.transform",
    "Noise": "augment.policies",
    "Mixup": "augment.policies",
    "Adversarial": "augment.policies",
    "Policy": "augment.policies",
    "Privacy": "privacy.mechanism",
    "SyntheticDataset": "synthetic.dataset",
    "RealAndSynthetic": "synthetic.combined",
    "open_data": "images.dataset",
    "GLEMError": "errors",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
