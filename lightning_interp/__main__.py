"""`python -m lightning_interp` is `lightning-interp`."""

import sys

from lightning_interp.cli import main

if __name__ == "__main__":
    sys.exit(main())
