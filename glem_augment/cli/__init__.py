"""One module per command of ``glem``, each with ``add_parser(subparsers)``; ``parsers`` has their names."""
