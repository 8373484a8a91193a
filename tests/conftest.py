"""Settings for the whole suite: silent type promotion, silent rank promotion and warnings are
errors. Holds no fixtures and knows nothing of the code under test."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    # In front of the project's own filters: a later filter wins, so exceptions stay possible.
    config.getini("filterwarnings").insert(0, "error")
