"""Corrections for the sampler's numerics: weights and masks by hand, and what they do to the gradients of objectives.
Knows the public functions only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.objective_cases import NAMES, assert_matches_oracle, assert_same_bits, run

from rspo_jax import OBJECTIVES, CorrectionConfig, correct, weighted_gradient
from rspo_jax.statistics import reduce

MASK = np.array([[True, True, True, False], [True, True, False, False], [False] * 4])


def arrays(ratios, mask=MASK):
    """old_log_probs, sampler_log_probs and mask with the given ρ; NaN on padding."""
    log_ratios = np.log(np.asarray(ratios, np.float64))
    old = np.where(mask, -2.0, np.nan).astype(np.float32)
    sampler = np.where(mask, -2.0 - log_ratios, np.nan).astype(np.float32)
    return jnp.asarray(old), jnp.asarray(sampler), jnp.asarray(mask)


RATIOS = [[1.0, 3.0, 0.1, 1.0], [4.9, 5.1, 1.0, 1.0], [1.0] * 4]


def as_floats(statistics):
    return {name: float(value) for name, value in reduce(statistics).items()}


def test_truncated_importance_sampling():
    weights, mask, statistics = correct(*arrays(RATIOS), CorrectionConfig("tis"))
    np.testing.assert_allclose(weights, [[1, 2, 0.1, 1], [2, 2, 1, 1], [1] * 4], rtol=1e-6)
    np.testing.assert_array_equal(mask, MASK)
    assert as_floats(statistics) == pytest.approx(
        {"correction_truncated": 3 / 5, "correction_weight_mean": 7.1 / 5}, rel=1e-6
    )
    # Any cap is one, also one below 1.
    capped, _, _ = correct(*arrays(RATIOS), CorrectionConfig("tis", tis_cap=0.5))
    np.testing.assert_allclose(capped, [[0.5, 0.5, 0.1, 1], [0.5, 0.5, 1, 1], [1] * 4], rtol=1e-6)


def test_icepop_drops_tokens_on_both_sides_and_keeps_the_ratio_between():
    weights, mask, statistics = correct(*arrays(RATIOS), CorrectionConfig("icepop"))
    np.testing.assert_allclose(weights, [[1, 3, 0, 1], [4.9, 0, 1, 1], [1] * 4], rtol=1e-6)
    np.testing.assert_array_equal(mask, MASK)
    assert as_floats(statistics) == pytest.approx(
        {"correction_dropped_tokens": 2 / 5, "correction_weight_mean": 8.9 / 5}, rel=1e-6
    )


def test_sequence_rejection_goes_by_the_geometric_mean():
    # Of the first response 2 · ½ · 1 = 1, of the second √(1.01 · 1) ≈ 1.005.
    old, sampler, mask = arrays([[2.0, 0.5, 1.0, 1.0], [1.01, 1.0, 1.0, 1.0], [1.0] * 4])
    weights, kept, statistics = correct(old, sampler, mask, CorrectionConfig("sequence_rejection"))
    np.testing.assert_array_equal(weights, np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(kept, MASK & np.array([[True], [False], [False]]))
    # The row without tokens is no response, and none that was dropped.
    assert as_floats(statistics) == {"correction_dropped_responses": 1.0, "correction_dropped_fraction": 0.5}
    for low, high, expected in [(0.99, 1.01, 0.0), (0.0, 1.001, 1.0), (1.001, 2.0, 1.0), (1.001, 1.002, 2.0)]:
        config = CorrectionConfig("sequence_rejection", sequence_low=low, sequence_high=high)
        statistics = correct(old, sampler, mask, config).statistics
        assert as_floats(statistics)["correction_dropped_responses"] == expected


def test_none_changes_nothing():
    weights, mask, statistics = correct(*arrays(RATIOS), CorrectionConfig())
    np.testing.assert_array_equal(weights, np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(mask, MASK)
    assert statistics == {}


@pytest.mark.parametrize("kind", ["tis", "icepop", "sequence_rejection"])
def test_equal_numerics_are_left_alone(kind):
    weights, mask, statistics = correct(*arrays(np.ones((3, 4))), CorrectionConfig(kind))
    np.testing.assert_array_equal(weights, np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(mask, MASK)
    assert not any(value for name, value in as_floats(statistics).items() if name != "correction_weight_mean")


# On the gradient

WEIGHTS = np.random.default_rng(0).uniform(0.0, 2.0, (6, 7)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_keeps_its_value_and_gets_a_weighted_gradient(name):
    batch = oracles.random_batch(5, 0.3)
    plain = run(name, batch)
    log_probs, pull_back = jax.vjp(lambda x: weighted_gradient(x, jnp.asarray(WEIGHTS)), jnp.asarray(batch.log_probs))
    result = run(name, batch, log_probs=log_probs)
    assert_same_bits(result, plain)
    (gradient,) = pull_back(jnp.asarray(result.gradient))
    np.testing.assert_allclose(gradient, plain.gradient * WEIGHTS, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["tis", "icepop"])
def test_for_sums_over_tokens_it_is_the_published_product(kind):
    """Loss of the token × weight, as the sources write it: here −mean_t weight · min(w·A, clip(w)·A)."""
    batch = oracles.random_batch(6, 0.3)
    rng = np.random.default_rng(7)
    sampler = batch.old_log_probs + rng.uniform(-2, 2, batch.mask.shape).astype(np.float32)
    weights, mask, _ = correct(*map(jnp.asarray, (batch.old_log_probs, sampler, batch.mask)), CorrectionConfig(kind))

    advantages, tokens = jnp.asarray(batch.advantages)[:, None], batch.mask.sum().astype(np.float32)

    def published(log_probs):
        ratio = jnp.exp(log_probs - batch.old_log_probs)
        surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.28) * advantages)
        return -jnp.sum(jnp.where(mask, weights * surrogate, 0)) / tokens

    def ours(log_probs):
        others = [jnp.asarray(array) for array in (batch.old_log_probs, batch.advantages)]
        return OBJECTIVES["dapo"].terms(weighted_gradient(log_probs, weights), *others, mask)[0].reduce()

    log_probs = jnp.asarray(batch.log_probs)
    gradient = jax.jit(jax.grad(ours))(log_probs)
    assert np.count_nonzero(gradient) > 5 and np.any(np.asarray(weights)[batch.mask] != 1)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(published))(log_probs), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["rspo", "dapo", "dr_grpo"])
def test_a_rejected_response_is_as_if_it_had_never_been_drawn(name):
    batch = oracles.random_batch(8, 0.3)
    sampler = batch.old_log_probs - np.where(np.arange(6) == 4, 0.01, 0.0)[:, None].astype(np.float32)
    arrays = (jnp.asarray(array) for array in (batch.old_log_probs, sampler, batch.mask))
    mask = np.asarray(correct(*arrays, CorrectionConfig("sequence_rejection")).mask)
    assert (
        batch.mask[4].any() and not mask[4].any() and np.array_equal(np.delete(mask, 4, 0), batch.mask[[0, 1, 2, 3, 5]])
    )
    result, without = run(name, batch.replace(mask=mask)), batch.rows(np.array([0, 1, 2, 3, 5]))
    assert_matches_oracle(result._replace(gradient=np.delete(result.gradient, 4, 0)), name, without, {})


def test_weights_and_log_probs_of_padding_may_be_anything():
    log_probs = jnp.asarray([[-1.0, np.nan], [-2.0, -np.inf]])
    mask = jnp.asarray([[True, False]] * 2)

    def loss(log_probs):
        return jnp.sum(jnp.where(mask, weighted_gradient(log_probs, jnp.full((2, 2), 0.5)), 0))

    value, gradient = jax.value_and_grad(loss)(log_probs)
    assert value == -3.0
    np.testing.assert_array_equal(gradient, [[0.5, 0.0]] * 2)


def test_what_is_wrong_is_named():
    for changes, message in [
        ({"kind": "mis"}, "kind of correction must be one of .*icepop"),
        ({"tis_cap": 0.0}, "tis_cap must be positive, got 0.0"),
        ({"icepop_low": 5.0}, "icepop_low and icepop_high must satisfy 0 ≤ low < high, got 5.0 and 5.0"),
        ({"sequence_low": -0.1}, "sequence_low and sequence_high must satisfy"),
        ({"sequence_high": float("nan")}, "sequence_low and sequence_high must satisfy"),
    ]:
        with pytest.raises(ValueError, match=message):
            CorrectionConfig(**changes)
    old, sampler, mask = arrays(RATIOS)
    with pytest.raises(ValueError, match=r"sampler_log_probs must have the shape of old_log_probs, \(3, 4\)"):
        correct(old, sampler[:2], mask, CorrectionConfig("tis"))
    with pytest.raises(ValueError, match="mask must have the shape"):
        correct(old, sampler, mask[:, :2], CorrectionConfig("tis"))
