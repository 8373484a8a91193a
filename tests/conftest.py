"""Settings of the whole suite: silent type and rank promotion are errors, as warnings are (`pyproject.toml`)."""

import importlib.metadata
import os
import signal

# Most of a test's time is XLA's: it optimises programs that run once, and its new emitters compile fusions two to four
# times as long. The flags must be set before JAX is imported. An XLA_FLAGS of one's own, even an empty one
# (`make test-slow`), keeps the programs as users compile them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    # An unknown flag would end the process.
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""),
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts what it puts in the background with SIGINT ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
