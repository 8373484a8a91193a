"""Scores from hidden states against float64 oracles and against the form with logits.

Most tests share a shape, and with it the compiled programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from rspo_jax.log_probs import head_log_probs, token_entropy, token_log_probs
from rspo_jax.log_probs.from_hidden import MIN_COLUMNS, columns_for

B, T, D, V = 2, 5, 7, 37


def random_inputs(seed=0, vocab_size=V, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(scale * rng.normal(size=(D, vocab_size)), dtype)
    targets = rng.integers(0, vocab_size, (B, T))
    targets[0, :2] = [0, vocab_size - 1]
    return hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(rng.normal(size=(B, T)), jnp.float32)


def expected(hidden, head, targets, weights, temperature=1.0):
    """Log-probs, entropy, and the gradients of Σ weights · log-probs in hidden and head, in float64."""
    hidden, head, weights = (np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden, head, weights))
    targets = np.asarray(targets)
    log_p = oracles.log_softmax(hidden @ head / temperature)
    logits_gradient = weights[..., None] * (np.eye(head.shape[1])[targets] - np.exp(log_p)) / temperature
    return (
        np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0],
        -(np.exp(log_p) * log_p).sum(axis=-1),
        logits_gradient @ head.T,
        np.einsum("btd,btv->dv", hidden, logits_gradient),
    )


def scores_and_gradients(function, hidden, head, targets, weights):
    """Scores, and the gradients of Σ weights · log-probs. The entropy is added, and must not show in the gradients."""

    def loss(hidden, head):
        scores = function(hidden, head, targets)
        return jnp.sum(scores[0] * weights) + jnp.sum(scores[1]), tuple(scores)

    gradients, scores = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
    return *scores, *gradients


@functools.cache
def compiled(block_columns, temperature):
    score = functools.partial(head_log_probs, temperature=temperature, block_columns=block_columns)
    return jax.jit(functools.partial(scores_and_gradients, score))


@functools.cache
def compiled_plain(temperature):
    return jax.jit(functools.partial(scores_and_gradients, functools.partial(plain, temperature=temperature)))


def plain(hidden, head, targets, temperature=1.0):
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    entropy = token_entropy(jax.lax.stop_gradient(logits), temperature)
    return token_log_probs(logits, targets, temperature), entropy


# A division by the temperature is left out at 1, whatever the blocks.
@pytest.mark.parametrize(("block_columns", "temperature"), [(None, 0.5), (1, 0.5), (8, 0.5), (36, 0.5), (None, 1.0)])
def test_values_and_gradients_match_oracle_and_plain_form(block_columns, temperature):
    inputs = random_inputs()
    got = compiled(block_columns, temperature)(*inputs)
    assert all(array.dtype == jnp.float32 for array in got)
    for array, exact in zip(got, expected(*inputs, temperature), strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-5, atol=1e-5)
    for array, other in zip(got, compiled_plain(temperature)(*inputs), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)


def test_blocks_as_wide_as_the_vocabulary_or_wider_are_one_block():
    programs = {str(compiled(block_columns, 0.5).trace(*random_inputs()).jaxpr) for block_columns in (None, V, V + 13)}
    assert len(programs) == 1


def test_chosen_blocks_of_a_vocabulary_that_they_do_not_divide():
    inputs = random_inputs(seed=1, vocab_size=MIN_COLUMNS * 2 + 77)
    repeats = 103  # as few as make a block no wider than the least
    tall = [np.tile(x, (1, repeats, *([1] * (x.ndim - 2)))) if x.shape[:2] == (B, T) else x for x in inputs]
    assert columns_for(B * T * repeats, inputs[1].shape[1]) == MIN_COLUMNS
    got = compiled(None, 1.0)(*tall)
    log_probs, entropy, hidden_gradient, head_gradient = expected(*inputs)
    np.testing.assert_allclose(got[0][:, :T], log_probs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1][:, -T:], entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2][:, :T], hidden_gradient, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(got[3]) / repeats, head_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_columns", [None, 8])
def test_bfloat16_is_accumulated_in_float32(block_columns):
    inputs = random_inputs(seed=2, dtype=jnp.bfloat16)
    got = compiled(block_columns, 0.7)(*inputs)
    assert [array.dtype for array in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    exact = expected(*inputs, 0.7)
    for array, oracle in zip(got[:2], exact[:2], strict=True):
        np.testing.assert_allclose(array, oracle, rtol=1e-5, atol=1e-5)
    for array, oracle in zip(got[2:], exact[2:], strict=True):  # one rounding of each operand and of the result
        np.testing.assert_allclose(np.asarray(array, np.float32), oracle, rtol=2**-7, atol=2**-7)


def test_float64_stays_float64():
    hidden, head, targets, weights = random_inputs(seed=6)
    exact = expected(hidden, head, targets, weights, 0.5)
    with jax.enable_x64(True):
        inputs = hidden.astype(jnp.float64), head.astype(jnp.float64), targets, weights.astype(jnp.float64)
        got = compiled(8, 0.5)(*inputs)
        assert all(array.dtype == jnp.float64 for array in got)
    for array, oracle in zip(got, exact, strict=True):
        np.testing.assert_allclose(array, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_columns", [None, 8])
def test_large_logits_stay_exact(block_columns):
    _, _, targets, _ = random_inputs()
    hidden, head = np.zeros((B, T, D), np.float32), np.zeros((D, V), np.float32)
    hidden[..., 0], head[0] = [1e4, -1e4, 1.0, -1.0, 0.0], np.linspace(-1, 1, V)
    inputs = [*map(jnp.asarray, (hidden, head)), targets, jnp.ones((B, T))]
    for array, exact in zip(compiled(block_columns, 0.5)(*inputs), expected(*inputs, 0.5), strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-5, atol=1e-5)


def test_entropy_carries_no_gradient():
    hidden, head, targets, weights = random_inputs(seed=3)
    *_, by_hidden, by_head = compiled(None, 0.5)(hidden, head, targets, 0 * weights)
    assert not np.any(by_hidden) and not np.any(by_head)


def test_entropy_has_the_gradient_of_the_plain_form_where_it_is_asked_for():
    hidden, head, targets, weights = random_inputs(seed=5)

    def plain(hidden, head):
        logits = jnp.einsum("btd,dv->btv", hidden, head)
        both = token_log_probs(logits, targets, 0.7) + 2 * token_entropy(logits, 0.7)
        return jnp.sum(weights * both)

    def fused(hidden, head, block_columns):
        score = functools.partial(head_log_probs, entropy_gradient=True, block_columns=block_columns)
        log_probs, entropy = score(hidden, head, targets, 0.7)
        return jnp.sum(weights * (log_probs + 2 * entropy))

    forms = [plain, *(functools.partial(fused, block_columns=block_columns) for block_columns in (None, 8))]
    gradients = jax.jit(lambda *arrays: [jax.grad(form, argnums=(0, 1))(*arrays) for form in forms])(hidden, head)
    for got in gradients[1:]:
        for gradient, exact in zip(got, gradients[0], strict=True):
            assert np.abs(exact).max() > 0.01
            np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)


def test_inside_scan_checkpoint_and_vmap():
    hidden, head, targets, weights = random_inputs(seed=4)
    score = functools.partial(head_log_probs, temperature=0.5, block_columns=8)
    direct = compiled(8, 0.5)(hidden, head, targets, weights)

    def rows_one_by_one(hidden, head, targets):
        body = jax.checkpoint(lambda carry, row: (carry, score(row[0][None], head, row[1][None])))
        return tuple(x[:, 0] for x in jax.lax.scan(body, 0, (hidden, targets))[1])

    def mapped(hidden, head, targets):
        scores = jax.vmap(score, in_axes=(0, None, 0))(hidden[:, None], head, targets[:, None])
        return tuple(x[:, 0] for x in scores)

    forms = jax.jit(lambda *arrays: [scores_and_gradients(form, *arrays) for form in (rows_one_by_one, mapped)])
    for got in forms(hidden, head, targets, weights):
        for array, same in zip(got, direct, strict=True):
            np.testing.assert_allclose(array, same, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block_columns", [None, 8])
def test_target_outside_the_vocabulary_is_not_a_number(block_columns):
    hidden, head, targets, weights = random_inputs(seed=5)
    targets = np.array(targets)
    targets[0, 0], targets[1, 1] = V, -1
    log_probs = compiled(block_columns, 0.5)(hidden, head, targets, weights)[0]
    assert np.argwhere(np.isnan(log_probs)).tolist() == [[0, 0], [1, 1]]


def test_no_array_of_all_logits():
    tokens, vocab_size = 512, 16 * MIN_COLUMNS
    shapes = (
        jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, vocab_size), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )

    def gradient(function):
        return jax.jit(jax.grad(lambda h, w, t: function(h, w, t)[0].sum(), argnums=(0, 1)))

    def temporary_bytes(function):
        analysis = gradient(function).lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    narrow = functools.partial(head_log_probs, block_columns=vocab_size // 64)
    assert temporary_bytes(narrow) * 20 <= temporary_bytes(plain)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    hidden, head, targets, _ = random_inputs()
    with pytest.raises(ValueError, match="temperature"):
        head_log_probs(hidden, head, targets, temperature=temperature)


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (0, lambda hidden: hidden[0], ValueError, "hidden must have axes"),
        (0, lambda hidden: hidden[..., 1:], ValueError, "head has shape"),
        (0, lambda hidden: hidden.astype(jnp.bfloat16), TypeError, "one floating dtype"),
        (1, lambda head: head.T, ValueError, "transpose a tied embedding"),
        (1, lambda head: head[:, :0], ValueError, "vocabulary is empty"),
        (2, lambda targets: targets[:, 1:], ValueError, "targets have shape"),
        (2, lambda targets: targets.astype(jnp.float32), TypeError, "integer token ids"),
    ],
)
def test_bad_inputs_are_refused(position, change, error, message):
    inputs = list(random_inputs()[:3])
    inputs[position] = change(inputs[position])
    hidden, head, targets = inputs
    with pytest.raises(error, match=message):
        head_log_probs(hidden, head, targets)


def test_empty_blocks_are_refused():
    hidden, head, targets, _ = random_inputs()
    with pytest.raises(ValueError, match="block_columns"):
        head_log_probs(hidden, head, targets, block_columns=0)
