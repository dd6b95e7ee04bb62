"""Applications on top of the library's public names: the explorer, which the command line starts."""
