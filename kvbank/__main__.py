"""`python -m kvbank` is the command `kvbank`."""

import sys

from kvbank.cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
