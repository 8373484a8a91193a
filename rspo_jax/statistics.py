"""Statistics that stay exact when a batch is cut into micro-batches or sharded.

A statistic holds enough to be finished later: sums with their weights, extremes, samples for a quantile.
Its arrays may have any leading axes (of a `lax.scan` over micro-batches, say), and `reduce` reads over all of
them at once, so that stacking is all the merging there is. Most finish as one number; those that finish as an array
(`Means`, `Sums`, `Quantiles`) know how many axes are their own. This file must never know what is being measured.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """A percentile of the float32 values under a mask, with linear interpolation; 0 where it is empty."""

    values: Array
    mask: Array
    percent: Array

    def reduce(self) -> Array:
        return masked_quantile(self.values, self.mask, jnp.max(self.percent))


class Quantiles(NamedTuple):
    """Several percentiles of the same values, a vector [n]."""

    values: Array
    mask: Array
    percents: Array
    """int32 [..., n]."""

    def reduce(self) -> Array:
        percents = jnp.max(self.percents.reshape(-1, self.percents.shape[-1]), axis=0)
        return jax.vmap(masked_quantile, (None, None, 0))(self.values, self.mask, percents)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Means:
    """Weighted means side by side, of each layer, say; 0 where the weight is 0."""

    total: Array
    weight: Array
    """Of the shape of `total`."""
    axes: int = field(default=1, metadata={"static": True})
    """How many of the last axes are kept."""

    def reduce(self) -> Array:
        total, weight = _sum_leading(self.total, self.axes), _sum_leading(self.weight, self.axes)
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Counts or plain sums side by side, of the bins of a histogram, say."""

    total: Array
    axes: int = field(default=1, metadata={"static": True})
    """How many of the last axes are kept."""

    def reduce(self) -> Array:
        return _sum_leading(self.total, self.axes)


class EffectiveSampleSize(NamedTuple):
    """(Σ w)² / (n Σ w²): the share of n samples that is left of them when they are weighted by w; 0 where n is 0.

    Source: L. Kish, "Survey Sampling", 1965. The weights are kept over the largest of them, which changes nothing and
    lets log-weights be as large as they are before a collapse.
    """

    peak: Array
    """The largest log-weight."""
    total: Array
    """Σ w / exp(peak)."""
    squares: Array
    """Σ (w / exp(peak))²."""
    count: Array

    def reduce(self) -> Array:
        scale = jnp.where(self.count > 0, jnp.exp(self.peak - jnp.max(self.peak)), 0)
        total, squares = jnp.sum(scale * self.total), jnp.sum(scale**2 * self.squares)
        count = jnp.sum(self.count)
        return jnp.where(count > 0, total**2 / jnp.where(count > 0, count * squares, 1), 0)


def at_least_float32(array: Array) -> Array:
    """Cast to float32, but leave float64 as it is: the one rule of precision of losses, softmaxes and routing."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


Statistic = Mean | Sum | Maximum | Minimum | Quantile | Quantiles | Means | Sums | EffectiveSampleSize
Statistics = Mapping[str, Statistic]


def masked_mean(values: Array, mask: Array) -> Mean:
    """The mean of `values` where `mask` holds; what the rest holds (NaN included) has no effect."""
    return Mean(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=values.dtype))


def effective_sample_size(log_weights: Array, mask: Array) -> EffectiveSampleSize:
    """Of the weights exp(`log_weights`) where `mask` holds."""
    dtype = log_weights.dtype
    peak = jnp.max(jnp.where(mask, log_weights, -jnp.inf))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, log_weights - peak, 0)), 0)
    return EffectiveSampleSize(peak, jnp.sum(weights), jnp.sum(weights**2), jnp.sum(mask, dtype=dtype))


def histogram(values: Array, mask: Array, edges: Sequence[float]) -> Sums:
    """Counts the values under a mask by bins: n edges make n + 1 of them, the first and the last without an end.

    A bin holds its lower edge and not its upper one. NaN is in none.

    Args:
      values: float, any shape.
      mask: bool, the same shape.
      edges: in rising order.

    Returns:
      int32 [n + 1]. Each bin is counted by comparing, which fuses; a scatter would be slow on a TPU.
    """
    mask = mask & ~jnp.isnan(values)
    parts = _split_last_axis(jnp.where(mask, values, -jnp.inf), jnp.asarray(-jnp.inf, values.dtype))
    at_least = jax.vmap(lambda edge: _count(parts >= edge))(jnp.asarray(edges, values.dtype))
    return Sums(-jnp.diff(at_least, prepend=jnp.sum(mask, dtype=jnp.int32), append=0))


def reduce(statistics: Statistics) -> dict[str, Array]:
    """Finishes every statistic: a dict of scalars and arrays under the same names."""
    return {name: statistic.reduce() for name, statistic in statistics.items()}


def _sum_leading(array: Array, axes: int) -> Array:
    """The sum over all axes but the last `axes`."""
    return jnp.sum(array, axis=tuple(range(array.ndim - axes)))


def masked_quantile(values: Array, mask: Array, percent: Array) -> Array:
    """The exact quantile of the masked values, as `numpy.quantile` with linear interpolation defines it.

    Sorting is the slowest thing that one can ask of an accelerator here. Bit patterns of floats can be ordered as the
    floats are, so the order statistic is found by bisecting its 32 bits with 32 counts instead.

    Args:
      values: float32, any shape. NaN counts as infinity.
      mask: bool, the same shape.
      percent: int32 scalar in [0, 100]; whole, so that the rank is exact however many values there are.

    Returns:
      float32 scalar; 0 where the mask holds nowhere.
    """
    never, infinity = jnp.int32(0x7FFFFFFF), _to_key(jnp.float32(jnp.inf))
    values = values.astype(jnp.float32)
    keys = _split_last_axis(jnp.where(mask, jnp.where(jnp.isnan(values), infinity, _to_key(values)), never), never)
    count = _count(keys < never)
    hundreds, rest = jnp.divmod(jnp.maximum(count - 1, 0), 100)
    rank = hundreds * percent + rest * percent // 100
    between_ranks = (rest * percent % 100).astype(jnp.float32) / 100

    def bisect(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the answer lies in [low, high]
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, whose sum might overflow
        enough = _count(keys <= middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    below, _ = jax.lax.fori_loop(0, 32, bisect, (_to_key(jnp.float32(-jnp.inf)), infinity))
    next_above = jnp.minimum(_reduce_parts(jnp.min, jnp.where(keys > below, keys, never)), infinity)
    has_next = rank + 1 < count
    above = jnp.where(has_next & (_count(keys <= below) <= rank + 1), next_above, below)
    low, high = (_from_key(key) for key in (below, above))
    between = jnp.where(between_ranks > 0, low + (high - low) * between_ranks, low)  # `high` may be infinite
    return jnp.where(count > 0, between, 0)


def _to_key(values: Array) -> Array:
    """float32 -> int32 in the same order: of negative numbers, all bits but the sign are turned round."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _from_key(key: Array) -> Array:
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.int32(0x7FFFFFFF), key), jnp.float32)


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
