"""`python -m experiments.bench_loss`: what a policy loss costs, in time, memory and share of what the device allows."""

import sys

from experiments.bench.loss import main

if __name__ == "__main__":
    sys.exit(main())
