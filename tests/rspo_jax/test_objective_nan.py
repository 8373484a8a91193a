"""A NaN at a response token must reach the loss, whatever the sign of the advantage, and never pass for a clip."""

import jax.numpy as jnp
import pytest

import rspo_jax


@pytest.mark.parametrize("name", rspo_jax.OBJECTIVES)
@pytest.mark.parametrize("row", [0, 1], ids=["good response", "bad response"])
@pytest.mark.parametrize("argument", ["log_probs", "old_log_probs"])
def test_a_nan_at_a_response_token_reaches_the_loss(name, row, argument):
    arrays = {"log_probs": jnp.full((2, 3), -1.0), "old_log_probs": jnp.full((2, 3), -1.1)}
    arrays[argument] = arrays[argument].at[row, 1].set(jnp.nan)
    mask = jnp.ones((2, 3), bool)
    loss, _ = rspo_jax.OBJECTIVES[name].loss(**arrays, advantages=jnp.array([1.0, -1.0]), mask=mask)
    assert jnp.isnan(loss)
