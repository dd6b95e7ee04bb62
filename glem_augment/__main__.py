"""`python -m glem_augment` is the command `glem`."""

from glem_augment.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
