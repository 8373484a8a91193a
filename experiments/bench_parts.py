"""`python -m experiments.bench_parts`: the parts of a step as the compilers of TPUs and GPUs see them."""

import sys

from experiments.bench.parts import main

if __name__ == "__main__":
    sys.exit(main())
