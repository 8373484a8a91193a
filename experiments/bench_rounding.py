"""Command that counts the weights in bfloat16 that updates move, by the way of rounding."""

import sys

from experiments.bench.rounding import main

if __name__ == "__main__":
    sys.exit(main())
