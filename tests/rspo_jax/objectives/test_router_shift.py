"""The effect of the router shift on each objective: floors, gradients, position, ablations, consequences."""

import functools

import jax
import numpy as np
import pytest
from support import oracles
from support.objective_cases import (
    NAMES,
    PLAIN,
    SHIFT,
    WITH_SHIFT,
    assert_matches_oracle,
    assert_same_bits,
    case_id,
    make_config,
    run,
    run_eagerly,
)

import rspo_jax

FORMS = [
    *[("rspo", {"position": position}) for position in ("pre_clip", "post_clip", "post_clip_literal")],
    *[(name, SHIFT) for name in ("gspo", "gspo_token", "grpo", "cispo", "sapo")],
]
"""One form for each formula."""
DEFAULT_FORMS = [FORMS[0], *FORMS[3:]]


@functools.partial(jax.jit, static_argnames="k")
def raw_shift(logits, old_logits, k):
    """Return raw γ of router logits [L, B, T, E] against older ones."""
    return rspo_jax.router_shift(logits, rspo_jax.trace_router(old_logits, k))


@pytest.mark.parametrize(("name", "settings"), [form for form in PLAIN if form[0] != "rspo"], ids=case_id)
def test_without_a_floor_the_router_shift_is_ignored(name, settings):
    batch = oracles.random_batch(seed=51, drift=0.6)
    plain = run(name, batch, settings)
    assert_same_bits(plain, run(name, batch, settings, router_shift=np.full(batch.mask.shape, 0.3, np.float32)))


@pytest.mark.parametrize(("name", "settings"), WITH_SHIFT, ids=case_id)
def test_router_shift_of_one_is_bitwise_the_base_objective(name, settings):
    for drift in (3e-4, 0.6):
        batch = oracles.random_batch(seed=53, drift=drift)
        ones = np.ones_like(batch.router_shift)
        base = run("gmpo" if name == "rspo" else name, batch)
        assert_same_bits(run(name, batch, settings, router_shift=ones), base)


@pytest.mark.parametrize(("name", "settings"), [FORMS[0], ("gspo", SHIFT), ("grpo", SHIFT)], ids=case_id)
def test_router_shift_none_means_one(name, settings):
    batch = oracles.random_batch(seed=52, drift=0.6)
    ones = np.ones_like(batch.router_shift)
    assert_same_bits(
        run_eagerly(name, batch, settings, router_shift=None), run_eagerly(name, batch, settings, router_shift=ones)
    )


def test_rspo_without_a_floor_is_gmpo():
    batch = oracles.random_batch(seed=53, drift=0.6)
    assert_same_bits(run_eagerly("rspo", batch, {"gamma_min": None}), run_eagerly("gmpo", batch))


@pytest.mark.parametrize(("name", "settings"), FORMS, ids=case_id)
def test_router_shift_at_and_below_the_floor_acts_as_the_floor(name, settings):
    floor = np.float32(0.8)
    batch = oracles.random_batch(seed=54, drift=0.2)

    def at(gamma):
        return run(name, batch, settings, router_shift=np.full(batch.mask.shape, gamma, np.float32))

    # The floor comes before any logarithm, also for a raw shift that has underflowed to zero.
    for below in (np.nextafter(floor, np.float32(0)), 0.5, 1e-30, 0.0):
        assert_same_bits(at(floor), at(below))
    assert at(0.9).loss != at(floor).loss
    assert_matches_oracle(at(floor), name, batch.replace(router_shift=np.full(batch.mask.shape, floor)), settings)


@pytest.mark.parametrize(("name", "settings"), FORMS, ids=case_id)
def test_tokens_below_the_floor_are_damped_not_masked_out(name, settings):
    batch = oracles.batch_from_log_ratios([[0.0, 0.0]], advantages=[1.0], router_shift=[[0.1, 1.0]])
    assert np.all(run(name, batch, settings).gradient < 0)


# Its gradient


def wide(name):
    """Return bounds that cut nothing here, for an objective that has bounds."""
    return {} if name in ("cispo", "sapo") else {"clip_low": 0.5, "clip_high": 0.5}


def test_no_gradient_flows_through_the_router_shift():
    """All forms are summed in one program, where a gradient of any of them would show.

    The next test shows that the same forms do depend on γ, without which a zero would prove nothing.
    """
    rng = np.random.default_rng(55)
    old_logits = rng.normal(size=(2, 6, 7, 8)).astype(np.float32)
    logits = old_logits + rng.uniform(-0.1, 0.1, old_logits.shape).astype(np.float32)
    gamma = np.asarray(raw_shift(logits, old_logits, 2))
    assert np.all((gamma > 0.8) & (gamma < 1.0))
    arrays = oracles.random_batch(55, 0.05).arrays()

    def total(logits):
        shifted = arrays | {"router_shift": raw_shift(logits, old_logits, 2)}
        losses = [
            rspo_jax.OBJECTIVES[name].terms(**shifted, config=make_config(name, options | wide(name)))[0].reduce()
            for name, options in DEFAULT_FORMS
        ]
        return sum(loss * (index + 1) for index, loss in enumerate(losses))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(logits), np.zeros(logits.shape, np.float32))


@functools.cache
def ablated_gradients():
    """Return the gradients by log-probabilities and by γ of all forms without the stop-gradient, and their batch."""
    batch = oracles.random_batch(56, 0.05)

    def loss(log_probs, gamma, name, config):
        arrays = batch.arrays() | {"log_probs": log_probs, "router_shift": gamma}
        return rspo_jax.OBJECTIVES[name].terms(**arrays, config=config)[0].reduce()

    forms = [
        (name, make_config(name, settings | wide(name) | {"gamma_gradient": True})) for name, settings in DEFAULT_FORMS
    ]
    gradients = jax.jit(lambda *arrays: {form[0]: jax.grad(loss, (0, 1))(*arrays, *form) for form in forms})
    return batch, jax.device_get(gradients(batch.log_probs, batch.router_shift))


@pytest.mark.parametrize(("name", "settings"), DEFAULT_FORMS, ids=case_id)
def test_the_ablation_lets_the_gradient_of_gamma_through(name, settings):
    """The gradient is taken by γ: differences by the router's logits would see the grid that γ is rounded to."""
    batch, gradients = ablated_gradients()
    by_log_probs, gradient = gradients[name]
    moving = batch.mask & (batch.router_shift > 0.801)
    at_floor = batch.router_shift == np.float32(0.8)
    step, expected = 1e-6, np.zeros(gradient.shape)
    exact = batch.replace(router_shift=batch.router_shift.astype(np.float64))
    for index in zip(*np.nonzero(moving), strict=True):
        shift = np.zeros(gradient.shape)
        shift[index] = step
        above, below = (
            oracles.loss(name, exact.replace(router_shift=exact.router_shift + s), **settings, **wide(name))
            for s in (shift, -shift)
        )
        expected[index] = (above - below) / (2 * step)
    np.testing.assert_allclose(gradient[~at_floor], expected[~at_floor], rtol=1e-4, atol=1e-7)
    assert np.abs(gradient).max() > 1e-3
    # The log-probabilities get the gradient that they always get.
    usual = oracles.gradient(name, batch, **settings, **wide(name))
    np.testing.assert_allclose(by_log_probs, usual, rtol=1e-5, atol=1e-7)


# As a mask


@pytest.mark.parametrize("name", ["rspo", "gspo", "grpo", "cispo", "sapo"])
def test_the_mask_leaves_drifted_tokens_out_and_the_others_alone(name):
    batch = oracles.random_batch(57, 3e-4)
    out = batch.mask & (batch.router_shift < np.float32(0.8))
    assert 0.1 < out.sum() / batch.mask.sum() < 0.9
    settings = SHIFT | {"gamma_use": "mask"}
    masked = run(name, batch, settings)
    np.testing.assert_array_equal(masked.gradient[out], 0.0)
    # As if those tokens had not moved, and had no gradient: they stay in the denominators.
    on_policy = batch.replace(log_probs=np.where(out, batch.old_log_probs, batch.log_probs))
    base = run("gmpo" if name == "rspo" else name, on_policy)
    rest = batch.mask & ~out
    np.testing.assert_allclose(masked.gradient[rest], base.gradient[rest], rtol=1e-6)
    assert masked.weight == base.weight


# What follows from the formulas


def test_on_policy_the_shift_is_one_and_all_gradients_are_reinforce():
    logits = np.random.default_rng(1).normal(size=(2, 6, 7, 8)).astype(np.float32)
    gamma = raw_shift(logits, logits, 2)
    np.testing.assert_array_equal(gamma, np.ones((6, 7), np.float32))
    batch = oracles.random_batch(seed=61)
    batch = batch.replace(log_probs=batch.old_log_probs, router_shift=np.asarray(gamma))
    forms = [*[(name, {}) for name in NAMES if name != "rspo"], *WITH_SHIFT]
    results = {(name, case_id(settings)): run(name, batch, settings) for name, settings in forms}
    for (name, _), result in results.items():
        expected = -batch.advantages[:, None] * oracles.token_shares(name, batch)
        np.testing.assert_allclose(result.gradient, expected, rtol=1e-6, atol=0)
    assert_same_bits(results["rspo", "pre_clip"], results["gmpo", "default"])


def test_unclipped_rspo_is_gmpo_times_one_factor_per_response():
    no_clip = {"clip_low": 100.0, "clip_high": 100.0}
    batch = oracles.random_batch(seed=62, drift=2.0)
    batch = batch.replace(mask=np.ones_like(batch.mask), advantages=batch.advantages + np.float32(3.0))
    gmpo = run_eagerly("gmpo", batch, no_clip).gradient
    floored = np.maximum(batch.router_shift.astype(np.float64), 0.8)
    factor = np.exp(np.mean(np.log(floored), axis=1, keepdims=True))
    assert np.all((factor > 0.8) & (factor < 1.0))
    for position in ("pre_clip", "post_clip"):
        rspo = run_eagerly("rspo", batch, no_clip | {"position": position}).gradient
        np.testing.assert_allclose(rspo / gmpo, np.broadcast_to(factor, (6, 7)), rtol=1e-5)
    # Tokens of one response are weighted against each other only where each has a ratio of its own.
    grpo, with_shift = (run_eagerly("grpo", batch, no_clip | options).gradient for options in ({}, SHIFT))
    np.testing.assert_allclose(with_shift / grpo, floored, rtol=1e-5)
    cispo, with_shift = (run("cispo", batch, options).gradient for options in ({}, SHIFT))
    np.testing.assert_allclose(with_shift / cispo, floored, rtol=1e-5)


def test_pre_clip_moves_the_bounds_of_the_ratio():
    gamma, clip, margin = 0.875, 0.4, 1e-4
    high, low = clip - np.log(gamma), -clip - np.log(gamma)
    log_ratios = [[high - margin], [high + margin], [low + margin], [low - margin], [clip + margin], [-clip + margin]]
    batch = oracles.batch_from_log_ratios(log_ratios, [1.0, 1.0, -1.0, -1.0, 1.0, -1.0], router_shift=gamma)
    pre_clip = run("rspo", batch, {"position": "pre_clip"}).gradient
    # Looser for good responses, tighter for bad ones than the same clip before the router shift.
    np.testing.assert_array_equal(pre_clip[:, 0] != 0, [True, False, True, False, True, False])
    for name, settings in (("gmpo", {}), ("rspo", {"position": "post_clip"})):
        gradient = run(name, batch, settings).gradient
        np.testing.assert_array_equal(gradient[:, 0] != 0, [False, False, True, True, False, True])


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_the_tight_clip_of_gspo_silences_bad_responses_only(name):
    for gamma, silenced in ((0.9996, True), (0.99975, False)):
        batch = oracles.batch_from_log_ratios(np.zeros((2, 3)), advantages=[2.0, -1.0], router_shift=gamma)
        result = run(name, batch, SHIFT)
        assert_matches_oracle(result, name, batch, SHIFT)
        assert np.all(result.gradient[0] < 0)
        assert np.all((result.gradient[1] == 0) == silenced)


@pytest.mark.parametrize("clip_low", [0.2, 0.64])
def test_a_floor_of_one_minus_the_clip_of_grpo_meets_it_exactly(clip_low):
    # With the usual 1 - 0.2 = 0.8 and w = 1, a tie keeps its gradient and a smaller ratio is cut. With 0.64,
    # exp(log floor) would round to below the bound.
    settings = {"clip_low": clip_low, "gamma_min": 1 - clip_low}
    expected = np.array([[-1.0], [1.0]]) * (1 - clip_low) / 6
    for gamma in (1 - clip_low, 0.1):
        batch = oracles.batch_from_log_ratios(np.zeros((2, 3)), [1.0, -1.0], router_shift=gamma)
        gradient = run("grpo", batch, settings).gradient
        np.testing.assert_allclose(gradient, np.broadcast_to(expected, (2, 3)), rtol=1e-6)
        log_ratios = np.full((2, 3), -(2.0**-20))
        batch = oracles.batch_from_log_ratios(log_ratios, [1.0, -1.0], router_shift=gamma)
        gradient = run("grpo", batch, settings).gradient
        np.testing.assert_array_equal(gradient[1], np.zeros(3, np.float32))
        assert np.all(gradient[0] < 0)


def test_literal_post_clip_raises_the_weight_of_drifted_bad_responses():
    batch = oracles.batch_from_log_ratios(np.zeros((2, 3)), advantages=[1.0, -1.0], router_shift=0.875)
    intended = run("rspo", batch, {"position": "post_clip"}).gradient
    literal = run("rspo", batch, {"position": "post_clip_literal"}).gradient
    np.testing.assert_allclose(intended, [[-0.875 / 6] * 3, [0.875 / 6] * 3], rtol=1e-6)
    np.testing.assert_allclose(literal, [[-0.875 / 6] * 3, [1 / 0.875 / 6] * 3], rtol=1e-6)
