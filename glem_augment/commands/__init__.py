"""One module per command of ``glem``, each with ``add_parser(subparsers)``."""

from glem_augment.commands import demo, evaluate, generate, info, preview, train

COMMANDS = (demo, train, evaluate, generate, preview, info)

__all__ = ["COMMANDS"]
