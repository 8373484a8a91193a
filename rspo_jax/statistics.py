"""Statistics that stay exact when a batch is cut into micro-batches or sharded.

A statistic holds enough to be finished later: sums with their weights, extremes, samples for a quantile.
Its arrays may have any leading axes (of a `lax.scan` over micro-batches, say), and `reduce` reads over all of
them at once, so that stacking is all the merging there is. This file must never know what is being measured.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.types import Array


class Mean(NamedTuple):
    """A weighted mean that has not been divided yet; 0 where the weight is 0."""

    total: Array
    weight: Array

    def reduce(self) -> Array:
        weight = jnp.sum(self.weight)
        return jnp.where(weight > 0, jnp.sum(self.total) / jnp.where(weight > 0, weight, 1), 0)


class Sum(NamedTuple):
    """A count or a plain sum."""

    total: Array

    def reduce(self) -> Array:
        return jnp.sum(self.total)


class Maximum(NamedTuple):
    """The largest value seen."""

    value: Array

    def reduce(self) -> Array:
        return jnp.max(self.value)


class Minimum(NamedTuple):
    """The smallest value seen."""

    value: Array

    def reduce(self) -> Array:
        return jnp.min(self.value)


class Quantile(NamedTuple):
    """A percentile of the non-negative float32 values under a mask, with linear interpolation; 0 where it is empty."""

    values: Array
    mask: Array
    percent: Array

    def reduce(self) -> Array:
        return masked_quantile(self.values, self.mask, jnp.max(self.percent))


Statistic = Mean | Sum | Maximum | Minimum | Quantile
Statistics = Mapping[str, Statistic]


def masked_mean(values: Array, mask: Array) -> Mean:
    """The mean of `values` where `mask` holds; what the rest holds (NaN included) has no effect."""
    return Mean(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=values.dtype))


def reduce(statistics: Statistics) -> dict[str, Array]:
    """Finishes every statistic: a dict of scalars under the same names."""
    return {name: statistic.reduce() for name, statistic in statistics.items()}


def masked_quantile(values: Array, mask: Array, percent: Array) -> Array:
    """The exact quantile of the masked values, as `numpy.quantile` with linear interpolation defines it.

    Sorting is the slowest thing that one can ask of an accelerator here. Bit patterns of non-negative floats are
    ordered as the floats are, so the order statistic is found by bisecting its 31 bits with 31 counts instead.

    Args:
      values: float32, any shape, non-negative where the mask holds.
      mask: bool, the same shape.
      percent: int32 scalar in [0, 100]; whole, so that the rank is exact however many values there are.

    Returns:
      float32 scalar; 0 where the mask holds nowhere.
    """
    infinity_bits, never = jnp.int32(0x7F800000), jnp.int32(0x7FFFFFFF)
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    keys = _split_last_axis(jnp.where(mask, jnp.minimum(bits, never - 1), never), never)
    count = _count(keys < never)
    hundreds, rest = jnp.divmod(jnp.maximum(count - 1, 0), 100)
    rank = hundreds * percent + rest * percent // 100
    between_ranks = (rest * percent % 100).astype(jnp.float32) / 100

    def bisect(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the answer lies in [low, high]
        middle = low + (high - low) // 2
        enough = _count(keys <= middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    below, _ = jax.lax.fori_loop(0, 31, bisect, (jnp.int32(0), infinity_bits))
    next_above = jnp.minimum(_reduce_parts(jnp.min, jnp.where(keys > below, keys, never)), infinity_bits)
    has_next = rank + 1 < count
    above = jnp.where(has_next & (_count(keys <= below) <= rank + 1), next_above, below)
    low, high = (jax.lax.bitcast_convert_type(b, jnp.float32) for b in (below, above))
    return jnp.where(count > 0, low + (high - low) * between_ranks, 0)


_PART = 32


def _split_last_axis(array: Array, fill: Array) -> Array:
    """[..., T] -> [..., 32, T / 32], padded; a scalar counts as one value.

    XLA on the CPU takes a reduction over more than 32 entries apart into windows, and writes down what it reduces.
    Over 32 it compares and adds in one vectorised loop.
    """
    array = jnp.atleast_1d(array)
    length = -(-array.shape[-1] // _PART)
    padding = [(0, 0)] * (array.ndim - 1) + [(0, _PART * length - array.shape[-1])]
    return jnp.pad(array, padding, constant_values=fill).reshape(*array.shape[:-1], _PART, length)


def _reduce_parts(reduction: Callable[..., Array], parts: Array) -> Array:
    """Over 32 entries, then over the rest. Without the barrier XLA would make one reduction of the two."""
    return reduction(jax.lax.optimization_barrier(reduction(parts, axis=-2)))


def _count(condition: Array) -> Array:
    return _reduce_parts(functools.partial(jnp.sum, dtype=jnp.int32), condition)
