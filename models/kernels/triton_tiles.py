"""What the Triton kernels for NVIDIA GPUs share: tiles of arrays, masked at the edges, and their products.

This file alone knows the Triton backend of Pallas. JAX deprecates it since 0.11, and says so where a program is lowered
for a GPU; where it is gone, GPUs do without these kernels. It must never know what a kernel computes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

Array = jax.Array

HAS_TRITON = triton is not None

MIN_TILE = 16
"""The least that the tensor cores multiply at once."""


class Span(NamedTuple):
    """The indices of a tile along one axis."""

    indices: Any
    """A slice, for a reference."""
    positions: Array
    """int32 [size]."""
    inside: Array
    """bool [size]: whether the array, or the part that counts, has them."""


def span(start: Array | int, size: int, end: Array | int) -> Span:
    """The `size` indices from `start` on, of which those before `end` are inside."""
    # A start that is known when tracing would have JAX refuse a tile that is larger than the axis.
    start = jnp.zeros((), jnp.int32) + start
    positions = start + jnp.arange(size, dtype=jnp.int32)
    return Span(pl.ds(start, size), positions, positions < end)


def tile_size(size: int, largest: int) -> int:
    """A power of two: as much of the axis as `largest` allows."""
    return min(largest, max(MIN_TILE, pl.next_power_of_2(max(1, size))))


def load(ref: Any, *indices: Any, other: float = 0.0) -> Array:
    """A tile; `other` where it is not inside.

    Args:
      ref: of an array that the kernel sees whole.
      indices: scalars, and a `Span` for each axis of the tile, one or two of them.
    """
    return triton.load(ref.at[_slices(indices)], mask=_mask(indices), other=other)


def store(ref: Any, tile: Array, *indices: Any) -> None:
    """Writes what is inside, in the dtype of the array."""
    triton.store(ref.at[_slices(indices)], tile.astype(ref.dtype), mask=_mask(indices))


def _slices(indices: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(index.indices if isinstance(index, Span) else index for index in indices)


def _mask(indices: tuple[Any, ...]) -> Array:
    first, *second = (index.inside for index in indices if isinstance(index, Span))
    return first[:, None] & second[0][None, :] if second else first


def dot(left: Array, right: Array, left_axis: int = 1, right_axis: int = 0) -> Array:
    """Σ over one axis of each tile, in float32.

    Products of float32 are rounded to TF32, as XLA's are by default on these GPUs, unless
    `jax.default_matmul_precision` asks for more. (Triton's own default is not XLA's.)
    """
    is_asked_for = jax.config.jax_default_matmul_precision is not None  # pyright: ignore[reportAttributeAccessIssue]
    rounds = left.dtype == jnp.float32 and not is_asked_for
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGH if rounds else None,
        preferred_element_type=jnp.float32,
    )


def call(
    kernel: Any,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    interpret: bool,
    num_warps: int = 8,
    num_stages: int = 3,
) -> Any:
    """A kernel that sees all its arrays whole and takes its tiles itself.

    Args:
      kernel: a function of references, inputs before outputs.
      name: as profilers show it.
      grid: programs along each axis, the fastest first.
      out_shape: a `jax.ShapeDtypeStruct`, or a list of them.
      interpret: run on any backend, slowly.
      num_warps: of a program.
      num_stages: tiles of a loop that are on their way at once.
    """
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )
