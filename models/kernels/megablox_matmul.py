"""Grouped products on a TPU: JAX's megablox kernel, with tiles that fit the groups."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox

Array = jax.Array

LANES = 128
"""Width of a TPU vector register."""


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Return the rows of a tile of the TPU kernel: a power of two, such that a group has about eight tiles or more."""
    per_group = num_rows // num_groups
    return min(512, max(LANES, 1 << max(0, (per_group // 8).bit_length() - 1)))


def _tile_columns(size: int, longest: int) -> int:
    """Return the length of equal tiles, each at most `longest`, that cover an axis with the least padding."""
    tiles = -(-size // longest)
    return -(-size // (tiles * LANES)) * LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def megablox_matmul(rows: Array, weights: Array, group_sizes: Array, interpret: bool = False) -> Array:
    """Multiply each row by the matrix of its group; see `models.kernels.grouped_matmul.grouped_matmul`.

    Args:
      rows: float32 or bfloat16 [M, D], sorted by group.
      weights: [E, D, F] in the dtype of rows.
      group_sizes: int32 [E], with a sum of at most M.
      interpret: if true, run the kernel on any backend, slowly, for tests.

    Returns:
      [M, F] in the dtype of rows; rows beyond the sum of group_sizes hold whatever the memory held.
    """
    return _multiply(rows, weights, group_sizes, interpret)


def _multiply(rows: Array, weights: Array, group_sizes: Array, interpret: bool) -> Array:
    num_rows, num_groups = rows.shape[0], weights.shape[0]
    # Two buffers of each tile and the float32 accumulator have to fit the vector memory, 16 MiB on the older chips.
    longest = 1024 if rows.dtype.itemsize <= 2 else 512

    def tiling(num_rows: int, depth: int, width: int) -> tuple[int, int, int]:
        """Return the tiles of one of the kernel's three products, forward and backward, from the product's sizes."""
        return tile_rows(num_rows, num_groups), _tile_columns(depth, longest), _tile_columns(width, longest)

    padding = -num_rows % tile_rows(num_rows, num_groups)
    padded = jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows
    # The kernel's own code relies on implicit promotion, which callers may have turned off.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = megablox.gmm(padded, weights, group_sizes, rows.dtype, tiling, interpret=interpret)
    return out[:num_rows]


def _forward(rows: Array, weights: Array, group_sizes: Array, interpret: bool) -> tuple[Array, tuple]:
    return _multiply(rows, weights, group_sizes, interpret), (rows, weights, group_sizes)


def _backward(interpret: bool, residuals: tuple, output_gradient: Array) -> tuple:
    rows, weights, group_sizes = residuals
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # The result of this forward product is not used, and XLA drops it.
        _, vjp = jax.vjp(lambda rows, weights: _multiply(rows, weights, group_sizes, interpret), rows, weights)
        return *vjp(output_gradient), None


megablox_matmul.defvjp(_forward, _backward)
