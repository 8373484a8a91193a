"""Command that times the judge of mathematics and counts its mistakes."""

import sys

from experiments.bench.verifier import main

if __name__ == "__main__":
    sys.exit(main())
