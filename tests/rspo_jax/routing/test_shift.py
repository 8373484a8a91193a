"""The router-shift ratio against float64 oracles, with and without the grid that the route is kept on.

Each γ equals that of the grid to 1e-6, and that of exact numbers to 1e-3. Traces are made by trace_router and read by
router_shift; nothing here looks into them beyond their size. Most tests share a shape, and with it a compiled program.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

import rspo_jax
from rspo_jax.routing import drift_reader, gamma_of, route_of, route_reader, trace_of, trace_reader
from rspo_jax.routing.shift import forced_route_of
from rspo_jax.types import RouterReading

SHAPE = (3, 2, 4, 8)
MANY = (6, 64, 64, 33)
"""A shape for properties that only many tokens show."""


def random_logits(seed, shape=SHAPE, scale=1.5):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def drifted(logits, seed, drift):
    change = np.random.default_rng(seed).uniform(-drift, drift, logits.shape)
    return (logits + change).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
def compiled_shifts(logits, old_logits, k):
    """γ by each aggregation over layers."""
    trace = rspo_jax.trace_router(old_logits, k)
    return {name: rspo_jax.router_shift(logits, trace, layer_aggregation=name) for name in ("mean", "sum")}


compiled_trace = jax.jit(rspo_jax.trace_router, static_argnums=1)


def shift(logits, old_logits, k, layer_aggregation="mean"):
    return np.asarray(compiled_shifts(logits, old_logits, k)[layer_aggregation])


def everywhere(*logits, rest=-20.0):
    """The same few logits in all layers and tokens, and some that matter little."""
    return np.broadcast_to(np.array([*logits, *[rest] * (SHAPE[-1] - len(logits))], np.float32), SHAPE)


def in_eval_shape(function, *shapes):
    """Trace a function of float32 arrays, which raises all that it refuses, without compiling anything."""
    return jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def assert_is_shift(gamma, new, old, k, layer_aggregation="mean"):
    on_grid, clearance = oracles.grid_router_shift(new, old, k, layer_aggregation)
    clear = clearance > 3e-4  # elsewhere float32 may round to the next step
    assert clear.mean() >= 0.75
    np.testing.assert_allclose(np.asarray(gamma)[clear], on_grid[clear], rtol=0, atol=1e-6)
    bound = 1e-3 if layer_aggregation == "mean" else 1e-3 * len(new)
    np.testing.assert_allclose(gamma, oracles.router_shift(new, old, k, layer_aggregation), rtol=0, atol=bound)


@pytest.mark.parametrize("layer_aggregation", ["mean", "sum"])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_matches_oracle(k, layer_aggregation):
    for drift in (0.01, 0.3, 3.0):
        old = random_logits(seed=1)
        new = drifted(old, seed=2, drift=drift)
        gamma = shift(new, old, k, layer_aggregation=layer_aggregation)
        assert_is_shift(gamma, new, old, k, layer_aggregation)
        assert gamma.dtype == np.float32 and gamma.shape == (2, 4)
        assert np.all((gamma > 0) & (gamma <= 1))


def test_matches_oracle_compiled_and_under_vmap():
    old = np.stack([random_logits(seed) for seed in range(3)])
    new = drifted(old, seed=3, drift=0.4)
    gamma = jax.jit(jax.vmap(lambda new, old: rspo_jax.router_shift(new, rspo_jax.trace_router(old, 2))))(new, old)
    for index in range(3):
        assert_is_shift(gamma[index], new[index], old[index], 2)


def test_mean_over_layers_is_the_default():
    old = random_logits(seed=4)
    new = drifted(old, seed=5, drift=0.5)
    trace = compiled_trace(old, 2)
    default = rspo_jax.router_shift(new, trace)
    assert_is_shift(default, new, old, 2)
    assert np.all(shift(new, old, 2, layer_aggregation="sum") < default)
    # On-policy, and not compiled as one program: as exact as where it is.
    np.testing.assert_array_equal(rspo_jax.router_shift(old, trace), np.ones((2, 4)))


def test_sum_over_layers_is_the_mean_to_the_power_of_the_layer_count():
    old = random_logits(seed=6, shape=(48, 1, 5, 16))
    new = drifted(old, seed=7, drift=0.1)
    mean, total = (shift(new, old, 4, layer_aggregation=name) for name in ("mean", "sum"))
    np.testing.assert_allclose(total, mean.astype(np.float64) ** 48, rtol=1e-4)
    assert np.all(mean > 0.9) and np.all(total < 0.5)


def test_both_means_are_inside_the_exponential():
    # The log-probabilities of the two old experts move by unequal amounts, about 0.3 and 2.7.
    old, new = everywhere(5.0, 4.0), everywhere(5.0, 1.0)
    move = np.abs(oracles.log_softmax(new) - oracles.log_softmax(old))[0, 0, 0, :2]
    assert abs(move[0] - move[1]) > 1.0
    gamma = shift(new, old, 2)
    np.testing.assert_allclose(gamma, np.full((2, 4), np.exp(-move.mean())), rtol=0, atol=1e-3)
    assert np.abs(gamma - np.exp(-move).mean()).min() > 0.1
    # The same in the layer direction: two layers stand still, one moves.
    gamma = shift(np.concatenate([old[:2], new[2:]]), old, 2)
    np.testing.assert_allclose(gamma, np.full((2, 4), np.exp(-move.mean() / 3)), rtol=0, atol=1e-3)


def test_experts_are_those_of_the_old_policy():
    # The current policy prefers expert 3; only the move of the old choice, expert 0, may count.
    old, new = everywhere(2.0, 0.0, 0.0, 0.0), everywhere(0.0, 0.0, 0.0, 4.0)
    move = (oracles.log_softmax(new) - oracles.log_softmax(old))[0, 0, 0, 0]
    np.testing.assert_allclose(shift(new, old, 1), np.full((2, 4), np.exp(-abs(move))), rtol=0, atol=1e-3)


def test_probabilities_are_over_all_experts():
    # Every chosen logit moves alike: over the top k alone nothing would have changed.
    old, new = everywhere(3.0, 2.0, 1.0, 0.0), everywhere(4.0, 3.0, 1.0, 0.0)
    gamma = shift(new, old, 2)
    assert_is_shift(gamma, new, old, 2)
    assert np.all(gamma < 0.95)


def test_rises_and_falls_do_not_cancel():
    old, new = everywhere(1.0, 1.0), everywhere(1.5, 0.5)
    gamma = shift(new, old, 2)
    assert_is_shift(gamma, new, old, 2)
    assert np.all(gamma < 0.65)


def test_on_policy_shift_is_exactly_one():
    logits = random_logits(seed=8, shape=MANY, scale=4.0)

    def gammas(logits, trace):
        return {name: rspo_jax.router_shift(logits, trace, layer_aggregation=name) for name in ("mean", "sum")}

    def total(logits, trace):
        return sum(gamma.sum() for gamma in gammas(logits, trace).values())

    # Once within one program, and then with score step and update step compiled apart from each other.
    trace = compiled_trace(logits, 4)
    for found in (compiled_shifts(logits, logits, 4), jax.jit(gammas)(logits, trace)):
        for gamma in found.values():
            np.testing.assert_array_equal(gamma, np.ones((64, 64), np.float32))
    assert jax.jit(jax.value_and_grad(total))(logits, trace)[0] == 2 * 64 * 64


@pytest.mark.parametrize("experts", [2, 256, 257, 300])
def test_expert_ids_survive_beyond_one_byte(experts):
    # The chosen experts sit at both ends of the table; an id stored in too small a type would wrap.
    rng = np.random.default_rng(experts)
    old = rng.normal(size=(2, 1, 3, experts)).astype(np.float32)
    old[..., -1] += 6.0
    old[..., 0] += 5.0
    new = drifted(old, seed=9, drift=0.5)
    new[..., -1] -= 1.0
    gamma = shift(new, old, 2)
    assert_is_shift(gamma, new, old, 2)


def test_order_of_layers_is_irrelevant():
    old = random_logits(seed=10)
    new = drifted(old, seed=11, drift=0.5)
    order = np.array([2, 0, 1])
    for aggregation in ("mean", "sum"):
        plain = shift(new, old, 2, layer_aggregation=aggregation)
        permuted = shift(new[order], old[order], 2, layer_aggregation=aggregation)
        np.testing.assert_allclose(plain, permuted, rtol=0, atol=1e-6)
    # The pairing of layers does matter.
    assert np.all(np.abs(shift(new[order], old, 2) - shift(new, old, 2)) > 1e-3)


def test_order_of_experts_is_irrelevant():
    old = random_logits(seed=12)
    new = drifted(old, seed=13, drift=0.5)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(shift(new, old, 2), shift(new[..., order], old[..., order], 2), rtol=0, atol=1e-6)


def test_order_of_the_chosen_experts_is_irrelevant():
    # Swapping the old logits of the two chosen experts swaps their slots; the new ones follow.
    old, new = everywhere(4.0, 3.0, 0.0, -1.0), everywhere(3.5, 3.25, 0.5, -1.0)
    swap = np.array([1, 0, *range(2, 8)])
    np.testing.assert_allclose(shift(new, old, 2), shift(new[..., swap], old[..., swap], 2), rtol=0, atol=1e-6)


def test_constant_added_to_all_logits_of_a_token_changes_nothing():
    old = random_logits(seed=14)
    new = drifted(old, seed=15, drift=0.5)
    constants = np.random.default_rng(1).uniform(-5.0, 5.0, (2, *SHAPE[:3], 1)).astype(np.float32)
    np.testing.assert_allclose(shift(new + constants[0], old + constants[1], 2), shift(new, old, 2), rtol=0, atol=2e-6)
    on_grid = np.round(old * 64) / 64
    np.testing.assert_allclose(shift(on_grid + np.float32(32.0), on_grid, 2), np.ones((2, 4)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_logits_that_move_by_delta_keep_the_shift_above_exp_minus_two_delta(k):
    rng = np.random.default_rng(17)
    for seed, delta in itertools.product(range(8), (0.01, 0.1, 1.0)):
        old = random_logits(seed=160 + seed)
        new = (old + delta * rng.choice([-1.0, 1.0], old.shape)).astype(np.float32)
        assert np.all(shift(new, old, k) >= np.exp(-2 * delta) - 1e-3)


def test_bound_of_two_delta_is_reached():
    # One expert in 300 falls by delta while all others rise by it.
    delta = 0.5
    old = np.zeros((1, 1, 1, 300), np.float32)
    old[..., 299] = 1e-3
    new = old + np.float32(delta)
    new[..., 299] -= 2 * delta
    gamma = shift(new, old, 1).item()
    assert np.exp(-2 * delta) - 1e-3 <= gamma < 1.01 * np.exp(-2 * delta)


def test_extreme_logits_stay_finite():
    old = everywhere(1e4, 0.0, -1e4, 50.0)
    for new in (old, old[..., ::-1].copy(), np.zeros_like(old)):
        gamma = shift(new, old, 2)
        assert np.isfinite(gamma).all() and np.all((gamma >= 0) & (gamma <= 1))
    assert np.all(shift(old, old, 8) == 1.0)


def test_tokens_do_not_influence_each_other():
    old = random_logits(seed=18)
    new = drifted(old, seed=19, drift=0.5)
    changed = new.copy()
    changed[:, 1, 2] = np.nan
    gamma, other = shift(new, old, 2), shift(changed, old, 2)
    elsewhere = np.ones((2, 4), bool)
    elsewhere[1, 2] = False
    np.testing.assert_array_equal(gamma[elsewhere], other[elsewhere])


def test_bfloat16_logits_are_computed_in_float32():
    old = jnp.asarray(random_logits(seed=20)).astype(jnp.bfloat16)
    new = jnp.asarray(random_logits(seed=21)).astype(jnp.bfloat16)
    gamma = shift(new, old, 2)
    assert gamma.dtype == np.float32
    assert_is_shift(gamma, new.astype(jnp.float32), old.astype(jnp.float32), 2)


def shift_of(logits, old_logits, k=2, **options):
    return rspo_jax.router_shift(logits, rspo_jax.trace_router(old_logits, k), **options)


@pytest.mark.parametrize("k", [9, 0, -1])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=r"\bk\b"):
        in_eval_shape(lambda logits: rspo_jax.trace_router(logits, k), SHAPE)


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 4, 8), (1, 3, 2, 4, 8)])
def test_logits_of_wrong_rank_are_refused(shape):
    with pytest.raises(ValueError, match="router_logits"):
        in_eval_shape(lambda logits: rspo_jax.trace_router(logits, 2), shape)
    with pytest.raises(ValueError, match="router_logits"):
        in_eval_shape(shift_of, shape, SHAPE)


@pytest.mark.parametrize("shape", [(2, 2, 4, 8), (1, 2, 4, 8), (3, 1, 4, 8), (3, 2, 5, 8)])
def test_trace_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="trace"):
        in_eval_shape(shift_of, shape, SHAPE)


def test_trace_with_more_experts_than_the_logits_is_refused():
    with pytest.raises(ValueError, match="trace"):
        in_eval_shape(functools.partial(shift_of, k=8), (*SHAPE[:3], 4), SHAPE)


@pytest.mark.parametrize("layer_aggregation", ["product", "max", None])
def test_unknown_layer_aggregation_is_refused(layer_aggregation):
    with pytest.raises(ValueError, match="layer_aggregation must be one of mean, sum; got"):
        in_eval_shape(functools.partial(shift_of, layer_aggregation=layer_aggregation), SHAPE, SHAPE)


@pytest.mark.parametrize(("experts", "bytes_a_slot"), [(2, 3), (256, 3), (257, 4)])
def test_a_slot_takes_three_bytes_or_four(experts, bytes_a_slot):
    trace = in_eval_shape(lambda logits: rspo_jax.trace_router(logits, 2), (6, 2, 5, experts))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trace)) == bytes_a_slot * 6 * 2 * 5 * 2
    # Rows lead and tokens come last, where a TPU pads to 128.
    assert all(leaf.shape[0] == 2 and leaf.shape[-1] == 5 for leaf in jax.tree.leaves(trace))


def test_a_qwen3_30b_a3b_token_takes_1152_bytes():
    trace = in_eval_shape(lambda logits: rspo_jax.trace_router(logits, 8), (48, 1, 1, 128))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trace)) == 1152


def test_on_policy_shift_survives_the_last_bits():
    # Programs that are compiled apart, or sums in another order, move a log-probability by some 1e-7 of itself. Beside
    # the middle between two grid points, rounding alone would make a step of it.
    rng = np.random.default_rng(25)
    logits = random_logits(26, MANY, scale=3.0)
    noisy = (logits + rng.uniform(-3e-6, 3e-6, logits.shape)).astype(np.float32)
    assert np.any(noisy != logits)
    np.testing.assert_array_equal(shift(noisy, logits, 4), np.ones((64, 64), np.float32))


def test_small_moves_are_not_lost_on_the_grid():
    # Each slot moves by a tenth of a step; the mean over many tokens is still right, but for the rounding tolerance.
    old = random_logits(27, MANY)
    new = drifted(old, 28, 2e-4)
    drift = -np.log(shift(new, old, 4).astype(np.float64)).mean()
    chosen = np.argsort(-old, axis=-1)[..., :4]
    moves = np.take_along_axis(oracles.log_softmax(new) - oracles.log_softmax(old), chosen, axis=-1)
    assert drift == pytest.approx(np.abs(moves).mean(), abs=1.1e-5)
    assert drift > 7e-5


def test_the_least_likely_experts_saturate():
    # The grid ends at −64 nats: whatever lies below counts as that.
    old, below, near = (everywhere(0.0, logit, rest=-200.0) for logit in (-80.0, -110.0, -2.0))
    assert np.all(shift(below, old, 2) == 1.0)
    assert_is_shift(shift(near, old, 2), near, old, 2)


def test_derivative_is_that_of_the_formula():
    old, new = random_logits(29), drifted(random_logits(29), 30, 0.8)
    gradient = jax.jit(jax.grad(lambda logits: jnp.sum(shift_of(logits, old))))(new)
    probabilities, expected = np.exp(oracles.log_softmax(new)), np.zeros(new.shape)
    gamma = oracles.router_shift(new, old, 2)
    for layer, row, token in np.ndindex(new.shape[:3]):
        for expert in np.argsort(-old[layer, row, token])[:2]:
            move = oracles.log_softmax(new[layer, row, token]) - oracles.log_softmax(old[layer, row, token])
            one_hot = np.arange(new.shape[-1]) == expert
            slope = np.sign(move[expert]) * (one_hot - probabilities[layer, row, token])
            expected[layer, row, token] -= gamma[row, token] * slope / (2 * len(new))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4)


def sigmoid_shift(new, old, expert_ids):
    """exp(−mean over layers and experts of |log σ − log σ_old|) in float64, [B, T]."""

    def log_scores(logits):
        return np.take_along_axis(-np.logaddexp(0, -logits.astype(np.float64)), expert_ids, axis=-1)

    return np.exp(-np.mean(np.abs(log_scores(new) - log_scores(old)), axis=(0, -1)))


def test_sigmoid_scores_are_compared_at_the_experts_that_the_model_chose():
    old, rng = random_logits(seed=60), np.random.default_rng(61)
    new = drifted(old, seed=62, drift=0.5)
    expert_ids = np.argsort(rng.normal(size=SHAPE), axis=-1)[..., :3]  # not those with the largest logits

    @jax.jit
    def gammas(new, old, expert_ids):
        trace = rspo_jax.trace_router(old, 3, "sigmoid", expert_ids)
        by_sigmoid = [rspo_jax.router_shift(logits, trace, score="sigmoid") for logits in (new, old)]
        return *by_sigmoid, rspo_jax.router_shift(new, trace)

    gamma, on_policy, by_softmax = gammas(new, old, expert_ids.astype(np.int32))
    np.testing.assert_allclose(gamma, sigmoid_shift(new, old, expert_ids), rtol=0, atol=1e-3)
    assert not np.allclose(gamma, by_softmax, atol=1e-2)
    np.testing.assert_array_equal(on_policy, 1)


def test_readers_of_sigmoid_scores_agree_with_the_functions():
    old = random_logits(seed=63)
    new = drifted(old, seed=64, drift=0.5)
    expert_ids = np.argsort(-old, axis=-1)[..., :2].astype(np.int32)

    def read(reader, logits):
        def step(carry, layer):
            return layer[0](carry, *layer[1:])

        return RouterReading(*jax.lax.scan(step, reader.carry, (reader.read, logits, expert_ids)))

    @jax.jit
    def both(new, old):
        trace = trace_of(read(trace_reader("sigmoid"), old))
        gamma = gamma_of(read(drift_reader(trace, "sigmoid"), new), trace)
        plain = rspo_jax.trace_router(old, 2, "sigmoid", jnp.asarray(expert_ids))
        return (trace, gamma), (plain, rspo_jax.router_shift(new, trace, score="sigmoid"))

    (trace, gamma), (expected_trace, expected_gamma) = both(new, old)
    jax.tree.map(np.testing.assert_array_equal, trace, expected_trace)
    np.testing.assert_allclose(gamma, expected_gamma, rtol=0, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_reader_has_a_gradient_only_where_it_is_asked_for(score):
    old = random_logits(seed=68)

    def of_reader(logits, trace, differentiable):
        reader = drift_reader(trace, score, differentiable)
        layers = (reader.read, logits)
        drift, _ = jax.lax.scan(lambda drift, layer: layer[0](drift, layer[1], None), reader.carry, layers)
        return jnp.sum(gamma_of(RouterReading(drift, None), trace))

    @jax.jit
    def gradients(new):
        trace = rspo_jax.trace_router(old, 2, score)
        plain = jax.grad(lambda logits: jnp.sum(rspo_jax.router_shift(logits, trace, score=score)))(new)
        return *(jax.grad(of_reader)(new, trace, differentiable) for differentiable in (False, True)), plain

    without, with_gradient, expected = gradients(drifted(old, seed=69, drift=0.8))
    assert not np.any(without) and np.abs(expected).max() > 0.01
    np.testing.assert_allclose(with_gradient, expected, rtol=0, atol=1e-6)


@jax.jit
def forced_routes(logits):
    trace = rspo_jax.trace_router(logits, 2)
    return forced_route_of(trace), forced_route_of(trace, with_weights=True)


@pytest.mark.parametrize("experts", [8, 256, 257])
def test_a_trace_as_a_route_to_force(experts):
    logits = random_logits(seed=66, shape=(3, 2, 4, experts))
    order = np.argsort(-logits, axis=-1)[..., :2]
    plain, weighted = forced_routes(logits)
    assert plain.weights is None and plain.expert_ids.dtype == (jnp.uint8 if experts <= 256 else jnp.uint16)
    np.testing.assert_array_equal(plain.expert_ids, order)
    np.testing.assert_array_equal(weighted.expert_ids, order)
    exact = np.take_along_axis(oracles.log_softmax(logits), order, axis=-1)
    assert weighted.weights.dtype == jnp.float32
    weights = np.asarray(weighted.weights)
    np.testing.assert_allclose(np.log(weights), exact, rtol=0, atol=0.5 / 1024 + 1e-6)
    divided = np.log(weights / weights.sum(axis=-1, keepdims=True))
    exact = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(divided, exact, rtol=0, atol=1 / 1024 + 1e-6)


@pytest.mark.parametrize("experts", [8, 256, 257])
def test_the_experts_alone(experts):
    logits = random_logits(seed=67, shape=(3, 2, 4, experts))
    expert_ids = np.argsort(-logits, axis=-1)[..., -2:].astype(np.int32)

    def read(_, layer):
        return route_reader().read(None, *layer)

    route = jax.jit(lambda *layers: route_of(RouterReading(*jax.lax.scan(read, None, layers))))(logits, expert_ids)
    assert route.dtype == (jnp.uint8 if experts <= 256 else jnp.uint16)
    np.testing.assert_array_equal(route, expert_ids.transpose(1, 0, 3, 2))


@pytest.mark.parametrize("score", ["", "softplus"])
def test_unknown_scores_are_refused(score):
    for call in (
        lambda logits: rspo_jax.trace_router(logits, 2, score),
        lambda logits: shift_of(logits, logits, score=score),
        lambda logits: trace_reader(score),
        lambda logits: drift_reader(rspo_jax.trace_router(logits, 2), score),
    ):
        with pytest.raises(ValueError, match=r"score must be one of softmax, sigmoid; got"):
            in_eval_shape(call, SHAPE)
