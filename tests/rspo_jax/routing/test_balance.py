"""Load balance and router z-loss against float64 oracles: values, gradients, padding, micro-batches and refusals.

Router logits are read layer by layer, as a model does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from rspo_jax import trace_router
from rspo_jax.objectives import RegularizerConfig
from rspo_jax.routing import expert_fractions, join_readers, load_balance_reader, router_loss_of, z_loss_reader
from rspo_jax.training import LearnerConfig
from rspo_jax.training.loss import batch_context, part_terms
from rspo_jax.types import ModelOutput, PackedBatch, PackedRows, RouterReading, ScoredBatch

L, N, T, E, K = 3, 4, 5, 6, 2
RNG = np.random.default_rng(0)
LOGITS, OLD_LOGITS = (RNG.normal(size=(L, N, T, E)).astype(np.float32) for _ in range(2))
LENGTHS = np.array([5, 3, 1, 0])
SEGMENT_IDS = (np.arange(T) < LENGTHS[:, None]).astype(np.int32)
REAL = SEGMENT_IDS != 0
compiled_trace = jax.jit(trace_router, static_argnums=1)
compiled_fractions = jax.jit(expert_fractions, static_argnums=2)
TRACE = compiled_trace(OLD_LOGITS, K)
FRACTIONS = compiled_fractions(TRACE.expert_ids, SEGMENT_IDS, E)


def read(reader, logits):
    def step(carry, layer):
        return layer[0](carry, *layer[1:])

    return RouterReading(*jax.lax.scan(step, reader.carry, (reader.read, logits, jnp.zeros((*logits.shape[:3], K)))))


def fractions_of(logits, segment_ids, k=K):
    """Share of slots of the k largest logits, float64 [L, E]."""
    counts = np.zeros((logits.shape[0], logits.shape[-1]))
    for layer, row, token in np.ndindex(logits.shape[:3]):
        if segment_ids[row, token]:
            counts[layer, np.argsort(-logits[layer, row, token])[:k]] += 1
    return counts / counts.sum(axis=1, keepdims=True)


def probabilities_of(logits, score):
    if score == "softmax":
        return np.exp(oracles.log_softmax(logits))
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return scores / scores.sum(axis=-1, keepdims=True)


def balance_oracle(logits, fractions, real, score="softmax"):
    """Mean over layers of E · Σ_e f_e · P_e."""
    layers = []
    for logits_of_layer, share in zip(logits, fractions, strict=True):
        mean_probability = probabilities_of(logits_of_layer, score)[real].mean(axis=0)
        layers.append(len(share) * np.sum(share * mean_probability))
    return np.mean(layers)


def z_oracle(logits, real):
    logits = logits.astype(np.float64)
    return np.mean(np.log(np.exp(logits).sum(axis=-1))[:, real] ** 2)


def derivative(function, at):
    result = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        step = np.zeros(at.shape)
        step[index] = 1e-6
        result[index] = (function(at + step) - function(at - step)) / 2e-6
    return result


def balance(logits, fractions, segment_ids, score):
    reader = load_balance_reader(fractions, segment_ids.shape, score)
    return router_loss_of(read(reader, logits), segment_ids).reduce()


def z_loss(logits, segment_ids):
    return router_loss_of(read(z_loss_reader(segment_ids.shape), logits), segment_ids).reduce()


balance_and_gradient = jax.jit(jax.value_and_grad(balance), static_argnums=3)
z_and_gradient = jax.jit(jax.value_and_grad(z_loss))


# The shares of the old route


def test_shares_are_those_of_the_slots_of_real_tokens():
    assert FRACTIONS.shape == (L, E) and FRACTIONS.dtype == jnp.float32
    np.testing.assert_allclose(FRACTIONS, fractions_of(OLD_LOGITS, SEGMENT_IDS), rtol=1e-6)
    # In micro-batches, which lead the arrays, they are those of the whole.
    parts = (np.reshape(array, (2, 2, *array.shape[1:])) for array in (TRACE.expert_ids, SEGMENT_IDS))
    np.testing.assert_array_equal(compiled_fractions(*parts, E), FRACTIONS)


def test_shares_without_a_real_token_are_zero():
    np.testing.assert_array_equal(compiled_fractions(TRACE.expert_ids, 0 * SEGMENT_IDS, E), 0)


def test_the_route_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"the old route covers .* = \(4, 5\), the rows \(2, 5\)"):
        expert_fractions(TRACE.expert_ids, SEGMENT_IDS[:2], E)


# The losses


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_balance_and_its_gradient(score):
    fractions = fractions_of(OLD_LOGITS, SEGMENT_IDS)
    value, gradient = balance_and_gradient(LOGITS, FRACTIONS, SEGMENT_IDS, score)
    assert value.dtype == jnp.float32
    assert value == pytest.approx(balance_oracle(LOGITS, fractions, REAL, score), rel=1e-6)
    # No gradient flows through f, neither here nor in the oracle.
    expected = derivative(lambda logits: balance_oracle(logits, fractions, REAL, score), LOGITS.astype(np.float64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
    assert np.abs(expected).max() > 1e-3


def test_z_loss_and_its_gradient():
    value, gradient = z_and_gradient(LOGITS, SEGMENT_IDS)
    assert value == pytest.approx(z_oracle(LOGITS, REAL), rel=1e-6)
    expected = derivative(lambda logits: z_oracle(logits, REAL), LOGITS.astype(np.float64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_on_policy_the_load_balance_is_that_of_switch():
    """E · Σ_e f_e · P_e with both from the same routers and K = 1, written down again from the paper."""
    fractions = compiled_fractions(compiled_trace(LOGITS, 1).expert_ids, SEGMENT_IDS, E)
    ours, _ = balance_and_gradient(LOGITS, fractions, SEGMENT_IDS, "softmax")
    layers = []
    for logits in LOGITS:
        tokens = np.exp(oracles.log_softmax(logits))[REAL]
        dispatched = np.bincount(tokens.argmax(axis=1), minlength=E) / len(tokens)
        layers.append(E * dispatched @ tokens.mean(axis=0))
    assert ours == pytest.approx(np.mean(layers), rel=1e-6)


def test_balance_is_one_and_collapse_is_the_number_of_experts():
    segment_ids, fractions = np.ones((N, T), np.int32), np.full((L, E), 1 / E, np.float32)
    assert balance_and_gradient(LOGITS, fractions, segment_ids, "softmax")[0] == pytest.approx(1.0, rel=1e-6)
    collapsed = np.broadcast_to(100 * np.eye(E)[0], LOGITS.shape).astype(np.float32)
    one_hot = compiled_fractions(compiled_trace(collapsed, 1).expert_ids, segment_ids, E)
    assert balance_and_gradient(collapsed, one_hot, segment_ids, "softmax")[0] == pytest.approx(E, rel=1e-6)


@jax.jit
def both_losses(logits, segment_ids):
    """Both losses before their division, read in one pass, and the gradient of the sum of their totals."""

    def total(logits):
        rows = segment_ids.shape
        readers = load_balance_reader(FRACTIONS, rows), z_loss_reader(rows)
        reading = read(join_readers(*readers), logits)
        losses = [router_loss_of(RouterReading(carry, None), segment_ids) for carry in reading.carry]
        return losses[0].total + losses[1].total, losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return losses, gradient


def in_parts(parts):
    """Both losses and their gradient, from micro-batches of the given rows, beside which the other rows are padding."""
    results, gradient = [], np.zeros(LOGITS.shape)
    for rows in parts:
        losses, by_logits = both_losses(LOGITS, SEGMENT_IDS * np.isin(np.arange(N), rows)[:, None])
        results.append(losses)
        gradient += np.asarray(by_logits)
    losses = jax.tree.map(lambda *leaves: np.sum(leaves), *results)
    assert all(loss.weight == REAL.sum() for loss in losses)
    return [loss.total / loss.weight for loss in losses], gradient / REAL.sum(), results


def test_micro_batches_add_up_to_the_whole():
    """The mean of their own losses is another number: f would be that of a part, and so would the denominator."""
    balance_loss, by_balance = balance_and_gradient(LOGITS, FRACTIONS, SEGMENT_IDS, "softmax")
    z, by_z = z_and_gradient(LOGITS, SEGMENT_IDS)
    by_both = np.asarray(by_balance) + np.asarray(by_z)
    for parts in ([range(N)], [[0, 3], [2, 1]]):
        losses, gradient, results = in_parts(parts)
        assert losses == pytest.approx([float(balance_loss), float(z)], rel=1e-6)
        np.testing.assert_allclose(gradient, by_both, rtol=1e-5, atol=1e-8)
    means = [z_loss.total / z_loss.weight for _, z_loss in results]
    assert np.mean(means) != pytest.approx(float(z), rel=1e-4)


class Policy:
    """A stand-in whose parameters are the router logits of its rows. Its logits do not depend on them."""

    router_score = "softmax"

    def apply(self, variables, tokens, segment_ids=None, router_reader=None):
        logits = variables["params"][:, tokens[:, 0]]  # the first token says which row it is
        reading = None if router_reader is None else read(router_reader, logits)
        return ModelOutput(jnp.zeros((*tokens.shape, 7)), logits, reading=reading)


def part_of(rows):
    """Some of the rows, each one response of all its tokens."""
    numbered = np.broadcast_to(rows[:, None], (len(rows), T)).astype(np.int32)
    places = np.arange(len(rows) * T, dtype=np.int32).reshape(-1, T)
    zeros, mask = np.zeros((len(rows), T), np.float32), REAL[rows]
    packed = PackedBatch(PackedRows(numbered, numbered, SEGMENT_IDS[rows]), places, mask, zeros, zeros[:, 0])
    return ScoredBatch(packed, zeros, jax.tree.map(lambda leaf: np.asarray(leaf)[rows], TRACE))


@pytest.mark.parametrize(("name", "balance_coefficient", "z_coefficient"), [("rspo", 0.25, 0.0), ("dapo", 0.25, 0.5)])
def test_a_coefficient_multiplies_the_loss_and_nothing_else(name, balance_coefficient, z_coefficient):
    """With advantages of 0 the total is the coefficient times the loss, whatever the objective and its denominator.

    The defect of a peer was to add (1 + coefficient) times the loss.
    """
    regularizers = RegularizerConfig(load_balance_coefficient=balance_coefficient, router_z_coefficient=z_coefficient)
    config = LearnerConfig(name, regularizers=regularizers, diagnostics=False)
    parts = jax.tree.map(lambda *leaves: np.stack(leaves), part_of(np.array([0, 3])), part_of(np.array([2, 1])))

    @jax.jit
    @jax.value_and_grad
    def loss(params, parts):
        context = batch_context(Policy(), params, parts, config)
        terms = jax.lax.map(lambda part: part_terms(Policy(), params, part, config, context)[0], parts)
        return jnp.sum(terms.total) / jnp.sum(terms.weight)

    value, gradient = loss(LOGITS, parts)
    balance_loss, by_balance = map(np.asarray, balance_and_gradient(LOGITS, FRACTIONS, SEGMENT_IDS, "softmax"))
    z, by_z = map(np.asarray, z_and_gradient(LOGITS, SEGMENT_IDS))
    assert value == pytest.approx(float(balance_coefficient * balance_loss + z_coefficient * z), rel=1e-6)
    np.testing.assert_allclose(gradient, balance_coefficient * by_balance + z_coefficient * by_z, rtol=1e-5, atol=1e-8)


def test_padding_has_no_effect():
    dirty = np.where(REAL[None, :, :, None], LOGITS, np.float32(30) * RNG.normal(size=LOGITS.shape)).astype(np.float32)
    old = np.where(REAL[None, :, :, None], OLD_LOGITS, -OLD_LOGITS)
    fractions = compiled_fractions(compiled_trace(old, K).expert_ids, SEGMENT_IDS, E)
    for clean, other in (
        (
            balance_and_gradient(LOGITS, FRACTIONS, SEGMENT_IDS, "softmax"),
            balance_and_gradient(dirty, fractions, SEGMENT_IDS, "softmax"),
        ),
        (z_and_gradient(LOGITS, SEGMENT_IDS), z_and_gradient(dirty, SEGMENT_IDS)),
    ):
        np.testing.assert_array_equal(clean[0], other[0])
        np.testing.assert_array_equal(clean[1], other[1])
        np.testing.assert_array_equal(np.asarray(clean[1])[:, ~REAL], 0.0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="z-loss is for softmax routers"):
        z_loss_reader((N, T), "sigmoid")
    for make in (lambda: z_loss_reader((N, T), "tanh"), lambda: load_balance_reader(jnp.ones((L, E)), (N, T), "tanh")):
        with pytest.raises(ValueError, match="score must be one of softmax, sigmoid; got 'tanh'"):
            make()
