"""Which experts a token activates, against a choice written token by token in float64 numpy. Knows no transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import TransformerConfig
from models.mixture import MixtureOfExperts, choose_experts

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


def oracle(logits, config, bias):
    """{expert: weight} of one token."""
    c = config
    if c.router == "softmax":
        scores = np.exp(logits - logits.max())
        scores = ranks = scores / scores.sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
        ranks = scores + bias
    size = E // c.router_groups
    groups = [list(range(first, first + size)) for first in range(0, E, size)]
    groups.sort(key=lambda group: -sum(sorted(ranks[group])[-2:]))
    allowed = [expert for group in groups[: c.router_groups_per_token] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -ranks[expert])[: c.num_experts_per_token]
    total = sum(scores[expert] for expert in chosen) if c.normalize_expert_weights else 1.0
    return {expert: scores[expert] / total * c.expert_weight_scale for expert in chosen}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_choice(name):
    config, rng = CONFIGS[name], np.random.default_rng(0)
    logits, bias = rng.normal(0, 2, (B, T, E)).astype(np.float32), rng.normal(0, 0.5, E).astype(np.float32)
    weights, expert_ids = choose_experts(jnp.asarray(logits), config, jnp.asarray(bias))
    for place in np.ndindex(B, T):
        expected = oracle(logits[place].astype(np.float64), config, bias.astype(np.float64))
        found = dict(zip(np.asarray(expert_ids[place]).tolist(), np.asarray(weights[place]).tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_token_that_no_expert_wants_still_divides_its_weights():
    logits = jnp.full((1, 1, E), -200.0)
    weights, _ = choose_experts(logits, SIGMOID, jnp.zeros(E))
    gradient = jax.grad(lambda logits: jnp.sum(choose_experts(logits, SIGMOID, jnp.zeros(E)).weights))(logits)
    np.testing.assert_allclose(weights, 2.5 / 3, rtol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_the_correction_of_the_choice_has_no_gradient_and_the_router_has():
    config = dataclasses.replace(SIGMOID, hidden_size=8, expert_size=4, shared_expert_size=3, gate_shared_expert=True)
    x = jax.random.normal(jax.random.key(0), (B, T, 8))
    moe = MixtureOfExperts(config)
    params = moe.init(jax.random.key(1), x)
    gradient = jax.grad(lambda params: jnp.sum(jnp.square(jax.jit(moe.apply)(params, x)[0])))(params)["params"]
    assert not np.any(gradient.pop("correction_bias"))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient)), jax.tree.map(np.any, gradient)
