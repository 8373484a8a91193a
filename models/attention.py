"""Causal grouped-query attention within segments: one pure function, and the form of it that suits each platform.

On a TPU, sequences of 128 tokens or more go through the splash kernels of JAX, whose memory grows with T and which skip
what lies above the diagonal. Everywhere else, and for short sequences and caches, blocks of queries go through
`jax.nn.dot_product_attention`. This file must never know Flax, a model or its configuration.

cuDNN's kernel is left out on purpose. It takes segments only as a bias [B, 1, T, T], and JAX then always asks it for
the gradient of that bias, which not every version can plan. On a GPU the blocks run as plain XLA.

Letters: B rows, T tokens, S cache slots, N heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

Array = jax.Array

KERNEL_MIN_TOKENS = 128
"""Shorter sequences would fill less than one tile of the TPU kernel."""
KERNEL_MAX_BLOCK = 512
"""Tokens of the largest tile: [512, 512] logits in float32 are 1 MiB of a TPU core's vector memory."""
LANES = 128
"""The kernel's blocks are multiples of the width of a TPU vector register."""
MIN_QUERY_BLOCK = 64
MAX_QUERY_BLOCKS = 8


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    offset: Array | None = None,
) -> Array:
    """softmax(queries · keys / √H) · values, over the earlier tokens of a token's own segment and itself.

    Differentiable in queries, keys and values (reverse mode). The softmax is in float32. In bfloat16 the TPU kernel
    rounds queries / √H before the first product, the other form scales the logits in float32.
    Under a mesh of several TPUs call it inside `jax.shard_map(..., check_vma=False)`: XLA cannot split the kernel.

    Args:
      queries: float [B, T, N, H].
      keys: [B, S, K, H] in the dtype of queries; N is a multiple of K, and head n reads key/value head n // (N // K).
      values: as keys.
      query_segments: int32 [B, T]; 0 is padding.
      key_segments: int32 [B, S]; 0 is padding or an empty slot.
      offset: int32 scalar, the cache slot of the first query; slots beyond a query's own are not seen. None means
        that the keys are the queries' own tokens: S = T.

    Returns:
      [B, T, N, H] in the dtype of queries. Rows of padding hold finite values that mean nothing.

    Raises:
      ValueError: if shapes or dtypes do not fit.
    """
    _check_inputs(queries, keys, values, query_segments, key_segments, offset)
    if offset is not None:
        return _attend_in_blocks(queries, keys, values, query_segments, key_segments, offset)
    inputs = (queries, keys, values, query_segments, key_segments)
    if queries.shape[1] < KERNEL_MIN_TOKENS:
        return _attend_in_blocks(*inputs)
    return jax.lax.platform_dependent(*inputs, tpu=_attend_with_kernel, default=_attend_in_blocks)


def attend_newest(queries: Array, keys: Array, values: Array, query_segments: Array, key_segments: Array) -> Array:
    """Attention of one token a row over everything of its segment in a cache, its own slot included.

    Args:
      queries: float [B, 1, N, H].
      keys: [B, K, S, H], as a cache keeps them: heads before slots, so that both products read it where it lies.
      values: as keys.
      query_segments: int32 [B, 1].
      key_segments: int32 [B, S].

    Returns:
      [B, 1, N, H] in the dtype of queries.
    """
    rows, _, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    grouped = queries.reshape(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    same = (query_segments == key_segments)[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(same, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, values).reshape(queries.shape)


def _attend_in_blocks(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    offset: Array | None = None,
) -> Array:
    """One block of queries at a time, each against no more keys than its last query may see.

    The backward pass computes each block's attention weights again, so that no block's weights outlive it. This also
    keeps them out of the residuals that `jax.lax.platform_dependent` carries for all of its branches.
    """
    tokens = queries.shape[1]
    block = _query_block(tokens)
    if block >= tokens:
        return _attend_masked(queries, keys, values, query_segments, key_segments, 0 if offset is None else offset)
    attended = []
    for start in range(0, tokens, block):
        of_block = slice(start, start + block)
        seen = slice(0, start + block) if offset is None else slice(None)
        first_slot = start if offset is None else offset + start
        attended.append(
            jax.checkpoint(_attend_masked)(
                queries[:, of_block],
                keys[:, seen],
                values[:, seen],
                query_segments[:, of_block],
                key_segments[:, seen],
                first_slot,
            )
        )
    return jnp.concatenate(attended, axis=1)


def _query_block(tokens: int) -> int:
    """At most 8 blocks, so that compile time stays bounded, of at least 64 queries, so that products stay large."""
    return max(MIN_QUERY_BLOCK, -(-tokens // MAX_QUERY_BLOCKS))


def _attend_masked(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    first_slot: Array | int,
) -> Array:
    """The plain form, with a mask [B, 1, T, S]; query t sits in slot first_slot + t."""
    slots = jnp.arange(keys.shape[1], dtype=jnp.int32)
    own_slots = first_slot + jnp.arange(queries.shape[1], dtype=jnp.int32)
    earlier = slots[None, :] <= own_slots[:, None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 to float32 inside
        return jax.nn.dot_product_attention(queries, keys, values, mask=(same & earlier[None])[:, None])


def _attend_with_kernel(
    queries: Array,
    keys: Array,
    values: Array,
    query_segments: Array,
    key_segments: Array,
    interpret: bool = False,
) -> Array:
    """Self-attention through the splash kernels; `interpret` runs them on any platform, slowly.

    Tokens are padded to a multiple of the block with segment -1. Every row sees at least itself, padding included:
    the kernel divides by zero on a row that sees nothing.
    """
    tokens, num_heads, head_dim = queries.shape[1:]
    block, padded = _kernel_block(tokens)
    missing = padded - tokens

    def heads_first(array: Array) -> Array:  # [B, T, N, H] -> [B, N, padded, H]
        return jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))

    scaled = (queries.astype(jnp.float32) * head_dim**-0.5).astype(queries.dtype)
    segments = splash_attention.SegmentIds(
        *(jnp.pad(array, ((0, 0), (0, missing)), constant_values=-1) for array in (query_segments, key_segments))
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((padded, padded))] * num_heads)
    kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=_block_sizes(block), interpret=interpret)
    attended = jax.vmap(kernel)(heads_first(scaled), heads_first(keys), heads_first(values), segments)
    return jnp.asarray(attended)[:, :, :tokens].swapaxes(1, 2)


def _kernel_block(tokens: int) -> tuple[int, int]:
    """The block, a multiple of 128 up to 512, and the padded length: the fewest blocks, as small as they may be."""
    num_blocks = -(-tokens // KERNEL_MAX_BLOCK)
    block = -(-tokens // (num_blocks * LANES)) * LANES
    return block, num_blocks * block


def _block_sizes(block: int) -> splash_attention.BlockSizes:
    """Two backward kernels, not the fused one: that one writes T / block partial gradients of the queries, which is
    memory that grows with T · T."""
    return splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _check_inputs(
    queries: Array, keys: Array, values: Array, query_segments: Array, key_segments: Array, offset: Array | None
) -> None:
    if queries.ndim != 4 or keys.ndim != 4:
        raise ValueError(f"queries and keys must have four axes, got shapes {queries.shape} and {keys.shape}")
    rows, tokens, num_heads, head_dim = queries.shape
    slots, num_kv_heads = keys.shape[1:3]
    if keys.shape != (rows, slots, num_kv_heads, head_dim) or values.shape != keys.shape:
        raise ValueError(
            f"keys and values must both be [{rows}, S, K, {head_dim}] to fit queries {queries.shape}, "
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
