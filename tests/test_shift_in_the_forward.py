"""The router shift inside the model's forward pass against the plain one on the router logits of all layers, and what
the compiled training step must not contain. Joins the model and the algorithm; knows no trainer."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rspo_jax
from models import Transformer, TransformerConfig, init_params
from rspo_jax.head_log_probs import head_log_probs
from rspo_jax.router import drift_reader, gamma_of, trace_of, trace_reader

# Sizes that no other array of a program has by chance.
CONFIG = TransformerConfig(
    vocab_size=37,
    hidden_size=22,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=10,
    num_experts=13,
    num_experts_per_token=2,
    expert_size=14,
)
B, T = 5, 29
TOKENS = np.random.default_rng(0).integers(0, 37, (B, T + 1)).astype(np.int32)
SEGMENT_IDS = np.repeat(np.array([[0, 1, 2]], np.int32), [4, 15, 10], axis=1).repeat(B, axis=0)
ADVANTAGES = np.array([1.0, -0.5, 0.3, -1.0, 0.8], np.float32)
MASK = SEGMENT_IDS > 0


def moved(params, scale):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return treedef.unflatten([leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def policies():
    old = init_params(CONFIG, jax.random.key(0))
    return old, moved(old, 0.02)


@functools.partial(jax.jit, static_argnames="config")
def read(params, reader, config=CONFIG):
    output = Transformer(config).apply(
        {"params": params}, TOKENS[:, :-1], segment_ids=jnp.asarray(SEGMENT_IDS), router_reader=reader
    )
    return output.router_logits, output.reading


def trace_in_forward(params):
    router_logits, reading = read(params, trace_reader())
    return router_logits, trace_of(reading)


def test_the_trace_is_that_of_the_router_logits(policies):
    router_logits, trace = trace_in_forward(policies[0])
    plain = jax.jit(rspo_jax.trace_router, static_argnames="k")(router_logits, k=2)
    for actual, expected in zip(trace, plain, strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("layer_aggregation", ["mean", "sum"])
def test_the_shift_is_that_of_the_router_logits(policies, layer_aggregation):
    old, new = policies
    _, trace = trace_in_forward(old)
    router_logits, reading = read(new, drift_reader(trace))
    gamma = gamma_of(reading, trace, layer_aggregation)
    plain = rspo_jax.router_shift(router_logits, trace, layer_aggregation)
    assert 0.05 < np.min(plain) < 0.999
    np.testing.assert_allclose(gamma, plain, rtol=0, atol=1e-6)
    # On-policy it is exactly 1, though the two programs were compiled apart.
    np.testing.assert_array_equal(gamma_of(read(old, drift_reader(trace))[1], trace), np.ones((B, T)))


def test_an_unknown_aggregation_is_refused(policies):
    _, trace = trace_in_forward(policies[0])
    _, reading = read(policies[0], drift_reader(trace))
    with pytest.raises(ValueError, match="layer_aggregation"):
        gamma_of(reading, trace, "product")


def loss_in_forward(params, trace, old_log_probs, config=CONFIG):
    output = Transformer(config).apply(
        {"params": params}, TOKENS[:, :-1], segment_ids=jnp.asarray(SEGMENT_IDS), router_reader=drift_reader(trace)
    )
    log_probs = head_log_probs(output.hidden, output.head, jnp.asarray(TOKENS[:, 1:])).log_probs
    gamma = gamma_of(output.reading, trace)
    return rspo_jax.rspo_loss(log_probs, old_log_probs, jnp.asarray(ADVANTAGES), jnp.asarray(MASK), gamma)[0]


def plain_loss(params, trace, old_log_probs):
    output = Transformer(CONFIG).apply({"params": params}, TOKENS[:, :-1], segment_ids=jnp.asarray(SEGMENT_IDS))
    log_probs = rspo_jax.token_log_probs(output.logits, jnp.asarray(TOKENS[:, 1:]))
    gamma = rspo_jax.router_shift(output.router_logits, trace)
    return rspo_jax.rspo_loss(log_probs, old_log_probs, jnp.asarray(ADVANTAGES), jnp.asarray(MASK), gamma)[0]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_loss_and_gradient_are_those_of_the_plain_form(policies, remat):
    old, new = policies
    _, trace = trace_in_forward(old)
    old_log_probs = jnp.asarray(np.random.default_rng(2).uniform(-4.5, -3, (B, T)).astype(np.float32))
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain_loss))(new, trace, old_log_probs)
    config = dataclasses.replace(CONFIG, remat=remat)
    loss = functools.partial(loss_in_forward, config=config)
    actual, gradient = jax.jit(jax.value_and_grad(loss))(new, trace, old_log_probs)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradient))
    assert largest > 1e-3
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-6), gradient, expected_gradient)


def arrays_of(function, *arguments):
    """The shapes of all arrays in a compiled program, axes of length 1 left out, in any order of the axes."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = re.findall(r"\b[a-z][a-z0-9]*\[([0-9,]*)\]", text)
    return {tuple(sorted(int(axis) for axis in shape.split(",") if axis not in ("", "1"))) for shape in shapes}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_holds_no_router_logits_of_all_layers(policies, remat):
    old, new = policies
    _, trace = trace_in_forward(old)
    old_log_probs = jnp.zeros((B, T), jnp.float32)
    loss = functools.partial(loss_in_forward, config=dataclasses.replace(CONFIG, remat=remat))
    of_all_layers = tuple(sorted((3, B, T, 13)))
    shapes = arrays_of(jax.grad(loss), new, trace, old_log_probs)
    # Autodiff keeps one array of that size for the gates themselves; full recomputation none at all.
    assert (of_all_layers in shapes) == (remat == "none" and of_all_layers in gmpo_arrays(new, old_log_probs))
    assert of_all_layers in arrays_of(jax.grad(plain_loss), new, trace, old_log_probs)
    assert of_all_layers not in arrays_of(lambda params: trace_of(read(params, trace_reader())[1]), old)


def gmpo_arrays(params, old_log_probs):
    def loss(params):
        output = Transformer(CONFIG).apply({"params": params}, TOKENS[:, :-1], segment_ids=jnp.asarray(SEGMENT_IDS))
        log_probs = head_log_probs(output.hidden, output.head, jnp.asarray(TOKENS[:, 1:])).log_probs
        gmpo = rspo_jax.OBJECTIVES["gmpo"].loss
        return gmpo(log_probs, old_log_probs, jnp.asarray(ADVANTAGES), jnp.asarray(MASK))[0]

    return arrays_of(jax.grad(loss), params)
