"""Grouped products on an NVIDIA GPU: two Pallas kernels that Triton compiles.

One multiplies each block of rows by the matrix of its group, or by its transpose, which the gradient of the rows needs;
the other sums rowᵀ · gradient over the rows of each group. What a tile holds of another group, or beyond an array, is
masked, so that sizes need not be multiples of anything.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from models.kernels.row_blocks import cut_rows
from models.kernels.triton_tiles import call, dot, load, span, store, tile_size

Array = jax.Array

TILE = 128
"""Rows, and columns, of a full tile of the output."""
DEPTH_BYTES = 128
"""Bytes of a tile along the axis that is summed over: one cache line. Three stages of two tiles of TILE × DEPTH_BYTES
take 96 KiB, which fits the shared memory of every GPU since Ampere."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def triton_matmul(rows: Array, weights: Array, group_sizes: Array, interpret: bool = False) -> Array:
    """Multiply each row by the matrix of its group; see `models.kernels.grouped_matmul.grouped_matmul`.

    Sums are in float32; factors are rounded as in `models.kernels.triton_tiles.dot`.

    Args:
      rows: float32 or bfloat16 [M, D], sorted by group.
      weights: [E, D, F] in the dtype of rows.
      group_sizes: int32 [E], with a sum of at most M.
      interpret: if true, run the kernels on any backend, slowly, for tests.

    Returns:
      [M, F] in the dtype of rows; rows beyond the sum of group_sizes hold whatever the memory held.
    """
    return _multiply(rows, weights, group_sizes, interpret, transposed=False)


def _forward(rows: Array, weights: Array, group_sizes: Array, interpret: bool) -> tuple[Array, tuple]:
    product = _multiply(rows, weights, group_sizes, interpret, transposed=False)
    return product, (rows, weights, group_sizes)


def _backward(interpret: bool, residuals: tuple, output_gradient: Array) -> tuple:
    rows, weights, group_sizes = residuals
    of_rows = _multiply(output_gradient, weights, group_sizes, interpret, transposed=True)
    of_weights = _sum_outer(rows, output_gradient, group_sizes, interpret)
    return of_rows, of_weights, None


triton_matmul.defvjp(_forward, _backward)


def _multiply(rows: Array, weights: Array, group_sizes: Array, interpret: bool, *, transposed: bool) -> Array:
    """Return rows[m] · weights[group of m], [M, D] -> [M, F], or transposed, [M, F] -> [M, D]."""
    num_rows, depth = rows.shape
    width = weights.shape[1 if transposed else 2]
    row_tile, column_tile = tile_size(num_rows // weights.shape[0], TILE), tile_size(width, TILE)
    depth_tile = tile_size(depth, DEPTH_BYTES // rows.dtype.itemsize)
    blocks = cut_rows(group_sizes, num_rows, row_tile)

    def kernel(start_ref: Any, end_ref: Any, group_ref: Any, rows_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        column_block, block = pl.program_id(0), pl.program_id(1)
        start, end, group = start_ref[block], end_ref[block], group_ref[block]

        @pl.when(start < end)
        def _() -> None:
            own, columns = span(start, row_tile, end), span(column_block * column_tile, column_tile, width)

            def add(step: Array, total: Array) -> Array:
                deep = span(step * depth_tile, depth_tile, depth)
                left = load(rows_ref, own, deep)
                if transposed:
                    return total + dot(left, load(weights_ref, group, columns, deep), right_axis=1)
                return total + dot(left, load(weights_ref, group, deep, columns))

            zeros = jnp.zeros((row_tile, column_tile), jnp.float32)
            store(out_ref, jax.lax.fori_loop(0, pl.cdiv(depth, depth_tile), add, zeros), own, columns)

    name = "grouped_product_transposed" if transposed else "grouped_product"
    # Programs that follow one another share their rows, and soon the matrix of their group: both stay in the cache.
    grid = (pl.cdiv(width, column_tile), blocks.start.size)
    out_shape = jax.ShapeDtypeStruct((num_rows, width), rows.dtype)
    return call(kernel, name, grid, out_shape, interpret)(blocks.start, blocks.end, blocks.group, rows, weights)


def _sum_outer(rows: Array, gradient: Array, group_sizes: Array, interpret: bool) -> Array:
    """Return Σ rows[m]ᵀ · gradient[m] over the rows of each group: [M, D], [M, F] -> [E, D, F], 0 for empty groups."""
    num_groups, depth, width = group_sizes.size, rows.shape[1], gradient.shape[1]
    depth_tile, column_tile = tile_size(depth, TILE), tile_size(width, TILE)
    row_tile = DEPTH_BYTES // rows.dtype.itemsize
    bounds = jnp.pad(jnp.cumsum(group_sizes, dtype=jnp.int32), (1, 0))

    def kernel(bounds_ref: Any, rows_ref: Any, gradient_ref: Any, out_ref: Any) -> None:
        group = pl.program_id(2)
        start, end = bounds_ref[group], bounds_ref[group + 1]
        columns = span(pl.program_id(0) * column_tile, column_tile, width)
        deep = span(pl.program_id(1) * depth_tile, depth_tile, depth)

        def add(step: Array, total: Array) -> Array:
            own = span(start + step * row_tile, row_tile, end)
            return total + dot(load(rows_ref, own, deep), load(gradient_ref, own, columns), left_axis=0)

        zeros = jnp.zeros((depth_tile, column_tile), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(end - start, row_tile), add, zeros)
        store(out_ref, total, group, deep, columns)

    grid = (pl.cdiv(width, column_tile), pl.cdiv(depth, depth_tile), num_groups)
    out_shape = jax.ShapeDtypeStruct((num_groups, depth, width), rows.dtype)
    return call(kernel, "grouped_outer_product", grid, out_shape, interpret)(bounds, rows, gradient)
