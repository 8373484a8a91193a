"""The Transformer against the whole Qwen3-MoE forward pass in float64 numpy, written token by token, and what padding,
packing, caching, recomputation and low precision may and may not change. Knows no loss and no sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from models import Transformer, TransformerConfig, init_params
from models.attention_layers import AttentionInputs, LayerCache
from models.blocks import RMSNorm
from models.mixture import MixtureOfExperts
from models.transformer import Layer, LayerCarry, LayerInputs, SharedInputs
from rspo_jax.sharding import MESH_AXES, RULES, shardings_of
from rspo_jax.types import RouterReader

CONFIG = TransformerConfig(
    vocab_size=11,
    hidden_size=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=5,
    num_experts_per_token=2,
    expert_size=7,
    rope_theta=100.0,
    rms_norm_epsilon=1e-2,
)
B, T = 4, 9
# Left padding of two amounts, none, and three packed segments.
SEGMENT_IDS = np.array(
    [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [1, 1, 1, 1, 2, 2, 2, 3, 3]], np.int32
)
POSITIONS_IN_SEGMENT = np.array(
    [[0, 0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6, 7], list(range(9)), [0, 1, 2, 3, 0, 1, 2, 0, 1]], np.int32
)
REAL = SEGMENT_IDS > 0


def random_tokens(seed=0, shape=(B, T)):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def random_params(config, seed=0):
    """Parameters of the right shapes: scales around 1, so that each is seen, and matrices of moderate size."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))

    def fill(path, leaf):
        scale, shift = (0.3, 1.0) if path[-1].key == "scale" else (0.4, 0.0)
        return jnp.asarray(shift + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, positions=None, segment_ids=None, cache=None):
    return Transformer(config).apply({"params": params}, tokens, positions, segment_ids, cache)


def softmax(x):
    exponentials = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exponentials / np.sum(exponentials, axis=-1, keepdims=True)


def normalised(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def rotated(x, positions, theta):
    """Rotary positions by rotating halves: [T, heads, head_dim]."""
    size = x.shape[-1]
    angles = np.outer(positions, 1.0 / theta ** (np.arange(0, size, 2) / size))
    angles = np.concatenate([angles, angles], axis=-1)[:, None, :]
    half_turned = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], axis=-1)
    return x * np.cos(angles) + half_turned * np.sin(angles)


def attention(config, p, x, positions, segment_ids):
    length, group = len(x), config.num_heads // config.num_kv_heads
    queries, keys, values = (np.tensordot(x, p[name], axes=1) for name in ("query", "key", "value"))
    queries = normalised(queries, p["query_norm"]["scale"], config.rms_norm_epsilon)
    keys = normalised(keys, p["key_norm"]["scale"], config.rms_norm_epsilon)
    queries, keys = rotated(queries, positions, config.rope_theta), rotated(keys, positions, config.rope_theta)
    result = np.zeros_like(x)
    for t in range(length):
        seen = [s for s in range(t + 1) if segment_ids[s] == segment_ids[t]]
        for head in range(config.num_heads):
            scores = keys[seen, head // group] @ queries[t, head] / np.sqrt(config.head_dim)
            result[t] += softmax(scores) @ values[seen, head // group] @ p["output"][head]
    return result


def mixture(config, p, x):
    router_logits = x @ p["router"]
    result = np.zeros_like(x)
    for t, probs in enumerate(softmax(router_logits)):
        chosen = np.argsort(-probs)[: config.num_experts_per_token]
        weights = probs[chosen] / np.sum(probs[chosen]) if config.normalize_expert_weights else probs[chosen]
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = x[t] @ p["gate_up"][expert, :, 0], x[t] @ p["gate_up"][expert, :, 1]
            result[t] += weight * (gate / (1 + np.exp(-gate)) * up) @ p["down"][expert]
    return result, router_logits


def oracle(config, params, tokens, positions, segment_ids):
    """Logits [B, T, V] and router logits [L, B, T, E] in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    epsilon = config.rms_norm_epsilon
    logits, router_logits = [], []
    for row_tokens, row_positions, row_segments in zip(tokens, positions, segment_ids, strict=True):
        x, row_router_logits = params["embedding"][row_tokens], []
        for index in range(config.num_layers):
            p = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
            normed = normalised(x, p["attention_norm"]["scale"], epsilon)
            x = x + attention(config, p["attention"], normed, row_positions, row_segments)
            mixed, layer_router_logits = mixture(config, p["moe"], normalised(x, p["moe_norm"]["scale"], epsilon))
            x = x + mixed
            row_router_logits.append(layer_router_logits)
        head = params["embedding"].T if config.tie_embeddings else params["head"]
        logits.append(normalised(x, params["final_norm"]["scale"], epsilon) @ head)
        router_logits.append(row_router_logits)
    return np.stack(logits), np.stack(router_logits, axis=1)


def assert_near_on_real_tokens(output, expected_logits, expected_router_logits, atol, real=REAL):
    np.testing.assert_allclose(output.logits[real], expected_logits[real], rtol=0, atol=atol)
    np.testing.assert_allclose(output.router_logits[:, real], expected_router_logits[:, real], rtol=0, atol=atol)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_matches_the_oracle(params):
    tokens = random_tokens()
    output = forward(CONFIG, params, tokens, None, SEGMENT_IDS)
    assert output.cache is None
    assert output.logits.dtype == jnp.float32 and output.logits.shape == (B, T, 11)
    assert output.router_logits.dtype == jnp.float32 and output.router_logits.shape == (2, B, T, 5)
    logits, router_logits = oracle(CONFIG, params, tokens, POSITIONS_IN_SEGMENT, SEGMENT_IDS)
    assert np.std(logits) > 0.3 and np.std(router_logits) > 0.3
    assert_near_on_real_tokens(output, logits, router_logits, atol=1e-4)


def test_one_key_head_raw_weights_and_tied_embeddings_at_any_positions():
    config = dataclasses.replace(
        CONFIG, num_kv_heads=1, num_experts_per_token=3, normalize_expert_weights=False, tie_embeddings=True
    )
    params, tokens = random_params(config, seed=1), random_tokens(seed=1)
    assert "head" not in params
    positions = np.random.default_rng(2).integers(0, 30, (B, T)).astype(np.int32)
    output = forward(config, params, tokens, positions, SEGMENT_IDS)
    assert_near_on_real_tokens(output, *oracle(config, params, tokens, positions, SEGMENT_IDS), atol=1e-4)


def test_as_many_key_heads_as_heads_all_experts_and_nothing_but_tokens():
    config = dataclasses.replace(CONFIG, num_kv_heads=4, num_experts_per_token=5, num_layers=3, rope_theta=10.0)
    params, tokens = random_params(config, seed=2), random_tokens(seed=2)
    output = forward(config, params, tokens)
    assert output.router_logits.shape == (3, B, T, 5)
    expected = oracle(config, params, tokens, np.tile(np.arange(T), (B, 1)), np.ones((B, T)))
    assert_near_on_real_tokens(output, *expected, atol=1e-4, real=np.ones((B, T), bool))


def test_padding_is_invisible(params):
    answer = random_tokens(seed=5, shape=(5,))
    results = []
    for seed in range(2):
        tokens, segment_ids = random_tokens(seed=6 + seed), np.zeros((B, T), np.int32)
        for row, width in enumerate((0, 1, 3, 4)):  # the same tokens behind padding of four amounts
            tokens[row, width : width + 5] = answer
            segment_ids[row, width : width + 5] = 1
        output = forward(CONFIG, params, tokens, None, segment_ids)
        for row, width in enumerate((0, 1, 3, 4)):
            results.append((output.logits[row, width : width + 5], output.router_logits[:, row, width : width + 5]))
    for logits, router_logits in results[1:]:
        np.testing.assert_allclose(logits, results[0][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(router_logits, results[0][1], rtol=0, atol=1e-5)


def test_packed_segments_equal_separate_rows(params):
    tokens = random_tokens(seed=8)
    tokens[3] = np.concatenate([tokens[0, :4], tokens[1, :3], tokens[2, :2]])
    segment_ids = np.zeros((B, T), np.int32)
    segment_ids[0, :4] = segment_ids[1, :3] = segment_ids[2, :2] = 1
    segment_ids[3] = [5, 5, 5, 5, 2, 2, 2, 9, 9]  # any number but 0
    output = forward(CONFIG, params, tokens, None, segment_ids)
    for row, start, end in ((0, 0, 4), (1, 4, 7), (2, 7, 9)):
        np.testing.assert_allclose(output.logits[3, start:end], output.logits[row, : end - start], rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            output.router_logits[:, 3, start:end], output.router_logits[:, row, : end - start], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("lengths", [[4, 1, 1, 1, 1, 1], [4, 4, 1]], ids=["steps", "chunks"])
def test_cached_decoding_equals_the_full_forward_pass(params, lengths):
    tokens = random_tokens(seed=9)
    full = forward(CONFIG, params, tokens, None, SEGMENT_IDS)
    cache, start, logits, router_logits = Transformer(CONFIG).init_cache(B, T + 2), 0, [], []
    for length in lengths:
        part = np.s_[:, start : start + length]
        output = forward(CONFIG, params, tokens[part], None, SEGMENT_IDS[part], cache)
        cache, start = output.cache, start + length
        assert cache.length == start
        logits.append(output.logits)
        router_logits.append(output.router_logits)
    joined = full._replace(logits=np.concatenate(logits, axis=1), router_logits=np.concatenate(router_logits, axis=2))
    assert_near_on_real_tokens(joined, np.asarray(full.logits), np.asarray(full.router_logits), atol=1e-5)
    np.testing.assert_array_equal(cache.segment_ids, np.pad(SEGMENT_IDS, ((0, 0), (0, 2))))
    assert cache.layers.keys.shape == cache.layers.values.shape == (2, B, 2, T + 2, 6)


def test_a_ring_holds_one_response_after_the_other(params):
    """Single tokens go on in the slots of older ones; a new segment sees nothing of them."""
    slots, tokens = 6, random_tokens(seed=20, shape=(2, 17))
    # The first row: sequences of 5, 6 and 6 tokens. The second: 3, padding, 4, and 6 that start in other slots.
    segment_ids = np.array([[1] * 5 + [2] * 6 + [3] * 6, [1] * 3 + [0] * 4 + [2] * 4 + [3] * 6], np.int32)
    expected = forward(CONFIG, params, tokens, None, segment_ids)
    cache, logits = Transformer(CONFIG).init_cache(2, slots), []
    for at in range(17):
        output = forward(CONFIG, params, tokens[:, at : at + 1], None, segment_ids[:, at : at + 1], cache)
        cache = output.cache
        logits.append(output.logits)
    real = segment_ids > 0
    actual = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(actual[real], np.asarray(expected.logits)[real], rtol=0, atol=1e-5)


def test_hidden_states_and_head_give_the_logits(params):
    for config in (CONFIG, dataclasses.replace(CONFIG, tie_embeddings=True)):
        output = forward(config, params, random_tokens(seed=21), None, SEGMENT_IDS)
        assert output.hidden.shape == (B, T, 10) and output.head.shape == (10, 11)
        exact = np.asarray(output.hidden, np.float64) @ np.asarray(output.head, np.float64)
        np.testing.assert_allclose(output.logits, exact, rtol=0, atol=1e-5)


def note_layer(own, carry, router_logits, expert_ids):
    """Tells the layers apart: a carry that depends on their order, and each layer's own slice."""
    return 2 * carry + own, (own, router_logits[..., 0], expert_ids)


def test_a_reader_sees_every_layer_in_order(params):
    reader = RouterReader(jax.tree_util.Partial(note_layer, jnp.array([3.0, 5.0])), jnp.float32(1))
    output = Transformer(CONFIG).apply(
        {"params": params}, random_tokens(seed=22), segment_ids=jnp.asarray(SEGMENT_IDS), router_reader=reader
    )
    own, first_logits, expert_ids = output.reading.layers
    assert output.reading.carry == 2 * (2 * 1 + 3) + 5
    np.testing.assert_array_equal(own, [3.0, 5.0])
    np.testing.assert_array_equal(first_logits, output.router_logits[..., 0])
    best = np.argsort(-np.asarray(output.router_logits), axis=-1, kind="stable")[..., :2]
    np.testing.assert_array_equal(expert_ids, best)
    plain = Transformer(CONFIG).apply({"params": params}, random_tokens(seed=22), segment_ids=jnp.asarray(SEGMENT_IDS))
    assert plain.reading is None
    np.testing.assert_array_equal(plain.logits, output.logits)


def weighted_sum(logits, router_logits):
    """A loss that sees every logit of the real tokens."""
    rng = np.random.default_rng(10)
    by_token = np.where(REAL[..., None], rng.normal(size=(B, T, 11)), 0)
    by_route = np.where(REAL[None, ..., None], rng.normal(size=(2, B, T, 5)), 0)
    if isinstance(logits, jax.Array):
        by_token, by_route = by_token.astype(np.float32), by_route.astype(np.float32)
    return (logits * by_token).sum() + (router_logits * by_route).sum()


@functools.partial(jax.jit, static_argnums=0)
def loss_gradient(config, params, tokens):
    def loss(params):
        output = Transformer(config).apply({"params": params}, tokens, segment_ids=jnp.asarray(SEGMENT_IDS))
        return weighted_sum(output.logits, output.router_logits)

    return jax.grad(loss)(params)


def test_gradient_agrees_with_differences_of_the_oracle_for_every_parameter(params):
    tokens = random_tokens(seed=11)
    gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), loss_gradient(CONFIG, params, tokens))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    leaves, treedef = jax.tree.flatten(exact)
    rng = np.random.default_rng(12)
    for index, slope in enumerate(jax.tree.leaves(gradient)):
        # Half along the gradient, half at random: a slope that is large, but not a norm only.
        direction = slope / np.linalg.norm(slope) + rng.normal(size=slope.shape) / np.sqrt(slope.size)
        values = []
        for step in (1e-5, -1e-5):
            moved = treedef.unflatten([*leaves[:index], leaves[index] + step * direction, *leaves[index + 1 :]])
            values.append(weighted_sum(*oracle(CONFIG, moved, tokens, POSITIONS_IN_SEGMENT, SEGMENT_IDS)))
        np.testing.assert_allclose(np.sum(slope * direction), (values[0] - values[1]) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_does_not_change_the_gradient(params, remat):
    tokens = random_tokens(seed=11)
    plain = loss_gradient(CONFIG, params, tokens)
    recomputed = loss_gradient(dataclasses.replace(CONFIG, remat=remat), params, tokens)
    for expected, gradient in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


def saved_shapes(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))

    def residuals(params):
        return jax.vjp(lambda p: Transformer(config).apply({"params": p}, jnp.zeros((B, T), jnp.int32)).logits, params)

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, shapes)[1]))


def test_recomputation_saves_memory():
    none, dots, full = (saved_shapes(remat) for remat in ("none", "dots", "full"))
    assert full < dots < none


def test_bfloat16_activations(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tokens = random_tokens(seed=13)
    output = forward(config, params, tokens, None, SEGMENT_IDS)
    assert output.logits.dtype == jnp.float32 and output.router_logits.dtype == jnp.float32
    assert np.all(np.isfinite(output.logits)) and np.all(np.isfinite(output.router_logits))
    # The first layer chooses its experts from almost the same logits, so they must be close.
    exact = oracle(CONFIG, params, tokens, POSITIONS_IN_SEGMENT, SEGMENT_IDS)[1]
    np.testing.assert_allclose(output.router_logits[0][REAL], exact[0][REAL], rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_dtypes(dtype, param_dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=param_dtype)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(param_dtype)}

    cache = jax.eval_shape(lambda: Transformer(config).init_cache(B, T))
    assert cache.layers.keys.dtype == cache.layers.values.dtype == jnp.dtype(dtype)
    output = jax.eval_shape(
        functools.partial(forward, config), shapes, jnp.zeros((B, T), jnp.int32), None, jnp.asarray(SEGMENT_IDS), cache
    )
    assert output.logits.dtype == output.router_logits.dtype == jnp.float32
    assert output.cache.layers.keys.dtype == jnp.dtype(dtype)

    gradient = jax.eval_shape(functools.partial(loss_gradient, config), shapes, jnp.zeros((B, T), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(param_dtype)}

    angles = jnp.zeros((B, T, 1, 3))
    segment_ids, zero = jnp.asarray(SEGMENT_IDS), jnp.int32(0)
    inputs = SharedInputs(AttentionInputs(angles, angles, segment_ids, segment_ids, zero))
    layer_cache = LayerCache(*(jnp.zeros((2, B, 2, T, 6), dtype) for _ in range(2)))
    carry = LayerCarry(jnp.zeros((B, T, 10), dtype), layer_cache, None)
    ((residual, _, _), (router_logits, _)), _ = jax.eval_shape(
        lambda: Layer(config, sparse=True).init_with_output(
            jax.random.key(0), carry, LayerInputs(zero, zero, None, None), inputs
        )
    )
    assert residual.dtype == jnp.dtype(dtype) and router_logits.dtype == jnp.float32


def test_the_router_and_the_norms_are_computed_in_float32():
    rng = np.random.default_rng(14)
    x = jnp.asarray(rng.normal(size=(1, 3, 256)), jnp.bfloat16)
    exact_x = np.asarray(x, np.float64)
    scale = rng.normal(size=256).astype(np.float32)
    normed = RMSNorm(1e-6, "float32").apply({"params": {"scale": scale}}, x)
    expected = jnp.asarray(normalised(exact_x, scale.astype(np.float64), 1e-6), jnp.bfloat16)
    assert isinstance(normed, jax.Array) and normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, expected)

    config = dataclasses.replace(CONFIG, hidden_size=256, dtype="bfloat16")
    shapes = {"router": (256, 5), "gate_up": (5, 256, 2, 7), "down": (5, 7, 256)}
    moe_params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    _, router_logits, _ = jax.jit(MixtureOfExperts(config).apply)({"params": moe_params}, x)
    np.testing.assert_allclose(router_logits, exact_x @ moe_params["router"].astype(np.float64), rtol=0, atol=1e-4)


def test_fresh_parameters_are_plain_dicts_of_arrays():
    # This kind of key compiles several times faster than the usual one.
    params = jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0, impl="rbg"))

    def visit(tree):
        if isinstance(tree, jax.Array):
            return 1
        assert type(tree) is dict
        return sum(visit(child) for child in tree.values())

    assert visit(params) == len(jax.tree.leaves(params))
    for leaf in jax.tree.leaves(params["layers"]):
        assert leaf.shape[0] == 2 and (np.all(leaf == 1) or np.any(leaf[0] != leaf[1]))  # layers start differently
    inputs_summed = {"query": 10, "key": 10, "value": 10, "output": 4 * 6, "router": 10, "gate_up": 10, "down": 7}
    kernels = params["layers"]["attention"] | params["layers"]["moe"] | {"head": params["head"]}
    for name, fan_in in (inputs_summed | {"head": 10}).items():
        deviation = np.std(kernels[name]) * fan_in**0.5
        assert abs(deviation - 1) < 3.5 / (2 * kernels[name].size) ** 0.5, name


def test_parameter_count():
    attention = 10 * 4 * 6 + 2 * 10 * 2 * 6 + 4 * 6 * 10 + 2 * 6
    moe = 10 * 5 + 5 * 10 * 2 * 7 + 5 * 7 * 10
    expected = 2 * 11 * 10 + 10 + 2 * (attention + moe + 2 * 10)
    for config, count in (
        (CONFIG, expected),
        (dataclasses.replace(CONFIG, tie_embeddings=True), expected - 11 * 10),
        (dataclasses.replace(CONFIG, num_layers=5), expected + 3 * (attention + moe + 2 * 10)),
    ):
        shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


ZEROS = np.zeros((2, 3), np.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": ZEROS[0]}, r"tokens must have axes \[B, T\], got shape \(3,\)"),
        ({"tokens": ZEROS[None]}, r"tokens must have axes \[B, T\], got shape \(1, 2, 3\)"),
        ({"positions": ZEROS[:, :2]}, r"positions must have the shape of tokens, \(2, 3\); got \(2, 2\)"),
        ({"positions": ZEROS[0]}, r"positions must have the shape of tokens, \(2, 3\); got \(3,\)"),
        ({"segment_ids": ZEROS[:1]}, r"segment_ids must have the shape of tokens, \(2, 3\); got \(1, 3\)"),
        ({"segment_ids": ZEROS[0]}, r"segment_ids must have the shape of tokens, \(2, 3\); got \(3,\)"),
        ({"cache": (3, 5)}, r"a cache of 3 rows and 5 slots cannot take tokens of shape \(2, 3\)"),
        ({"cache": (2, 2)}, r"a cache of 2 rows and 2 slots cannot take tokens of shape \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(arguments, message):
    arguments = {name: jnp.asarray(value) for name, value in arguments.items() if name != "cache"} | (
        {"cache": Transformer(CONFIG).init_cache(*arguments["cache"])} if "cache" in arguments else {}
    )
    with pytest.raises(ValueError, match=message):
        Transformer(CONFIG).apply({"params": {}}, **({"tokens": jnp.asarray(ZEROS)} | arguments))


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_every_parameter_has_logical_axes(tie_embeddings):
    model = Transformer(TransformerConfig(tie_embeddings=tie_embeddings))
    params = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
    leaves, structure = jax.tree.flatten(params)
    axes = structure.flatten_up_to(model.param_axes())
    assert [len(names) for names in axes] == [leaf.ndim for leaf in leaves]
    assert {name for names in axes for name in names} - {None} <= set(RULES)
    mesh = AbstractMesh((1, 2, 2, 2, 1), MESH_AXES)
    assert len(jax.tree.leaves(shardings_of(mesh, params, model.param_axes()))) == len(leaves)


def test_cast_parameters_give_the_same_bits_from_less_memory():
    model = Transformer(TransformerConfig(dtype="bfloat16", hidden_size=16, expert_size=8))
    params = init_params(model.config, jax.random.key(0))
    cast = model.cast_params(params)
    kept = {"float32": set(), "bfloat16": set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        kept[leaf.dtype.name].add(path[-1].key)
    assert kept["float32"] == {"router", "scale"} and len(kept["bfloat16"]) == 8
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 32)
    prompt, token = tokens[:, :5], tokens[:, 5:]

    @jax.jit
    def read_and_decode(params):
        output = model.apply({"params": params}, prompt, cache=model.init_cache(2, 8))
        return output.logits, model.apply({"params": params}, token, cache=output.cache).logits

    for logits, expected in zip(read_and_decode(cast), read_and_decode(params), strict=True):
        np.testing.assert_array_equal(logits, expected)
