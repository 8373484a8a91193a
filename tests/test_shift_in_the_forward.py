"""The router shift inside the model's forward pass against the plain one on the router logits of all layers.

And the arrays that a compiled training step must not contain.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rspo_jax
from models import Transformer, TransformerConfig, init_params
from rspo_jax.log_probs import head_log_probs
from rspo_jax.routing import drift_reader, gamma_of, trace_of, trace_reader
from rspo_jax.routing.shift import forced_route_of

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
    changes = [scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return treedef.unflatten([np.asarray(leaf) + change for leaf, change in zip(leaves, changes, strict=True)])


@pytest.fixture(scope="module")
def policies():
    old = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    return old, moved(old, 0.02)


@functools.partial(jax.jit, static_argnames="config")
def read(params, reader, config=CONFIG, route=None):
    output = Transformer(config).apply(
        {"params": params},
        TOKENS[:, :-1],
        segment_ids=jnp.asarray(SEGMENT_IDS),
        router_reader=reader,
        forced_route=route,
    )
    return output.router_logits, output.reading


compiled_shift = jax.jit(rspo_jax.router_shift, static_argnums=2)


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
    plain = compiled_shift(router_logits, trace, layer_aggregation)
    assert 0.05 < np.min(plain) < 0.999
    np.testing.assert_allclose(gamma, plain, rtol=0, atol=1e-6)
    # On-policy it is exactly 1, though the two programs were compiled apart.
    np.testing.assert_array_equal(gamma_of(read(old, drift_reader(trace))[1], trace), np.ones((B, T)))


def test_under_replay_the_shift_is_that_of_the_natural_router_logits(policies):
    old, new = policies
    _, trace = trace_in_forward(old)
    route = forced_route_of(trace)
    router_logits, reading = read(new, drift_reader(trace), route=route)
    gamma = gamma_of(reading, trace)
    np.testing.assert_allclose(gamma, compiled_shift(router_logits, trace, "mean"), rtol=0, atol=1e-6)
    assert np.max(gamma) < 0.999  # though the experts are the old ones
    # Under the old parameters the replayed pass is the free one, and that with the old scores, on a grid, nearly so.
    free, _ = trace_in_forward(old)
    again, reading = read(old, drift_reader(trace), route=route)
    np.testing.assert_array_equal(again, free)
    np.testing.assert_array_equal(gamma_of(reading, trace), np.ones((B, T)))
    copied, _ = read(old, drift_reader(trace), route=forced_route_of(trace, with_weights=True))
    assert 0 < np.abs(np.asarray(copied) - np.asarray(free)).max() < 1e-3


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


class Compiled(NamedTuple):
    """A loss and its gradient as one program, with the shapes of all arrays in it."""

    run: Callable[..., Any]
    shapes: set[tuple[int, ...]]


def compiled(loss, *arguments):
    program = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return Compiled(program, shapes_in(program))


def shapes_in(program):
    """Return the shapes of all arrays in a program, each sorted and without axes of length 1."""
    shapes = re.findall(r"\b[a-z][a-z0-9]*\[([0-9,]*)\]", program.as_text())
    return {tuple(sorted(int(axis) for axis in shape.split(",") if axis not in ("", "1"))) for shape in shapes}


@pytest.fixture(scope="module")
def arguments(policies):
    old, new = policies
    _, trace = trace_in_forward(old)
    return new, trace, jnp.asarray(np.random.default_rng(2).uniform(-4.5, -3, (B, T)).astype(np.float32))


@pytest.fixture(scope="module")
def plain(arguments):
    return compiled(plain_loss, *arguments)


@pytest.fixture(scope="module", params=["none", "full"])
def in_forward(request, arguments):
    config = dataclasses.replace(CONFIG, remat=request.param)
    return request.param, compiled(functools.partial(loss_in_forward, config=config), *arguments)


def test_loss_and_gradient_are_those_of_the_plain_form(arguments, plain, in_forward):
    expected, expected_gradient = plain.run(*arguments)
    actual, gradient = in_forward[1].run(*arguments)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_gradient))
    assert largest > 1e-3
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-6), gradient, expected_gradient)


# The router logits of all layers.
OF_ALL_LAYERS = tuple(sorted((3, B, T, 13)))


def test_a_step_holds_no_router_logits_of_all_layers(arguments, plain, in_forward):
    remat, program = in_forward
    # Without rematerialization, autodiff keeps one array of that size for the gates, as it does without router shift.
    expected = remat == "none" and OF_ALL_LAYERS in compiled(gmpo_loss, arguments[0], arguments[2]).shapes
    assert (OF_ALL_LAYERS in program.shapes) == expected
    assert OF_ALL_LAYERS in plain.shapes


def test_a_scoring_pass_holds_no_router_logits_of_all_layers(policies):
    program = jax.jit(lambda params: trace_of(read(params, trace_reader())[1])).lower(policies[0]).compile()
    assert OF_ALL_LAYERS not in shapes_in(program)


def gmpo_loss(params, old_log_probs):
    output = Transformer(CONFIG).apply({"params": params}, TOKENS[:, :-1], segment_ids=jnp.asarray(SEGMENT_IDS))
    log_probs = head_log_probs(output.hidden, output.head, jnp.asarray(TOKENS[:, 1:])).log_probs
    gmpo = rspo_jax.OBJECTIVES["gmpo"].loss
    return gmpo(log_probs, old_log_probs, jnp.asarray(ADVANTAGES), jnp.asarray(MASK))[0]
