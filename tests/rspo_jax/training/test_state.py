"""How a run begins: with fresh parameters, or with given ones. Knows no step."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.sharding import make_mesh
from rspo_jax.training import TrainerConfig, state_on_mesh
from rspo_jax.training.state import first_state

POLICY = types.SimpleNamespace(param_axes=lambda: {"kernel": ("embed", None)})


def init_params(key):
    return {"kernel": jax.random.normal(key, (4, 3))}


@pytest.fixture(scope="module")
def template():
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        return state_on_mesh(POLICY, init_params, TrainerConfig(), make_mesh())


def begin(params, template):
    with jax.numpy_dtype_promotion("standard"):
        return first_state(init_params, params, TrainerConfig(), template)


def test_a_run_begins_with_the_parameters_that_it_is_given(template):
    given = np.arange(12, dtype=np.float32).reshape(4, 3)
    state, fresh = begin({"kernel": jnp.asarray(given)}, template), begin(None, template)
    np.testing.assert_array_equal(state.train.params["kernel"], given)
    assert np.any(np.asarray(fresh.train.params["kernel"]) != given)
    assert state.train.params["kernel"].sharding == template.train.params["kernel"].sharding
    # All else is as in a run with fresh parameters.
    params = fresh.train.params
    same = state._replace(train=state.train._replace(params=params))
    jax.tree.map(np.testing.assert_array_equal, same, fresh)


def test_parameters_of_another_shape_are_refused(template):
    with pytest.raises(AssertionError, match="shape"):
        begin({"kernel": jnp.zeros((4, 4))}, template)
