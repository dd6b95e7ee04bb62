"""The command line: `main` and one module per command of `glem`, each with `add_parser(subparsers)`."""
