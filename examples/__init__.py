"""Scripts on top of the public names; benchmarks share `_quality`."""
