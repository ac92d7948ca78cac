"""`python -m ultramem` is the `ultramem` command."""

import sys

from ultramem.cli import main

if __name__ == "__main__":
    sys.exit(main())
