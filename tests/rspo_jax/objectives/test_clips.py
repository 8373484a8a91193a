"""Clips and gates: ties, overflow, the side that is cut, the dual clip, and the peculiarities of single objectives."""

import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.objective_cases import (
    CASES,
    assert_matches_oracle,
    assert_same_bits,
    case_id,
    padded,
    run,
    run_eagerly,
)

CUT = [(name, settings) for name, settings in CASES if name not in ("cispo", "sapo")]
"""Forms whose clip cuts the gradient."""


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gmpo", {}), ("rspo", {"position": "pre_clip"}), ("rspo", {"position": "post_clip"})],
    ids=case_id,
)
def test_a_tie_at_the_bound_of_log_ratios_keeps_the_whole_gradient(name, settings):
    """JAX splits the derivative of minimum and clip at a tie (0.5); an objective must not."""
    log_ratios = np.array([[0.4] * 3, [-0.4] * 3], np.float32)  # as the bounds are rounded
    batch = oracles.batch_from_log_ratios(log_ratios, advantages=[1.5, -0.5])
    batch = padded(batch.replace(log_probs=log_ratios, old_log_probs=np.zeros_like(log_ratios)))
    bounds = {"clip_low": float(log_ratios[0, 0]), "clip_high": float(log_ratios[0, 0])}
    assert oracles.kept(name, batch, **settings, **bounds)[batch.mask].all()
    assert_matches_oracle(run(name, batch, settings), name, batch, settings | bounds)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo"])
def test_a_tie_at_the_bound_of_ratios_keeps_the_whole_gradient(name):
    settings = {"gamma_min": 0.8, "clip_low": 0.0, "clip_high": 0.0}
    batch = padded(oracles.batch_from_log_ratios(np.zeros((2, 3)), advantages=[1.5, -0.5]))
    assert oracles.kept(name, batch, **settings)[batch.mask].all()
    assert_matches_oracle(run_eagerly(name, batch, settings), name, batch, settings)


@pytest.mark.parametrize(("name", "settings"), CUT, ids=case_id)
def test_all_tokens_clipped_gives_zero_gradient_but_not_zero_value(name, settings):
    log_ratios = [[0.9, 1.5, 50.0], [-0.9, -1.5, -50.0]]
    for advantages in ([1.5, -0.5], [0.5, -2.0]):
        batch = padded(oracles.batch_from_log_ratios(log_ratios, advantages, router_shift=0.875))
        result = run(name, batch, settings)
        np.testing.assert_array_equal(result.gradient, np.zeros((6, 7), np.float32))
        assert abs(result.loss) > 0.01
        np.testing.assert_allclose(result.loss, oracles.loss(name, batch, **settings), rtol=1e-5)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_a_ratio_that_overflows_leaves_value_and_gradient_finite(name, settings):
    batch = padded(oracles.batch_from_log_ratios([[200.0] * 3, [-200.0] * 3], advantages=[1.5, -0.5]))
    result = run(name, batch, settings)
    assert np.isfinite(result.loss)
    assert_matches_oracle(result, name, batch, settings)
    if name != "cispo":
        np.testing.assert_array_equal(result.gradient, np.zeros((6, 7), np.float32))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_the_clip_cuts_on_the_improving_side_only(name, settings):
    """A good response that became unlikely and a bad one that became likely keep their gradient."""
    batch = padded(oracles.batch_from_log_ratios([[-0.9, -1.5, -5.0], [0.2, 0.3, 0.25]], advantages=[1.5, -0.5]))
    result = run(name, batch, settings)
    assert np.all(result.gradient[:2, :3] * np.array([[-1.0], [1.0]]) > 0)
    assert_matches_oracle(result, name, batch, settings)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_large_log_ratios_stay_finite_and_exact(name, settings):
    log_ratios = [[50.0, -50.0, 50.0], [50.0, 50.0, 50.0], [-50.0, -50.0, -50.0]]
    for advantages in ([1.0, -1.0, -1.0], [-1.0, 1.5, 1.25], [-2.0, -1.0, 1.0]):
        batch = padded(oracles.batch_from_log_ratios(log_ratios, advantages, router_shift=[[0.5, 0.9, 1.0]] * 3))
        result = run(name, batch, settings)
        assert np.isfinite(result.loss) and np.isfinite(result.gradient).all()
        assert_matches_oracle(result, name, batch, settings)


# The dual clip


def test_the_dual_clip_bounds_the_ratio_of_bad_responses_only():
    high = np.log(1.5)
    batch = padded(oracles.batch_from_log_ratios([[high - 0.01, high + 0.01, 3.0]] * 2, advantages=[-1.0, 1.0]))
    settings = {"dual_clip": 1.5, "aggregation": "token_mean"}
    result = run("grpo", batch, settings)
    assert_matches_oracle(result, "grpo", batch, settings)
    np.testing.assert_array_equal(result.gradient[0, :3] != 0, [True, False, False])
    # The loss of each token is −A·min(w, 1.5) in the bad response and −A·1.2 in the good one.
    np.testing.assert_allclose(result.total, 1.5 * (np.exp(-0.01) + 2) - 3 * 1.2, rtol=1e-5)
    without = run("grpo", batch, {"aggregation": "token_mean"})
    np.testing.assert_array_equal(without.gradient[0, :3] != 0, True)
    assert_same_bits(result.gradient[1], without.gradient[1])


def test_a_tie_with_the_dual_clip_keeps_the_gradient():
    batch = padded(oracles.batch_from_log_ratios([[0.75] * 3], advantages=[-1.0]))
    ratio = np.asarray(jnp.exp(jnp.float32(0.75)))
    for bound, expected in ((ratio, ratio / 3), (np.nextafter(ratio, np.float32(1)), 0.0)):
        gradient = run_eagerly("grpo", batch, {"dual_clip": float(bound)}).gradient
        np.testing.assert_allclose(gradient[0, :3], expected, rtol=1e-6)


# CISPO


def test_cispo_keeps_the_sign_of_the_gradient_where_a_token_is_unlikely():
    """Without the stop-gradient on the weight, the product rule adds w·log π and flips the sign below log π = −1."""
    old = np.full((6, 7), -5.0, np.float32)
    log_probs = (old + np.linspace(-0.1, 0.1, 7)).astype(np.float32)  # inside the clip
    batch = oracles.random_batch(1).replace(log_probs=log_probs, old_log_probs=old, mask=np.ones((6, 7), bool))
    batch = batch.replace(advantages=np.array([1, -1, 1, -1, 2, -2], np.float32))
    gradient = run("cispo", batch).gradient
    assert np.all(np.sign(gradient) == -np.sign(batch.advantages)[:, None])
    weights = np.exp(log_probs.astype(np.float64) - old)
    np.testing.assert_allclose(gradient, -batch.advantages[:, None] * weights / 42, rtol=1e-5)
    naive = -batch.advantages[:, None] * weights * (1 + log_probs) / 42
    assert np.all(np.sign(naive) == -np.sign(gradient))


def test_cispo_gives_clipped_tokens_a_gradient_and_an_absolute_cap_is_a_wide_clip():
    batch = padded(oracles.batch_from_log_ratios([[2.0, 0.0, -2.0], [2.0, 0.0, -2.0]], advantages=[1.0, -1.0]))
    expected = np.array([[-1.0], [1.0]]) / 6
    gradient = run("cispo", batch).gradient[:2, :3]
    np.testing.assert_allclose(gradient, expected * [1.2, 1.0, np.exp(-2)], rtol=1e-6)
    capped = run_eagerly("cispo", batch, {"clip_high": 4.0}).gradient[:2, :3]
    np.testing.assert_allclose(capped, expected * [5.0, 1.0, np.exp(-2)], rtol=1e-6)
    both = run("cispo", batch, {"clip_low": 0.1, "clip_high": 4.0}).gradient[:2, :3]
    np.testing.assert_allclose(both, expected * [5.0, 1.0, 0.9], rtol=1e-6)


# SAPO


def test_sapo_is_the_on_policy_gradient_at_a_ratio_of_one_and_falls_off_on_both_sides():
    log_ratios = np.log([[0.25, 0.5, 1.0, 2.0, 4.0]] * 2)
    batch = padded(oracles.batch_from_log_ratios(log_ratios, advantages=[1.0, -1.0]))
    factors = run("sapo", batch).gradient[:2, :5] * -10 * np.array([[1.0], [-1.0]])
    np.testing.assert_allclose(factors[:, 2], 1.0, rtol=1e-6)
    # 4p(1 − p)·w is less than the ratio itself off-policy, the more so for bad responses, whose τ is larger.
    off_policy = np.delete(factors / np.exp(log_ratios), 2, axis=1)
    assert np.all(off_policy < 1) and np.all(off_policy[1] < off_policy[0])


# GSPO-token


def test_gspo_token_with_one_advantage_a_response_is_gspo():
    for settings in ({}, {"gamma_min": 0.8}):
        for drift in (3e-4, 0.6):
            batch = oracles.random_batch(31, drift)
            token, sequence = run("gspo_token", batch, settings), run("gspo", batch, settings)
            np.testing.assert_allclose(token.loss, sequence.loss, rtol=1e-6)
            np.testing.assert_allclose(token.gradient, sequence.gradient, rtol=1e-6, atol=0)


def test_gspo_token_takes_an_advantage_for_each_token():
    rng = np.random.default_rng(32)
    wide = {"clip_low": 0.05, "clip_high": 0.05}
    for drift in (3e-4, 0.3):
        batch = oracles.random_batch(33, drift)
        advantages = rng.normal(size=batch.mask.shape).astype(np.float32)
        batch = batch.replace(advantages=advantages)
        for settings in (wide, wide | {"gamma_min": 0.9}):
            result = run_eagerly("gspo_token", batch, settings)
            np.testing.assert_allclose(result.loss, oracles.loss("gspo_token", batch, **settings), rtol=1e-5, atol=1e-6)
            expected = oracles.gradient("gspo_token", batch, **settings)
            np.testing.assert_allclose(result.gradient, expected, rtol=1e-5, atol=0)
        dirty = batch.replace(advantages=np.where(batch.mask, advantages, np.nan))
        assert_same_bits(result, run_eagerly("gspo_token", dirty, wide | {"gamma_min": 0.9}))


# Dr. GRPO


def test_a_constant_length_does_not_favour_short_responses():
    mask = np.arange(7) < np.array([1, 2, 3, 4, 5, 7])[:, None]
    batch = oracles.random_batch(41, 0.0).replace(mask=mask, advantages=np.ones(6, np.float32))
    by_token = run("dr_grpo", batch).gradient[mask]
    np.testing.assert_allclose(by_token, -1 / (6 * 7), rtol=1e-6)
    longer = run("dr_grpo", batch, {"constant_length": 11}).gradient[mask]
    np.testing.assert_allclose(longer, -1 / (6 * 11), rtol=1e-6)
    assert len(set(run("grpo", batch).gradient[mask].tolist())) == 6
