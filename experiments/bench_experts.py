"""`python -m experiments.bench_experts`: what a block of experts costs beside a dense one of equal FLOPs."""

import sys

from experiments.bench.experts import main

if __name__ == "__main__":
    sys.exit(main())
