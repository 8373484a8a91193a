"""Statistics that stay exact when a batch is cut into micro-batches or sharded.

A statistic holds enough to be reduced later: sums with their weights, extremes, samples for a quantile. Its arrays may
have any leading axes, for example of a `lax.scan` over micro-batches. `reduce` reads over all of them at once, so
statistics are merged by stacking their arrays. Most reduce to one number; `Means`, `Sums` and `Quantiles` reduce to an
array, and hold how many axes are its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.types import Array


class Mean(NamedTuple):
    """A weighted mean before its division; 0 where the weight is 0."""

    total: Array
    """Σ weight · value."""
    weight: Array
    """Σ weight."""

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
    """A percentile of the float32 values under a mask, with linear interpolation; 0 if the mask holds nowhere."""

    values: Array
    mask: Array
    """bool, of the shape of `values`."""
    percent: Array
    """int32, the same in all entries."""

    def reduce(self) -> Array:
        return masked_quantile(self.values, self.mask, jnp.max(self.percent))


class Quantiles(NamedTuple):
    """Several percentiles of the same values, a vector [n]; see `Quantile`."""

    values: Array
    mask: Array
    percents: Array
    """int32 [..., n], the same along all leading axes."""

    def reduce(self) -> Array:
        percents = jnp.max(self.percents.reshape(-1, self.percents.shape[-1]), axis=0)
        return jax.vmap(masked_quantile, (None, None, 0))(self.values, self.mask, percents)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Means:
    """Weighted means side by side, for example one for each layer; 0 where the weight is 0."""

    total: Array
    weight: Array
    """Weights, in the shape of `total`."""
    axes: int = field(default=1, metadata={"static": True})
    """Number of last axes that are kept."""

    def reduce(self) -> Array:
        total, weight = _sum_leading(self.total, self.axes), _sum_leading(self.weight, self.axes)
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Counts or plain sums side by side, for example of the bins of a histogram."""

    total: Array
    axes: int = field(default=1, metadata={"static": True})
    """Number of last axes that are kept."""

    def reduce(self) -> Array:
        return _sum_leading(self.total, self.axes)


class EffectiveSampleSize(NamedTuple):
    """Kish's effective sample size as a share of the n samples, (Σ w)² / (n Σ w²) of their weights w; 0 where n is 0.

    Source: L. Kish, "Survey Sampling", Wiley 1965; the division by n, which makes it a share, is this library's own.
    The weights are kept relative to the largest one, which changes nothing and allows for log-weights as large as they
    get before a collapse.
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
    """Cast to float32, and leave float64 as it is: the one rule of precision, for losses, softmaxes and routing."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


Statistic = Mean | Sum | Maximum | Minimum | Quantile | Quantiles | Means | Sums | EffectiveSampleSize
Statistics = Mapping[str, Statistic]


def masked_mean(values: Array, mask: Array) -> Mean:
    """Return the mean of `values` where `mask` holds. Other values, NaN included, have no effect."""
    return Mean(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=values.dtype))


def effective_sample_size(log_weights: Array, mask: Array) -> EffectiveSampleSize:
    """Return Kish's effective sample size of the weights exp(`log_weights`) where `mask` holds."""
    dtype = log_weights.dtype
    peak = jnp.max(jnp.where(mask, log_weights, -jnp.inf))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, log_weights - peak, 0)), 0)
    return EffectiveSampleSize(peak, jnp.sum(weights), jnp.sum(weights**2), jnp.sum(mask, dtype=dtype))


def histogram(values: Array, mask: Array, edges: Sequence[float]) -> Sums:
    """Count the values under a mask in bins: n edges make n + 1 bins, of which the first and the last are unbounded.

    A bin holds its lower edge and not its upper one. NaN is in no bin. Values are compared with each edge, which fuses;
    a scatter would be slow on a TPU.

    Args:
      values: float, any shape.
      mask: bool, the same shape.
      edges: n edges, in rising order.

    Returns:
      Counts, int32 [n + 1] once reduced.
    """
    mask = mask & ~jnp.isnan(values)
    parts = _split_last_axis(jnp.where(mask, values, -jnp.inf), jnp.asarray(-jnp.inf, values.dtype))
    at_least = jax.vmap(lambda edge: _count(parts >= edge))(jnp.asarray(edges, values.dtype))
    return Sums(-jnp.diff(at_least, prepend=jnp.sum(mask, dtype=jnp.int32), append=0))


def reduce(statistics: Statistics) -> dict[str, Array]:
    """Reduce every statistic to a scalar or an array, under the same name."""
    return {name: statistic.reduce() for name, statistic in statistics.items()}


def _sum_leading(array: Array, axes: int) -> Array:
    """Return the sum over all axes but the last `axes`."""
    return jnp.sum(array, axis=tuple(range(array.ndim - axes)))


def masked_quantile(values: Array, mask: Array, percent: Array) -> Array:
    """Return the exact quantile of the masked values, as `numpy.quantile` with linear interpolation defines it.

    The search is this library's own, because `jnp.quantile` and `jnp.nanquantile` sort, and sorting is the slowest
    thing that one can ask of an accelerator here. Bit patterns of floats can be ordered as the floats are, so the order
    statistic is found by bisecting its 32 bits, with 32 counts.

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
    """Map float32 to int32 in the same order: all bits of negative numbers but the sign are inverted."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _from_key(key: Array) -> Array:
    """Invert `_to_key`."""
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.int32(0x7FFFFFFF), key), jnp.float32)


_PART = 32


def _split_last_axis(array: Array, fill: Array) -> Array:
    """Reshape [..., T] to [..., 32, T / 32], padded; a scalar counts as one value.

    XLA on the CPU splits a reduction over more than 32 entries into windows, and stores the array that it reduces. Over
    32 entries it compares and adds in one vectorized loop.
    """
    array = jnp.atleast_1d(array)
    length = -(-array.shape[-1] // _PART)
    padding = [(0, 0)] * (array.ndim - 1) + [(0, _PART * length - array.shape[-1])]
    return jnp.pad(array, padding, constant_values=fill).reshape(*array.shape[:-1], _PART, length)


def _reduce_parts(reduction: Callable[..., Array], parts: Array) -> Array:
    """Reduce over 32 entries, then over the rest. Without the barrier XLA would merge the two reductions."""
    return reduction(jax.lax.optimization_barrier(reduction(parts, axis=-2)))


def _count(condition: Array) -> Array:
    return _reduce_parts(functools.partial(jnp.sum, dtype=jnp.int32), condition)
