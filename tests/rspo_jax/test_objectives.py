"""Values and gradients of every objective against float64 oracles, and what follows from the
formulas. Knows the public functions only; metrics have a file of their own."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import rspo_jax

CASES = [
    ("rspo", {"position": "pre_clip"}),
    ("rspo", {"position": "post_clip"}),
    ("rspo", {"position": "post_clip_literal"}),
    ("gmpo", {}),
    ("gspo", {}),
    ("gspo_rs", {}),
    ("grpo", {"aggregation": "sequence_mean"}),
    ("grpo", {"aggregation": "token_mean"}),
    ("grpo_rs", {"aggregation": "sequence_mean"}),
    ("grpo_rs", {"aggregation": "token_mean"}),
]
SHAPE = (6, 7)
NAMES = ["rspo", "gmpo", "gspo", "grpo", "gspo_rs", "grpo_rs"]
BASE_AND_ROUTER_SHIFT = [
    ("gmpo", "rspo", {"position": "pre_clip"}, {}),
    ("gmpo", "rspo", {"position": "post_clip"}, {}),
    ("gmpo", "rspo", {"position": "post_clip_literal"}, {}),
    ("gspo", "gspo_rs", {}, {}),
    ("grpo", "grpo_rs", {"aggregation": "sequence_mean"}, {"aggregation": "sequence_mean"}),
    ("grpo", "grpo_rs", {"aggregation": "token_mean"}, {"aggregation": "token_mean"}),
]


def case_id(value):
    return "-".join(value.values()) or "default" if isinstance(value, dict) else None


def make_config(name, settings):
    return rspo_jax.OBJECTIVES[name].config_type(**settings)


def pad(array):
    """All batches run in one shape, so that each configuration is compiled once."""
    missing = [(0, most - size) for size, most in zip(array.shape, SHAPE, strict=False)]
    return np.pad(array, missing)


@functools.cache
def compiled(name, config):
    """A compiled function from the dict of arrays to the loss and its gradient by log_probs."""

    def loss(log_probs, arrays):
        return rspo_jax.OBJECTIVES[name].loss(log_probs, **arrays, config=config)[0]

    return jax.jit(jax.value_and_grad(loss))


def run(name, batch, settings=None, **overrides):
    arrays = {key: value for key, value in (batch.arrays() | overrides).items() if value is not None}
    rows, tokens = arrays["log_probs"].shape
    arrays = {key: pad(np.asarray(value)) for key, value in arrays.items()}
    log_probs = arrays.pop("log_probs")
    loss, gradient = compiled(name, make_config(name, settings or {}))(log_probs, arrays)
    return loss, np.asarray(gradient)[:rows, :tokens]


@functools.cache
def compiled_terms(name, config):
    """As `compiled`, for the sum of the terms; the weight is the auxiliary output."""

    def total(log_probs, arrays):
        mean, _ = rspo_jax.OBJECTIVES[name].terms(log_probs, **arrays, config=config)
        return mean.total, mean.weight

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def total_gradient(name, batch, settings):
    """Sum of the terms, its weight, and the gradient of the sum, in the batch's own shape."""
    arrays = batch.arrays()
    log_probs = arrays.pop("log_probs")
    function = compiled_terms(name, make_config(name, settings))
    (total, weight), gradient = function(log_probs, arrays)
    return float(total), float(weight), np.asarray(gradient)


def assert_matches_oracle(result, name, batch, settings):
    loss, gradient = result
    np.testing.assert_allclose(loss, oracles.loss(name, batch, **settings), rtol=1e-5, atol=0)
    np.testing.assert_allclose(gradient, oracles.gradient(name, batch, **settings), rtol=1e-5, atol=0)


def assert_same_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


# The oracle itself


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
@pytest.mark.parametrize("drift", [3e-4, 0.6, 3.0])
def test_closed_form_gradient_is_the_derivative_of_the_value_oracle(name, settings, drift):
    batch = oracles.random_batch(seed=11, drift=drift)
    batch = batch.replace(log_probs=batch.log_probs.astype(np.float64))
    expected = oracles.gradient(name, batch, **settings)
    step = 1e-6
    for index in np.ndindex(expected.shape):
        shift = np.zeros(expected.shape)
        shift[index] = step
        above = oracles.loss(name, batch.replace(log_probs=batch.log_probs + shift), **settings)
        below = oracles.loss(name, batch.replace(log_probs=batch.log_probs - shift), **settings)
        assert (above - below) / (2 * step) == pytest.approx(expected[index], rel=1e-6, abs=1e-8)


# Against the oracle


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
@pytest.mark.parametrize("drift", [3e-4, 0.05, 0.6, 5.0, 50.0])
def test_value_and_gradient_match_oracle_when_compiled(name, settings, drift):
    for seed in range(8):
        batch = oracles.random_batch(seed, drift)
        assert_matches_oracle(run(name, batch, settings), name, batch, settings)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_value_and_gradient_match_oracle_without_compilation(name, settings):
    batch = oracles.random_batch(seed=21, drift=0.6)
    with jax.disable_jit():
        assert_matches_oracle(run(name, batch, settings), name, batch, settings)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_value_and_gradient_match_oracle_under_vmap(name, settings):
    drifts = (3e-4, 0.6, 5.0)
    batches = [oracles.random_batch(seed, drift) for seed, drift in enumerate(drifts)]
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch.arrays() for batch in batches])
    log_probs = arrays.pop("log_probs")
    losses, gradients = jax.vmap(compiled(name, make_config(name, settings)))(log_probs, arrays)
    for result, batch in zip(zip(losses, gradients, strict=True), batches, strict=True):
        assert_matches_oracle(result, name, batch, settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rspo", {"gamma_min": 0.7, "clip_low": 0.1, "clip_high": 0.25}),
        ("rspo", {"gamma_min": 1.0, "clip_low": 0.3, "clip_high": 0.05, "position": "post_clip"}),
        ("gmpo", {"clip_low": 0.05, "clip_high": 0.3}),
        ("gspo", {"clip_low": 0.02, "clip_high": 0.1}),
        ("gspo_rs", {"clip_low": 0.15, "clip_high": 0.01, "gamma_min": 0.9}),
        ("grpo", {"clip_low": 0.05, "clip_high": 0.28, "aggregation": "token_mean"}),
        ("grpo_rs", {"clip_low": 0.3, "clip_high": 0.1, "gamma_min": 0.65}),
    ],
)
def test_every_config_field_reaches_the_loss(name, settings):
    for seed in (41, 42):
        batch = oracles.random_batch(seed, drift=0.6)
        assert_matches_oracle(run(name, batch, settings), name, batch, settings)


@pytest.mark.parametrize("name", NAMES)
def test_default_config_is_the_published_one(name):
    config = rspo_jax.OBJECTIVES[name].config_type()
    assert {key: getattr(config, key) for key in oracles.DEFAULTS[name]} == oracles.DEFAULTS[name]
    batch = oracles.random_batch(seed=43, drift=0.6)
    loss = jax.jit(lambda arrays: rspo_jax.OBJECTIVES[name].loss(**arrays)[0])(batch.arrays())
    np.testing.assert_allclose(loss, oracles.loss(name, batch), rtol=1e-5)


def test_table_holds_exactly_the_named_objectives_with_one_signature():
    assert set(rspo_jax.OBJECTIVES) == set(NAMES)
    expected = [
        "log_probs",
        "old_log_probs",
        "advantages",
        "mask",
        "router_shift",
        "config",
        "entropy",
    ]
    for name in NAMES:
        for function in (rspo_jax.OBJECTIVES[name].loss, rspo_jax.OBJECTIVES[name].terms):
            assert list(inspect.signature(function).parameters) == expected


def test_rspo_loss_is_the_table_entry():
    batch = oracles.random_batch(seed=44)
    arrays = {key: jnp.asarray(value) for key, value in batch.arrays().items()}
    config = rspo_jax.RSPOConfig(position="post_clip")
    assert rspo_jax.OBJECTIVES["rspo"].config_type is rspo_jax.RSPOConfig
    assert_same_bits(
        rspo_jax.rspo_loss(**arrays, config=config),
        rspo_jax.OBJECTIVES["rspo"].loss(**arrays, config=config),
    )


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_frozen_and_hashable(name):
    config = rspo_jax.OBJECTIVES[name].config_type()
    with pytest.raises(AttributeError):
        config.clip_low = 0.1
    assert hash(config) == hash(rspo_jax.OBJECTIVES[name].config_type())


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_a_float32_scalar(name):
    loss, gradient = run(name, oracles.random_batch(seed=45))
    assert loss.shape == () and loss.dtype == jnp.float32 and gradient.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_are_computed_in_float32(name):
    batch = oracles.random_batch(seed=46, drift=0.6)
    rounded = {key: jnp.asarray(value) for key, value in batch.arrays().items()}
    rounded |= {key: value.astype(jnp.bfloat16) for key, value in rounded.items() if key != "mask"}
    exact = batch.replace(
        **{key: np.asarray(value.astype(jnp.float32)) for key, value in rounded.items() if key != "mask"}
    )
    loss, gradient = run(name, batch, **rounded)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, oracles.loss(name, exact), rtol=1e-5)
    # The gradient comes back in the dtype of its argument: only its last rounding is to bfloat16.
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(gradient.astype(jnp.float32)), oracles.gradient(name, exact), rtol=2**-8, atol=0
    )


# Clips


@pytest.mark.parametrize(
    ("name", "settings", "log_ratio"),
    [
        ("rspo", {"clip_low": 0.5, "clip_high": 0.5}, 0.5),
        ("rspo", {"clip_low": 0.5, "clip_high": 0.5, "position": "post_clip"}, 0.5),
        ("rspo", {"clip_low": 0.5, "clip_high": 0.5, "position": "post_clip_literal"}, 0.5),
        ("gmpo", {"clip_low": 0.5, "clip_high": 0.5}, 0.5),
        ("gspo", {"clip_low": 0.0, "clip_high": 0.0}, 0.0),
        ("gspo_rs", {"clip_low": 0.0, "clip_high": 0.0}, 0.0),
        ("grpo", {"clip_low": 0.0, "clip_high": 0.0}, 0.0),
        ("grpo", {"clip_low": 0.0, "clip_high": 0.0, "aggregation": "token_mean"}, 0.0),
        ("grpo_rs", {"clip_low": 0.0, "clip_high": 0.0}, 0.0),
    ],
)
def test_tie_at_the_clip_bound_keeps_the_whole_gradient(name, settings, log_ratio):
    # JAX splits the derivative of minimum and clip at a tie (0.5); an objective must not.
    batch = oracles.batch_from_log_ratios([[log_ratio] * 3, [-log_ratio] * 3], advantages=[1.5, -0.5])
    assert oracles.kept(name, batch, **settings).all()
    assert_matches_oracle(run(name, batch, settings), name, batch, settings)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_all_tokens_clipped_gives_zero_gradient_but_not_zero_value(name, settings):
    log_ratios = [[0.9, 1.5, 50.0], [-0.9, -1.5, -50.0]]
    for advantages in ([1.5, -0.5], [0.5, -2.0]):
        batch = oracles.batch_from_log_ratios(log_ratios, advantages, router_shift=0.875)
        loss, gradient = run(name, batch, settings)
        np.testing.assert_array_equal(gradient, np.zeros((2, 3), np.float32))
        assert abs(loss) > 0.01
        np.testing.assert_allclose(loss, oracles.loss(name, batch, **settings), rtol=1e-5)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_cut_ratio_that_overflows_leaves_value_and_gradient_finite(name, settings):
    batch = oracles.batch_from_log_ratios([[200.0] * 3, [-200.0] * 3], advantages=[1.5, -0.5])
    loss, gradient = run(name, batch, settings)
    np.testing.assert_allclose(loss, oracles.loss(name, batch, **settings), rtol=1e-5)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_clip_cuts_on_the_improving_side_only(name, settings):
    # A good response that became unlikely and a bad one that became likely keep their gradient.
    batch = oracles.batch_from_log_ratios([[-0.9, -1.5, -5.0], [0.9, 1.5, 5.0]], advantages=[1.5, -0.5])
    loss, gradient = run(name, batch, settings)
    assert np.all(gradient * np.array([[-1.0], [1.0]]) > 0)
    assert_matches_oracle((loss, gradient), name, batch, settings)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_large_log_ratios_stay_finite_and_exact(name, settings):
    log_ratios = [[50.0, -50.0, 50.0], [50.0, 50.0, 50.0], [-50.0, -50.0, -50.0]]
    for advantages in ([1.0, -1.0, -1.0], [-1.0, 1.0, 1.0], [-2.0, -1.0, 1.0]):
        batch = oracles.batch_from_log_ratios(log_ratios, advantages, router_shift=[[0.5, 0.9, 1.0]] * 3)
        loss, gradient = run(name, batch, settings)
        assert np.isfinite(loss) and np.isfinite(gradient).all()
        assert_matches_oracle((loss, gradient), name, batch, settings)


# Router shift


@pytest.mark.parametrize("name", ["gmpo", "gspo", "grpo"])
def test_base_objectives_ignore_router_shift(name):
    batch = oracles.random_batch(seed=51, drift=0.6)
    plain = run(name, batch, router_shift=None)
    assert_same_bits(plain, run(name, batch))
    assert_same_bits(plain, run(name, batch, router_shift=jnp.full(batch.mask.shape, 0.3)))


@pytest.mark.parametrize("name", ["rspo", "gspo_rs", "grpo_rs"])
def test_router_shift_none_means_one(name):
    batch = oracles.random_batch(seed=52, drift=0.6)
    assert_same_bits(
        run(name, batch, router_shift=None),
        run(name, batch, router_shift=jnp.ones(batch.mask.shape)),
    )


@pytest.mark.parametrize(("base", "name", "settings", "base_settings"), BASE_AND_ROUTER_SHIFT, ids=case_id)
def test_router_shift_of_one_is_bitwise_the_base_objective(base, name, settings, base_settings):
    clips = {key: oracles.DEFAULTS[base][key] for key in ("clip_low", "clip_high")}
    for drift in (3e-4, 0.6):
        batch = oracles.random_batch(seed=53, drift=drift)
        batch = batch.replace(router_shift=np.ones_like(batch.router_shift))
        shifted = run(name, batch, settings | clips)
        assert_same_bits(shifted, run(base, batch, base_settings | clips))
        assert_same_bits(run(name, batch, settings), run(base, batch, base_settings))


@pytest.mark.parametrize("name", ["rspo", "gspo_rs", "grpo_rs"])
def test_router_shift_at_and_below_the_floor_acts_as_the_floor(name):
    settings = {"gamma_min": 0.75, "clip_low": 0.5, "clip_high": 0.5}
    batch = oracles.random_batch(seed=54, drift=0.2)
    at_floor = run(name, batch, settings, router_shift=jnp.full(batch.mask.shape, 0.75))
    # A raw shift that has underflowed to zero must be floored before any logarithm is taken.
    for below in (np.nextafter(np.float32(0.75), np.float32(0)), 0.5, 1e-30, 0.0):
        assert_same_bits(
            at_floor,
            run(name, batch, settings, router_shift=jnp.full(batch.mask.shape, below, jnp.float32)),
        )
    above = run(name, batch, settings, router_shift=jnp.full(batch.mask.shape, 0.8))
    assert above[0] != at_floor[0]
    floored = batch.replace(router_shift=np.full(batch.mask.shape, 0.75, np.float32))
    assert_matches_oracle(at_floor, name, floored, settings)


@pytest.mark.parametrize("name", ["rspo", "gspo_rs", "grpo_rs"])
def test_tokens_below_the_floor_are_damped_not_masked_out(name):
    batch = oracles.batch_from_log_ratios([[0.0, 0.0]], advantages=[1.0], router_shift=[[0.1, 1.0]])
    _, gradient = run(name, batch)
    assert np.all(gradient < 0)


@pytest.mark.parametrize("name", ["rspo", "gspo_rs", "grpo_rs"])
def test_no_gradient_flows_through_the_router_shift(name):
    rng = np.random.default_rng(55)
    old_logits = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    logits = old_logits + jnp.asarray(rng.uniform(-0.1, 0.1, old_logits.shape), jnp.float32)
    trace = rspo_jax.trace_router(old_logits, 2)
    settings = {"clip_low": 0.4, "clip_high": 0.4}
    log_ratios = rng.uniform(-0.1, 0.1, (3, 4))
    batch = oracles.batch_from_log_ratios(log_ratios, advantages=[1.0, -1.0, 0.5])
    log_probs, old_log_probs, advantages, mask, _ = (jnp.asarray(value) for value in batch.arrays().values())

    def loss(log_probs, router_logits):
        gamma = rspo_jax.router_shift(router_logits, trace)
        objective = rspo_jax.OBJECTIVES[name]
        config = make_config(name, settings)
        return objective.loss(log_probs, old_log_probs, advantages, mask, router_shift=gamma, config=config)[0]

    # Else a zero would prove nothing: the shift is off its flat ends, and the loss depends on it.
    gamma = np.asarray(rspo_jax.router_shift(logits, trace))
    assert np.all((gamma > 0.8) & (gamma < 1.0))
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (by_log_probs, by_logits) = gradient(log_probs, logits)
    assert value != gradient(log_probs, old_logits)[0]
    assert np.any(np.asarray(by_log_probs) != 0)
    np.testing.assert_array_equal(by_logits, np.zeros(logits.shape, np.float32))


# What follows from the formulas


def test_on_policy_router_shift_is_one_and_all_gradients_are_reinforce():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 7, 16)), jnp.float32)
    gamma = rspo_jax.router_shift(logits, rspo_jax.trace_router(logits, 4))
    np.testing.assert_array_equal(gamma, np.ones((6, 7), np.float32))
    batch = oracles.random_batch(seed=61)
    batch = batch.replace(log_probs=batch.old_log_probs, router_shift=np.asarray(gamma))
    lengths = batch.mask.sum(axis=1, keepdims=True)
    responses = np.count_nonzero(lengths)
    reinforce = -batch.advantages[:, None] * batch.mask / (responses * np.maximum(lengths, 1))
    results = {name: run(name, batch) for name in NAMES}
    for loss, gradient in results.values():
        np.testing.assert_allclose(gradient, reinforce, rtol=1e-6, atol=0)
        np.testing.assert_allclose(loss, -batch.advantages[lengths[:, 0] > 0].sum() / responses, rtol=1e-6)
    assert_same_bits(results["rspo"], results["gmpo"])


def test_unclipped_rspo_is_gmpo_times_one_factor_per_response():
    wide = {"clip_low": 100.0, "clip_high": 100.0}
    batch = oracles.random_batch(seed=62, drift=2.0)
    batch = batch.replace(mask=np.ones_like(batch.mask), advantages=batch.advantages + np.float32(3.0))
    _, gmpo = run("gmpo", batch, wide)
    floored = np.maximum(batch.router_shift.astype(np.float64), 0.8)
    factor = np.exp(np.mean(np.log(floored), axis=1, keepdims=True))
    assert np.all((factor > 0.8) & (factor < 1.0))
    for position in ("pre_clip", "post_clip"):
        _, rspo = run("rspo", batch, wide | {"position": position})
        np.testing.assert_allclose(rspo / gmpo, np.broadcast_to(factor, (6, 7)), rtol=1e-5)
    # Tokens of one response are re-weighted against each other in GRPO with router shift only.
    _, grpo = run("grpo", batch, wide)
    _, grpo_rs = run("grpo_rs", batch, wide)
    np.testing.assert_allclose(grpo_rs / grpo, floored, rtol=1e-5)


def test_pre_clip_moves_the_bounds_of_the_ratio():
    gamma, clip, margin = 0.875, 0.4, 1e-4
    high, low = clip - np.log(gamma), -clip - np.log(gamma)
    log_ratios = [
        [high - margin],
        [high + margin],
        [low + margin],
        [low - margin],
        [clip + margin],
        [-clip + margin],
    ]
    advantages = [1.0, 1.0, -1.0, -1.0, 1.0, -1.0]
    batch = oracles.batch_from_log_ratios(log_ratios, advantages, router_shift=gamma)
    _, pre_clip = run("rspo", batch, {"position": "pre_clip"})
    # Looser for good responses, tighter for bad ones than the same clip before the router shift.
    np.testing.assert_array_equal(pre_clip[:, 0] != 0, [True, False, True, False, True, False])
    for name, settings in (("gmpo", {}), ("rspo", {"position": "post_clip"})):
        _, gradient = run(name, batch, settings)
        np.testing.assert_array_equal(gradient[:, 0] != 0, [False, False, True, True, False, True])


def test_gspo_router_shift_with_tight_clip_silences_bad_responses_only():
    for gamma, silenced in ((0.9996, True), (0.99975, False)):
        batch = oracles.batch_from_log_ratios(np.zeros((2, 3)), advantages=[2.0, -1.0], router_shift=gamma)
        loss, gradient = run("gspo_rs", batch)
        assert_matches_oracle((loss, gradient), "gspo_rs", batch, {})
        assert np.all(gradient[0] < 0)
        assert np.all((gradient[1] == 0) == silenced)


@pytest.mark.parametrize("clip_low", [0.2, 0.64, 0.77])
def test_grpo_router_shift_floor_of_one_minus_the_clip_meets_it_exactly(clip_low):
    # With the defaults 1 - 0.2 = 0.8 at w = 1: a tie keeps its gradient, a smaller ratio is cut.
    # The other values are those where exp(log floor) would round to below the bound.
    settings = {"clip_low": clip_low, "gamma_min": 1 - clip_low}
    expected = np.array([[-1.0], [1.0]]) * (1 - clip_low) / 6
    for gamma in (1 - clip_low, 0.1):
        batch = oracles.batch_from_log_ratios(np.zeros((2, 3)), [1.0, -1.0], router_shift=gamma)
        _, gradient = run("grpo_rs", batch, settings)
        np.testing.assert_allclose(gradient, np.broadcast_to(expected, (2, 3)), rtol=1e-6)
        log_ratios = np.full((2, 3), -(2.0**-20))
        batch = oracles.batch_from_log_ratios(log_ratios, [1.0, -1.0], router_shift=gamma)
        _, gradient = run("grpo_rs", batch, settings)
        np.testing.assert_array_equal(gradient[1], np.zeros(3, np.float32))
        assert np.all(gradient[0] < 0)


def test_literal_post_clip_raises_the_weight_of_drifted_bad_responses():
    batch = oracles.batch_from_log_ratios(np.zeros((2, 3)), advantages=[1.0, -1.0], router_shift=0.875)
    _, intended = run("rspo", batch, {"position": "post_clip"})
    _, literal = run("rspo", batch, {"position": "post_clip_literal"})
    np.testing.assert_allclose(intended, [[-0.875 / 6] * 3, [0.875 / 6] * 3], rtol=1e-6)
    np.testing.assert_allclose(literal, [[-0.875 / 6] * 3, [1 / 0.875 / 6] * 3], rtol=1e-6)


# Masks, empty rows, zero advantages


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0])
def test_padding_has_no_effect_whatever_it_holds(name, settings, garbage):
    batch = oracles.random_batch(seed=71, drift=0.6)
    clean = run(name, batch, settings)
    fields = ("log_probs", "old_log_probs", "router_shift")
    for changed in [*[(field,) for field in fields], fields]:
        dirty = {field: np.where(batch.mask, getattr(batch, field), np.float32(garbage)) for field in changed}
        assert_same_bits(clean, run(name, batch.replace(**dirty), settings))


@pytest.mark.parametrize("name", NAMES)
def test_entropy_never_enters_the_loss(name):
    batch = oracles.random_batch(seed=72, drift=0.6)
    clean = run(name, batch)
    assert_same_bits(clean, run(name, batch, entropy=jnp.full(batch.mask.shape, 2.0)))
    dirty = np.where(batch.mask, 2.0, np.nan).astype(np.float32)
    assert_same_bits(clean, run(name, batch, entropy=dirty))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_masked_rows_are_as_if_absent(name, settings):
    batch = oracles.random_batch(seed=73, drift=0.6)
    present = batch.mask.any(axis=1)
    assert not present.all()
    loss, gradient = run(name, batch, settings)
    total, weight, filtered = total_gradient(name, batch.rows(present), settings)
    np.testing.assert_allclose(loss, total / weight, rtol=1e-6)
    np.testing.assert_allclose(gradient[present], filtered / weight, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(gradient[~present], 0.0)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_zero_advantage_rows_count_in_the_denominator_and_nowhere_else(name, settings):
    batch = oracles.random_batch(seed=74, drift=0.6)
    assert batch.advantages[3] == 0.0 and batch.mask[3].any()
    loss, gradient = run(name, batch, settings)
    np.testing.assert_array_equal(gradient[3], 0.0)
    without, _ = run(name, batch.rows(np.array([0, 1, 2, 4, 5])), settings)
    rows = np.count_nonzero(batch.mask.any(axis=1))
    tokens = batch.mask.sum()
    shrink = 1 - batch.mask[3].sum() / tokens if settings.get("aggregation") == "token_mean" else (rows - 1) / rows
    np.testing.assert_allclose(loss, without * shrink, rtol=1e-5)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_zero_advantages_everywhere_give_zero(name, settings):
    batch = oracles.random_batch(seed=75, drift=50.0)
    loss, gradient = run(name, batch.replace(advantages=np.zeros_like(batch.advantages)), settings)
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(batch.log_probs))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_batch_without_response_tokens_gives_zero(name, settings):
    batch = oracles.random_batch(seed=76)
    for filler in (0.0, np.nan):
        padding = np.full_like(batch.log_probs, filler)
        empty = batch.replace(
            mask=np.zeros_like(batch.mask),
            log_probs=padding,
            old_log_probs=padding,
            router_shift=padding,
        )
        loss, gradient = run(name, empty, settings)
        assert loss == 0.0
        np.testing.assert_array_equal(gradient, np.zeros_like(batch.log_probs))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_order_of_responses_and_tokens_is_irrelevant(name, settings):
    batch = oracles.random_batch(seed=77, drift=0.6)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(6), rng.permutation(7)
    loss, gradient = run(name, batch, settings)
    shuffled = batch.rows(rows)
    shuffled = shuffled.replace(
        **{key: value[:, columns] for key, value in shuffled.arrays().items() if key != "advantages"}
    )
    shuffled_loss, shuffled_gradient = run(name, shuffled, settings)
    np.testing.assert_allclose(loss, shuffled_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient[rows][:, columns], shuffled_gradient, rtol=1e-6, atol=0)


# Terms and micro-batches


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
def test_terms_are_the_undivided_sums_of_the_loss(name, settings):
    batch = oracles.random_batch(seed=81, drift=0.6)
    total, weight, gradient = total_gradient(name, batch, settings)
    expected_total, expected_weight = oracles.total_and_weight(name, batch, **settings)
    assert weight == expected_weight
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
    loss, loss_gradient = run(name, batch, settings)
    np.testing.assert_allclose(total / weight, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient / weight, loss_gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (2, 2, 2), (3, 1, 2)])
def test_micro_batches_of_any_size_and_order_give_the_whole_batch(name, settings, sizes):
    batch = oracles.random_batch(seed=82, drift=0.6)
    loss, gradient = run(name, batch, settings)
    order = np.random.default_rng(sum(sizes[:2])).permutation(6)
    pieces = np.split(order, np.cumsum(sizes)[:-1])
    results = [total_gradient(name, batch.rows(piece), settings) for piece in pieces]
    assert all(np.isfinite(total) and np.isfinite(part).all() for total, _, part in results)
    weight = sum(part for _, part, _ in results)
    np.testing.assert_allclose(sum(total for total, _, _ in results) / weight, loss, rtol=1e-5)
    rebuilt = np.concatenate([part for _, _, part in results]) / weight
    np.testing.assert_allclose(rebuilt, gradient[order], rtol=1e-5, atol=0)
    # The mean of the micro-batches' own means is another number, so this test can fail.
    means = np.mean([total / max(part, 1.0) for total, part, _ in results])
    assert not np.isclose(means, loss, rtol=1e-3)


# Bad inputs

GOOD = oracles.batch_from_log_ratios(np.full((2, 3), 0.1), advantages=[1.0, -1.0]).arrays()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("log_probs", np.zeros(3, np.float32)),
        ("log_probs", np.zeros((2, 3, 1), np.float32)),
        ("log_probs", np.zeros((2, 3), np.int32)),
        ("old_log_probs", np.zeros((2, 4), np.float32)),
        ("old_log_probs", np.zeros((3, 3), np.float32)),
        ("old_log_probs", np.zeros((1, 3), np.float32)),
        ("advantages", np.zeros(3, np.float32)),
        ("advantages", np.zeros((2, 3), np.float32)),
        ("advantages", np.zeros((2, 1), np.float32)),
        ("advantages", np.float32(1.0)),
        ("mask", np.ones((2, 4), bool)),
        ("mask", np.ones(2, bool)),
        ("mask", np.ones((2, 3), np.float32)),
        ("mask", np.ones((2, 3), np.int32)),
        ("router_shift", np.ones((2, 4), np.float32)),
        ("router_shift", np.ones((3, 2, 3), np.float32)),
        ("router_shift", np.ones(2, np.float32)),
        ("entropy", np.ones((2, 4), np.float32)),
        ("entropy", np.ones(2, np.float32)),
    ],
)
def test_bad_array_is_refused_by_name(name, argument, value):
    arrays = {key: jnp.asarray(array) for key, array in (GOOD | {argument: value}).items()}
    for function in (rspo_jax.OBJECTIVES[name].loss, rspo_jax.OBJECTIVES[name].terms):
        with pytest.raises((ValueError, TypeError), match=rf"\b{argument}\b"):
            function(**arrays)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *[(name, field, -1e-3) for name in NAMES for field in ("clip_low", "clip_high")],
        *[(name, "gamma_min", v) for name in ("rspo", "gspo_rs", "grpo_rs") for v in (0.0, -0.1, 1.01)],
        ("rspo", "position", "after_clip"),
        ("rspo", "position", None),
        ("grpo", "aggregation", "mean"),
        ("grpo_rs", "aggregation", "sum"),
    ],
)
def test_bad_config_is_refused_by_name(name, field, value):
    arrays = {key: jnp.asarray(array) for key, array in GOOD.items()}
    with pytest.raises((ValueError, TypeError), match=field):
        rspo_jax.OBJECTIVES[name].loss(**arrays, config=make_config(name, {field: value}))


@pytest.mark.parametrize("name", NAMES)
def test_clips_of_zero_and_a_floor_of_one_are_legal(name):
    settings = {"clip_low": 0.0, "clip_high": 0.0}
    settings |= {"gamma_min": 1.0} if "gamma_min" in oracles.DEFAULTS[name] else {}
    batch = oracles.random_batch(seed=92, drift=0.6)
    assert_matches_oracle(run(name, batch, settings), name, batch, settings)
