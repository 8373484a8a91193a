"""The two programs of a training step against gradients and metrics in float64 NumPy.

The policy is a table: logits and router logits depend on the last token alone, so that everything can be written down.
Only the tests of an unmoved router and of the two ways to log-probabilities use a real model. Rows hold one response
each, where it stands in the rollout.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracles

import models
from rspo_jax.objectives import GRPOConfig, GSPOConfig, RegularizerConfig, RSPOConfig
from rspo_jax.routing import drift_reader, gamma_of, numbers_and_arrays, router_shift, trace_router
from rspo_jax.statistics import reduce
from rspo_jax.training import LearnerConfig, OptimizerConfig, init_train_state, score, score_rows, update
from rspo_jax.training.update import freeze, route_to_device, route_to_host, split_parts, supervised_update
from rspo_jax.types import ModelOutput, PackedBatch, PackedRows, RolloutBatch, RouterReading

VOCABULARY, LAYERS, EXPERTS, K = 6, 2, 4, 2
ROWS, WIDTH = 8, 7

# Without momentum, Adam's first moment is the gradient, clipped to a norm that nothing here reaches.
BARE = OptimizerConfig(learning_rate=0.01, warmup_updates=1, beta1=0.0, max_gradient_norm=1e6)


def read_layers(reader, router_logits):
    """What a reader sees of [L, B, T, E], layer by layer."""

    def read_layer(carry, layer):
        read, layer_logits = layer
        return read(carry, layer_logits, jax.lax.top_k(layer_logits, K)[1])

    if reader is None or router_logits is None:
        return None
    return RouterReading(*jax.lax.scan(read_layer, reader.carry, (reader.read, router_logits)))


class TablePolicy:
    """Parameters: logits [V, V], and router [L, V, E] unless it is dense."""

    router_score = "softmax"

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None, router_reader=None):
        params = variables["params"]
        router_logits = params["router"][:, tokens] if "router" in params else None
        reading = read_layers(router_reader, router_logits)
        return ModelOutput(params["logits"][tokens], router_logits, cache, reading=reading)

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, length))


class ContextPolicy(TablePolicy):
    """Every earlier token counts as well, unless it is padding."""

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None, router_reader=None):
        params, seen = variables["params"], (segment_ids > 0)[..., None]
        logits = jnp.cumsum(jnp.where(seen, params["logits"][tokens], 0), axis=1)
        router_logits = jnp.cumsum(jnp.where(seen[None], params["router"][:, tokens], 0), axis=2)
        return ModelOutput(logits, router_logits, cache, reading=read_layers(router_reader, router_logits))


TABLE, CONTEXT = TablePolicy(), ContextPolicy()
MODEL_CONFIG = models.TransformerConfig(
    vocab_size=VOCABULARY,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=4,
    num_experts_per_token=2,
    expert_size=8,
)
MODEL = models.Transformer(MODEL_CONFIG)


@pytest.fixture(autouse=True)
def promotion_as_optax_needs_it():
    """Optax multiplies Python floats with int32 counts, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def table_params(seed, drift=0.0, dense=False):
    """float32 tables; `drift` moves them in a direction of its own, the router three times as far."""
    rng, away = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    shapes = {"logits": (VOCABULARY, VOCABULARY), "router": (LAYERS, VOCABULARY, EXPERTS)}
    params = {
        name: (rng.normal(size=shape) + scale * drift * away.normal(size=shape)).astype(np.float32)
        for (name, shape), scale in zip(shapes.items(), (1, 3), strict=True)
    }
    return {"logits": params["logits"]} if dense else params


def make_rollout(seed=0):
    """Eight left-padded rows. The mask leaves out one response, and two rows have a single token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (ROWS, WIDTH + 1)).astype(np.int32)
    segment_ids = np.ones_like(tokens)
    mask = np.zeros((ROWS, WIDTH), bool)
    for row, (padding, length) in enumerate([(0, 5), (1, 4), (2, 1), (0, 3), (2, 5), (1, 0), (0, 1), (1, 2)]):
        tokens[row, :padding], segment_ids[row, :padding] = 0, 0
        mask[row, 2 : 2 + length] = True
        tokens[row, 3 + length :], segment_ids[row, 3 + length :] = 0, 0
    sampler_log_probs = np.where(mask, -rng.uniform(0.5, 3, mask.shape), 0).astype(np.float32)
    advantages = rng.normal(size=ROWS).astype(np.float32)
    return RolloutBatch(tokens, segment_ids, mask, sampler_log_probs, advantages)


def batch_of(rollout, parts=1):
    """The responses of a rollout as a batch, each in a row of its own, padding included."""
    rows = ROWS // parts
    places = np.arange(rows * WIDTH, dtype=np.int32).reshape(rows, WIDTH)

    def cut(array):
        return np.asarray(array).reshape(parts, rows, *np.shape(array)[1:])

    return PackedBatch(
        PackedRows(
            cut(rollout.tokens[:, :-1]), cut(rollout.tokens[:, 1:]), cut(np.asarray(rollout.segment_ids)[:, :-1])
        ),
        np.broadcast_to(places, (parts, rows, WIDTH)).copy(),
        cut(rollout.mask),
        cut(rollout.sampler_log_probs),
        cut(rollout.advantages),
    )


def merged(tree):
    """[parts, rows, ...] -> [parts · rows, ...]."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)


def in_float64(rollout, params, old_params):
    """What the trainer should compute of a table, as a batch of the oracles, in their own precision."""
    inputs, targets = rollout.tokens[:, :-1], rollout.tokens[:, 1:]
    log_probs, old_log_probs = (
        np.take_along_axis(oracles.log_softmax(tree["logits"])[inputs], targets[..., None], axis=-1)[..., 0]
        for tree in (params, old_params)
    )
    gamma = np.ones(log_probs.shape)
    if "router" in params:
        gamma, _ = oracles.grid_router_shift(params["router"][:, inputs], old_params["router"][:, inputs], K)
    return oracles.Batch(log_probs, old_log_probs, rollout.advantages, rollout.mask, gamma)


def chain_to_table(rollout, params, gradient):
    """d loss / d logits of the table from d loss / d log_probs [B, T]: Σ g · (onehot − softmax)."""
    probs = np.exp(oracles.log_softmax(params["logits"]))
    result = np.zeros((VOCABULARY, VOCABULARY))
    for row, position in zip(*np.nonzero(rollout.mask), strict=True):
        before, after = rollout.tokens[row, position : position + 2]
        result[before] += gradient[row, position] * (np.eye(VOCABULARY)[after] - probs[before])
    return result


def as_arrays(tree):
    return jax.tree.map(jnp.array, tree)


def scored(rollout, old_params, parts=1):
    return score(TABLE, old_params, batch_of(rollout, parts), LearnerConfig())[0]


def run_update(batch, params, learner, optimizer=BARE):
    """One update from a fresh optimizer: gradient, reduced statistics, next state."""
    state = init_train_state(as_arrays(params), optimizer)  # a copy: the update takes its buffers
    next_state, statistics = update(TABLE, optimizer, state, as_arrays(batch), learner)
    return next_state.opt_state[1][0].mu, as_floats(statistics), next_state


def as_floats(statistics):
    """Those that are numbers."""
    return numbers_and_arrays(reduce(statistics))[0]


def bits(tree):
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def assert_close(actual, expected, tolerance=1e-6):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=tolerance), actual, expected)


# --- scoring ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_against_float64(temperature):
    rollout, params = make_rollout(), table_params(0)
    learner = LearnerConfig(temperature=temperature)
    (batch, log_probs, route, _), statistics = score(TABLE, params, batch_of(rollout), learner)
    assert bits(batch) == bits(batch_of(rollout))
    everywhere = oracles.log_softmax(params["logits"].astype(np.float64) / temperature)[rollout.tokens[:, :-1]]
    expected = np.take_along_axis(everywhere, rollout.tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs[0], expected, rtol=0, atol=1e-6)
    entropy = -(np.exp(everywhere) * everywhere).sum(axis=-1)
    d = (expected - rollout.sampler_log_probs)[rollout.mask]
    metrics = as_floats(statistics)
    assert set(metrics) == {"entropy", "sampler_kl", "mismatch_mean", "mismatch_max"}
    assert metrics["mismatch_mean"] == pytest.approx(np.abs(d).mean(), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(entropy[rollout.mask].mean(), abs=1e-6)
    assert metrics["sampler_kl"] == pytest.approx(np.mean(np.expm1(d) - d), rel=1e-5)
    assert bits(route) == bits(trace_of_table(rollout, params))


def trace_of_table(rollout, params):
    """In one part."""
    trace = trace_router(jnp.asarray(params["router"])[:, rollout.tokens[:, :-1]], K)
    return jax.tree.map(lambda leaf: leaf[None], trace)


@pytest.mark.parametrize("parts", [2, 4])
def test_scores_do_not_depend_on_the_parts(parts):
    rollout, params = make_rollout(), table_params(0)
    whole, statistics = score(TABLE, params, batch_of(rollout), LearnerConfig())
    cut, cut_statistics = score(TABLE, params, batch_of(rollout, parts), LearnerConfig())
    assert cut.old_log_probs.shape == (parts, ROWS // parts, WIDTH)
    assert_close(merged(cut.old_log_probs), merged(whole.old_log_probs))
    assert bits(merged(cut.old_route)) == bits(merged(whole.old_route))
    for name, value in as_floats(statistics).items():
        assert as_floats(cut_statistics)[name] == pytest.approx(value, rel=1e-6)


def test_pieces_of_a_batch():
    batch = scored(make_rollout(), table_params(0), parts=4)
    pieces = split_parts(batch, 2)
    assert len(pieces) == 2 and pieces[0].old_log_probs.shape == (2, ROWS // 4, WIDTH)
    assert bits(jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)) == bits(batch)


def test_a_route_goes_to_the_host_and_back_unchanged():
    batch = scored(make_rollout(), table_params(0))
    on_host = route_to_host(batch)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(on_host.old_route)} == {"pinned_host"}
    back = route_to_device(on_host)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(back.old_route)} == {"device"}
    assert bits(back) == bits(batch)
    dense = batch._replace(old_route=None)
    assert route_to_device(route_to_host(dense)).old_route is None


def test_scores_are_those_of_the_function_of_the_loss():
    rollout, params = as_arrays(make_rollout()), as_arrays(table_params(0))
    (batch, log_probs, route, _), _ = score(CONTEXT, params, batch_of(rollout), LearnerConfig())
    rows, route = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (batch.rows, route))
    direct, reading = score_rows(CONTEXT, params, rows, 1.0, drift_reader(route))
    np.testing.assert_allclose(log_probs[0], direct.log_probs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(gamma_of(reading, route), np.ones((ROWS, WIDTH)))
    router_logits = CONTEXT.apply({"params": params}, rows.inputs, segment_ids=rows.segment_ids).router_logits
    np.testing.assert_array_equal(router_shift(router_logits, route), np.ones((ROWS, WIDTH)))


class LogitsOnly:
    """A model that gives nothing but its logits."""

    def apply(self, *arguments, **options):
        return MODEL.apply(*arguments, **options)._replace(hidden=None, head=None)


def test_both_ways_to_log_probabilities_agree():
    rollout, params = as_arrays(make_rollout()), models.init_params(MODEL_CONFIG, jax.random.key(3))
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch_of(rollout).rows)

    @jax.jit
    def both(params, rows):
        return [[score_rows(policy, params, rows, at)[0] for policy in (MODEL, LogitsOnly())] for at in (1.0, 0.6)]

    for fused, plain in both(params, rows):
        assert_close(fused, plain, 1e-5)


def with_other_padding(tokens, segment_ids):
    other = np.where(segment_ids == 0, VOCABULARY - 1, tokens).astype(np.int32)
    assert not np.array_equal(other, tokens)
    return other


def test_what_padding_holds_does_not_change_a_score():
    rollout, params = make_rollout(), table_params(0)
    other = rollout._replace(tokens=with_other_padding(rollout.tokens, rollout.segment_ids))
    scores, other_scores = (score(CONTEXT, params, batch_of(each), LearnerConfig()) for each in (rollout, other))
    np.testing.assert_array_equal(
        np.asarray(other_scores[0].old_log_probs[0])[rollout.mask],
        np.asarray(scores[0].old_log_probs[0])[rollout.mask],
    )
    for actual, expected in zip(other_scores[0].old_route, scores[0].old_route, strict=True):
        actual, expected = (np.moveaxis(np.asarray(leaf[0]), -1, 1)[rollout.mask] for leaf in (actual, expected))
        np.testing.assert_array_equal(actual, expected)
    assert as_floats(other_scores[1]) == as_floats(scores[1])


def test_an_update_of_a_model_on_policy_sees_an_unmoved_router():
    rollout, params = as_arrays(make_rollout()), models.init_params(MODEL_CONFIG, jax.random.key(3))
    batch, _ = score(MODEL, params, batch_of(rollout), LearnerConfig())
    state = init_train_state(params, BARE)
    _, statistics = update(MODEL, BARE, state, batch, LearnerConfig())
    metrics = as_floats(statistics)
    assert metrics["gamma_mean"] == metrics["gamma_min"] == metrics["gamma_p10"] == 1
    assert metrics["gamma_floor_fraction"] == metrics["clip_fraction"] == metrics["skipped_updates"] == 0
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["grad_norm"] > 0.01


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_table_on_policy_has_ratios_of_exactly_one(temperature):
    learner = LearnerConfig(temperature=temperature)
    rollout, params = make_rollout(), table_params(0)
    batch, _ = score(TABLE, params, batch_of(rollout), learner)
    gradient, metrics, _ = run_update(batch, params, learner)
    assert metrics["gamma_mean"] == metrics["gamma_min"] == metrics["gamma_p10"] == 1
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    # d log_probs / d logits has the temperature once more.
    tempered = {"logits": params["logits"] / temperature, "router": params["router"]}
    by_log_probs = oracles.gradient("rspo", in_float64(rollout, tempered, tempered))
    expected = chain_to_table(rollout, tempered, by_log_probs) / temperature
    np.testing.assert_allclose(gradient["logits"], expected, rtol=0, atol=1e-6)


# --- the gradient ---

OBJECTIVES = {
    "rspo": (LearnerConfig(), {}),
    "rspo, other options": (
        LearnerConfig(objective_config=RSPOConfig(gamma_min=0.5, clip_low=0.1, clip_high=0.2, position="post_clip")),
        {"gamma_min": 0.5, "clip_low": 0.1, "clip_high": 0.2, "position": "post_clip"},
    ),
    "gmpo": (LearnerConfig("gmpo"), {}),
    "gspo, router shift": (LearnerConfig("gspo", GSPOConfig(gamma_min=0.8)), {"gamma_min": 0.8}),
    "grpo": (
        LearnerConfig("grpo", GRPOConfig(aggregation="token_mean")),
        {"aggregation": "token_mean"},
    ),
    "grpo, router shift": (LearnerConfig("grpo", GRPOConfig(gamma_min=0.8)), {"gamma_min": 0.8}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_against_float64(name):
    learner, changes = OBJECTIVES[name]
    rollout, old_params, params = make_rollout(), table_params(0), table_params(0, drift=0.15)
    gradient, metrics, next_state = run_update(scored(rollout, old_params), params, learner)
    batch = in_float64(rollout, params, old_params)
    assert 0.1 < np.mean(batch.router_shift[batch.mask] < 0.8) < 0.9  # the floor decides for some, not for all
    expected = chain_to_table(rollout, params, oracles.gradient(learner.objective, batch, **changes))
    assert np.abs(expected).max() > 0.02
    np.testing.assert_allclose(gradient["logits"], expected, rtol=0, atol=1e-6)
    # No gradient reaches the router through γ.
    np.testing.assert_array_equal(gradient["router"], np.zeros_like(params["router"]))
    np.testing.assert_array_equal(next_state.params["router"], params["router"])
    assert metrics["loss"] == pytest.approx(oracles.loss(learner.objective, batch, **changes), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    for metric, value in oracles.metrics(learner.objective, batch, **changes).items():
        assert metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert (int(next_state.updates), int(next_state.skipped), metrics["skipped_updates"]) == (1, 0, 0)


def test_layers_may_be_summed():
    learner = LearnerConfig(layer_aggregation="sum")
    rollout, old_params, params = make_rollout(), table_params(0), table_params(0, drift=0.15)
    _, metrics, _ = run_update(scored(rollout, old_params), params, learner)
    inputs = rollout.tokens[:, :-1]
    gamma, _ = oracles.grid_router_shift(params["router"][:, inputs], old_params["router"][:, inputs], K, "sum")
    assert metrics["gamma_mean"] == pytest.approx(gamma[rollout.mask].mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["rspo", "grpo", "gspo, router shift"])
def test_neither_micro_batches_nor_the_order_of_rows_matter(name):
    """Responses differ in length, one is empty, and every mean has one denominator for the whole batch."""
    learner = dataclasses.replace(OBJECTIVES[name][0], diagnostics=name == "rspo")
    rollout, old_params, params = make_rollout(), table_params(0), table_params(0, drift=0.15)
    gradient, metrics, _ = run_update(scored(rollout, old_params), params, learner)
    assert np.abs(gradient["logits"]).max() > 0.02
    order = np.random.default_rng(5).permutation(ROWS)
    variants = [(1, order), (2, np.arange(ROWS)), (4, np.arange(ROWS)), (2, order)]
    for micro_batches, rows in variants:
        shuffled = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], rollout)
        cut_gradient, cut_metrics, _ = run_update(scored(shuffled, old_params, micro_batches), params, learner)
        assert_close(cut_gradient, gradient)
        assert set(cut_metrics) == set(metrics)
        for metric, value in metrics.items():
            assert cut_metrics[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), (metric, micro_batches)


def test_parameters_move_the_same_whatever_the_micro_batches():
    rollout, old_params = make_rollout(), table_params(0)
    ends = []
    for micro_batches in (1, 2, 4):
        learner = LearnerConfig()
        batch = as_arrays(scored(rollout, old_params, micro_batches))
        state = init_train_state(as_arrays(old_params), BARE)
        for _ in range(3):
            state, _ = update(TABLE, BARE, state, batch, learner)
        ends.append(state.params)
    assert np.abs(np.asarray(ends[0]["logits"]) - old_params["logits"]).max() > 0.005
    assert_close(ends[1], ends[0])
    assert_close(ends[2], ends[0])


def test_a_dense_policy():
    rollout = make_rollout()
    old_params, params = table_params(0, dense=True), table_params(0, drift=0.15, dense=True)
    learner = LearnerConfig()
    batch, statistics = score(TABLE, old_params, batch_of(rollout, parts=4), learner)
    assert batch.old_route is None
    assert batch.old_log_probs.shape == (4, ROWS // 4, WIDTH)
    assert as_floats(statistics)["entropy"] > 0
    gradient, metrics, _ = run_update(batch, params, learner)
    assert not [name for name in metrics if name.startswith("gamma")]
    # Without a router, RSPO is GMPO.
    expected = chain_to_table(rollout, params, oracles.gradient("gmpo", in_float64(rollout, params, old_params)))
    np.testing.assert_allclose(gradient["logits"], expected, rtol=0, atol=1e-6)


def test_what_stands_outside_the_mask_has_no_effect():
    learner = LearnerConfig()
    rollout, old_params, params = make_rollout(), table_params(0), table_params(0, drift=0.15)
    batch = scored(rollout, old_params)
    nowhere = np.where(rollout.mask, 0, np.nan).astype(np.float32)
    polluted = batch._replace(
        old_log_probs=batch.old_log_probs + nowhere[None], batch=batch.batch._replace(sampler_log_probs=nowhere[None])
    )
    clean, dirty = run_update(batch, params, learner), run_update(polluted, params, learner)
    assert bits(clean[2]) == bits(dirty[2])
    assert clean[1] == dirty[1]
    # Row 5 has no response token.
    advantages = rollout.advantages.copy()
    advantages[5] = 100
    other = run_update(batch._replace(batch=batch.batch._replace(advantages=advantages[None])), params, learner)
    assert bits(other[2]) == bits(clean[2])


def test_a_batch_without_a_single_response_token_changes_nothing():
    rollout, params, learner = make_rollout(), table_params(0), LearnerConfig()
    empty = rollout._replace(mask=np.zeros_like(rollout.mask))
    gradient, metrics, next_state = run_update(scored(empty, params), params, learner)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == metrics["learned_updates"] == 0
    assert {name for name, value in metrics.items() if not math.isfinite(value)} == {"max_violation"}  # of no load
    assert bits(next_state.params) == bits(as_arrays(params))
    assert not np.any(np.asarray(gradient["logits"]))


# --- the optimizer ---


def test_the_first_steps_of_adamw_by_hand():
    """The clipped gradient, bias-corrected moments, decoupled weight decay, and the warmup's two learning rates."""
    optimizer = OptimizerConfig(
        learning_rate=0.1, warmup_updates=2, weight_decay=0.05, beta1=0.8, beta2=0.9, max_gradient_norm=0.05
    )
    learner, rollout, params = LearnerConfig(), make_rollout(), table_params(0)
    batch = as_arrays(scored(rollout, params))
    state = init_train_state(as_arrays(params), optimizer)
    expected = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    first = second = np.zeros_like(expected["logits"])
    for step in range(1, 4):
        float64_batch = in_float64(rollout, expected, params)
        gradient = chain_to_table(rollout, expected, oracles.gradient("rspo", float64_batch))
        assert np.linalg.norm(gradient) > 0.1
        gradient = gradient * (0.05 / np.linalg.norm(gradient))
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        direction = first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.9**step)) + 1e-8)
        learning_rate = 0.1 * min((step - 1) / 2, 1)
        expected["logits"] = expected["logits"] - learning_rate * (direction + 0.05 * expected["logits"])
        expected["router"] = expected["router"] - learning_rate * 0.05 * expected["router"]
        state, statistics = update(TABLE, optimizer, state, batch, learner)
        assert as_floats(statistics)["grad_norm"] > 0.1  # before clipping
        assert_close(state.params, expected, 1e-5)
    assert int(state.updates) == 3


@pytest.mark.parametrize("bound", [0.05, 10.0])
def test_the_gradient_norm_is_bounded(bound):
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_updates=1, beta1=0.0, max_gradient_norm=bound)
    learner, params = LearnerConfig(), table_params(0)
    batch = scored(make_rollout(), params)
    whole, metrics, _ = run_update(batch, params, learner)
    clipped, clipped_metrics, _ = run_update(batch, params, learner, optimizer)
    assert 0.1 < metrics["grad_norm"] < 10
    assert clipped_metrics["grad_norm"] == metrics["grad_norm"]
    factor = min(1.0, bound / metrics["grad_norm"])
    assert_close(clipped, jax.tree.map(lambda leaf: np.asarray(leaf) * factor, whole), 1e-7)
    assert float(optax.tree.norm(clipped)) <= bound * (1 + 1e-6)


WARMUP_SCHEDULES = [(warmup, decay) for warmup in (0, 1, 5) for decay in (None, 6, 20)]


@pytest.mark.parametrize(("warmup", "decay"), WARMUP_SCHEDULES)
def test_schedules_by_hand(warmup, decay):
    schedule = OptimizerConfig(learning_rate=0.3, warmup_updates=warmup, decay_updates=decay).schedule()
    for step in range(25):
        if step < warmup:
            expected = 0.3 * step / warmup
        elif decay is None:
            expected = 0.3
        else:
            progress = min((step - warmup) / (decay - warmup), 1)
            expected = 0.3 * (1 + math.cos(math.pi * progress)) / 2
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-7), step


# --- frozen parameters ---


def test_a_frozen_parameter_meets_no_part_of_an_update():
    """Neither norm, nor moments, nor weight decay; the others move as if it were not there."""
    params = {"frozen": jnp.array([3.0, -2.0]), "free": jnp.array([1.0, 5.0])}
    frozen = {"frozen": True, "free": False}
    gradient = {"frozen": jnp.array([1e3, jnp.nan]), "free": jnp.array([0.3, -0.4])}
    optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.adamw(0.1, weight_decay=0.5))

    def step(params, state, gradient, frozen):
        gradient = freeze(gradient, frozen)
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, freeze(changes, frozen)), state, optax.tree.norm(gradient)

    alone = {"free": params["free"]}
    state, state_alone = optimizer.init(params), optimizer.init(alone)
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        for _ in range(2):
            params, state, norm = step(params, state, gradient, frozen)
            alone, state_alone, _ = step(alone, state_alone, {"free": gradient["free"]}, {"free": False})
            assert norm == pytest.approx(0.5)
    np.testing.assert_array_equal(params["frozen"], [3.0, -2.0])
    np.testing.assert_array_equal(params["free"], alone["free"])
    assert np.all(params["free"] != jnp.array([1.0, 5.0]))
    adam = optax.tree.get(state, "ScaleByAdamState", filtering=lambda _, node: hasattr(node, "mu"))
    assert not np.any(adam.mu["frozen"]) and not np.any(adam.nu["frozen"])


# --- updates that are not finite ---


def with_advantage(batch, row, value):
    advantages = np.array(batch.batch.advantages)
    advantages.reshape(-1)[row] = value
    return batch._replace(batch=batch.batch._replace(advantages=advantages))


def nan_advantage(batch):
    return with_advantage(batch, 3, np.nan)


def infinite_advantage(batch):
    return with_advantage(batch, 0, np.inf)


@pytest.mark.parametrize("spoil", [nan_advantage, infinite_advantage])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_an_update_that_is_not_finite_is_skipped(spoil, micro_batches):
    optimizer = BARE
    learner, params = LearnerConfig(), table_params(0)
    good = scored(make_rollout(), params, micro_batches)
    state = init_train_state(as_arrays(params), optimizer)
    for _ in range(2):
        state, _ = update(TABLE, optimizer, state, as_arrays(good), learner)
    before = bits((state.params, state.opt_state))
    straight, _ = update(TABLE, optimizer, as_arrays(state), as_arrays(good), learner)

    state, statistics = update(TABLE, optimizer, state, as_arrays(spoil(good)), learner)
    assert bits((state.params, state.opt_state)) == before
    assert (int(state.updates), int(state.skipped)) == (2, 1)
    assert (as_floats(statistics)["skipped_updates"], as_floats(statistics)["learned_updates"]) == (1, 0)

    state, statistics = update(TABLE, optimizer, state, as_arrays(good), learner)
    assert bits((state.params, state.opt_state)) == bits((straight.params, straight.opt_state))
    assert (int(state.updates), int(state.skipped)) == (3, 1)
    assert (as_floats(statistics)["skipped_updates"], as_floats(statistics)["learned_updates"]) == (0, 1)


# --- updates that learn from nothing, and responses far outside of every range ---


HELD = LearnerConfig("grpo", regularizers=RegularizerConfig(kl_coefficient=0.1))


def with_reference(batch):
    return batch._replace(reference_log_probs=batch.old_log_probs - 0.5)


def all_clipped(batch):
    """Good responses that are twice as likely as they were."""
    good = jnp.abs(batch.batch.advantages)
    return batch._replace(old_log_probs=batch.old_log_probs - 0.7, batch=batch.batch._replace(advantages=good))


def without_advantage(batch):
    return batch._replace(batch=batch.batch._replace(advantages=0 * batch.batch.advantages))


def without_tokens(batch):
    return batch._replace(batch=batch.batch._replace(mask=jnp.zeros_like(batch.batch.mask)))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_update_that_no_response_has_a_share_in_is_counted(micro_batches):
    """A KL penalty still has a gradient then, where there are tokens; it teaches nothing about rewards."""
    params = table_params(0)
    batch = scored(make_rollout(), params, micro_batches)
    for change, learned in [(lambda same: same, 1), (all_clipped, 0), (without_advantage, 0), (without_tokens, 0)]:
        for learner, changed in [(LearnerConfig("grpo"), change(batch)), (HELD, with_reference(change(batch)))]:
            _, metrics, _ = run_update(changed, params, learner)
            assert (metrics["learned_updates"], metrics["skipped_updates"]) == (learned, 0)
            penalised = learner is HELD and change is not without_tokens
            assert (metrics["grad_norm"] > 0) == (learned == 1 or penalised)
    # CISPO clips weights: every token keeps a gradient.
    assert run_update(all_clipped(batch), params, LearnerConfig("cispo"))[1]["learned_updates"] == 1


@pytest.mark.parametrize(("name", "nats"), [("grpo", 200.0), ("gspo", 200.0), ("gmpo", 4000.0), ("k3", 60.0)])
def test_responses_far_outside_of_every_range_are_learned_from(name, nats):
    """A bad response that became far more likely gets less likely; a token far below the reference gets more likely."""
    params, rollout = table_params(0, dense=True), make_rollout()
    bad = rollout._replace(advantages=-np.ones(ROWS, np.float32))
    learner = HELD if name == "k3" else LearnerConfig(name)
    batch, _ = score(TABLE, params, batch_of(bad), learner, params if name == "k3" else None)
    first = batch.old_log_probs
    if name == "k3":
        batch = without_advantage(batch)._replace(reference_log_probs=first + nats)
    else:
        batch = batch._replace(old_log_probs=first - nats)
    state = init_train_state(as_arrays(params), BARE)
    for made in (1, 2, 3):
        state, statistics = update(TABLE, BARE, state, as_arrays(batch), learner)
        metrics = as_floats(statistics)
        assert (int(state.updates), metrics["skipped_updates"]) == (made, 0)
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 1e6
    after, _ = score(TABLE, state.params, batch_of(bad), learner)
    moved = np.asarray(after.old_log_probs - first)[np.asarray(batch.batch.mask)].mean()
    assert moved > 0 if name == "k3" else moved < 0


# --- parameters in bfloat16 ---


def test_small_updates_of_bfloat16_parameters_add_up():
    """At a learning rate of 1e-5 rounding to the nearest would lose nearly all of them."""
    optimizer = OptimizerConfig(learning_rate=1e-5, warmup_updates=0)
    batch, ends = batch_of(make_rollout()), {}
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models.init_params(MODEL_CONFIG, jax.random.key(0)))
    for dtype in ("float32", "bfloat16"):
        policy = models.Transformer(dataclasses.replace(MODEL_CONFIG, param_dtype=dtype))
        state = init_train_state(jax.tree.map(functools.partial(jnp.array, dtype=dtype), start), optimizer)
        before = bits(state.params)
        kinds = [leaf.dtype for leaf in jax.tree.leaves(state)]
        for _ in range(40):
            state, _ = supervised_update(policy, optimizer, state, as_arrays(batch))
        assert bits(state.params) != before and [leaf.dtype for leaf in jax.tree.leaves(state)] == kinds
        ends[dtype] = np.concatenate(
            [
                np.asarray(new, np.float64).reshape(-1) - np.asarray(old, np.float64).reshape(-1)
                for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(start), strict=True)
            ]
        )
    along = ends["bfloat16"] @ ends["float32"] / (ends["float32"] @ ends["float32"])
    assert along == pytest.approx(1, abs=0.2)


class SteepPolicy(TablePolicy):
    """A finite output with an infinite slope, √0 at the start."""

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None, router_reader=None):
        params = variables["params"]
        return ModelOutput(params["logits"][tokens] * (1 + jnp.sqrt(params["scale"])), None, cache)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is():
    steep, learner = SteepPolicy(), LearnerConfig()
    params = table_params(0, dense=True) | {"scale": np.float32(0)}
    batch, _ = score(steep, params, batch_of(make_rollout()), learner)
    state = init_train_state(as_arrays(params), BARE)
    before = bits((state.params, state.opt_state))
    state, statistics = update(steep, BARE, state, as_arrays(batch), learner)
    assert math.isfinite(as_floats(statistics)["loss"])
    assert bits((state.params, state.opt_state)) == before
    assert (int(state.updates), int(state.skipped)) == (0, 1)


# --- supervised updates ---


def test_a_supervised_update_against_float64():
    rollout, params = make_rollout(), table_params(0)
    batch = batch_of(rollout)
    state = init_train_state(as_arrays(params), BARE)
    next_state, statistics = supervised_update(TABLE, BARE, state, as_arrays(batch))
    metrics = as_floats(statistics)
    assert set(metrics) == {"loss", "grad_norm", "skipped_updates", "learned_updates"}
    assert metrics["learned_updates"] == 1
    log_probs = in_float64(rollout, params, params).log_probs[rollout.mask]
    assert metrics["loss"] == pytest.approx(-log_probs.mean(), abs=1e-6)
    expected = chain_to_table(rollout, params, -1.0 * rollout.mask / rollout.mask.sum())
    np.testing.assert_allclose(next_state.opt_state[1][0].mu["logits"], expected, rtol=0, atol=1e-6)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-5)


def test_supervised_updates_lower_the_loss_to_the_entropy_of_the_data():
    rollout = make_rollout()
    batch = batch_of(rollout, parts=2)
    optimizer = OptimizerConfig(learning_rate=0.3, warmup_updates=2)
    state = init_train_state(as_arrays(table_params(0)), optimizer)
    losses = []
    for _ in range(60):
        state, statistics = supervised_update(TABLE, optimizer, state, as_arrays(batch))
        losses.append(as_floats(statistics)["loss"])
    # No table can do better than the frequencies of what follows each token.
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (rollout.tokens[:, :-1][rollout.mask], rollout.tokens[:, 1:][rollout.mask]), 1)
    frequencies = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    floor = -np.sum(counts * np.log(np.where(counts > 0, frequencies, 1))) / counts.sum()
    assert floor <= losses[-1] < floor + 0.05 < losses[0] - 0.5


def test_a_supervised_update_ignores_padding():
    rollout = make_rollout()
    ends = []
    for variant in (rollout, rollout._replace(tokens=with_other_padding(rollout.tokens, rollout.segment_ids))):
        state = init_train_state(as_arrays(table_params(0)), BARE)
        next_state, statistics = supervised_update(CONTEXT, BARE, state, as_arrays(batch_of(variant)))
        ends.append((next_state.opt_state[1][0].mu, as_floats(statistics)["loss"]))
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-6)
    assert_close(ends[0][0], ends[1][0])


def test_a_supervised_update_that_is_not_finite_is_skipped():
    params = table_params(0)
    params["logits"][2] = np.nan
    state = init_train_state(as_arrays(params), BARE)
    before = bits((state.params, state.opt_state))
    state, statistics = supervised_update(TABLE, BARE, state, as_arrays(batch_of(make_rollout())))
    assert bits((state.params, state.opt_state)) == before
    assert (int(state.updates), int(state.skipped), as_floats(statistics)["skipped_updates"]) == (0, 1, 1)


# --- configs ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": -1e-3}, "learning_rate must be positive, got -0.001"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"warmup_updates": -1}, "warmup_updates must be 0 or more, got -1"),
        ({"decay_updates": 10}, r"decay_updates \(10\) counts the warmup too and must exceed it \(10\)"),
        ({"decay_updates": 0, "warmup_updates": 0}, r"decay_updates \(0\) .* must exceed it \(0\)"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must be 0 or more, got nan"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be positive, got 0.0"),
        ({"max_gradient_norm": math.nan}, "max_gradient_norm must be positive, got nan"),
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\), got 1.0"),
        ({"beta1": -0.1}, r"beta1 must lie in \[0, 1\), got -0.1"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\), got 1.0"),
        ({"beta2": math.nan}, r"beta2 must lie in \[0, 1\), got nan"),
    ],
)
def test_optimizer_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


def test_the_edges_of_an_optimizer_config_are_allowed():
    OptimizerConfig(warmup_updates=0, decay_updates=1, weight_decay=0.0, beta1=0.0, beta2=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ppo"}, "unknown objective 'ppo'; choose one of rspo, gmpo, gspo, gspo_token, grpo, dr_grpo"),
        ({"layer_aggregation": "max"}, "layer_aggregation must be one of mean, sum; got 'max'"),
        ({"micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ({"row_length": 0}, "row_length must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive to train, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive to train, got nan"),
    ],
)
def test_learner_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**changes)


def test_the_config_of_another_objective_is_refused():
    learner, params = LearnerConfig("rspo", GSPOConfig()), table_params(0)
    batch = scored(make_rollout(), params)
    with pytest.raises(TypeError, match="rspo takes a RSPOConfig, got a GSPOConfig"):
        run_update(batch, params, learner)


def test_the_route_of_another_batch_is_refused():
    learner, params = LearnerConfig(), table_params(0)
    batch = scored(make_rollout(), params)
    fewer_tokens = jax.tree.map(lambda leaf: leaf[..., :-1], batch.old_route)
    with pytest.raises(ValueError, match=r"the old route covers \[N, T\] = \(8, 6\), the rows \(8, 7\)"):
        run_update(batch._replace(old_route=fewer_tokens), params, learner)
