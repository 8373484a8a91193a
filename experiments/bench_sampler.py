"""Command that times our sampler against Hugging Face's and Tunix's."""

import sys

from experiments.bench.sampler import main

if __name__ == "__main__":
    sys.exit(main())
