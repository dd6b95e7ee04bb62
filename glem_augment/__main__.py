"""`python -m glem_augment` is the command `glem`."""

from __future__ import annotations

import sys

from glem_augment.cli import main

if __name__ == "__main__":
    sys.exit(main())
