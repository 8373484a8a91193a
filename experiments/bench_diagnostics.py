"""Command that times an update with and without its diagnostics."""

import sys

from experiments.bench.diagnostics import main

if __name__ == "__main__":
    sys.exit(main())
