"""Command that compiles the parts of a step for TPUs and GPUs."""

import sys

from experiments.bench.parts import main

if __name__ == "__main__":
    sys.exit(main())
