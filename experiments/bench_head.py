"""Command that times log-probs without logits against the form that holds the logits."""

import sys

from experiments.bench.head import main

if __name__ == "__main__":
    sys.exit(main())
