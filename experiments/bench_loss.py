"""Command that measures policy losses: time, memory, and share of the device's bound."""

import sys

from experiments.bench.loss import main

if __name__ == "__main__":
    sys.exit(main())
