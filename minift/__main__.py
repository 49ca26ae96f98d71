"""`python -m minift` is the command `minift`."""

import sys

from minift.cli import main

if __name__ == "__main__":
    sys.exit(main())
