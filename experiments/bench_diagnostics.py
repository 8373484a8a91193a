"""`python -m experiments.bench_diagnostics`: what the diagnostics of an update cost."""

import sys

from experiments.bench.diagnostics import main

if __name__ == "__main__":
    sys.exit(main())
