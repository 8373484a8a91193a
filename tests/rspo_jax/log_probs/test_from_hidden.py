"""Scores from hidden states against float64 oracles and against the form with logits. Knows the public functions only,
and the size of a block."""

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

from rspo_jax.log_probs import head_log_probs, token_entropy, token_log_probs
from rspo_jax.log_probs.from_hidden import MIN_COLUMNS, columns_for

B, T, D, V = 2, 5, 7, 37
BLOCKS = [None, 1, 8, 36, 37, 50]


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
    def loss(hidden, head):
        scores = function(hidden, head, targets)
        return jnp.sum(scores[0] * weights), tuple(scores)

    gradients, scores = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    return *scores, *gradients


def plain(hidden, head, targets, temperature=1.0):
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    entropy = token_entropy(jax.lax.stop_gradient(logits), temperature)
    return token_log_probs(logits, targets, temperature), entropy


@pytest.mark.parametrize("block_columns", BLOCKS)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_values_and_gradients_match_oracle_and_plain_form(block_columns, temperature):
    inputs = random_inputs()
    score = functools.partial(head_log_probs, temperature=temperature, block_columns=block_columns)
    got = scores_and_gradients(score, *inputs)
    assert all(array.dtype == jnp.float32 for array in got)
    for array, exact in zip(got, expected(*inputs, temperature), strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-5, atol=1e-5)
    for array, other in zip(
        got, scores_and_gradients(functools.partial(plain, temperature=temperature), *inputs), strict=True
    ):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)


def test_chosen_blocks_of_a_vocabulary_that_they_do_not_divide():
    inputs = random_inputs(seed=1, vocab_size=MIN_COLUMNS * 2 + 77)
    tall = tuple(jnp.tile(x, (1, 300, *([1] * (x.ndim - 2)))) if x.shape[:2] == (B, T) else x for x in inputs)
    assert columns_for(B * T * 300, inputs[1].shape[1]) == MIN_COLUMNS
    got = scores_and_gradients(head_log_probs, *tall)
    log_probs, entropy, hidden_gradient, head_gradient = expected(*inputs)
    np.testing.assert_allclose(got[0][:, :T], log_probs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1][:, -T:], entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[2][:, :T], hidden_gradient, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[3] / 300, head_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_columns", [None, 8])
def test_bfloat16_is_accumulated_in_float32(block_columns):
    inputs = random_inputs(seed=2, dtype=jnp.bfloat16)
    score = functools.partial(head_log_probs, temperature=0.7, block_columns=block_columns)
    got = scores_and_gradients(score, *inputs)
    assert [array.dtype for array in got] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    exact = expected(*inputs, 0.7)
    for array, oracle in zip(got[:2], exact[:2], strict=True):
        np.testing.assert_allclose(array, oracle, rtol=1e-5, atol=1e-5)
    for array, oracle in zip(got[2:], exact[2:], strict=True):  # one rounding of each operand and of the result
        np.testing.assert_allclose(array.astype(jnp.float32), oracle, rtol=2**-7, atol=2**-7)


def test_float64_stays_float64():
    hidden, head, targets, weights = random_inputs(seed=6)
    exact = expected(hidden, head, targets, weights)
    with jax.enable_x64(True):
        inputs = hidden.astype(jnp.float64), head.astype(jnp.float64), targets, weights.astype(jnp.float64)
        got = scores_and_gradients(functools.partial(head_log_probs, block_columns=8), *inputs)
        assert all(array.dtype == jnp.float64 for array in got)
    for array, oracle in zip(got, exact, strict=True):
        np.testing.assert_allclose(array, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_columns", [None, 8])
def test_large_logits_stay_exact(block_columns):
    hidden = jnp.asarray([[[1e4], [-1e4], [1.0]]], jnp.float32)
    head = jnp.asarray(np.linspace(-1, 1, 17)[None], jnp.float32)
    targets, weights = jnp.asarray([[0, 0, 16]]), jnp.ones((1, 3))
    score = functools.partial(head_log_probs, block_columns=block_columns)
    got = scores_and_gradients(score, hidden, head, targets, weights)
    for array, exact in zip(got, expected(hidden, head, targets, weights), strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-5, atol=1e-5)


def test_entropy_carries_no_gradient():
    hidden, head, targets, _ = random_inputs(seed=3)
    gradients = jax.grad(lambda h, w: head_log_probs(h, w, targets).entropy.sum(), argnums=(0, 1))(hidden, head)
    assert all(not np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("block_columns", [None, 8])
def test_entropy_has_the_gradient_of_the_plain_form_where_it_is_asked_for(block_columns):
    hidden, head, targets, weights = random_inputs(seed=5)

    def plain(hidden, head):
        logits = jnp.einsum("btd,dv->btv", hidden, head)
        both = token_log_probs(logits, targets, 0.7) + 2 * token_entropy(logits, 0.7)
        return jnp.sum(weights * both)

    def fused(hidden, head):
        score = functools.partial(head_log_probs, entropy_gradient=True, block_columns=block_columns)
        log_probs, entropy = score(hidden, head, targets, 0.7)
        return jnp.sum(weights * (log_probs + 2 * entropy))

    expected = jax.grad(plain, argnums=(0, 1))(hidden, head)
    for gradient, exact in zip(jax.grad(fused, argnums=(0, 1))(hidden, head), expected, strict=True):
        assert np.abs(exact).max() > 0.01
        np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)


def test_inside_scan_checkpoint_and_vmap():
    hidden, head, targets, weights = random_inputs(seed=4)
    score = functools.partial(head_log_probs, block_columns=8)
    direct = scores_and_gradients(score, hidden, head, targets, weights)

    def rows_one_by_one(hidden, head, targets):
        body = jax.checkpoint(lambda carry, row: (carry, score(row[0][None], head, row[1][None])))
        return tuple(x[:, 0] for x in jax.lax.scan(body, 0, (hidden, targets))[1])

    def mapped(hidden, head, targets):
        scores = jax.vmap(score, in_axes=(0, None, 0))(hidden[:, None], head, targets[:, None])
        return tuple(x[:, 0] for x in scores)

    for form in (rows_one_by_one, mapped):
        for array, same in zip(scores_and_gradients(form, hidden, head, targets, weights), direct, strict=True):
            np.testing.assert_allclose(array, same, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block_columns", [None, 8])
def test_target_outside_the_vocabulary_is_not_a_number(block_columns):
    hidden, head, targets, _ = random_inputs(seed=5)
    log_probs = head_log_probs(hidden, head, targets.at[0, 0].set(V).at[1, 1].set(-1), block_columns=block_columns)[0]
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


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rspo_jax.log_probs import head_log_probs

B, T, D, V = 4, 8, 16, 96
rng = np.random.default_rng(0)
arrays = (
    jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
    jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    jnp.asarray(rng.permutation(np.arange(B * T) * 3 % V).reshape(B, T), jnp.int32),
    jnp.asarray(rng.normal(size=(B, T)), jnp.float32),
)

def run(hidden, head, targets, weights, block_columns=20):
    def loss(hidden, head):
        scores = head_log_probs(hidden, head, targets, 0.7, block_columns=block_columns)
        return jnp.sum(scores.log_probs * weights), scores
    (_, scores), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
    return *scores, *gradients

expected = jax.device_get(jax.jit(run)(*arrays))

def check(shape, rows, head, gathers_allowed, context=True):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "tensor"))
    shardings = [NamedSharding(mesh, spec) for spec in (P(rows), head, P(rows), P(rows))]
    placed = [jax.device_put(array, sharding) for array, sharding in zip(arrays, shardings)]
    outputs = tuple(shardings[i] for i in (2, 2, 0, 1))
    function = jax.jit(run, in_shardings=tuple(shardings), out_shardings=outputs)
    if context:
        with jax.set_mesh(mesh):
            compiled = function.lower(*placed).compile()
    else:
        compiled = function.lower(*placed).compile()
    for got, want in zip(compiled(*placed), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    text = compiled.as_text()
    if not gathers_allowed:
        assert "all-gather" not in text and "all-to-all" not in text, re.findall(".*all-(?:gather|to-all).*", text)
    loops = re.findall(r"body=%([\\w.]+)", text)
    assert loops
    for name in loops if context else []:
        body = text.split("%" + name + " (")[1].split("\\n}")[0]
        assert "all-" not in body and "collective" not in body, body

check((2, 2), "data", P(None, "tensor"), False)
check((1, 4), None, P(None, "tensor"), False)
check((4, 1), "data", P(None, None), False)
check((2, 2), "data", P("data", "tensor"), True)
check((2, 2), "data", P(None, "tensor"), True, context=False)

with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "tensor"))):
    one_block = jax.jit(run, static_argnums=4)(*arrays, None)
for got, want in zip(one_block, expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(4, 1), ("data", "tensor"))):
    try:
        jax.jit(run)(arrays[0][:3], arrays[1], arrays[2][:3], arrays[3][:3])
    except ValueError as error:
        assert "3 rows" in str(error), error
    else:
        raise AssertionError("3 rows were split over 4 devices")
print("sharded as unsharded")
"""


def test_on_a_mesh_as_on_one_device():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.stdout.strip() == "sharded as unsharded", finished.stderr
