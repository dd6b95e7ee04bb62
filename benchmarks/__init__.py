"""Measurements of the library: the paper's tables, whether augmentation helps, and how long things take."""
