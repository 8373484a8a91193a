"""`python -m experiments.bench_verifier --data DIR`: how fast answers are judged, and how often rightly."""

import sys

from experiments.bench.verifier import main

if __name__ == "__main__":
    sys.exit(main())
