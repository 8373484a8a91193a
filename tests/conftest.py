"""Settings for the whole suite: silent type promotion and silent rank promotion are errors, as warnings are by
`pyproject.toml`. Holds no fixtures and knows nothing of the code under test."""

import os
import signal

# Most of a test's time is LLVM's, which optimises programs that run once. It must be set before JAX is imported; an
# XLA_FLAGS of one's own, also an empty one (`make test-slow`), keeps the programs as users compile them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts what it puts in the background with SIGINT ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
