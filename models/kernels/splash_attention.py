"""Causal attention within segments on a TPU: JAX's splash kernels, with blocks that fit the number of tokens.

Letters as in `models.attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

Array = jax.Array

MAX_BLOCK = 512
"""Tokens of the largest tile: [512, 512] logits in float32 take 1 MiB of a TPU core's vector memory."""
LANES = 128
"""Width of a TPU vector register, of which blocks are multiples."""


def splash_attention(
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

    Tokens are padded to a multiple of the block with segment -1. Every token, padding included, sees at least itself:
    for a token that sees nothing the kernel would divide by zero. If `interpret` is true, the kernels run on any
    backend, slowly, for tests.
    """
    tokens, num_heads, head_dim = queries.shape[1:]
    block, padded = block_of(tokens)
    missing = padded - tokens

    def heads_first(array: Array) -> Array:  # [B, T, heads, size] -> [B, heads, padded, size]
        return jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))

    scaled = (queries.astype(jnp.float32) * (head_dim**-0.5 if scale is None else scale)).astype(queries.dtype)
    segments = kernels.SegmentIds(
        *(jnp.pad(array, ((0, 0), (0, missing)), constant_values=-1) for array in (query_segments, key_segments))
    )
    if window is None:
        mask = kernels.CausalMask((padded, padded))
    else:
        mask = kernels.LocalMask((padded, padded), window_size=(window - 1, 0), offset=0)
    mask = kernels.MultiHeadMask([mask] * num_heads)
    # Without `use_fused_bwd_kernel`: it writes T / block partial gradients of the queries, memory that grows with T².
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = kernels.BlockSizes(**dict.fromkeys(names, block))
    kernel = kernels.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    # The kernel gives the sinks' gradient in the dtype of the queries: a cast brings it back to their own.
    run = jax.vmap(functools.partial(kernel, sinks=None if sinks is None else sinks.astype(queries.dtype)))
    attended = run(heads_first(scaled), heads_first(keys), heads_first(values), segments)
    return jnp.asarray(attended)[:, :, :tokens].swapaxes(1, 2)


def block_of(tokens: int) -> tuple[int, int]:
    """Return the tokens of a block, a multiple of 128 up to 512, and the padded length: few blocks, little padding."""
    num_blocks = -(-tokens // MAX_BLOCK)
    block = -(-tokens // (num_blocks * LANES)) * LANES
    return block, num_blocks * block
