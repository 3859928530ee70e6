"""`python -m benchmarks.networks`."""

import sys

from benchmarks.networks.command import main

if __name__ == "__main__":  # not in the processes that it starts
    sys.exit(main())
