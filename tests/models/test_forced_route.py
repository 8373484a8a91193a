"""The Transformer where the experts of every token are given: its own choice changes nothing, another one reaches the
right layers, and the router learns through the weights alone. Knows no loss and no sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import Transformer, TransformerConfig, init_params
from rspo_jax.types import ForcedRoute, RouterReader

# Two stacks with experts, a dense layer between them.
CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=3,
    dense_layers=(1,),
    dense_size=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    num_experts=5,
    num_experts_per_token=2,
    expert_size=6,
    remat="full",
)
B, T, L, K = 3, 5, 2, 2
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T)).astype(np.int32)
SEGMENT_IDS = jnp.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 2, 2], [1, 1, 1, 1, 1]], jnp.int32)
READER = RouterReader(jax.tree_util.Partial(lambda carry, router_logits, expert_ids: (carry, expert_ids)))


def random_params(config):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def random_route():
    order = np.argsort(np.random.default_rng(2).normal(size=(L, B, T, 5)), axis=-1)
    return ForcedRoute(jnp.asarray(order[..., :K].astype(np.uint8)))


@jax.jit
def run(params, route=None):
    """Logits, router logits and the experts used."""
    output = Transformer(CONFIG).apply(
        {"params": params}, TOKENS, segment_ids=SEGMENT_IDS, router_reader=READER, forced_route=route
    )
    return output.logits, output.router_logits, output.reading.layers


@jax.jit
@jax.grad
def gradient_of(params, route=None):
    by_token = np.random.default_rng(3).normal(size=(B, T, 11)).astype(np.float32)
    return jnp.sum(jnp.where(SEGMENT_IDS[..., None] > 0, run(params, route)[0], 0) * by_token)


def test_forced_to_its_own_choice_nothing_changes():
    params = random_params(CONFIG)
    free = run(params)
    replayed = run(params, ForcedRoute(free[2].astype(jnp.uint8)))
    jax.tree.map(np.testing.assert_array_equal, replayed, free)


def test_each_layer_uses_the_experts_that_it_is_given():
    params, route = random_params(CONFIG), random_route()
    logits, router_logits, used = run(params, route)
    np.testing.assert_array_equal(used, route.expert_ids)
    free = run(params)
    np.testing.assert_array_equal(router_logits[0], free[1][0])  # before any forced expert: the natural ones
    assert not np.allclose(router_logits[1], free[1][1], atol=1e-2) and not np.allclose(logits, free[0], atol=1e-2)


@pytest.mark.slow  # three gradients to compile
def test_gradients():
    params = random_params(CONFIG)
    free, route = gradient_of(params), ForcedRoute(run(params)[2].astype(jnp.uint8))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(free))
    jax.tree.map(np.testing.assert_array_equal, gradient_of(params, route), free)
    # With scores that are given the router has none, and all else still has.
    scores = jnp.asarray(np.random.default_rng(4).uniform(0.1, 0.5, (L, B, T, K)).astype(np.float32))
    gradient = gradient_of(params, route._replace(weights=scores))
    for stack in ("layers_0", "layers_2"):
        assert not np.any(gradient[stack]["moe"].pop("router"))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


IDS, WEIGHTS = np.zeros((L, B, T, K), np.int32), np.ones((L, B, T, K), np.float32)
DENSE = dataclasses.replace(CONFIG, num_experts=0, dense_layers=())


@pytest.mark.parametrize(
    ("config", "route", "message"),
    [
        (DENSE, ForcedRoute(IDS), "forced_route says which experts to use, but this model has none: leave it out"),
        (CONFIG, ForcedRoute(IDS[:1]), r"expert_ids must have axes \[L, B, T, K\], here \(2, 3, 5, 2\); got \(1, 3,"),
        (CONFIG, ForcedRoute(IDS[:, :, :4]), r"got \(2, 3, 4, 2\): record the route of the same tokens"),
        (CONFIG, ForcedRoute(IDS[..., :1]), r"got \(2, 3, 5, 1\)"),
        (CONFIG, ForcedRoute(IDS, WEIGHTS[0]), r"forced_route.weights must have axes .* got \(3, 5, 2\)"),
        (CONFIG, ForcedRoute(WEIGHTS), "forced_route.expert_ids must be integers, got float32"),
        (CONFIG, ForcedRoute(IDS, IDS), "forced_route.weights must be float32, got int32"),
    ],
)
def test_routes_that_do_not_fit(config, route, message):
    with pytest.raises(ValueError, match=message):
        Transformer(config).apply({"params": {}}, TOKENS, forced_route=route)


def test_the_parameters_of_the_router():
    config = dataclasses.replace(
        CONFIG, router="sigmoid", router_bias=True, shared_expert_size=3, gate_shared_expert=True
    )
    model, params = Transformer(config), jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.structure(model.router_params()) == jax.tree.structure(params)
    chosen = [
        "/".join(key.key for key in path)
        for path, is_router in jax.tree_util.tree_leaves_with_path(model.router_params())
        if is_router
    ]
    names = ("correction_bias", "router", "router_bias")
    assert chosen == [f"{stack}/moe/{name}" for stack in ("layers_0", "layers_2") for name in names]
    assert not any(jax.tree.leaves(Transformer(DENSE).router_params()))
