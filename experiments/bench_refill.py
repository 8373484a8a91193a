"""`python -m experiments.bench_refill`: what it brings to give a free slot the next prompt."""

import sys

from experiments.bench.refill import main

if __name__ == "__main__":
    sys.exit(main())
