"""Applications on top of the library's public names: the demo and the explorer. The command line starts them."""
