"""Causal grouped-query attention within segments: one pure function, with an implementation for each platform.

Sequences of 128 tokens or more go through kernels whose memory grows with T and which skip what lies above the diagonal
or before the window: JAX's own on a TPU (`models.kernels.splash_attention`), and those of
`models.kernels.triton_attention` on an NVIDIA GPU. Elsewhere, and for short sequences, caches and windows that are not
known when compiling, blocks of queries go through `jax.nn.dot_product_attention`; where there are sinks, or values of
another size, which that function does not take, through the same formula written out.

cuDNN's kernel is left out on purpose. It takes segments only as a bias [B, 1, T, T] and computes a gradient for that
bias, so that its memory grows with T²; it does not take float32; and whether it has a plan for some shapes shows only
on a device.

Letters: B rows, T tokens, S cache slots, N heads, K key/value heads, H head size, V head size of the values.
"""

import functools
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.sharding import platform

Array = jax.Array

KERNEL_MIN_TOKENS = 128
"""Tokens from which on kernels are used; fewer would fill less than one tile of the TPU kernel."""
MIN_QUERY_BLOCK = 64
"""Queries of the smallest block, so that products stay large."""
MAX_QUERY_BLOCKS = 8
"""Most blocks of queries, so that compile time stays bounded."""


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    offset: Array | None = None,
    *,
    sinks: Array | None = None,
    window: Array | int | None = None,
    scale: float | None = None,
) -> Array:
    """Return softmax(scale · queries · keys) · values over each token itself and the earlier tokens of its segment.

    Differentiable in queries, keys, values and sinks (reverse mode). The softmax is in float32. In bfloat16 the TPU
    kernel rounds scale · queries and the sinks first; the other forms scale the logits and read the sinks in float32.
    Under a mesh of several TPUs or GPUs call it inside `jax.shard_map(..., check_vma=False)`: XLA cannot split kernels.

    Args:
      queries: float [B, T, N, H].
      keys: [B, S, K, H] in the dtype of queries; N is a multiple of K, and head n reads key/value head n // (N // K).
      values: [B, S, K, V] in the dtype of queries.
      query_segments: int32 [B, T]; 0 is padding.
      key_segments: int32 [B, S]; 0 is padding or an empty slot.
      offset: int32 scalar, the cache slot of the first query; no query sees slots beyond its own. None means that the
        keys are those of the queries' own tokens: S = T.
      sinks: float32 [N], a logit of each head that joins the softmax's denominator and adds no value (gpt-oss).
      window: number of tokens that a token sees, itself included. An int is known when compiling, and kernels and
        blocks skip what lies before the window. An int32 scalar may differ from layer to layer of a scan, but then the
        kernels, whose masks are built when compiling, cannot be used. None, or a number beyond T, is no window.
      scale: the factor of the logits; 1 / √H when absent.

    Returns:
      [B, T, N, V] in the dtype of queries. At padding the values are finite and mean nothing.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the window is not a positive whole number.
    """
    _check_inputs(queries, keys, values, query_segments, key_segments, offset)
    _check_options(queries.shape[2], sinks, window)
    inputs = (queries, keys, values, query_segments, key_segments)
    if offset is not None:
        return _attend_in_blocks(*inputs, sinks, offset, window=window, scale=scale)
    if _is_static(window) and window >= queries.shape[1]:
        window = None
    if queries.shape[1] >= KERNEL_MIN_TOKENS and (window is None or _is_static(window)):
        # Imported where they are used: Pallas takes a second to import, and CPUs do without it.
        found = platform()
        if found == "tpu":
            from models.kernels.splash_attention import splash_attention

            return splash_attention(*inputs, sinks, window=window, scale=scale)
        if found == "cuda":
            from models.kernels import triton_tiles
            from models.kernels.triton_attention import MAX_HEAD_DIM, triton_attention

            if triton_tiles.HAS_TRITON and max(queries.shape[-1], values.shape[-1]) <= MAX_HEAD_DIM:
                return triton_attention(*inputs, sinks, window=window, scale=scale)
    return _attend_in_blocks(*inputs, sinks, window=window, scale=scale)


def attend_newest(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    newest_slot: Array | None = None,
    *,
    sinks: Array | None = None,
    window: Array | int | None = None,
    scale: float | None = None,
) -> Array:
    """Attend from one token per row to all tokens of its segment in a cache, itself included.

    The cache is a ring whose newest token is the query's own. With a window, the age of a slot is the number of steps
    from it to the query's slot, around the ring. It depends on the order of the slots and not on a token's position in
    its row, so that padding on the left of a prompt and slots that were written again make no difference.

    Args:
      queries: float [B, 1, N, H].
      keys: [B, K, S, H], as a cache keeps them: heads before slots, so that both products read them in place.
      values: [B, K, S, V].
      query_segments: int32 [B, 1].
      key_segments: int32 [B, S].
      newest_slot: int32 scalar, the slot of the queries' own tokens. Only a window needs it.
      sinks: as for `attend`.
      window: as for `attend`; here it makes no difference whether it is known when compiling.
      scale: as for `attend`.

    Returns:
      [B, 1, N, V] in the dtype of queries.

    Raises:
      ValueError: if the sinks do not fit, the window is not a positive whole number, or it comes without a slot.
    """
    rows, _, num_heads, head_dim = queries.shape
    num_kv_heads, slots = keys.shape[1:3]
    _check_options(num_heads, sinks, window)
    grouped = queries.reshape(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    seen = (query_segments == key_segments)[:, None, None, :]
    if window is not None:
        if newest_slot is None:
            raise ValueError("a window counts from the query's own slot: give newest_slot")
        age = (newest_slot - jnp.arange(slots, dtype=jnp.int32)) % slots
        seen = seen & (age < window)[None, None, None, :]
    grouped_sinks = None if sinks is None else sinks.reshape(1, num_kv_heads, num_heads // num_kv_heads, 1)
    weights = _masked_softmax(logits, seen, grouped_sinks).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, values).reshape(rows, 1, num_heads, values.shape[-1])


def _masked_softmax(logits: Array, seen: Array, sinks: Array | None) -> Array:
    """Return the weights over the last axis in float32; the sinks count in their sum and are not in the result."""
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    sinks = sinks.astype(jnp.float32)
    highest = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), sinks))
    weights = jnp.exp(logits - highest)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - highest))


def _attend_in_blocks(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    sinks: Array | None = None,
    offset: Array | None = None,
    *,
    window: Array | int | None = None,
    scale: float | None = None,
) -> Array:
    """Attend one block of queries at a time, each to no more keys than its queries may see.

    The backward pass computes each block's weights again, so that they do not outlive the block.
    """
    tokens = queries.shape[1]
    block = _query_block(tokens)
    masked = functools.partial(_attend_masked, scale=scale)
    if block >= tokens:
        first_slot = 0 if offset is None else offset
        return masked(queries, keys, values, query_segments, key_segments, first_slot, sinks, window)
    attended = []
    for start in range(0, tokens, block):
        of_block = slice(start, start + block)
        first_seen = max(0, start + 1 - window) if offset is None and _is_static(window) else 0
        seen = slice(first_seen, start + block) if offset is None else slice(None)
        first_slot = start - first_seen if offset is None else offset + start
        attended.append(
            jax.checkpoint(masked)(
                queries[:, of_block],
                keys[:, seen],
                values[:, seen],
                query_segments[:, of_block],
                key_segments[:, seen],
                first_slot,
                sinks,
                window,
            )
        )
    return jnp.concatenate(attended, axis=1)


def _query_block(tokens: int) -> int:
    """Return the number of queries in a block."""
    return max(MIN_QUERY_BLOCK, -(-tokens // MAX_QUERY_BLOCKS))


def _attend_masked(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    first_slot: Array | int,
    sinks: Array | None,
    window: Array | int | None,
    *,
    scale: float | None,
) -> Array:
    """Attend in the plain form, with a mask [B, 1, T, S]; query t is in slot first_slot + t."""
    slots = jnp.arange(keys.shape[1], dtype=jnp.int32)
    own_slots = first_slot + jnp.arange(queries.shape[1], dtype=jnp.int32)
    near = slots[None, :] <= own_slots[:, None]
    if window is not None:
        near = near & (own_slots[:, None] - slots[None, :] < window)
    same = query_segments[:, :, None] == key_segments[:, None, :]
    seen = (same & near[None])[:, None]
    if sinks is None and values.shape == keys.shape:
        with jax.numpy_dtype_promotion("standard"):  # the function promotes bfloat16 to float32 inside
            return jax.nn.dot_product_attention(queries, keys, values, mask=seen, scale=scale)
    rows, tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    grouped = queries.reshape(rows, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    grouped_sinks = None if sinks is None else sinks.reshape(1, num_kv_heads, num_heads // num_kv_heads, 1, 1)
    weights = _masked_softmax(logits, seen[:, :, None], grouped_sinks).astype(values.dtype)
    return jnp.einsum("bkgts,bskv->btkgv", weights, values).reshape(rows, tokens, num_heads, values.shape[-1])


def _check_inputs(
    queries: Array, keys: Array, values: Array, query_segments: Array, key_segments: Array, offset: Array | None
) -> None:
    if queries.ndim != 4 or keys.ndim != 4:
        raise ValueError(f"queries and keys must have four axes, got shapes {queries.shape} and {keys.shape}")
    rows, tokens, num_heads, head_dim = queries.shape
    slots, num_kv_heads = keys.shape[1:3]
    if keys.shape != (rows, slots, num_kv_heads, head_dim) or values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"keys must be [{rows}, S, K, {head_dim}] and values [{rows}, S, K, V] to fit queries {queries.shape}, "
            f"got {keys.shape} and {values.shape}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"the number of heads ({num_heads}) must be a multiple of key/value heads ({num_kv_heads})")
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"queries, keys and values must share one dtype, got {queries.dtype}, {keys.dtype} and {values.dtype}"
        )
    if query_segments.shape != (rows, tokens) or key_segments.shape != (rows, slots):
        raise ValueError(
            f"segments must be [{rows}, {tokens}] and [{rows}, {slots}], "
            f"got {query_segments.shape} and {key_segments.shape}"
        )
    if offset is None and slots != tokens:
        raise ValueError(f"{tokens} queries against {slots} keys: give the offset of the first query in the cache")


def _is_static(window: Array | int | None) -> TypeGuard[int]:
    return isinstance(window, int | np.integer)


def _check_options(num_heads: int, sinks: Array | None, window: Array | int | None) -> None:
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks must have one logit for each of the {num_heads} heads, got shape {sinks.shape}")
    if window is None:
        return
    if _is_static(window):
        if window < 1:
            raise ValueError(f"a window holds at least the token itself: it must be at least 1, got {window}")
    elif jnp.shape(window) or not jnp.issubdtype(jnp.result_type(window), jnp.integer):
        raise ValueError(f"the window must be one whole number, got {window}")
