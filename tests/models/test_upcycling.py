"""Upcycling of a tiny dense Qwen2: its first outputs, the effect of noise, the parts that learn, and the refusals.

`test_upcycle_command.py` has Qwen3 and folders.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.random_params import draw_params

import models
from models.hugging_face.families import family_for
from models.mixture import MixtureOfExperts
from models.upcycling import UpcyclingConfig, upcycle, upcycled_config

QWEN3 = models.TransformerConfig(
    vocab_size=40, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=12, num_experts=0, dense_size=48
)
QWEN2 = dataclasses.replace(
    QWEN3,
    attention_bias="qkv",
    query_key_norm="none",
    rope_scaling=models.RopeScaling("linear", factor=2.0),
    sliding_window=3,
    sliding_layers=(1,),
    tie_embeddings=True,
)
PLAIN = UpcyclingConfig(num_experts=4, num_experts_per_token=2)
NOISY = dataclasses.replace(PLAIN, noise=0.3)
SPLIT = UpcyclingConfig(num_experts=12, num_experts_per_token=6, expert_split=3, router_std=0.5, shared_expert_size=5)
TOKENS = np.random.default_rng(3).integers(2, QWEN3.vocab_size, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return draw_params(QWEN2)


def of_each(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_the_mixture_computes_what_the_dense_model_does(params):
    sparse = upcycled_config(QWEN2, SPLIT)
    assert family_for(sparse).model_type == "qwen2_moe"
    made = upcycle(QWEN2, params, SPLIT, jax.random.key(1))
    assert of_each(made) == of_each(jax.eval_shape(lambda: models.init_params(sparse, jax.random.key(0))))

    def run(config, params):
        return jax.jit(models.Transformer(config).apply)({"params": params}, TOKENS)

    dense, output = run(QWEN2, params).logits, run(sparse, made)
    scale = np.max(np.abs(dense))
    assert np.max(np.abs(output.logits - dense)) <= 2e-6 * scale
    assert np.std(dense) > 0.1 * scale
    check_choice(output.router_logits, SPLIT)


def check_choice(router_logits, upcycling):
    """Tokens choose among all copies, and the parts of a copy stand and fall together."""
    _, chosen = jax.lax.top_k(router_logits, upcycling.num_experts_per_token)
    copies = np.asarray(chosen) // upcycling.expert_split
    assert len(np.unique(copies)) == upcycling.num_experts // upcycling.expert_split
    for row in copies.reshape(-1, upcycling.num_experts_per_token):
        assert set(np.bincount(row)) <= {0, upcycling.expert_split}


def test_experts_are_the_parts_of_the_feed_forward_network(params):
    moe = upcycle(QWEN2, params, SPLIT, jax.random.key(2))["layers"]["moe"]
    source = jax.tree.map(np.asarray, params["layers"]["dense"])
    for expert in range(12):
        own = slice(16 * (expert % 3), 16 * (expert % 3) + 16)
        np.testing.assert_array_equal(moe["gate_up"][:, expert], source["gate_up"][..., own])
        np.testing.assert_array_equal(moe["down"][:, expert], source["down"][:, own] * np.float32(3))
    router = np.asarray(moe["router"])
    np.testing.assert_array_equal(router, np.repeat(router[..., ::3], 3, axis=-1))
    assert len(np.unique(router[..., ::3])) == 2 * 32 * 4
    assert np.std(router) == pytest.approx(0.5, rel=0.2)
    assert np.all(moe["shared"]["down"] == 0) and np.all(moe["shared_gate"] == 0)
    assert np.std(moe["shared"]["gate_up"]) == pytest.approx(32**-0.5, rel=0.2)


def test_noise_makes_the_experts_differ_by_what_was_asked(params):
    moe = upcycle(QWEN2, params, NOISY, jax.random.key(1))["layers"]["moe"]
    for name, axes in (("gate_up", (1, 3)), ("down", (1, 2))):
        source, experts = np.asarray(params["layers"]["dense"][name]), np.asarray(moe[name])
        of_experts = tuple(axis + 1 for axis in axes)
        std = np.std(source, axis=axes)[:, None]
        added = experts - source[:, None]
        np.testing.assert_allclose(np.std(added, axis=of_experts) / std, 0.3, rtol=0.1)
        for shift in (1, 2, 3):
            between = np.std(experts - np.roll(experts, shift, axis=1), axis=of_experts)
            np.testing.assert_allclose(between / std, 0.3 * 2**0.5, rtol=0.1)


def test_the_seed_decides(params):
    one, again, other = (upcycle(QWEN2, params, NOISY, jax.random.key(seed))["layers"]["moe"] for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    for name in ("router", "gate_up", "down"):
        assert np.mean(np.asarray(one[name]) != np.asarray(other[name])) > 0.99
    assert np.all(np.asarray(one["shared"]["gate_up"]) != np.asarray(other["shared"]["gate_up"]))
    without_noise = upcycle(QWEN2, params, PLAIN, jax.random.key(1))["layers"]["moe"]
    np.testing.assert_array_equal(one["router"], without_noise["router"])


def test_the_dtype_stays_and_what_is_not_copied_is_shared(params):
    in_bfloat16 = dataclasses.replace(QWEN2, param_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: models.init_params(in_bfloat16, jax.random.key(0)))
    made = jax.eval_shape(lambda params: upcycle(in_bfloat16, params, NOISY), shapes)
    sparse = upcycled_config(in_bfloat16, NOISY)
    assert of_each(made) == of_each(jax.eval_shape(lambda: models.init_params(sparse, jax.random.key(0))))
    made = upcycle(QWEN2, params, PLAIN, jax.random.key(1))
    assert made["layers"]["attention"] is params["layers"]["attention"] and made["embedding"] is params["embedding"]
    assert "dense" in params["layers"] and "dense" not in made["layers"]


def test_experts_learn_at_once_and_the_router_if_there_is_noise(params):
    """Equal experts make the loss blind to the router: weights that sum to 1 mix what is the same."""
    sparse = upcycled_config(QWEN2, PLAIN)
    x, pull = jnp.asarray(np.random.default_rng(7).standard_normal((2, 2, 12, 32), np.float32))

    def loss(moe):
        mixed, _, _ = MixtureOfExperts(sparse).apply({"params": moe}, x)
        return jnp.sum(mixed * pull), mixed

    differentiate = jax.jit(jax.grad(loss, has_aux=True))
    outputs = []
    for upcycling in (PLAIN, NOISY):
        moe = upcycle(QWEN2, params, upcycling, jax.random.key(1))["layers"]["moe"]
        gradients, mixed = differentiate(jax.tree.map(lambda leaf: leaf[0], moe))
        outputs.append(mixed)
        assert np.all(np.max(np.abs(gradients["down"]), axis=(1, 2)) > 0.1)
        assert np.all(np.max(np.abs(gradients["gate_up"]), axis=(1, 2, 3)) > 0.1)
        assert np.max(np.abs(gradients["shared"]["down"])) > 0.1
        router = np.max(np.abs(gradients["router"]))
        assert router > 0.1 if upcycling.noise else router < 1e-4
    assert np.std(outputs[0] - outputs[1]) > 0.1 * np.std(outputs[0])


CANNOT_BE = [
    ({"num_experts": 0}, "num_experts must be at least 1"),
    ({"num_experts_per_token": 0}, "num_experts_per_token must be at least 1"),
    ({"expert_split": 0}, "expert_split must be at least 1"),
    ({"shared_expert_size": 0}, "shared_expert_size must be at least 1"),
    ({"num_experts_per_token": 9}, "has only 8 experts"),
    ({"num_experts": 10, "num_experts_per_token": 4, "expert_split": 4}, r"num_experts \(10\) must be a multiple"),
    ({"num_experts_per_token": 2, "expert_split": 4}, r"num_experts_per_token \(2\) must be a multiple"),
    ({"noise": -0.1}, "noise must be 0 or more"),
    ({"noise": float("inf")}, "noise must be 0 or more"),
    ({"noise": float("nan")}, "noise must be 0 or more"),
    ({"router_std": 0.0}, "router_std must be more than 0"),
    ({"router_std": float("nan")}, "router_std must be more than 0"),
]


def test_settings_that_cannot_be():
    for settings, words in CANNOT_BE:
        with pytest.raises(ValueError, match=words):
            UpcyclingConfig(**settings)


NO_MIXTURE = [
    (models.TransformerConfig(), UpcyclingConfig(), "has 8 experts a layer already"),
    (QWEN3, UpcyclingConfig(num_experts=10, num_experts_per_token=5, expert_split=5), "48, is not a multiple"),
    (
        dataclasses.replace(QWEN3, sliding_window=4, sliding_layers=(1,)),
        UpcyclingConfig(),
        "query_key_norm 'head', windows in 1 of 2 layers",
    ),
    (dataclasses.replace(QWEN3, attention_sinks=True), UpcyclingConfig(), "no family of Hugging Face models"),
]


def test_models_that_cannot_become_a_mixture():
    for config, upcycling, words in NO_MIXTURE:
        with pytest.raises(ValueError, match=words):
            upcycle(config, {}, upcycling)
    split = UpcyclingConfig(num_experts=8, num_experts_per_token=8, expert_split=8)
    assert upcycled_config(QWEN3, split).num_experts == 8
    sliding = dataclasses.replace(QWEN3, sliding_window=4, sliding_layers=(0, 1))
    assert upcycled_config(sliding).num_experts == 8


def test_a_shared_expert_only_where_there_is_no_other_way():
    plain = dataclasses.replace(QWEN3, query_key_norm="none")
    assert upcycled_config(plain).shared_expert_size == 0
    biased = upcycled_config(dataclasses.replace(plain, attention_bias="qkv"))
    assert (biased.shared_expert_size, biased.gate_shared_expert) == (64, True)
