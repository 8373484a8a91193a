"""Generation with tables of next-token logits, a policy with a cache, and a small Transformer: the responses, their
frequencies and ends, and what is reported of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from models import Transformer, TransformerConfig, init_params
from rspo_jax import token_log_probs
from rspo_jax.rollouts import SamplerConfig, generate
from rspo_jax.rollouts.sampler import pad_prompts, truncate_logits
from rspo_jax.routing import route_of, route_reader
from rspo_jax.types import ModelOutput

GREEDY = SamplerConfig(max_new_tokens=8, temperature=0.0)


class TablePolicy:
    """Next-token logits are the row of a table, the parameters [V, V], that the last token chooses."""

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        return ModelOutput(variables["params"][tokens], None, cache)

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, length))

    def repeat_cache(self, cache, repeats):
        return jnp.repeat(cache, repeats, axis=0)


class BagPolicy:
    """Next-token logits depend on how often each token stands in the segment so far, by the parameters [V, V].

    Its cache is a ring like the Transformer's, and it compiles in a fraction of the time.
    """

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        ring, segments, length = cache
        first = length % ring.shape[1]
        ring = jax.lax.dynamic_update_slice(ring, tokens, (0, first))
        segments = jax.lax.dynamic_update_slice(segments, segment_ids, (0, first))
        seen = segment_ids[:, :, None] == segments[:, None, :]
        if tokens.shape[1] > 1:  # a prompt, which begins at slot 0
            slots = jnp.arange(ring.shape[1])
            seen = seen & (slots[None, None, :] <= jnp.arange(tokens.shape[1])[None, :, None])
        params = variables["params"]
        counts = jnp.einsum("bts,bsv->btv", seen.astype(jnp.float32), jax.nn.one_hot(ring, len(params)))
        logits = 3 * jnp.sin(jnp.einsum("btv,vw->btw", counts, params))
        return ModelOutput(logits, None, (ring, segments, length + tokens.shape[1]))

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, length), jnp.int32), jnp.zeros((batch_size, length), jnp.int32), jnp.int32(0)

    def repeat_cache(self, cache, repeats):
        ring, segments, length = cache
        return jnp.repeat(ring, repeats, axis=0), jnp.repeat(segments, repeats, axis=0), length


class RecordingPolicy(TablePolicy):
    """Also notes the tokens and segments of every call that is run."""

    def __init__(self):
        self.calls = []

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None):
        def note(*arrays):
            self.calls.append([np.array(array) for array in arrays])

        jax.debug.callback(note, tokens, segment_ids, ordered=True)
        return super().apply(variables, tokens, positions, segment_ids, cache)


TABLE, BAG = TablePolicy(), BagPolicy()
KEYS = jax.random.split(jax.random.key(0), 4)


def counting_table(vocabulary):
    """Token i is most likely followed by i + 1."""
    table = np.random.default_rng(0).random((vocabulary, vocabulary)).astype(np.float32)
    table[np.arange(vocabulary), (np.arange(vocabulary) + 1) % vocabulary] += 2
    return table


def run(policy, params, prompts, config, stop_tokens=(), seed=0, width=None, pad_id=0):
    tokens, mask = pad_prompts(prompts, width or max(map(len, prompts)), pad_id)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    return jax.tree.map(np.asarray, generate(policy, params, tokens, mask, keys, config, stop_tokens, pad_id))


def test_rows_end_at_a_stop_token_and_sampling_ends_with_the_last_row():
    policy, table = RecordingPolicy(), counting_table(9)
    samples = run(policy, table, [[5, 2], [3], [1, 1, 0], [6], [4]], GREEDY, stop_tokens=(5, 7), pad_id=8)
    jax.effects_barrier()
    expected = [[3, 4, 5], [4, 5], [1, 2, 3, 4, 5], [7], [5]]
    for row, (response, previous) in enumerate(zip(expected, (2, 3, 0, 6, 4), strict=True)):
        length = len(response)
        np.testing.assert_array_equal(samples.tokens[row], response + [8] * (8 - length))
        np.testing.assert_array_equal(samples.mask[row], np.arange(8) < length)
        # Greedy, but reported at temperature 1.
        log_probs = oracles.log_softmax(table)[[previous, *response[:-1]], response]
        np.testing.assert_allclose(samples.log_probs[row, :length], log_probs, rtol=1e-5)
        assert np.all(samples.log_probs[row, length:] == 0)
    assert (samples.tokens.dtype, samples.mask.dtype, samples.log_probs.dtype) == (np.int32, bool, np.float32)

    assert len(policy.calls) == 5  # the prompts, and four steps until the last of five tokens is drawn
    np.testing.assert_array_equal(policy.calls[0][0], [[8, 5, 2], [8, 8, 3], [1, 1, 0], [8, 8, 6], [8, 8, 4]])
    np.testing.assert_array_equal(policy.calls[0][1], [[0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1]])
    for step, (tokens, segment_ids) in enumerate(policy.calls[1:]):
        going = [len(response) > step + 1 for response in expected]
        np.testing.assert_array_equal(segment_ids[:, 0], going)
        np.testing.assert_array_equal(tokens[going, 0], samples.tokens[going, step])


def test_at_most_max_new_tokens():
    policy, table = RecordingPolicy(), counting_table(9)
    config = SamplerConfig(max_new_tokens=3, temperature=0.0)
    samples = run(policy, table, [[2], [0, 7]], config, stop_tokens=(5,))
    jax.effects_barrier()
    np.testing.assert_array_equal(samples.tokens, [[3, 4, 5], [8, 0, 1]])
    assert np.all(samples.mask) and len(policy.calls) == 3


def test_without_stop_tokens_every_row_is_full():
    samples = run(TABLE, counting_table(9), [[2], [0, 7]], GREEDY)
    np.testing.assert_array_equal(samples.tokens, [[3, 4, 5, 6, 7, 8, 0, 1], [8, 0, 1, 2, 3, 4, 5, 6]])
    assert np.all(samples.mask)


def test_top_k_one_equals_greedy():
    table = np.random.default_rng(1).normal(size=(9, 9)).astype(np.float32)
    prompts = [[token] for token in range(9)]
    one = run(TABLE, table, prompts, SamplerConfig(max_new_tokens=8, top_k=1))
    np.testing.assert_array_equal(one.tokens, run(TABLE, table, prompts, GREEDY).tokens)
    np.testing.assert_array_equal(one.log_probs, 0)  # under the distribution drawn from, nothing else was possible


def distribution(logits, config):
    """What one row of logits becomes, in float64."""
    probs = np.exp(oracles.log_softmax(np.asarray(logits, np.float64) / config.temperature))
    order = np.argsort(-probs)
    kept = order[: config.top_k]
    held = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[: np.searchsorted(held, config.top_p) + 1]  # up to the first with which they hold top_p
    return np.where(np.isin(np.arange(len(probs)), kept), probs, 0) / probs[kept].sum()


def assert_frequencies(counts, probs):
    """Pearson's test at the 0.999 quantile (of Wilson and Hilferty); cells of probability zero must be empty."""
    assert np.all(counts[probs == 0] == 0)
    expected = counts.sum() * probs[probs > 0]
    assert np.min(expected) > 5 and expected.size > 9
    statistic = np.sum((counts[probs > 0] - expected) ** 2 / expected)
    variance = 2 / (9 * (expected.size - 1))
    assert statistic < (expected.size - 1) * (1 - variance + 3.09 * variance**0.5) ** 3, statistic


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(max_new_tokens=2, temperature=0.7),
        SamplerConfig(max_new_tokens=2, temperature=1.3, top_k=5, top_p=0.8),
    ],
    ids=["temperature", "truncated"],
)
def test_frequencies(config):
    table = (0.7 * np.random.default_rng(2).normal(size=(6, 6))).astype(np.float32)
    samples = run(TABLE, table, [[3]] * 20_000, config, seed=5)
    probs = np.stack([distribution(row, config) for row in table])
    first, second = samples.tokens.T
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (first, second), 1)
    assert_frequencies(pairs, probs[3][:, None] * probs)
    neighbours = np.zeros((6, 6))  # rows draw independently of each other
    np.add.at(neighbours, (first[::2], first[1::2]), 1)
    assert_frequencies(neighbours, np.outer(probs[3], probs[3]))
    expected = np.log(np.stack([probs[3][first], probs[first, second]], axis=1))
    np.testing.assert_allclose(samples.log_probs, expected, rtol=0, atol=1e-5)


def truncated_by_oracle(logits, top_k, top_p):
    result = np.full(logits.shape, -np.inf)
    for row, row_logits in enumerate(np.asarray(logits, np.float64)):
        ranked = sorted(range(len(row_logits)), key=lambda token: (-row_logits[token], token))[:top_k]
        weights = np.exp(row_logits[ranked] - row_logits[ranked[0]])
        held = 0.0
        for token, prob in zip(ranked, weights / weights.sum(), strict=True):
            if held >= top_p:
                break
            result[row, token] = logits[row, token]
            held += prob
    return result


TRUNCATIONS = [(None, 1.0), (1, 1.0), (3, 1.0), (7, 1.0), (20, 1.0), (None, 0.6), (None, 1e-6), (4, 0.6), (1, 0.5)]
compiled_truncate = jax.jit(lambda logits: [truncate_logits(logits, *truncation) for truncation in TRUNCATIONS])


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
def test_truncation_matches_the_oracle(kind):
    logits = (2 * np.random.default_rng(3).normal(size=(40, 7))).astype(np.float32)
    logits = {"random": logits, "ties": np.round(logits), "equal": np.zeros_like(logits)}[kind]
    for (top_k, top_p), truncated in zip(TRUNCATIONS, compiled_truncate(logits), strict=True):
        np.testing.assert_array_equal(truncated, truncated_by_oracle(logits, top_k, top_p), err_msg=f"{top_k} {top_p}")


@pytest.mark.parametrize("top_p", [1e-30, 1e-50])
def test_the_smallest_top_p_keeps_exactly_the_likeliest_token(top_p):
    logits = np.random.default_rng(4).normal(size=(40, 7)).astype(np.float32)
    truncated = jax.jit(truncate_logits, static_argnums=(1, 2))(logits, None, top_p)
    np.testing.assert_array_equal(truncated, np.where(logits == logits.max(axis=1, keepdims=True), logits, -np.inf))


def test_top_k_alone_keeps_tokens_of_vanishing_probability():
    logits = np.array([[0.0, -20.0, -30.0, -40.0]], np.float32)
    truncated = jax.jit(truncate_logits, static_argnums=(1, 2))(logits, 3, 1.0)
    np.testing.assert_array_equal(truncated, [[0.0, -20.0, -30.0, -np.inf]])


MODEL = TransformerConfig(
    vocab_size=13,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=4,
    expert_size=6,
)
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10], [3, 12], [5, 5, 5]]
EOS = 1


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(functools.partial(init_params, MODEL), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@jax.jit
def model_logits(params, tokens, segment_ids):
    return Transformer(MODEL).apply({"params": params}, tokens, segment_ids=segment_ids).logits


def full_pass(params, prompts, samples, width=4):
    """Tokens [B, width + R] of prompts and responses together, and the logits that score the token after each."""
    tokens, mask = pad_prompts(prompts, width, 0)
    tokens = np.concatenate([tokens, samples.tokens], axis=1)
    segment_ids = np.concatenate([mask, samples.mask], axis=1).astype(np.int32)
    return tokens, np.asarray(model_logits(params, tokens, segment_ids))


@pytest.fixture(scope="module")
def draw(params):
    """Draws once for the same arguments. Greedy answers come from wider padding than `full_pass` has."""

    @functools.cache
    def draw(temperature, seed=0, prompts=tuple(map(tuple, PROMPTS))):
        prompts = [list(prompt) for prompt in prompts]
        config = SamplerConfig(max_new_tokens=7, temperature=temperature)
        return run(Transformer(MODEL), params, prompts, config, (EOS,), seed, width=4 if temperature else 9)

    return draw


def test_greedy_takes_the_likeliest_token_of_the_full_forward_pass_whatever_the_padding(params, draw):
    samples = draw(0.0)
    _, logits = full_pass(params, PROMPTS, samples)
    likeliest = np.argmax(logits[:, 3:-1], axis=-1)
    np.testing.assert_array_equal(samples.tokens[samples.mask], likeliest[samples.mask])
    # The rest is padding, and begins after the first stop token.
    for row_tokens, row_mask in zip(samples.tokens, samples.mask, strict=True):
        stops = np.flatnonzero(row_tokens == EOS)
        np.testing.assert_array_equal(row_mask, np.arange(7) < (stops[0] + 1 if stops.size else 7))
        assert np.all(row_tokens[~row_mask] == 0)
    assert len(np.unique(samples.tokens)) > 3


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_trainer(params, draw, temperature):
    samples = draw(temperature)
    tokens, logits = full_pass(params, PROMPTS, samples)
    expected = token_log_probs(jnp.asarray(logits[:, :-1]), jnp.asarray(tokens[:, 1:]), temperature or 1.0)[:, 3:]
    np.testing.assert_allclose(samples.log_probs[samples.mask], expected[samples.mask], rtol=0, atol=1e-5)
    assert np.all(samples.log_probs[~samples.mask] == 0)


def test_the_key_alone_decides(draw):
    samples = draw(1.0)
    again = draw.__wrapped__(1.0)
    for first, second in zip(samples, again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert np.any(draw(1.0, seed=1).tokens != samples.tokens)


def test_rows_do_not_depend_on_other_rows(draw):
    samples, changed = draw(1.0), draw(1.0, prompts=((3, 4, 5), (9, 2, 2, 2), (7, 8, 9, 10), (11,), (5, 5, 5)))
    assert np.any(samples.tokens[[1, 3]] != changed.tokens[[1, 3]])
    for row in (0, 2, 4):
        np.testing.assert_array_equal(changed.tokens[row], samples.tokens[row])
        np.testing.assert_allclose(changed.log_probs[row], samples.log_probs[row], rtol=0, atol=1e-5)


def test_equal_prompts_draw_differently(draw):
    samples = draw(1.0, prompts=((3, 4),) * 5)
    assert len({tuple(row) for row in samples.tokens}) > 2


@pytest.fixture(scope="module")
def policies(params):
    """Name -> policy and parameters."""
    table = np.random.default_rng(8).normal(size=(MODEL.vocab_size, MODEL.vocab_size)).astype(np.float32)
    return {"bag": (BAG, table), "transformer": (Transformer(MODEL), params)}


@pytest.mark.parametrize(
    ("name", "temperature", "slots"),
    [("bag", 0.0, 3), ("bag", 1.0, 1), ("bag", 1.0, 4), ("bag", 1.0, 9), ("transformer", 1.0, 4)],
)
def test_responses_do_not_depend_on_the_slots(policies, name, temperature, slots):
    prompts = [*PROMPTS, [9], [8, 7], [3, 3, 3, 3], [10, 2]]
    all_at_once, in_slots = (
        run(
            *policies[name],
            prompts,
            SamplerConfig(max_new_tokens=7, temperature=temperature, slots=number),
            (EOS, 4),
            width=4,
        )
        for number in (None, slots)
    )
    assert len(set(all_at_once.mask.sum(axis=1))) > 2  # slots are free at different times
    np.testing.assert_array_equal(in_slots.tokens, all_at_once.tokens)
    np.testing.assert_array_equal(in_slots.mask, all_at_once.mask)
    np.testing.assert_allclose(in_slots.log_probs, all_at_once.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "slots"), [("bag", None), ("bag", 6), ("bag", 4), ("transformer", None)])
def test_several_responses_to_a_prompt_share_its_reading(policies, name, slots):
    config = SamplerConfig(max_new_tokens=7, slots=slots)
    (policy, params), keys = policies[name], jax.random.split(jax.random.key(3), 15)
    tokens, mask = pad_prompts(PROMPTS, 4, 0)
    shared = generate(policy, params, tokens, mask, keys, config, (EOS, 4), repeats=3)
    tokens, mask = (np.repeat(array, 3, axis=0) for array in (tokens, mask))
    alone = generate(policy, params, tokens, mask, keys, config, (EOS, 4))
    assert shared.tokens.shape == (15, 7)
    np.testing.assert_array_equal(shared.tokens, alone.tokens)
    np.testing.assert_array_equal(shared.mask, alone.mask)
    np.testing.assert_allclose(shared.log_probs, alone.log_probs, rtol=0, atol=1e-5)
    assert len({row.tobytes() for row in np.asarray(shared.tokens)}) > 8


@jax.jit
def model_route(params, tokens, segment_ids):
    output = Transformer(MODEL).apply({"params": params}, tokens, segment_ids=segment_ids, router_reader=route_reader())
    return route_of(output.reading)


@pytest.mark.parametrize("slots", [None, 4])
def test_the_recorded_experts_are_those_of_the_full_forward_pass(params, slots):
    """With one prefill for all, and in slots that read later prompts token by token."""
    config = SamplerConfig(max_new_tokens=7, slots=slots)
    keys = jax.random.split(jax.random.key(3), 15)
    prompts, mask = pad_prompts(PROMPTS, 4, 0)
    draw = functools.partial(generate, Transformer(MODEL), params, prompts, mask, keys, config, (EOS, 4), repeats=3)
    plain, recorded = draw(), draw(record_route=True)
    assert plain.route is None
    for name in ("tokens", "mask", "log_probs"):
        np.testing.assert_array_equal(getattr(recorded, name), getattr(plain, name))
    tokens = np.concatenate([np.repeat(prompts, 3, axis=0), recorded.tokens], axis=1)
    segment_ids = np.concatenate([np.repeat(mask, 3, axis=0), recorded.mask], axis=1).astype(np.int32)
    expected = np.asarray(model_route(params, tokens[:, :-1], segment_ids[:, :-1]))
    # An input is read if the token after it belongs to the sequence, too.
    read = np.broadcast_to((segment_ids[:, :-1] * segment_ids[:, 1:])[:, None, None, :] > 0, expected.shape)
    assert recorded.route.dtype == jnp.uint8 and recorded.route.shape == (15, 2, 2, 4 + 7 - 1)
    assert len(set(np.sum(recorded.mask, axis=1).tolist())) > 2 and len(np.unique(expected[read])) == 4
    np.testing.assert_array_equal(recorded.route, np.where(read, expected, 0))


def test_a_model_without_experts_has_no_route_to_record():
    dense = Transformer(TransformerConfig(num_experts=0, dense_size=4, hidden_size=8, num_layers=1))
    tokens, mask = pad_prompts([[5, 2]], 2, 0)
    weights = init_params(dense.config, jax.random.key(0))
    with pytest.raises(ValueError, match="this model has no experts, so it has no route to record: leave record_route"):
        generate(dense, weights, tokens, mask, KEYS[:1], GREEDY, (7,), record_route=True)


def test_a_prompt_is_read_once_for_all_its_responses():
    policy, table = RecordingPolicy(), counting_table(9)
    tokens, mask = pad_prompts([[5, 2], [3]], 2, 0)
    generate(policy, table, tokens, mask, KEYS[:4], GREEDY, (7,), repeats=2)
    jax.effects_barrier()
    np.testing.assert_array_equal(policy.calls[0][0], [[5, 2], [0, 3]])
    np.testing.assert_array_equal(policy.calls[1][0], [[3], [3], [4], [4]])


def test_repeats_that_are_refused():
    tokens, mask = pad_prompts([[5, 2]], 2, 0)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        generate(TABLE, counting_table(9), tokens, mask, KEYS[:1], GREEDY, (7,), repeats=0)


def test_a_free_slot_takes_the_next_prompt_at_once():
    policy, table = RecordingPolicy(), counting_table(9)
    # Responses to 7 are long, those to 3 and 6 short.
    prompts = [[7], [3], [1, 3], [6], [3], [5, 3]]
    config = SamplerConfig(max_new_tokens=6, temperature=0.0, slots=2)
    samples = run(policy, table, prompts, config, stop_tokens=(4,), pad_id=0)
    jax.effects_barrier()
    expected = [[8, 0, 1, 2, 3, 4], [4], [4], [7, 8, 0, 1, 2, 3], [4], [4]]
    for row, response in enumerate(expected):
        np.testing.assert_array_equal(samples.tokens[row][samples.mask[row]], response)
    # Slot 0 draws the first response and feeds and draws the fifth and the last; slot 1 does the others beside it.
    steps = np.array([call[0][:, 0] for call in policy.calls[1:]])
    segments = np.array([call[1][:, 0] for call in policy.calls[1:]])
    np.testing.assert_array_equal(steps[:, 0], [8, 0, 1, 2, 3, 3, 5, 3])
    np.testing.assert_array_equal(segments[:, 0], [1, 1, 1, 1, 1, 2, 3, 3])
    np.testing.assert_array_equal(steps[:, 1], [1, 3, 6, 7, 8, 0, 1, 2])
    np.testing.assert_array_equal(segments[:, 1], [2, 2, 3, 3, 3, 3, 3, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 .*, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 .*, got nan"),
        ({"slots": 0}, "slots must be at least 1, got 0; leave it out to draw all responses at once"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": -1}, "top_k must be at least 1, got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, r"top_p must lie in \(0, 1\], got 1.01"),
        ({"top_p": float("nan")}, r"top_p must lie in \(0, 1\], got nan"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**arguments)


def test_prompts_are_padded_on_the_left():
    tokens, mask = pad_prompts([[5, 6], [7], [1, 2, 3]], 3, pad_id=9)
    np.testing.assert_array_equal(tokens, [[9, 5, 6], [9, 9, 7], [1, 2, 3]])
    np.testing.assert_array_equal(mask, [[False, True, True], [False, False, True], [True, True, True]])
    assert tokens.dtype == np.int32 and mask.dtype == bool


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 has 0 tokens, which does not fit the range 1 to 3"),
        ([[1, 2, 3, 4]], "prompt 0 has 4 tokens, which does not fit the range 1 to 3"),
    ],
)
def test_prompts_that_do_not_fit(prompts, message):
    with pytest.raises(ValueError, match=message):
        pad_prompts(prompts, 3, 0)


@pytest.mark.parametrize(("tokens_shape", "mask_shape"), [((3,), (3,)), ((2, 3), (2, 2)), ((1, 2, 3), (1, 2, 3))])
def test_shapes_that_do_not_fit(tokens_shape, mask_shape):
    tokens, mask = np.zeros(tokens_shape, np.int32), np.ones(mask_shape, bool)
    with pytest.raises(ValueError, match=r"prompts and prompt_mask must both be \[B, P\]"):
        generate(TABLE, counting_table(4), tokens, mask, KEYS[:2], GREEDY, (1,))


@pytest.mark.parametrize(("keys", "repeats"), [(KEYS[:1], 1), (KEYS[:2], 2), (KEYS[0], 1)], ids=["1", "2", "scalar"])
def test_keys_that_are_not_one_a_response(keys, repeats):
    tokens, mask = pad_prompts([[1, 2], [3]], 2, 0)
    with pytest.raises(ValueError, match="responses need as many keys"):
        generate(TABLE, counting_table(4), tokens, mask, keys, GREEDY, (1,), repeats=repeats)
