"""Settings for the whole suite: silent type promotion and silent rank promotion are errors, as warnings are by
`pyproject.toml`. Holds no fixtures and knows nothing of the code under test."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
