"""Command that times the sampler with and without refilled slots."""

import sys

from experiments.bench.refill import main

if __name__ == "__main__":
    sys.exit(main())
