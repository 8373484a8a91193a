"""Attention against float64 numpy written token by token, with the gradients by hand: the blocks that run here, the
kernels in interpret mode, and what is lowered for each platform. Knows no model."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gpu_lowering import LOWERS_TRITON, lowered

from models import attention
from models.kernels import splash_attention, triton_attention, triton_tiles

NAMES = ("queries", "keys", "values")


def visible_slots(query_segments, key_segments, offset, window=None):
    """bool [B, T, S], token by token."""
    rows, tokens = query_segments.shape
    visible = np.zeros((rows, tokens, key_segments.shape[1]), bool)
    for row in range(rows):
        for token in range(tokens):
            own = offset + token
            first = 0 if window is None else max(0, own - window + 1)
            visible[row, token, first : own + 1] = key_segments[row, first : own + 1] == query_segments[row, token]
    return visible


def reference(
    queries, keys, values, query_segments, key_segments, cotangent, offset=0, *, sinks=None, window=None, scale=None
):
    """The attended values, and the gradients of sum(attended * cotangent) in the order of NAMES; float64.

    With sinks it is written as gpt-oss has it, one more column of logits whose weight is dropped after the softmax,
    and their gradient comes last.
    """
    queries, keys, values, cotangent = (np.asarray(array, np.float64) for array in (queries, keys, values, cotangent))
    visible = visible_slots(query_segments, key_segments, offset, window)
    group, scale = queries.shape[2] // keys.shape[2], queries.shape[3] ** -0.5 if scale is None else scale
    attended, d_queries = np.zeros((*queries.shape[:3], values.shape[3])), np.zeros_like(queries)
    d_keys, d_values, d_sinks = np.zeros_like(keys), np.zeros_like(values), np.zeros(queries.shape[2])
    for row, head in np.ndindex(queries.shape[0], queries.shape[2]):
        q, k, v = queries[row, :, head], keys[row, :, head // group], values[row, :, head // group]
        logits = np.where(visible[row], scale * (q @ k.T), -np.inf)
        sink = np.full((len(q), 1), -np.inf if sinks is None else sinks[head])
        logits = np.concatenate([logits, sink], axis=1)
        weights = np.exp(logits - np.max(logits, axis=1, keepdims=True))
        weights /= np.sum(weights, axis=1, keepdims=True)
        attended[row, :, head] = weights[:, :-1] @ v
        d_weights = np.concatenate([cotangent[row, :, head] @ v.T, np.zeros((len(q), 1))], axis=1)
        d_logits = weights * (d_weights - np.sum(weights * d_weights, axis=1, keepdims=True))
        d_queries[row, :, head] = scale * (d_logits[:, :-1] @ k)
        d_keys[row, :, head // group] += scale * (d_logits[:, :-1].T @ q)
        d_values[row, :, head // group] += weights[:, :-1].T @ cotangent[row, :, head]
        d_sinks[head] += np.sum(d_logits[:, -1])
    return attended, (d_queries, d_keys, d_values) if sinks is None else (d_queries, d_keys, d_values, d_sinks)


def packed_segments(rows, tokens):
    """Row 0 is one segment, row 1 is padded on the left, row 2 packs three segments, row 3 has padding at both ends."""
    segments = np.ones((4, tokens), np.int32)
    segments[1, : tokens // 3] = 0
    segments[2, tokens // 4 :], segments[2, (2 * tokens) // 3 :] = 2, 3
    segments[3, : tokens // 5], segments[3, tokens // 2 :], segments[3, (7 * tokens) // 8 :] = 0, 2, 0
    return segments[:rows]


def random_arrays(shape, kv_heads, slots=None, dtype=np.float32, value_size=None):
    """Queries, keys, values and a cotangent that is zero nowhere."""
    rows, tokens, num_heads, head_dim = shape
    rng = np.random.default_rng([*shape, kv_heads])
    kv_shape = (rows, tokens if slots is None else slots, kv_heads)
    value_size = head_dim if value_size is None else value_size
    shapes = (shape, (*kv_shape, head_dim), (*kv_shape, value_size), (rows, tokens, num_heads, value_size))
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def random_sinks(heads):
    """Some as large as the logits, some that hardly count."""
    return np.random.default_rng(heads).normal(scale=2, size=heads).astype(np.float32)


def value_and_gradients(function, queries, keys, values, query_segments, key_segments, cotangent, *offset):
    def run(queries, keys, values):
        return function(queries, keys, values, query_segments, key_segments, *offset)

    value, vjp = jax.vjp(run, queries, keys, values)
    return value, vjp(cotangent)


@functools.partial(jax.jit, static_argnums=0)
def compiled(function, *inputs):
    return value_and_gradients(function, *inputs)


def interpreted_kernel(*inputs, **options):
    return splash_attention.splash_attention(*inputs, **options, interpret=True)


def interpreted_triton(*inputs, **options):
    return triton_attention.triton_attention(*inputs, **options, interpret=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled_with_options(function, static, arrays, sinks, segments, cotangent, traced):
    """Value and gradients, those of the sinks last; `static` are pairs of names and numbers."""

    def run(arrays, sinks):
        return function(*arrays, *segments, **dict(static), **traced, sinks=sinks)

    value, vjp = jax.vjp(run, arrays, sinks)
    gradients, sinks_gradient = vjp(cotangent)
    return value, gradients if sinks is None else (*gradients, sinks_gradient)


def assert_near(actual, expected, tolerance=1e-5):
    """The largest error, relative to the largest entry."""
    assert actual.shape == expected.shape
    error = np.max(np.abs(np.asarray(actual, np.float64) - expected))
    assert error <= tolerance * np.max(np.abs(expected)), error


def assert_matches(function, shape, kv_heads):
    """Real rows, and gradients of a loss over real rows, agree with the reference."""
    queries, keys, values, cotangent = random_arrays(shape, kv_heads)
    segments = packed_segments(*shape[:2])
    real = (segments > 0)[:, :, None, None]
    cotangent = cotangent * real
    value, gradients = compiled(function, queries, keys, values, segments, segments, cotangent)
    expected, expected_gradients = reference(queries, keys, values, segments, segments, cotangent)
    assert_near(np.asarray(value) * real, expected * real)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected_gradient)


def test_oracle_gradients_agree_with_differences():
    *arrays, cotangent = (np.asarray(array, np.float64) for array in random_arrays((2, 5, 4, 3), 2, value_size=2))
    segments, options = packed_segments(2, 5), {"window": 3, "scale": 0.8}
    arrays.append(np.asarray(random_sinks(4), np.float64))

    def run(arrays):
        return reference(*arrays[:3], segments, segments, cotangent, sinks=arrays[3], **options)

    for index, gradient in enumerate(run(arrays)[1]):
        direction = np.random.default_rng(index).normal(size=gradient.shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [array + step * direction if position == index else array for position, array in enumerate(arrays)]
            values.append(np.sum(run(moved)[0] * cotangent))
        np.testing.assert_allclose(np.sum(gradient * direction), (values[0] - values[1]) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize(
    ("shape", "kv_heads"),
    [
        ((1, 1, 2, 4), 1),
        ((4, 9, 4, 6), 2),
        ((4, 24, 3, 5), 3),
        ((4, 65, 4, 8), 1),  # one block and one token
        ((4, 130, 4, 6), 2),  # long enough for the choice by platform
    ],
    ids=str,
)
def test_value_and_gradients_match_the_reference(shape, kv_heads):
    assert_matches(attention.attend, shape, kv_heads)


@pytest.mark.parametrize(
    ("shape", "kv_heads"),
    [
        ((4, 150, 6, 24), 2),  # the last tiles are not full, heads share their keys, the head size is no power of two
        ((4, 256, 2, 16), 2),
    ],
    ids=str,
)
def test_the_gpu_kernel_matches_the_reference(shape, kv_heads):
    assert_matches(interpreted_triton, shape, kv_heads)


def test_the_tpu_kernel_matches_the_reference_in_two_blocks_with_padding(monkeypatch):
    monkeypatch.setattr(splash_attention, "MAX_BLOCK", 128)
    assert splash_attention.block_of(250) == (128, 256)
    assert_matches(interpreted_kernel, (4, 250, 4, 24), 2)


def test_the_tpu_kernel_matches_the_reference_in_one_block_with_one_head_per_key_head():
    assert splash_attention.block_of(256) == (256, 256)
    assert_matches(interpreted_kernel, (4, 256, 2, 16), 2)


@pytest.mark.parametrize(("tokens", "slots", "offset"), [(1, 12, 0), (1, 12, 7), (5, 12, 4), (150, 180, 13)], ids=str)
def test_a_cache_is_read_up_to_each_token(tokens, slots, offset):
    queries, keys, values, cotangent = random_arrays((4, tokens, 4, 6), 2, slots)
    key_segments = packed_segments(4, slots)
    query_segments = key_segments[:, offset : offset + tokens]
    real = (query_segments > 0)[:, :, None, None]
    cotangent = cotangent * real
    inputs = (query_segments, key_segments, cotangent)
    value, gradients = compiled(attention.attend, queries, keys, values, *inputs, np.int32(offset))
    expected, expected_gradients = reference(queries, keys, values, *inputs, offset)
    assert_near(np.asarray(value) * real, expected * real)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected_gradient)

    later = (np.arange(slots) >= offset + tokens)[None, :, None, None]
    other_keys, other_values = (jnp.where(later, 1e3, array) for array in (keys, values))
    other_value, _ = compiled(attention.attend, queries, other_keys, other_values, *inputs, np.int32(offset))
    np.testing.assert_array_equal(other_value, value)


@pytest.mark.parametrize(
    ("function", "tokens"),
    [(attention.attend, 24), (attention.attend, 130), (interpreted_kernel, 130), (interpreted_triton, 130)],
)
def test_padding_is_finite_and_touches_no_real_token(function, tokens):
    queries, keys, values, cotangent = random_arrays((4, tokens, 2, 6), 1)
    segments = packed_segments(4, tokens)
    segments[0] = 0  # nothing but padding
    real = (segments > 0)[:, :, None, None]
    value, gradients = compiled(function, queries, keys, values, segments, segments, cotangent)
    assert all(np.all(np.isfinite(array)) for array in (value, *gradients))

    others = [jnp.where(real, array, 7 - 2 * array) for array in (queries, keys, values)]
    other_value, other_gradients = compiled(function, *others, segments, segments, jnp.where(real, cotangent, -3.0))
    for array, other in zip((value, *gradients), (other_value, *other_gradients), strict=True):
        np.testing.assert_array_equal(np.where(real, array, 0), np.where(real, other, 0))


def test_a_query_that_sees_no_slot_is_finite():
    queries, keys, values, cotangent = random_arrays((1, 2, 2, 4), 1, slots=3)
    query_segments, key_segments = np.zeros((1, 2), np.int32), np.ones((1, 3), np.int32)
    value, gradients = compiled(
        attention.attend, queries, keys, values, query_segments, key_segments, cotangent, np.int32(1)
    )
    assert all(np.all(np.isfinite(array)) for array in (value, *gradients))


@pytest.mark.parametrize(
    ("shape", "kv_heads", "value_size", "with_sinks", "static", "traced"),
    [
        ((4, 24, 4, 6), 2, 6, True, {}, {}),
        ((4, 24, 4, 6), 2, 9, True, {"scale": 0.7}, {"window": 9}),
        ((4, 24, 4, 6), 2, 6, False, {"scale": 0.9}, {"window": 5}),
        ((4, 24, 4, 6), 4, 3, False, {"scale": 0.3, "window": 1}, {}),
        ((4, 150, 2, 6), 1, 4, True, {"window": 30}, {}),  # by platform, and blocks see few keys
        ((4, 70, 4, 6), 2, 6, True, {"window": 9}, {"offset": 13}),
        ((4, 5, 4, 6), 2, 3, False, {"scale": 0.7}, {"offset": 10, "window": 4}),
    ],
    ids=str,
)
def test_sinks_windows_scales_and_other_values_match_the_reference(
    shape, kv_heads, value_size, with_sinks, static, traced
):
    offset = traced.get("offset", 0)
    slots = shape[1] + offset + (5 if offset else 0)
    *arrays, cotangent = random_arrays(shape, kv_heads, slots, value_size=value_size)
    key_segments = packed_segments(shape[0], slots)
    segments = (key_segments[:, offset : offset + shape[1]], key_segments)
    sinks = random_sinks(shape[2]) if with_sinks else None
    real = (segments[0] > 0)[:, :, None, None]
    cotangent = cotangent * real
    scalars = {name: np.int32(value) for name, value in traced.items()}
    names = tuple(static.items())
    value, gradients = compiled_with_options(attention.attend, names, arrays, sinks, segments, cotangent, scalars)
    expected, expected_gradients = reference(*arrays, *segments, cotangent, sinks=sinks, **static, **traced)
    assert_near(np.asarray(value) * real, expected * real)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected_gradient)


@pytest.mark.parametrize("kernel", [interpreted_kernel, interpreted_triton])
def test_kernels_with_sinks_a_window_a_scale_and_other_values_match_the_reference(kernel, monkeypatch):
    monkeypatch.setattr(splash_attention, "MAX_BLOCK", 128)
    assert splash_attention.block_of(300) == (128, 384)  # the last block of queries sees nothing of the first keys
    *arrays, cotangent = random_arrays((3, 300, 4, 12), 2, value_size=20)
    segments, sinks, options = packed_segments(3, 300), random_sinks(4), {"window": 60, "scale": 0.5}
    real = (segments > 0)[:, :, None, None]
    cotangent, inputs = cotangent * real, (segments, segments)
    names = tuple(options.items())
    value, gradients = compiled_with_options(kernel, names, arrays, sinks, inputs, cotangent, {})
    expected, expected_gradients = reference(*arrays, *inputs, cotangent, sinks=sinks, **options)
    assert_near(np.asarray(value) * real, expected * real)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected_gradient)


def test_a_window_may_differ_from_layer_to_layer_of_a_scan():
    queries, keys, values, cotangent = random_arrays((2, 70, 2, 4), 1)
    segments, windows = packed_segments(2, 70), (7, np.iinfo(np.int32).max, 20)

    @jax.jit
    def scanned(queries):
        def layer(x, window):
            return attention.attend(x, keys, values, segments, segments, window=window), None

        return jax.vjp(lambda x: jax.lax.scan(layer, x, np.asarray(windows, np.int32))[0], queries)[1](cotangent)

    x, inputs = np.asarray(queries, np.float64), []
    for window in windows:
        inputs.append(x)
        x, _ = reference(x, keys, values, segments, segments, cotangent, window=window)
    expected = cotangent
    for window, x in reversed(list(zip(windows, inputs, strict=True))):
        expected = reference(x, keys, values, segments, segments, expected, window=window)[1][0]
    assert_near(scanned(queries)[0], expected)


@pytest.mark.parametrize(
    ("window", "with_sinks", "value_size"), [(4, True, 3), (10, False, 6), (None, True, 6)], ids=str
)
def test_decoding_in_a_ring_is_the_same_as_reading_all_at_once(window, with_sinks, value_size):
    """Rows with padding on the left and several segments; the ring is written again, unless all of it is seen."""
    tokens, prompt, slots = 27, 6, 30 if window is None else 10
    queries, keys, values, cotangent = random_arrays((4, tokens, 4, 6), 2, value_size=value_size)
    segments, sinks = packed_segments(4, tokens), random_sinks(4) if with_sinks else None
    options = {"sinks": sinks, "scale": 0.6}
    expected, _ = reference(queries, keys, values, segments, segments, cotangent, window=window, **options)
    options["window"] = None if window is None else np.int32(window)

    def ring_of(array, newest):
        """What each slot holds once the newest token is written: [B, S, ...]."""
        held = newest - (newest - np.arange(slots)) % slots
        return np.where((held >= 0).reshape(1, slots, *(1,) * (array.ndim - 2)), array[:, np.maximum(held, 0)], 0)

    @jax.jit
    def decode(queries, keys, values, own, slot_segments, slot):
        heads_first = (jnp.swapaxes(array, 1, 2) for array in (keys, values))
        return attention.attend_newest(queries, *heads_first, own, slot_segments, slot, **options)

    caches = [[ring_of(array, newest) for array in (keys, values, segments)] for newest in range(tokens)]
    ring_keys, ring_values, ring_segments = caches[prompt - 1]
    own = (queries[:, :prompt], ring_keys, ring_values, segments[:, :prompt], ring_segments, np.int32(0))
    attended = [attention.attend(*own, **options)]
    for token in range(prompt, tokens):
        own, (ring_keys, ring_values, ring_segments) = slice(token, token + 1), caches[token]
        inputs = (queries[:, own], ring_keys, ring_values, segments[:, own], ring_segments)
        attended.append(decode(*inputs, np.int32(token % slots)))
    real = (segments > 0)[:, :, None, None]
    assert_near(np.concatenate(attended, axis=1) * real, expected * real)


def test_a_query_that_sees_no_slot_is_all_sink():
    *arrays, cotangent = random_arrays((1, 2, 2, 4), 1, slots=3)
    segments = (np.zeros((1, 2), np.int32), np.ones((1, 3), np.int32))
    traced = {"offset": np.int32(1), "window": np.int32(1)}
    value, gradients = compiled_with_options(attention.attend, (), arrays, random_sinks(2), segments, cotangent, traced)
    assert all(np.all(array == 0) for array in (value, *gradients))


@pytest.mark.parametrize(
    ("function", "tokens"), [(attention.attend, 20), (interpreted_kernel, 140), (interpreted_triton, 140)]
)
def test_bfloat16_stays_bfloat16_with_sinks_and_other_values(function, tokens):
    *arrays, cotangent = random_arrays((2, tokens, 2, 16), 1, dtype=jnp.bfloat16, value_size=8)
    sinks, segments = random_sinks(2), (np.ones((2, tokens), np.int32),) * 2
    value, gradients = compiled_with_options(function, (("window", 12),), arrays, sinks, segments, cotangent, {})
    expected, expected_gradients = reference(*arrays, *segments, cotangent, sinks=sinks, window=12)
    for array, expected_array in zip((value, *gradients), (expected, *expected_gradients), strict=True):
        assert array.dtype == (jnp.bfloat16 if array.ndim == 4 else jnp.float32)
        assert_near(array, expected_array, tolerance=2**-6)


@pytest.mark.parametrize(("function", "tokens"), [(attention.attend, 20), (interpreted_triton, 140)])
def test_bfloat16_stays_bfloat16(function, tokens):
    inputs = random_arrays((2, tokens, 2, 16), 1, dtype=jnp.bfloat16)
    segments = np.ones((2, tokens), np.int32)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention asks for it when it is differentiated
        value, gradients = compiled(function, *inputs[:3], segments, segments, inputs[3])
    expected, expected_gradients = reference(*inputs[:3], segments, segments, inputs[3])
    for array, expected_array in zip((value, *gradients), (expected, *expected_gradients), strict=True):
        assert array.dtype == jnp.bfloat16
        assert_near(array, expected_array, tolerance=2**-6)


@pytest.mark.parametrize("kernel", [interpreted_kernel, interpreted_triton])
def test_kernels_inside_scan_checkpoint_and_shard_map(kernel):
    queries, keys, values, cotangent = random_arrays((1, 130, 2, 8), 1)
    segments = packed_segments(1, 130)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)

    def twice(attend):
        def layer(x, _):
            return attend(x, keys, values, segments, segments), None

        def run(x):
            return jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0]

        value, vjp = jax.vjp(run, queries)
        return value, vjp(cotangent)[0]

    value, gradient = jax.jit(lambda: twice(sharded))()
    expected, expected_gradient = jax.jit(lambda: twice(attention.attend))()
    assert_near(value, np.asarray(expected, np.float64))
    assert_near(gradient, np.asarray(expected_gradient, np.float64))


def lowered_text(platform, tokens, slots=None, **options):
    """Value and gradients of three scanned layers, lowered for one platform."""
    queries, keys, values, cotangent = random_arrays((1, tokens, 2, 8), 1, slots)
    query_segments, key_segments = (np.ones((1, array.shape[1]), np.int32) for array in (queries, keys))
    offset = () if slots is None else (np.int32(0),)

    def layers(queries, keys, values, query_segments, key_segments, *offset):
        def layer(x, _):
            return attention.attend(x, keys, values, query_segments, key_segments, *offset, **options), None

        return jax.lax.scan(layer, queries, None, length=3)[0]

    inputs = (queries, keys, values, query_segments, key_segments, cotangent, *offset)
    return lowered(functools.partial(value_and_gradients, layers), platform, *inputs)


def test_long_sequences_use_the_kernel_on_a_tpu_and_never_hold_all_pairs_of_tokens():
    text = lowered_text("tpu", 896)
    assert text.count("tpu_custom_call") >= 3  # forward, and two backward
    assert "896x896" not in text
    block = attention._query_block(896)
    assert not [keys for keys in range(block, 897, block) if re.search(rf"tensor<3x[0-9x]*x{block}x{keys}x", text)]


@pytest.mark.parametrize(("platform", "tokens", "slots"), [("tpu", 100, None), ("tpu", 140, 150), ("cpu", 140, None)])
def test_short_sequences_caches_and_cpus_do_without_the_kernel(platform, tokens, slots):
    assert "tpu_custom_call" not in lowered_text(platform, tokens, slots)


def test_sinks_keep_the_kernel_and_so_do_windows_known_when_compiling():
    assert lowered_text("tpu", 140, sinks=random_sinks(2), window=20).count("tpu_custom_call") >= 3
    assert "tpu_custom_call" not in lowered_text("tpu", 140, window=jnp.int32(20))


def test_blocks_read_no_keys_from_before_the_window():
    logits = [int(keys) for keys in re.findall(r"x64x(\d+)xf32>", lowered_text("cpu", 320, window=20))]
    assert max(logits) == 64 + 20 - 1


def test_a_window_beyond_the_tokens_is_no_window():
    arrays = random_arrays((1, 24, 2, 4), 1)[:3]
    segments = np.ones((1, 24), np.int32)
    texts = [
        str(jax.make_jaxpr(functools.partial(attention.attend, **options))(*arrays, segments, segments))
        for options in ({}, {"window": 24}, {"window": 23})
    ]
    assert texts[0] == texts[1] != texts[2]


@LOWERS_TRITON
def test_long_sequences_use_the_kernel_on_a_gpu_and_never_hold_all_pairs_of_tokens():
    text = lowered_text("cuda", 896)
    assert text.count("xla.gpu.triton") >= 3
    assert "896x896" not in text
    block = attention._query_block(896)
    assert not [keys for keys in range(block, 897, block) if re.search(rf"tensor<3x[0-9x]*x{block}x{keys}x", text)]


@LOWERS_TRITON
def test_sinks_and_windows_keep_the_kernel_of_a_gpu_unless_they_are_not_known_when_compiling():
    assert lowered_text("cuda", 140, sinks=random_sinks(2), window=20).count("xla.gpu.triton") >= 3
    assert "xla.gpu.triton" not in lowered_text("cuda", 140, window=jnp.int32(20))


def test_a_gpu_runs_plain_xla_where_there_is_no_triton(monkeypatch):
    monkeypatch.setattr(triton_tiles, "HAS_TRITON", False)
    text = lowered_text("cuda", 140)
    assert "custom_call" not in text and "dot_general" in text


def test_a_gpu_runs_plain_xla_where_heads_are_wide():
    shape = jax.ShapeDtypeStruct((1, 140, 2, triton_attention.MAX_HEAD_DIM + 8), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, 140), jnp.int32)
    assert "xla.gpu.triton" not in lowered(attention.attend, "cuda", shape, shape, shape, segments, segments)


def test_query_blocks_are_few_and_large():
    for tokens in (1, 24, 63, 64, 65, 128, 511, 512, 513, 2048, 8191, 30_001):
        block = attention._query_block(tokens)
        assert block >= 64 and -(-tokens // block) <= 8
    assert attention._query_block(512) == 64 and attention._query_block(8192) == 1024


def test_kernel_blocks_are_tiles_and_waste_little():
    for tokens in (*range(128, 2100, 7), 8191, 8192, 8193, 30_001):
        block, padded = splash_attention.block_of(tokens)
        assert block % 128 == 0 and 128 <= block <= 512
        assert padded % block == 0 and padded >= tokens
        assert padded - tokens < 128 * (padded // block)
    assert splash_attention.block_of(8192) == (512, 8192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": (1, 4, 8)}, "four axes"),
        ({"keys": (2, 4, 2, 8)}, "keys must be .* and values"),
        ({"keys": (1, 4, 2, 6)}, "keys must be .* and values"),
        ({"values": (1, 4, 1, 8)}, "keys must be .* and values"),
        ({"queries": (1, 4, 3, 8)}, "multiple of key/value heads"),
        ({"query_segments": (1, 5)}, "segments must be"),
        ({"key_segments": (2, 4)}, "segments must be"),
        ({"keys": (1, 6, 2, 8), "values": (1, 6, 2, 8), "key_segments": (1, 6)}, "give the offset"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    shapes = {name: (1, 4, 2, 8) for name in NAMES} | {"query_segments": (1, 4), "key_segments": (1, 4)} | changes
    arrays = {name: np.ones(shape, np.int32 if "segments" in name else np.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        attention.attend(**arrays)


def test_keys_of_another_dtype_are_refused():
    queries, keys, values, _ = random_arrays((1, 4, 2, 8), 2)
    segments = np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="share one dtype"):
        attention.attend(queries, keys.astype(jnp.bfloat16), values, segments, segments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": np.ones(4, np.float32)}, "one logit for each of the 2 heads"),
        ({"window": 0}, "at least 1, got 0"),
        ({"window": np.ones(2, np.int32)}, "one whole number"),
        ({"window": np.float32(3)}, "one whole number"),
        ({"window": 2.5}, "one whole number"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    queries, keys, values, _ = random_arrays((1, 1, 2, 8), 2)
    segments = np.ones((1, 1), np.int32)
    for function in (attention.attend, attention.attend_newest):
        with pytest.raises(ValueError, match=message):
            function(queries, keys, values, segments, segments, np.int32(0), **options)


def test_a_window_of_the_newest_token_needs_its_slot():
    queries, keys, values, _ = random_arrays((1, 1, 2, 8), 2)
    segments = np.ones((1, 1), np.int32)
    with pytest.raises(ValueError, match="give newest_slot"):
        attention.attend_newest(queries, keys, values, segments, segments, window=3)
