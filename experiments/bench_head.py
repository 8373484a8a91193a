"""`python -m experiments.bench_head`: what log-probs without logits cost beside the form that holds the logits."""

import sys

from experiments.bench.head import main

if __name__ == "__main__":
    sys.exit(main())
