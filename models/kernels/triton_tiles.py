"""Tiles of arrays, masked at the edges, and their products, for the Triton kernels that run on NVIDIA GPUs.

No other file uses the Triton backend of Pallas. JAX deprecates it since 0.11, with a warning whenever a program is
lowered for a GPU; where JAX no longer has it, GPUs do without these kernels.
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
"""The smallest size that the tensor cores multiply at once."""


class Span(NamedTuple):
    """The indices of a tile along one axis."""

    indices: Any
    """A slice, to index a reference with."""
    positions: Array
    """int32 [size]: the same indices as numbers."""
    inside: Array
    """bool [size]: True for those inside the array, or inside the part of it that counts."""


def span(start: Array | int, size: int, end: Array | int) -> Span:
    """Return the `size` indices from `start` on, of which those before `end` are inside."""
    # JAX refuses a tile that is larger than its axis if the start is known while tracing.
    start = jnp.zeros((), jnp.int32) + start
    positions = start + jnp.arange(size, dtype=jnp.int32)
    return Span(pl.ds(start, size), positions, positions < end)


def tile_size(size: int, largest: int) -> int:
    """Return the size of tiles along an axis: a power of two that covers the axis, or `largest`."""
    return min(largest, max(MIN_TILE, pl.next_power_of_2(max(1, size))))


def load(ref: Any, *indices: Any, other: float = 0.0) -> Array:
    """Load a tile, with `other` in place of what is not inside.

    Args:
      ref: a reference to an array that the kernel sees whole.
      indices: scalars, and a `Span` for each axis of the tile, of which there are one or two.
      other: the number to fill with.
    """
    where, mask = _tile_of(ref, indices)
    return triton.load(where, mask=mask, other=other)


def store(ref: Any, tile: Array, *indices: Any) -> None:
    """Store the part of a tile that is inside, in the dtype of the array; arguments as for `load`."""
    where, mask = _tile_of(ref, indices)
    triton.store(where, tile.astype(ref.dtype), mask=mask)


def _tile_of(ref: Any, indices: tuple[Any, ...]) -> tuple[Any, Array]:
    """Return a reference to a tile, and which of its entries are inside."""
    where = ref.at[tuple(index.indices if isinstance(index, Span) else index for index in indices)]
    first, *second = (index.inside for index in indices if isinstance(index, Span))
    return where, first[:, None] & second[0][None, :] if second else first


def dot(left: Array, right: Array, left_axis: int = 1, right_axis: int = 0) -> Array:
    """Multiply two tiles, summing over one axis of each in float32.

    Factors of float32 are rounded to TF32, as XLA does by default on these GPUs, unless `jax.default_matmul_precision`
    asks for more. (Triton's own default is another one.)
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
    """Return a function of arrays that runs a kernel, which sees all its arrays whole and takes its own tiles of them.

    Args:
      kernel: a function of references, inputs before outputs.
      name: the kernel's name in profiles.
      grid: number of programs along each axis, the fastest first.
      out_shape: a `jax.ShapeDtypeStruct`, or a list of them.
      interpret: if true, run on any backend, slowly.
      num_warps: warps of a program.
      num_stages: iterations of a loop whose tiles are being loaded at once.
    """
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )
