"""Products of rows that are sorted by group with one matrix per group: the work of the chosen experts, and no more.

Each platform has its own implementation, chosen while the program is traced: Pallas' megablox kernel on a TPU
(`models.kernels.megablox_matmul`), our own kernels on an NVIDIA GPU (`models.kernels.triton_matmul`), and a loop over
blocks of rows in plain JAX elsewhere. `jax.lax.ragged_dot` is not used: by default XLA turns it into a product with the
matrices of all groups, on CPUs, GPUs and TPUs alike.
"""

import jax
import jax.numpy as jnp

from models.kernels.row_blocks import cut_rows
from rspo_jax.sharding import platform

Array = jax.Array


def grouped_matmul(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """Multiply each row by the matrix of its group.

    Rows of group 0 come first, then those of group 1, and so on. Groups may be empty. Rows beyond sum(group_sizes)
    belong to no group: they are not computed, and both their output and their gradient are unspecified (on a TPU,
    whatever the memory held, NaN included). Mask them where they can occur.

    On a TPU the kernel declares 2·M·D·F FLOPs, the useful work, to XLA's cost analysis. The tiles that it computes hold
    up to M + (E − 1)·tile rows, since a tile that two groups share is computed for both; their size keeps that near
    1/8 more than M, down to tiles of 128 rows. On a GPU no two groups share a tile: each group begins with a new one.

    Args:
      rows: float32 or bfloat16 [M, D], sorted by group.
      weights: float [E, D, F], in the dtype of rows.
      group_sizes: int32 [E], not negative, with a sum of at most M; a sum of M is the normal case.

    Returns:
      [M, F] in the dtype of rows; products are summed in float32. Differentiable (reverse mode) in rows and weights.

    Raises:
      ValueError: if shapes or dtypes do not fit together.
    """
    _check(rows, weights, group_sizes)
    if 0 in (*rows.shape, *weights.shape):
        return jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    # Imported where they are used: Pallas takes a second to import, and CPUs do without it.
    found = platform()
    if found == "tpu":
        from models.kernels.megablox_matmul import megablox_matmul

        return megablox_matmul(rows, weights, group_sizes)
    if found == "cuda":
        from models.kernels import triton_tiles
        from models.kernels.triton_matmul import triton_matmul

        if triton_tiles.HAS_TRITON:
            return triton_matmul(rows, weights, group_sizes)
    return block_matmul(rows, weights, group_sizes)


def _check(rows: Array, weights: Array, group_sizes: Array) -> None:
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(f"rows must be [M, D] and weights [E, D, F]; got {rows.shape} and {weights.shape}")
    if group_sizes.shape != weights.shape[:1] or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"group_sizes must be int32 with one entry for each of the {weights.shape[0]} groups; got "
            f"{group_sizes.dtype} of shape {group_sizes.shape}"
        )
    if rows.dtype != weights.dtype:
        raise ValueError(
            f"rows and weights must have one dtype; got {rows.dtype} and {weights.dtype}: cast one of them"
        )


def block_size_for(num_rows: int, num_groups: int) -> int:
    """Return the rows of a block: a power of two such that a group has at least two, large but with little waste."""
    per_group = max(1, num_rows // num_groups)
    return min(512, max(8, 1 << (per_group // 4).bit_length()))


@jax.custom_vjp
def block_matmul(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """Multiply in plain JAX: one product per block of rows, in a loop over the blocks in use."""
    return _multiply_blocks(rows, weights, group_sizes)


def _pad_to_blocks(array: Array, block_size: int) -> Array:
    # A block may begin at the last row; without the padding, a slice of a whole block there would be moved to fit.
    return jnp.pad(array, ((0, block_size), (0, 0)))


def _multiply_blocks(rows: Array, weights: Array, group_sizes: Array) -> Array:
    num_rows = rows.shape[0]
    block_size = block_size_for(num_rows, weights.shape[0])
    blocks = cut_rows(group_sizes, num_rows, block_size)
    padded = _pad_to_blocks(rows, block_size)

    def body(block: Array, out: Array) -> Array:
        # The last block of a group also writes to rows of the next group, whose own blocks overwrite them later.
        block_rows = jax.lax.dynamic_slice_in_dim(padded, blocks.start[block], block_size)
        product = _dot(block_rows, weights[blocks.group[block]], (1, 0))
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), blocks.start[block], 0)

    out = jnp.zeros((num_rows + block_size, weights.shape[2]), rows.dtype)
    return jax.lax.fori_loop(0, blocks.num_used, body, out)[:num_rows]


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _block_forward(rows: Array, weights: Array, group_sizes: Array) -> tuple[Array, tuple]:
    return _multiply_blocks(rows, weights, group_sizes), (rows, weights, group_sizes)


def _block_backward(residuals: tuple, output_gradient: Array) -> tuple:
    rows, weights, group_sizes = residuals
    block_size = block_size_for(rows.shape[0], weights.shape[0])
    blocks = cut_rows(group_sizes, rows.shape[0], block_size)
    padded_rows, padded_gradient = _pad_to_blocks(rows, block_size), _pad_to_blocks(output_gradient, block_size)

    def body(block: Array, sums: Array) -> Array:
        start, group = blocks.start[block], blocks.group[block]
        # Rows of the next group must not count in the gradient of this group's matrix.
        own = start + jnp.arange(block_size, dtype=jnp.int32) < blocks.end[block]
        block_rows = jax.lax.dynamic_slice_in_dim(padded_rows, start, block_size)
        gradient = jax.lax.dynamic_slice_in_dim(padded_gradient, start, block_size)
        block_rows, gradient = (jnp.where(own[:, None], array, 0) for array in (block_rows, gradient))
        return sums.at[group].add(_dot(block_rows, gradient, (0, 0)))

    sums = jax.lax.fori_loop(0, blocks.num_used, body, jnp.zeros(weights.shape, jnp.float32))
    row_gradient = _multiply_blocks(output_gradient, weights.swapaxes(1, 2), group_sizes)
    return row_gradient, sums.astype(weights.dtype), None


block_matmul.defvjp(_block_forward, _block_backward)
