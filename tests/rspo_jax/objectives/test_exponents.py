"""The bounded exponential against float64, and what it does for objectives and penalties far outside of their range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.objective_cases import CASES, assert_matches_oracle, case_id, padded, run, run_eagerly

from rspo_jax.objectives import CorrectionConfig, correct, kl_penalty
from rspo_jax.objectives.exponents import bounded_exp, bounded_k3

X = np.concatenate([np.linspace(-120, 20, 701), [20.5, 21, 40, 60, 89, 200, 1e4]]).astype(np.float32)
DEFAULT = [
    (name, settings) for name, settings in CASES if name not in ("cispo", "sapo") and "dual_clip" not in settings
]
"""Forms that nothing holds back from above where A < 0."""


@jax.jit
def with_derivatives(x):
    return {f.__name__: jax.vmap(jax.value_and_grad(f))(x) for f in (bounded_exp, bounded_k3)}


def test_values_and_derivatives_against_float64():
    x = X.astype(np.float64)
    value, slope = oracles.bounded_exp(x), oracles.bounded_slope(x)
    found = with_derivatives(X)
    np.testing.assert_allclose(found["bounded_exp"], (value, slope), rtol=1e-6, atol=2e-38)
    np.testing.assert_allclose(found["bounded_k3"], (value - 1 - x, slope - 1), rtol=1e-5, atol=1e-6)
    assert np.all(np.diff(found["bounded_exp"][0][X > -80]) > 0)
    for function in (bounded_exp, bounded_k3):
        assert np.isnan(function(jnp.float32(np.nan)))


def test_inside_the_range_no_bit_changes_with_the_bound():
    """The sign of a zero included: a gradient of −0 stays −0."""
    inside = jnp.asarray([*X[X <= 20], -0.0, 20.0, 1e-8])
    plain = {bounded_exp: jnp.exp, bounded_k3: lambda x: jnp.expm1(x) - x}
    for bounded, unbounded in plain.items():
        for weight in (1.0, -0.0, -0.3):

            def outputs(function, x, weight=weight):
                return jax.value_and_grad(lambda x: jnp.sum(weight * function(x)))(x)

            for compile_ in (lambda f: f, lambda f: jax.jit(f, static_argnums=0)):
                left, right = (jax.device_get(compile_(outputs)(f, inside)) for f in (bounded, unbounded))
                assert [leaf.tobytes() for leaf in left] == [leaf.tobytes() for leaf in right]


@pytest.mark.parametrize(("name", "settings"), DEFAULT, ids=case_id)
def test_a_bad_response_that_became_far_more_likely_is_pulled_back(name, settings):
    """However far it is: the gradient stays finite, never vanishes, and keeps its direction."""
    for nats in (5.0, 19.0, 21.0, 60.0, 89.0, 200.0, 4096.0):
        batch = padded(oracles.batch_from_log_ratios([[nats] * 3, [0.0] * 3], advantages=[-1.5, 0.5]))
        result = run(name, batch, settings)
        assert np.isfinite(result.loss) and np.sum(result.gradient.astype(np.float32) ** 2) < np.inf
        assert np.all(result.gradient[0, :3] > 0)
        assert_matches_oracle(result, name, batch, settings)


def test_bounds_without_end_stay_finite():
    """Nothing cuts the ratio then, for good responses either; CISPO's weight and a correction's have no gradient."""
    batch = padded(oracles.batch_from_log_ratios([[200.0] * 3, [0.0] * 3], advantages=[1.5, -0.5]))
    for name in ("grpo", "gspo", "gmpo", "cispo"):
        settings = {"clip_high": np.inf}
        result = run_eagerly(name, batch, settings)
        assert np.all(np.isfinite(result.gradient)) and np.all(result.gradient[0, :3] < 0)
        assert_matches_oracle(result, name, batch, settings)
    for config in (CorrectionConfig("tis", tis_cap=np.inf), CorrectionConfig("icepop", icepop_high=np.inf)):
        weights = correct(jnp.full((1, 1), -1.0), jnp.full((1, 1), -201.0), jnp.ones((1, 1), bool), config).weights
        np.testing.assert_allclose(weights, oracles.bounded_exp(200.0), rtol=1e-6)


def test_k3_pulls_a_token_back_to_the_reference_however_far_it_is():
    nats = np.array([[5.0, 19.0, 21.0, 60.0, 89.0, 200.0, 4096.0]], np.float32)

    def penalty(log_probs):
        return jnp.sum(kl_penalty(log_probs, jnp.zeros_like(log_probs), jnp.ones(nats.shape, bool), "k3"))

    gradient = jax.grad(penalty)(-nats)
    assert np.sum(np.square(gradient)) < np.inf
    np.testing.assert_allclose(gradient, 1 - oracles.bounded_slope(nats.astype(np.float64)), rtol=1e-5)
    np.testing.assert_array_equal(gradient < 0, True)
