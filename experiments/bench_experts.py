"""Command that times a block of experts against a dense block of equal FLOPs."""

import sys

from experiments.bench.experts import main

if __name__ == "__main__":
    sys.exit(main())
