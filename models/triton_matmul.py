"""Grouped products on an NVIDIA GPU: two Pallas kernels that Triton compiles.

One multiplies each block of rows with the matrix of its group, or with its transpose, as the gradient in the rows asks
for; the other sums rowᵀ · gradient over the rows of each group. Tiles that hold rows of another group, or lie beyond an
array, are masked, so that sizes need not be multiples of anything. Pure functions of arrays: this file must never know
an expert, a router or a model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from models.row_blocks import cut_rows

Array = jax.Array

TILE = 128
"""Rows and columns of a full tile of the output."""
MIN_TILE = 16
"""The least that the tensor cores multiply at once."""
DEPTH_BYTES = 128
"""Of a tile along the axis that is summed over: one line of the cache."""
# Three stages of two tiles of TILE × DEPTH_BYTES are 96 KiB, within the shared memory of every GPU since Ampere.
COMPILER = triton.CompilerParams(num_warps=8, num_stages=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def triton_matmul(rows: Array, weights: Array, group_sizes: Array, interpret: bool = False) -> Array:
    """The GPU's implementation of `models.grouped_matmul.grouped_matmul`.

    Products of float32 are rounded to TF32, as XLA's are by default on these GPUs, unless
    `jax.default_matmul_precision` asks for more. Sums are in float32.

    Args:
      rows: float32 or bfloat16 [M, D], sorted by group.
      weights: [E, D, F] in the dtype of rows.
      group_sizes: int32 [E], with a sum of at most M.
      interpret: runs the kernels on any backend, slowly, for tests.

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


def _tile(size: int) -> int:
    """A power of two, full where the axis is long enough."""
    return min(TILE, max(MIN_TILE, pl.next_power_of_2(max(1, size))))


def _precision(dtype: Any) -> jax.lax.Precision | None:
    """None is what `jax.default_matmul_precision` says; Triton's own default is not XLA's."""
    is_asked_for = jax.config.jax_default_matmul_precision is not None  # pyright: ignore[reportAttributeAccessIssue]
    return None if is_asked_for or dtype != jnp.float32 else jax.lax.Precision.HIGH


def _span(start: Array | int, size: int, end: Array | int) -> tuple[Any, Array]:
    """The indices of a tile along one axis, and which of them are its own."""
    return pl.ds(start, size), start + jnp.arange(size, dtype=jnp.int32) < end


def _load(ref: Any, rows: tuple[Any, Array], columns: tuple[Any, Array], *leading: Array) -> Array:
    mask = rows[1][:, None] & columns[1][None, :]
    return triton.load(ref.at[(*leading, rows[0], columns[0])], mask=mask, other=0.0)


def _store(ref: Any, rows: tuple[Any, Array], columns: tuple[Any, Array], tile: Array, *leading: Array) -> None:
    mask = rows[1][:, None] & columns[1][None, :]
    triton.store(ref.at[(*leading, rows[0], columns[0])], tile.astype(ref.dtype), mask=mask)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int, precision: jax.lax.Precision | None) -> Array:
    """Σ over one axis of each, in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)


def _multiply(rows: Array, weights: Array, group_sizes: Array, interpret: bool, *, transposed: bool) -> Array:
    """rows[m] · weights[group of m], [M, D] -> [M, F]; transposed: [M, F] -> [M, D]."""
    num_rows, depth = rows.shape
    width = weights.shape[1 if transposed else 2]
    row_tile, column_tile = _tile(num_rows // weights.shape[0]), _tile(width)
    depth_tile = min(_tile(depth), DEPTH_BYTES // rows.dtype.itemsize)
    blocks = cut_rows(group_sizes, num_rows, row_tile)
    precision = _precision(rows.dtype)

    def kernel(start_ref: Any, end_ref: Any, group_ref: Any, rows_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        column_block, block = pl.program_id(0), pl.program_id(1)
        start, end, group = start_ref[block], end_ref[block], group_ref[block]

        @pl.when(start < end)
        def _() -> None:
            own = _span(start, row_tile, end)
            columns = _span(column_block * column_tile, column_tile, width)

            def add(step: Array, total: Array) -> Array:
                deep = _span(step * depth_tile, depth_tile, depth)
                left = _load(rows_ref, own, deep)
                axes = (columns, deep) if transposed else (deep, columns)
                right = _load(weights_ref, *axes, group)
                return total + _dot(left, right, 1, 1 if transposed else 0, precision)

            zeros = jnp.zeros((row_tile, column_tile), jnp.float32)
            _store(out_ref, own, columns, jax.lax.fori_loop(0, pl.cdiv(depth, depth_tile), add, zeros))

    # Programs that follow one another share their rows, and soon the matrix of their group: both stay in the cache.
    return _call(
        kernel,
        (pl.cdiv(width, column_tile), blocks.start.size),
        jax.ShapeDtypeStruct((num_rows, width), rows.dtype),
        interpret,
        "grouped_product_transposed" if transposed else "grouped_product",
    )(blocks.start, blocks.end, blocks.group, rows, weights)


def _sum_outer(rows: Array, gradient: Array, group_sizes: Array, interpret: bool) -> Array:
    """Σ rows[m]ᵀ · gradient[m] over the rows of each group: [M, D], [M, F] -> [E, D, F], 0 for empty groups."""
    num_groups, depth, width = group_sizes.size, rows.shape[1], gradient.shape[1]
    depth_tile, column_tile = _tile(depth), _tile(width)
    row_tile = DEPTH_BYTES // rows.dtype.itemsize
    bounds = jnp.pad(jnp.cumsum(group_sizes, dtype=jnp.int32), (1, 0))
    precision = _precision(rows.dtype)

    def kernel(bounds_ref: Any, rows_ref: Any, gradient_ref: Any, out_ref: Any) -> None:
        group = pl.program_id(2)
        start, end = bounds_ref[group], bounds_ref[group + 1]
        columns = _span(pl.program_id(0) * column_tile, column_tile, width)
        deep = _span(pl.program_id(1) * depth_tile, depth_tile, depth)

        def add(step: Array, total: Array) -> Array:
            own = _span(start + step * row_tile, row_tile, end)
            left, right = _load(rows_ref, own, deep), _load(gradient_ref, own, columns)
            return total + _dot(left, right, 0, 0, precision)

        zeros = jnp.zeros((depth_tile, column_tile), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(end - start, row_tile), add, zeros)
        _store(out_ref, deep, columns, total, group)

    return _call(
        kernel,
        (pl.cdiv(width, column_tile), pl.cdiv(depth, depth_tile), num_groups),
        jax.ShapeDtypeStruct((num_groups, depth, width), rows.dtype),
        interpret,
        "grouped_outer_product",
    )(bounds, rows, gradient)


def _call(kernel: Any, grid: tuple[int, ...], out_shape: jax.ShapeDtypeStruct, interpret: bool, name: str) -> Any:
    """A call whose kernel sees all arrays whole and takes its tiles itself."""
    return pl.pallas_call(
        kernel, out_shape=out_shape, grid=grid, compiler_params=COMPILER, interpret=interpret, name=name
    )
