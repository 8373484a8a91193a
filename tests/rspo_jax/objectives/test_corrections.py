"""Corrections for the sampler's numerics: weights and masks by hand, and their effect on gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.objective_cases import NAMES, assert_matches_oracle, assert_same_bits, run

from rspo_jax import OBJECTIVES, CorrectionConfig, correct, weighted_gradient
from rspo_jax.statistics import reduce

MASK = np.array([[True, True, True, False], [True, True, False, False], [False] * 4])
RATIOS = [[1.0, 3.0, 0.1, 1.0], [4.9, 5.1, 1.0, 1.0], [1.0] * 4]


def arrays_of(ratios, mask=MASK):
    """Return old_log_probs, sampler_log_probs and mask with the given ρ; NaN on padding."""
    log_ratios = np.log(np.asarray(ratios, np.float64))
    old = np.where(mask, -2.0, np.nan).astype(np.float32)
    sampler = np.where(mask, -2.0 - log_ratios, np.nan).astype(np.float32)
    return jnp.asarray(old), jnp.asarray(sampler), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames="configs")
def compiled(old, sampler, mask, configs):
    corrections = [correct(old, sampler, mask, config) for config in configs]
    return [correction._replace(statistics=reduce(correction.statistics)) for correction in corrections]


def corrected(ratios, *configs):
    """Return weights, mask and statistics, as floats, of each config."""
    return [
        (weights, mask, {name: float(value) for name, value in statistics.items()})
        for weights, mask, statistics in compiled(*arrays_of(ratios), configs)
    ]


def test_truncated_importance_sampling():
    usual, capped = corrected(RATIOS, CorrectionConfig("tis"), CorrectionConfig("tis", tis_cap=0.5))
    weights, mask, statistics = usual
    np.testing.assert_allclose(weights, [[1, 2, 0.1, 1], [2, 2, 1, 1], [1] * 4], rtol=1e-6)
    np.testing.assert_array_equal(mask, MASK)
    assert statistics == pytest.approx({"correction_truncated": 3 / 5, "correction_weight_mean": 7.1 / 5}, rel=1e-6)
    # Any positive cap is allowed, also one below 1.
    np.testing.assert_allclose(capped[0], [[0.5, 0.5, 0.1, 1], [0.5, 0.5, 1, 1], [1] * 4], rtol=1e-6)


def test_icepop_drops_tokens_on_both_sides_and_keeps_the_ratio_between():
    ((weights, mask, statistics),) = corrected(RATIOS, CorrectionConfig("icepop"))
    np.testing.assert_allclose(weights, [[1, 3, 0, 1], [4.9, 0, 1, 1], [1] * 4], rtol=1e-6)
    np.testing.assert_array_equal(mask, MASK)
    expected = {"correction_dropped_tokens": 2 / 5, "correction_weight_mean": 8.9 / 5}
    assert statistics == pytest.approx(expected, rel=1e-6)


def test_sequence_rejection_goes_by_the_geometric_mean():
    # Of the first response 2 · ½ · 1 = 1, of the second √(1.01 · 1) ≈ 1.005.
    ratios = [[2.0, 0.5, 1.0, 1.0], [1.01, 1.0, 1.0, 1.0], [1.0] * 4]
    bounds = {(0.99, 1.01): 0, (0.0, 1.001): 1, (1.001, 2.0): 1, (1.001, 1.002): 2}
    usual, *others = corrected(
        ratios,
        CorrectionConfig("sequence_rejection"),
        *[CorrectionConfig("sequence_rejection", sequence_low=low, sequence_high=high) for low, high in bounds],
    )
    weights, kept, statistics = usual
    np.testing.assert_array_equal(weights, np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(kept, MASK & np.array([[True], [False], [False]]))
    # The row without tokens is no response, and none that was dropped.
    assert statistics == {"correction_dropped_responses": 1.0, "correction_dropped_fraction": 0.5}
    dropped = [statistics["correction_dropped_responses"] for _, _, statistics in others]
    assert dropped == list(bounds.values())


def test_no_correction_changes_nothing():
    weights, mask, statistics = correct(*arrays_of(RATIOS), CorrectionConfig())
    np.testing.assert_array_equal(weights, np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(mask, MASK)
    assert statistics == {}


def test_equal_numerics_are_left_alone():
    kinds = ("tis", "icepop", "sequence_rejection")
    for weights, mask, statistics in corrected(np.ones((3, 4)), *map(CorrectionConfig, kinds)):
        np.testing.assert_array_equal(weights, np.ones((3, 4), np.float32))
        np.testing.assert_array_equal(mask, MASK)
        assert not any(value for name, value in statistics.items() if name != "correction_weight_mean")


# Effect on the gradient

WEIGHTS = np.random.default_rng(0).uniform(0.0, 2.0, (6, 7)).astype(np.float32)


def test_every_objective_keeps_its_value_and_gets_a_weighted_gradient():
    batch = oracles.random_batch(5, 0.3)
    log_probs, pull_back = jax.vjp(lambda x: weighted_gradient(x, jnp.asarray(WEIGHTS)), jnp.asarray(batch.log_probs))
    for name in NAMES:
        plain, result = run(name, batch), run(name, batch, log_probs=log_probs)
        assert_same_bits(result, plain)
        (gradient,) = pull_back(jnp.asarray(result.gradient))
        np.testing.assert_allclose(gradient, plain.gradient * WEIGHTS, rtol=1e-6, atol=0)


def test_for_sums_over_tokens_it_is_the_published_product():
    """The sources write token loss × weight: here −mean_t weight · min(w·A, clip(w)·A)."""
    batch = oracles.random_batch(6, 0.3)
    rng = np.random.default_rng(7)
    sampler = batch.old_log_probs + rng.uniform(-2, 2, batch.mask.shape).astype(np.float32)
    advantages, tokens = jnp.asarray(batch.advantages)[:, None], batch.mask.sum().astype(np.float32)

    def published(log_probs, weights, mask):
        ratio = jnp.exp(log_probs - batch.old_log_probs)
        surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.28) * advantages)
        return -jnp.sum(jnp.where(mask, weights * surrogate, 0)) / tokens

    def ours(log_probs, weights, mask):
        others = [jnp.asarray(array) for array in (batch.old_log_probs, batch.advantages)]
        return OBJECTIVES["dapo"].terms(weighted_gradient(log_probs, weights), *others, mask)[0].reduce()

    gradients = jax.jit(lambda *arrays: (jax.grad(ours)(*arrays), jax.grad(published)(*arrays)))
    arrays = (batch.old_log_probs, sampler, batch.mask)
    for weights, mask, _ in compiled(*arrays, (CorrectionConfig("tis"), CorrectionConfig("icepop"))):
        gradient, expected = gradients(jnp.asarray(batch.log_probs), weights, mask)
        assert np.count_nonzero(gradient) > 5 and np.any(np.asarray(weights)[batch.mask] != 1)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_a_rejected_response_is_as_if_it_had_never_been_drawn():
    batch = oracles.random_batch(8, 0.3)
    sampler = batch.old_log_probs - np.where(np.arange(6) == 4, 0.01, 0.0)[:, None].astype(np.float32)
    (correction,) = compiled(batch.old_log_probs, sampler, batch.mask, (CorrectionConfig("sequence_rejection"),))
    mask = np.asarray(correction.mask)
    rest = np.array([0, 1, 2, 3, 5])
    assert batch.mask[4].any() and not mask[4].any() and np.array_equal(mask[rest], batch.mask[rest])
    for name in ("rspo", "dapo", "dr_grpo"):
        result = run(name, batch.replace(mask=mask))
        assert_matches_oracle(result._replace(gradient=result.gradient[rest]), name, batch.rows(rest), {})


def test_weights_and_log_probs_of_padding_may_be_anything():
    mask = np.array([[True, False]] * 2)

    @jax.jit
    @jax.value_and_grad
    def loss(log_probs):
        return jnp.sum(jnp.where(mask, weighted_gradient(log_probs, jnp.full((2, 2), 0.5)), 0))

    value, gradient = loss(np.array([[-1.0, np.nan], [-2.0, -np.inf]], np.float32))
    assert value == -3.0
    np.testing.assert_array_equal(gradient, [[0.5, 0.0]] * 2)


def test_mistakes_are_named():
    for changes, message in [
        ({"kind": "mis"}, "kind of correction must be one of none, tis, icepop, sequence_rejection; got 'mis'"),
        ({"tis_cap": 0.0}, "tis_cap must be positive, got 0.0"),
        ({"icepop_low": 5.0}, "icepop_low and icepop_high must satisfy 0 ≤ low < high, got 5.0 and 5.0"),
        ({"sequence_low": -0.1}, "sequence_low and sequence_high must satisfy"),
        ({"sequence_high": float("nan")}, "sequence_low and sequence_high must satisfy"),
    ]:
        with pytest.raises(ValueError, match=message):
            CorrectionConfig(**changes)
    old, sampler, mask = arrays_of(RATIOS)
    with pytest.raises(ValueError, match=r"sampler_log_probs must have the shape of old_log_probs, \(3, 4\)"):
        correct(old, sampler[:2], mask, CorrectionConfig("tis"))
    with pytest.raises(ValueError, match="mask must have the shape"):
        correct(old, sampler, mask[:, :2], CorrectionConfig("tis"))
