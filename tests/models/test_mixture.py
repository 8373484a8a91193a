"""Which experts a token activates, against a choice written token by token in float64 numpy, and what becomes of it
where the experts are given. Knows no transformer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import TransformerConfig
from models.mixture import MixtureOfExperts, choose_experts
from rspo_jax.types import ForcedRoute

B, T, E = 2, 9, 12
SOFTMAX = TransformerConfig(num_experts=E, num_experts_per_token=3)
SIGMOID = dataclasses.replace(SOFTMAX, router="sigmoid", expert_weight_scale=2.5)
CONFIGS = {
    "softmax": SOFTMAX,
    "softmax, not divided": dataclasses.replace(SOFTMAX, normalize_expert_weights=False),
    "softmax, scaled": dataclasses.replace(SOFTMAX, expert_weight_scale=0.5),
    "sigmoid": SIGMOID,
    "sigmoid, not divided": dataclasses.replace(SIGMOID, normalize_expert_weights=False),
    "sigmoid, 2 of 4 groups": dataclasses.replace(SIGMOID, router_groups=4, router_groups_per_token=2),
    "sigmoid, 1 of 3 groups": dataclasses.replace(SIGMOID, router_groups=3, router_groups_per_token=1),
    "sigmoid, 4 of 4 groups": dataclasses.replace(SIGMOID, router_groups=4, router_groups_per_token=4),
}


def scores_of(logits, config):
    if config.router == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    scores = np.exp(logits - logits.max())
    return scores / scores.sum()


def weights_of(scores, chosen, config):
    """{expert: weight} of one token, given its experts."""
    total = sum(scores[expert] for expert in chosen) if config.normalize_expert_weights else 1.0
    return {expert: scores[expert] / total * config.expert_weight_scale for expert in chosen}


def oracle(logits, config, bias):
    """{expert: weight} of one token."""
    c, scores = config, scores_of(logits, config)
    ranks = scores if c.router == "softmax" else scores + bias
    size = E // c.router_groups
    groups = [list(range(first, first + size)) for first in range(0, E, size)]
    groups.sort(key=lambda group: -sum(sorted(ranks[group])[-2:]))
    allowed = [expert for group in groups[: c.router_groups_per_token] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -ranks[expert])[: c.num_experts_per_token]
    return weights_of(scores, chosen, c)


def inputs():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (B, T, E)).astype(np.float32), rng.normal(0, 0.5, E).astype(np.float32)


def by_expert(choice, place):
    weights, expert_ids = (np.asarray(array[place]).tolist() for array in choice)
    return dict(zip(expert_ids, weights, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_choice(name):
    config, (logits, bias) = CONFIGS[name], inputs()
    choice = choose_experts(jnp.asarray(logits), config, jnp.asarray(bias))
    for place in np.ndindex(B, T):
        expected = oracle(logits[place].astype(np.float64), config, bias.astype(np.float64))
        found = by_expert(choice, place)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_weights", [False, True], ids=["current scores", "given scores"])
def test_a_forced_choice(name, with_weights):
    """The given experts, whatever groups and correction say, and weights that the model makes of their scores."""
    config, (logits, bias) = CONFIGS[name], inputs()
    rng = np.random.default_rng(1)
    expert_ids = np.argsort(rng.normal(size=logits.shape), axis=-1)[..., :3]
    given = rng.uniform(0.01, 0.5, expert_ids.shape).astype(np.float32)
    forced = ForcedRoute(jnp.asarray(expert_ids, jnp.uint8), jnp.asarray(given) if with_weights else None)
    choice = choose_experts(jnp.asarray(logits), config, jnp.asarray(bias), forced)
    assert choice.expert_ids.dtype == jnp.int32
    for place in np.ndindex(B, T):
        scores = scores_of(logits[place].astype(np.float64), config)
        if with_weights:
            scores[expert_ids[place]] = given[place]
        expected = weights_of(scores, expert_ids[place].tolist(), config)
        assert by_expert(choice, place) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_forced_to_its_own_choice_nothing_changes(name):
    config, (logits, bias) = CONFIGS[name], map(jnp.asarray, inputs())
    by_slot = jnp.asarray(np.random.default_rng(2).normal(size=(B, T, 3)).astype(np.float32))

    @functools.partial(jax.jit, static_argnames="replayed")
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(logits, expert_ids, replayed):
        choice = choose_experts(logits, config, bias, ForcedRoute(expert_ids) if replayed else None)
        return jnp.sum(choice.weights * by_slot), choice

    free = run(logits, None, False)
    replayed = run(logits, free[0][1].expert_ids, True)
    assert np.all(np.any(free[1], axis=-1))
    jax.tree.map(np.testing.assert_array_equal, replayed, free)


def test_a_token_that_no_expert_wants_still_divides_its_weights():
    logits = jnp.full((1, 1, E), -200.0)
    weights, _ = choose_experts(logits, SIGMOID, jnp.zeros(E))
    gradient = jax.grad(lambda logits: jnp.sum(choose_experts(logits, SIGMOID, jnp.zeros(E)).weights))(logits)
    np.testing.assert_allclose(weights, 2.5 / 3, rtol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_what_forced_experts_return():
    config, rng = dataclasses.replace(SOFTMAX, hidden_size=8, expert_size=4), np.random.default_rng(1)
    shapes = {"router": (8, E), "gate_up": (E, 8, 2, 4), "down": (E, 4, 8)}
    params = {name: jnp.asarray(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(B, T, 8)).astype(np.float32))
    expert_ids = np.argsort(rng.normal(size=(B, T, E)), axis=-1)[..., :3]
    mixed, router_logits, used = jax.jit(
        lambda: MixtureOfExperts(config).apply({"params": params}, x, forced=ForcedRoute(jnp.asarray(expert_ids)))
    )()
    exact, x = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}, np.asarray(x, np.float64)
    np.testing.assert_array_equal(used, expert_ids)
    np.testing.assert_allclose(router_logits, x @ exact["router"], rtol=0, atol=2e-5)  # the natural ones
    for place in np.ndindex(B, T):
        scores, expected = scores_of(x[place] @ exact["router"], config), 0
        for expert, weight in weights_of(scores, expert_ids[place].tolist(), config).items():
            gate, up = (x[place] @ exact["gate_up"][expert, :, half] for half in range(2))
            expected = expected + weight * (gate / (1 + np.exp(-gate)) * up) @ exact["down"][expert]
        np.testing.assert_allclose(mixed[place], expected, rtol=0, atol=1e-4)


def test_the_correction_of_the_choice_has_no_gradient_and_the_router_has():
    config = dataclasses.replace(SIGMOID, hidden_size=8, expert_size=4, shared_expert_size=3, gate_shared_expert=True)
    x = jax.random.normal(jax.random.key(0), (B, T, 8))
    moe = MixtureOfExperts(config)
    params = moe.init(jax.random.key(1), x)
    gradient = jax.grad(lambda params: jnp.sum(jnp.square(jax.jit(moe.apply)(params, x)[0])))(params)["params"]
    assert not np.any(gradient.pop("correction_bias"))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient)), jax.tree.map(np.any, gradient)
