"""Diagnostics against numpy in float64, written token by token: of routes and of ratios, whole and in micro-batches.

A scan over layers stands for a model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from rspo_jax import statistics
from rspo_jax.rollouts import unpack
from rspo_jax.routing import diagnostics, drift_reader, gamma_of, trace_router
from rspo_jax.types import RouterReading

L, N, T, E, K = 3, 4, 6, 8, 2


def log_scores(logits, score):
    return -np.logaddexp(0, -np.asarray(logits, np.float64)) if score == "sigmoid" else oracles.log_softmax(logits)


def top(logits):
    return np.argsort(-logits, axis=-1, kind="stable")[..., :K].astype(np.int32)


@pytest.fixture(scope="module")
def routes():
    """Logits of an old policy and of a current one, [L, N, T, E], and which tokens count."""
    rng = np.random.default_rng(0)
    old = rng.normal(size=(L, N, T, E)).astype(np.float32)
    new = (old + 0.6 * rng.normal(size=old.shape)).astype(np.float32)
    new[:, 0] = old[:, 0]  # a row that did not move
    mask = rng.random((N, T)) < 0.6
    mask[3] = False  # a row of prompts and padding only
    return old, new, mask


def read(reader, logits, expert_ids):
    """Run a reader through the layers, as a model does."""

    def layer(carry, inputs):
        return inputs[0](carry, *inputs[1:])

    return RouterReading(*jax.lax.scan(layer, reader.carry, (reader.read, logits, expert_ids)))


def expected_routing(old, new, mask, score):
    """Reduced statistics, counted token by token."""
    sums = {name: np.zeros(L) for name in ("layer_drift", "layer_overlap", "layer_stays", "layer_router_entropy")}
    load, everywhere = np.zeros((L, E)), mask.copy()
    for layer, row, token in np.ndindex(L, N, T):
        if not mask[row, token]:
            continue
        before, now = old[layer, row, token], new[layer, row, token]
        ids, new_ids = set(top(before).tolist()), set(top(now).tolist())
        moves = log_scores(now, score) - log_scores(before, score)
        weights = np.exp(log_scores(now, score))
        p = weights / weights.sum()
        sums["layer_drift"][layer] += np.mean([abs(moves[expert]) for expert in ids])
        sums["layer_overlap"][layer] += len(ids & new_ids) / K
        sums["layer_stays"][layer] += ids == new_ids
        sums["layer_router_entropy"][layer] -= np.sum(p * np.log(p))
        everywhere[row, token] &= ids == new_ids
        for expert in new_ids:
            load[layer, expert] += 1
    tokens = mask.sum()
    return {name: total / tokens for name, total in sums.items()} | {
        "expert_load": load / (K * tokens),
        "route_stays": everywhere.sum() / tokens,
    }


def assert_routing(reduced, expected):
    assert reduced.keys() == expected.keys()
    for name, value in expected.items():
        # The route's memory is on a grid of 1/1024 nat.
        tolerance = 1e-3 if name == "layer_drift" else 1e-6
        np.testing.assert_allclose(reduced[name], value, rtol=0, atol=tolerance, err_msg=name)


@functools.partial(jax.jit, static_argnums=4)
def measure_routing(old, new, mask, new_experts, score):
    """Reduced statistics, γ by the drift reader alone, and γ by the one inside."""
    trace = trace_router(old, K, score)
    drift = drift_reader(trace, score)
    reading = read(diagnostics.routing_reader(drift, trace.expert_ids, mask, score), new, new_experts)
    reduced = statistics.reduce(diagnostics.routing_statistics(reading))
    inside = gamma_of(diagnostics.drift_reading(reading), trace)
    return reduced, gamma_of(read(drift, new, new_experts), trace), inside


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_routing_matches_the_oracle(routes, score):
    reduced, gamma, inside = measure_routing(*routes, top(routes[1]), score)
    expected = expected_routing(*routes, score)
    assert 0.05 < expected["route_stays"] < expected["layer_stays"].min() < 0.95
    assert_routing(reduced, expected)
    np.testing.assert_allclose(np.sum(reduced["expert_load"], axis=-1), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(gamma, inside)  # also of tokens that do not count


def test_routing_of_micro_batches_is_that_of_the_whole(routes):
    def part(arrays):
        old, new, mask, new_experts = arrays
        trace = trace_router(old, K)
        reader = diagnostics.routing_reader(drift_reader(trace), trace.expert_ids, mask)
        return diagnostics.routing_statistics(read(reader, new, new_experts))

    @jax.jit
    def measure(parts):
        stacked = jax.lax.map(part, parts)
        return statistics.reduce(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), stacked))  # a step's mini-batches

    old, new, mask = routes
    by_row = [np.stack(np.split(array, 2, axis=1)) for array in (old, new)]
    experts = np.stack(np.split(top(new), 2, axis=1))
    assert_routing(measure((*by_row, mask.reshape(2, 2, T), experts)), expected_routing(*routes, "softmax"))


def test_a_route_that_stays_and_what_is_masked(routes):
    old, _, mask = routes
    changed = np.where(mask[None, ..., None], old, -old)  # what does not count turns round
    reduced, _, _ = measure_routing(old, changed, mask, top(changed), "softmax")
    np.testing.assert_array_equal(reduced["layer_drift"], 0)
    for name in ("layer_overlap", "layer_stays", "route_stays"):
        np.testing.assert_array_equal(reduced[name], 1)
    nothing, _, _ = measure_routing(old, old, np.zeros_like(mask), top(old), "softmax")
    for name, value in nothing.items():
        np.testing.assert_array_equal(value, 0, err_msg=name)


def test_even_routers_have_the_most_entropy_and_extreme_ones_none(routes):
    logits, mask = np.zeros((L, N, T, E), np.float32), np.ones((N, T), bool)
    logits[1, ..., 3] = 1e4
    logits[2, ..., :4] = -np.inf
    reduced, _, _ = measure_routing(logits, logits, mask, top(logits), "softmax")
    np.testing.assert_allclose(reduced["layer_router_entropy"], np.log([8, 1, 4]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("passes", [False, True])
def test_a_gradient_comes_only_from_a_drift_reader_that_has_one(routes, passes):
    old, new, mask = map(jnp.asarray, routes)
    experts = top(routes[0])

    def first_logits(_, carry, logits, expert_ids):
        return carry + logits[..., 0], None

    def shown(new):
        trace = trace_router(old, K)
        drift = drift_reader(trace)
        if passes:
            drift = drift._replace(read=jax.tree_util.Partial(first_logits, jnp.zeros(L)))
        reading = read(diagnostics.routing_reader(drift, trace.expert_ids, mask), new, experts)
        reduced = statistics.reduce(diagnostics.routing_statistics(reading))
        return jnp.sum(diagnostics.drift_reading(reading).carry) + sum(jnp.sum(value) for value in reduced.values())

    expected = np.zeros(new.shape)
    expected[..., 0] = passes
    np.testing.assert_array_equal(jax.jit(jax.grad(shown))(new), expected)


def test_inputs_that_score_a_response_are_found_in_the_rows():
    places = np.array([[2, 3, 4, 0], [9, 10, 0, 0], [0, 0, 0, 0]], np.int32)  # beyond a response stands a 0
    mask = np.array([[True, True, True, False], [True, True, False, False], [False] * 4])

    @jax.jit
    def there_and_back(places, mask):
        found = diagnostics.response_inputs(places, mask, (2, 6))
        return found, unpack(found, places)

    found, unpacked = there_and_back(places, mask)
    np.testing.assert_array_equal(np.flatnonzero(found), [2, 3, 4, 9, 10])
    np.testing.assert_array_equal(np.where(mask, unpacked, False), mask)


def test_max_violation_is_how_far_the_busiest_expert_lies_above_the_mean():
    load = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 0.0, 0.0]]
    np.testing.assert_allclose(diagnostics.max_violation(load), [0, 3, 1, np.nan], rtol=1e-12)


def ratio_batch():
    rng = np.random.default_rng(1)
    log_ratio = (rng.normal(size=(6, 8)) * 10.0 ** rng.uniform(-5, 1.5, (6, 8))).astype(np.float32)
    gamma = np.exp(-(10.0 ** rng.uniform(-5, 0.3, (6, 8)))).astype(np.float32)
    gamma[1] = 1.0
    mask = rng.random((6, 8)) < 0.7
    mask[2:4] = False  # a micro-batch of nothing
    return log_ratio, gamma, mask


def expected_histogram(values, edges):
    return np.histogram(values, [-np.inf, *np.float32(edges), np.inf])[0]


def kish(log_weights):
    weights = np.exp(log_weights - log_weights.max())
    return weights.sum() ** 2 / (weights.size * (weights**2).sum())


def test_ratio_statistics_match_numpy_whole_and_in_micro_batches():
    log_ratio, gamma, mask = ratio_batch()
    spoiled = np.where(mask, log_ratio, np.nan), np.where(mask, gamma, np.nan), mask

    def measure(log_ratio, gamma, mask):
        return diagnostics.ratio_statistics(log_ratio, mask, gamma, 0.8)

    @jax.jit
    def both(arrays):
        parts = [array.reshape(3, 2, 8) for array in arrays]
        return statistics.reduce(measure(*arrays)), statistics.reduce(jax.lax.map(lambda part: measure(*part), parts))

    d, drift = log_ratio[mask], -np.log(gamma[mask])
    quantiles = np.array(diagnostics.PERCENTS) / 100
    expected = {
        "log_ratio_quantiles": np.quantile(d.astype(np.float64), quantiles),
        "log_ratio_histogram": expected_histogram(d, diagnostics.LOG_RATIO_EDGES),
        "effective_sample_size": kish(d.astype(np.float64)),
        "drift_quantiles": np.quantile(drift.astype(np.float64), quantiles),
        "drift_histogram": expected_histogram(drift, diagnostics.DRIFT_EDGES),
        "shifted_sample_size": kish(d + np.log(np.maximum(gamma[mask].astype(np.float64), 0.8))),
    }
    assert (expected["log_ratio_histogram"] > 0).sum() > 10 and expected["drift_histogram"][0] > 0
    for reduced in both(spoiled):
        assert reduced.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(reduced[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
            assert np.issubdtype(reduced[name].dtype, np.integer) == name.endswith("histogram")


def test_weights_that_no_float_can_hold_have_an_effective_sample_size():
    mask = np.ones((1, 4), bool)

    size = jax.jit(lambda log_weights: statistics.effective_sample_size(log_weights, mask).reduce())
    for log_weights, expected in (([300] * 4, 1), ([300, 0, 0, 0], 0.25), ([-300] * 4, 1)):
        np.testing.assert_allclose(size(np.float32([log_weights])), expected, rtol=1e-6)


def test_a_dense_model_has_no_drift_and_an_objective_without_floor_no_shifted_size():
    log_ratio, gamma, mask = ratio_batch()
    dense = jax.eval_shape(diagnostics.ratio_statistics, log_ratio, mask)
    unweighted = jax.eval_shape(diagnostics.ratio_statistics, log_ratio, mask, gamma)
    assert dense.keys() == {"log_ratio_quantiles", "log_ratio_histogram", "effective_sample_size"}
    assert unweighted.keys() - dense.keys() == {"drift_quantiles", "drift_histogram"}


def test_mismatch_matches_numpy():
    rng = np.random.default_rng(2)
    trainer, sampler = rng.normal(size=(2, 4, 5)).astype(np.float32)
    mask = rng.random((4, 5)) < 0.7
    trainer[~mask] = np.nan
    measure = jax.jit(lambda *arrays: statistics.reduce(diagnostics.mismatch_statistics(*arrays)))
    reduced = measure(trainer, sampler, mask)
    gap = trainer[mask] - sampler[mask]
    np.testing.assert_allclose(reduced["mismatch_mean"], np.abs(gap).mean(), rtol=1e-6)
    np.testing.assert_allclose(reduced["mismatch_max"], np.abs(gap).max(), rtol=1e-6)
    expected = expected_histogram(gap, diagnostics.LOG_RATIO_EDGES)
    np.testing.assert_array_equal(reduced["mismatch_histogram"], expected)


def test_bins_are_four_a_decade_to_both_sides():
    drift, ratio = np.array(diagnostics.DRIFT_EDGES), np.array(diagnostics.LOG_RATIO_EDGES)
    np.testing.assert_allclose(np.log10(drift), np.arange(-4, 1.1, 0.25), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ratio, [*-drift[::-1], *drift])


def test_a_step_is_taken_apart_into_numbers_and_arrays():
    load = np.array([[0.5, 0.25, 0.25, 0.0], [0.25] * 4], np.float32)
    reduced = {
        "loss": np.float32(0.5),
        "expert_load": load,
        "layer_drift": np.float32([0.1, 0.3]),
        "layer_overlap": np.float32([1.0, 0.5]),
        "layer_router_entropy": np.float32([1.0, 1.5]),
        "drift_histogram": np.arange(22),
    }
    numbers, arrays = diagnostics.numbers_and_arrays(reduced)
    assert {name: type(value) for name, value in numbers.items()} == dict.fromkeys(numbers, float)
    expected = {"loss": 0.5, "drift": 0.2, "overlap": 0.75, "router_entropy": 1.25, "max_violation": 0.5}
    assert numbers == pytest.approx(expected, rel=1e-6)
    assert arrays.keys() == reduced.keys() - {"loss"} | {"layer_max_violation", "drift_edges"}
    np.testing.assert_allclose(arrays["layer_max_violation"], [1, 0], rtol=0, atol=1e-6)
    assert "log_ratio_edges" in diagnostics.numbers_and_arrays({"mismatch_histogram": np.zeros(43)})[1]
    assert diagnostics.numbers_and_arrays({"loss": np.float32(1)}) == ({"loss": 1.0}, {})
