"""Times of programs that take turns, and medians of their ratios: the one method of every benchmark."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax

Direction = Literal["forward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
"""Passes of a function that are timed apart."""
_REST = 0.01  # seconds


def take_turns(measurements: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure every contender once a turn, in an order that reverses after each turn.

    A shared machine changes its speed from one second to the next, so only values of the same turn are comparable:
    the figure to report is the median of their ratios (`paired_ratios`), with quartiles or `median_interval`. The
    reversal makes a steady drift cancel: over two turns every contender has the same mean position.

    Args:
      measurements: name -> a function that takes one measurement and returns it.
      repeats: number of turns; an even number balances the order.

    Returns:
      name -> measurements, one a turn.
    """
    values: dict[str, list[float]] = {name: [] for name in measurements}
    for turn in range(repeats):
        for name in list(measurements)[:: -1 if turn % 2 else 1]:
            values[name].append(measurements[name]())
    return values


def interleaved_seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time calls that take turns (`take_turns`).

    In each turn a call runs twice after a short rest, and the second run counts. The first one warms up: caches and
    threads are then the call's own, and not those that the call before left behind (OpenMP's threads spin for some
    time after their work). It also absorbs compilation.

    Args:
      calls: name -> a call that returns when its work is done, or returns JAX arrays.
      repeats: number of turns.

    Returns:
      name -> seconds, one value a turn.
    """

    def second_of_two(call: Callable[[], Any]) -> float:
        time.sleep(_REST)
        jax.block_until_ready(call())
        started = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - started

    return take_turns({name: lambda call=call: second_of_two(call) for name, call in calls.items()}, repeats)


class Quartiles(NamedTuple):
    """A median with the quartiles below and above it."""

    low: float
    median: float
    high: float

    def range(self, digits: int = 2) -> str:
        """Return the outer quartiles as "low – high"."""
        return f"{self.low:.{digits}f} – {self.high:.{digits}f}"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of some values; a single value is its own."""
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3)


def paired_ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return the ratios of values to the reference's of the same turn."""
    return [value / base for value, base in zip(values, reference, strict=True)]


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the median that holds for any distribution, if the values are independent.

    Returns:
      Two of the values: the r-th from below and from above, with the largest r for which at most 2.5 % of samples have
      fewer than r values below their median. None for fewer than six values, which have no such interval.
    """
    count = len(values)
    below = itertools.accumulate(math.comb(count, few) / 2**count for few in range(count + 1))
    rank = sum(share <= 0.025 for share in below)
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]
