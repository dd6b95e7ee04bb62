"""One module per command of ``glem``, each with ``add_parser(subparsers)``."""

from glem_augment.commands import adapt, demo, evaluate, generate, info, preview, push, train

COMMANDS = (demo, train, adapt, evaluate, generate, preview, info, push)

__all__ = ["COMMANDS"]
