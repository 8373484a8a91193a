"""Causal grouped-query attention within segments on an NVIDIA GPU: three Pallas kernels that Triton compiles.

The kernel of the forward pass keeps each query's highest logit and its sum of weights while it goes over the keys
(Dao, FlashAttention-2, arXiv 2307.08691), so that no weights are ever written. The two kernels of the backward pass
compute the weights again, one tile of keys or one tile of queries at a time. All three skip what lies above the
diagonal or before the window, never repeat keys and values for the heads that share them, and mask what is beyond an
array.

Letters as in `models.attention`; logits are in units of log 2, for `exp2`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from models.kernels.triton_tiles import Span, call, dot, load, span, store, tile_size

Array = jax.Array

LOG2_E = math.log2(math.e)
UNSEEN = -1e30
"""The logit of a key that a query does not see. Finite, so that a query that has seen no key yet is not NaN."""
MAX_HEAD_DIM = 256
"""The widest heads whose tiles fit the shared memory."""


class _Settings(NamedTuple):
    """Options of `triton_attention`, which are known when compiling."""

    scale: float
    window: int | None
    interpret: bool


class _Tiles(NamedTuple):
    """Sizes of the tiles of a program."""

    queries: int
    """Queries that it takes at once."""
    keys: int
    """Keys that it takes at once."""
    head: int
    """The head size H as a power of two."""
    value: int
    """The head size V of the values as a power of two."""
    num_warps: int
    """Warps of the program."""

    @classmethod
    def of(cls, inputs: "_Inputs", queries: int, keys: int) -> "_Tiles":
        """Take so many queries and keys of two bytes per entry, and half as many in float32: more would spill."""
        head, value = (tile_size(array.shape[-1], MAX_HEAD_DIM) for array in (inputs.queries, inputs.values))
        part = 1 if inputs.queries.dtype.itemsize <= 2 else 2
        return cls(queries // part, keys // part, head, value, num_warps=4 if max(head, value) <= 64 else 8)

    def key_steps(self, block: Array, tokens: int, window: int | None) -> tuple[Array | int, Array]:
        """Return the first tile of keys that a tile of queries sees, and one beyond the last."""
        first_query = block * self.queries
        first_key = 0 if window is None else jnp.maximum(0, first_query - (window - 1))
        return first_key // self.keys, pl.cdiv(jnp.minimum(tokens, (block + 1) * self.queries), self.keys)


class _Inputs(NamedTuple):
    """The five arrays, or a kernel's references to them."""

    queries: Any
    keys: Any
    values: Any
    query_segments: Any
    key_segments: Any


def triton_attention(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    sinks: Array | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Array:
    """Attend as `models.attention.attend` does without an offset: same arrays, same result.

    Factors are rounded as in `triton_tiles.dot`, and weights to the dtype of the values before the last product. If
    `interpret` is true, the kernels run on any backend, slowly, for tests.
    """
    settings = _Settings(queries.shape[-1] ** -0.5 if scale is None else scale, window, interpret)
    return _attention(queries, keys, values, query_segments, key_segments, sinks, settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    sinks: Array | None,
    settings: _Settings,
) -> Array:
    return _attend(_Inputs(queries, keys, values, query_segments, key_segments), sinks, settings)[0]


def _forward(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    sinks: Array | None,
    settings: _Settings,
) -> tuple[Array, tuple]:
    inputs = _Inputs(queries, keys, values, query_segments, key_segments)
    attended, log_sums = _attend(inputs, sinks, settings)
    return attended, (inputs, sinks, attended, log_sums)


def _backward(settings: _Settings, residuals: tuple, gradient: Array) -> tuple:
    inputs, sinks, attended, log_sums = residuals
    products = attended.astype(jnp.float32) * gradient.astype(jnp.float32)
    # Σ weights · (gradient in the weights) of each query, computed from its output.
    means = jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2)  # [B, N, T]
    of_keys, of_values = _differentiate_keys(inputs, gradient, log_sums, means, settings)
    of_queries = _differentiate_queries(inputs, gradient, log_sums, means, settings)
    of_sinks = None
    if sinks is not None:
        weights = jnp.exp2(LOG2_E * sinks.astype(jnp.float32)[None, :, None] - log_sums)
        of_sinks = -jnp.sum(weights * means, axis=(0, 2)).astype(sinks.dtype)
    return of_queries, of_keys, of_values, None, None, of_sinks


_attention.defvjp(_forward, _backward)


def _seen(inputs: _Inputs, row: Array, own: Span, others: Span, settings: _Settings, keys_first: bool) -> Array:
    """Return True where a query sees a key, bool [queries, keys], or [keys, queries] if `keys_first`."""
    query_segments = load(inputs.query_segments, row, own, other=-1)
    key_segments = load(inputs.key_segments, row, others, other=-2)

    def pair(queries: Array, keys: Array) -> tuple[Array, Array]:
        return (queries[None, :], keys[:, None]) if keys_first else (queries[:, None], keys[None, :])

    query_positions, key_positions = pair(own.positions, others.positions)
    query_segments, key_segments = pair(query_segments, key_segments)
    seen = (query_segments == key_segments) & (key_positions <= query_positions)
    if settings.window is not None:
        seen = seen & (query_positions - key_positions < settings.window)
    return seen


def _logits(left: Array, right: Array, settings: _Settings) -> Array:
    """Return the logits of queries [queries, H] and keys [keys, H], in the order of the two arguments."""
    return dot(left, right, right_axis=1) * (settings.scale * LOG2_E)


def _attend(inputs: _Inputs, sinks: Array | None, settings: _Settings) -> tuple[Array, Array]:
    """Return the attended values, [B, T, N, V], and log2 of the softmax's denominator, float32 [B, N, T]."""
    rows, tokens, num_heads, head_dim = inputs.queries.shape
    num_kv_heads, value_dim = inputs.values.shape[2:]
    tiles = _Tiles.of(inputs, queries=128, keys=64)

    def kernel(*refs: Any) -> None:
        arrays, (out_ref, log_sums_ref) = _Inputs(*refs[:5]), refs[-2:]
        block, head, row = (pl.program_id(axis) for axis in range(3))
        own = span(block * tiles.queries, tiles.queries, tokens)
        head_span, value_span = span(0, tiles.head, head_dim), span(0, tiles.value, value_dim)
        kv_head = head // (num_heads // num_kv_heads)
        queries = load(arrays.queries, row, own, head, head_span)

        def add(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, highest, weight_sum = carry
            others = span(step * tiles.keys, tiles.keys, tokens)
            keys = load(arrays.keys, row, others, kv_head, head_span)
            seen = _seen(arrays, row, own, others, settings, keys_first=False)
            logits = jnp.where(seen, _logits(queries, keys, settings), UNSEEN)
            new_highest = jnp.maximum(highest, jnp.max(logits, axis=1))
            weights = jnp.where(seen, jnp.exp2(logits - new_highest[:, None]), 0.0)
            shrink = jnp.exp2(highest - new_highest)
            values = load(arrays.values, row, others, kv_head, value_span)
            total = total * shrink[:, None] + dot(weights.astype(values.dtype), values)
            return total, new_highest, weight_sum * shrink + jnp.sum(weights, axis=1)

        start = (
            jnp.zeros((tiles.queries, tiles.value), jnp.float32),
            jnp.full(tiles.queries, UNSEEN, jnp.float32),
            jnp.zeros(tiles.queries, jnp.float32),
        )
        first, end = tiles.key_steps(block, tokens, settings.window)
        total, highest, weight_sum = jax.lax.fori_loop(first, end, add, start)
        if sinks is not None:
            sink = refs[5][head].astype(jnp.float32) * LOG2_E
            new_highest = jnp.maximum(highest, sink)
            shrink = jnp.exp2(highest - new_highest)
            total, highest = total * shrink[:, None], new_highest
            weight_sum = weight_sum * shrink + jnp.exp2(sink - new_highest)
        weight_sum = jnp.where(weight_sum > 0, weight_sum, 1.0)  # a query that saw nothing attends to nothing
        store(out_ref, total / weight_sum[:, None], row, own, head, value_span)
        store(log_sums_ref, highest + jnp.log2(weight_sum), row, head, own)

    out_shape = [
        jax.ShapeDtypeStruct((rows, tokens, num_heads, value_dim), inputs.queries.dtype),
        jax.ShapeDtypeStruct((rows, num_heads, tokens), jnp.float32),
    ]
    grid = (pl.cdiv(tokens, tiles.queries), num_heads, rows)
    arguments = inputs if sinks is None else (*inputs, sinks)
    run = call(kernel, "attention", grid, out_shape, settings.interpret, tiles.num_warps, num_stages=2)
    attended, log_sums = run(*arguments)
    return attended, log_sums


def _weight_gradients(
    logits: Array, seen: Array, log_sums: Array, means: Array, of_weights: Array, scale: float
) -> tuple[Array, Array]:
    """Return the weights, computed again, and the gradient of the unscaled products of queries and keys."""
    weights = jnp.where(seen, jnp.exp2(logits - log_sums), 0.0)
    return weights, weights * (of_weights - means) * scale


def _differentiate_keys(
    inputs: _Inputs, gradient: Array, log_sums: Array, means: Array, settings: _Settings
) -> tuple[Array, Array]:
    """Return the gradients of keys and values, for each tile of keys a sum over the later queries of all its heads."""
    tokens, num_heads, head_dim = inputs.queries.shape[1:]
    rows, _, num_kv_heads, value_dim = inputs.values.shape
    tiles = _Tiles.of(inputs, queries=64, keys=64)
    sharing = num_heads // num_kv_heads

    def kernel(*refs: Any) -> None:
        arrays, (gradient_ref, log_sums_ref, means_ref, of_keys_ref, of_values_ref) = _Inputs(*refs[:5]), refs[5:]
        block, kv_head, row = (pl.program_id(axis) for axis in range(3))
        others = span(block * tiles.keys, tiles.keys, tokens)
        head_span, value_span = span(0, tiles.head, head_dim), span(0, tiles.value, value_dim)
        keys = load(arrays.keys, row, others, kv_head, head_span)
        values = load(arrays.values, row, others, kv_head, value_span)
        first = block * tiles.keys // tiles.queries
        last_query = tokens
        if settings.window is not None:
            last_query = jnp.minimum(tokens, (block + 1) * tiles.keys + settings.window - 1)
        steps = pl.cdiv(last_query, tiles.queries) - first

        def add(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            of_keys, of_values = carry
            head = kv_head * sharing + step // steps
            own = span((first + step % steps) * tiles.queries, tiles.queries, tokens)
            queries = load(arrays.queries, row, own, head, head_span)
            of_outputs = load(gradient_ref, row, own, head, value_span)
            seen = _seen(arrays, row, own, others, settings, keys_first=True)
            logits = _logits(keys, queries, settings)
            sums, row_means = load(log_sums_ref, row, head, own)[None, :], load(means_ref, row, head, own)[None, :]
            of_weights = dot(values, of_outputs, right_axis=1)
            weights, of_logits = _weight_gradients(logits, seen, sums, row_means, of_weights, settings.scale)
            of_values = of_values + dot(weights.astype(of_outputs.dtype), of_outputs)
            return of_keys + dot(of_logits.astype(queries.dtype), queries), of_values

        start = tuple(jnp.zeros((tiles.keys, width), jnp.float32) for width in (tiles.head, tiles.value))
        of_keys, of_values = jax.lax.fori_loop(0, sharing * steps, add, start)
        store(of_keys_ref, of_keys, row, others, kv_head, head_span)
        store(of_values_ref, of_values, row, others, kv_head, value_span)

    out_shape = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (inputs.keys, inputs.values)]
    grid = (pl.cdiv(tokens, tiles.keys), num_kv_heads, rows)
    run = call(kernel, "attention_keys", grid, out_shape, settings.interpret, tiles.num_warps, num_stages=2)
    of_keys, of_values = run(*inputs, gradient, log_sums, means)
    return of_keys, of_values


def _differentiate_queries(
    inputs: _Inputs, gradient: Array, log_sums: Array, means: Array, settings: _Settings
) -> Array:
    """Return the gradients of queries, for each tile of them a sum over the earlier keys."""
    rows, tokens, num_heads, head_dim = inputs.queries.shape
    num_kv_heads, value_dim = inputs.values.shape[2:]
    tiles = _Tiles.of(inputs, queries=64, keys=64)

    def kernel(*refs: Any) -> None:
        arrays, (gradient_ref, log_sums_ref, means_ref, out_ref) = _Inputs(*refs[:5]), refs[5:]
        block, head, row = (pl.program_id(axis) for axis in range(3))
        own = span(block * tiles.queries, tiles.queries, tokens)
        head_span, value_span = span(0, tiles.head, head_dim), span(0, tiles.value, value_dim)
        kv_head = head // (num_heads // num_kv_heads)
        queries = load(arrays.queries, row, own, head, head_span)
        of_outputs = load(gradient_ref, row, own, head, value_span)
        sums, row_means = load(log_sums_ref, row, head, own)[:, None], load(means_ref, row, head, own)[:, None]

        def add(step: Array, of_queries: Array) -> Array:
            others = span(step * tiles.keys, tiles.keys, tokens)
            keys = load(arrays.keys, row, others, kv_head, head_span)
            values = load(arrays.values, row, others, kv_head, value_span)
            seen = _seen(arrays, row, own, others, settings, keys_first=False)
            logits = _logits(queries, keys, settings)
            of_weights = dot(of_outputs, values, right_axis=1)
            _, of_logits = _weight_gradients(logits, seen, sums, row_means, of_weights, settings.scale)
            return of_queries + dot(of_logits.astype(keys.dtype), keys)

        first, end = tiles.key_steps(block, tokens, settings.window)
        zeros = jnp.zeros((tiles.queries, tiles.head), jnp.float32)
        store(out_ref, jax.lax.fori_loop(first, end, add, zeros), row, own, head, head_span)

    out_shape = jax.ShapeDtypeStruct(inputs.queries.shape, inputs.queries.dtype)
    grid = (pl.cdiv(tokens, tiles.queries), num_heads, rows)
    run = call(kernel, "attention_queries", grid, out_shape, settings.interpret, tiles.num_warps, num_stages=2)
    return run(*inputs, gradient, log_sums, means)
