"""What the benchmarks measure: times in turn, what a compiler says of its program, and the bound that a device sets.

Times of several programs are only comparable when they are taken in turn, so that a noisy machine disturbs all alike;
that is the one way offered here. This file must never know what is being measured.
"""

import functools
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_REST = 0.01  # seconds


class Spread(NamedTuple):
    """A median and its quartiles."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The quartiles of at least two values."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the median that holds for any distribution, if the values are independent.

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


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """The ratios of values taken in the same turn."""
    return [value / base for value, base in zip(values, reference, strict=True)]


def paired_ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The quartiles of the ratios of values taken in the same turn."""
    return spread(ratios(values, reference))


def interleaved_seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times each call in turn, `repeats` times.

    In each turn a call runs twice after a short rest, and the second run counts: caches and threads are then its own,
    and not those that the call before left behind (OpenMP's threads spin for some time after their work).

    Args:
      calls: name -> a call that returns when its work is done, or returns JAX arrays.
      repeats: turns.

    Returns:
      name -> seconds, one a turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(_REST)
            jax.block_until_ready(call())
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class Analysis:
    """What XLA says of a compiled program, per device. A loop's body is counted once, however often it runs."""

    flops: float
    transcendentals: float
    """Calls of exp, log and the like, which count as no FLOPs."""
    bytes_accessed: float
    """Read and written by all kernels together, in whatever memory or cache."""
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    """The most that is alive at once beside arguments and outputs."""
    peak_bytes: int
    """The most that is alive at once, with arguments and outputs; what is donated counts once. 0 where unknown, and
    without temporaries on the CPU, whose compiler does not count them here."""
    optimal_seconds: float | None
    """The TPU compiler's own estimate; others give none."""

    @property
    def compulsory_bytes(self) -> int:
        """What any program with these arguments and outputs has to read or write once."""
        return self.argument_bytes + self.output_bytes


def analyse(compiled: jax.stages.Compiled) -> Analysis:
    """Reads the compiler's cost and memory analysis.

    Raises:
      RuntimeError: if the backend gives none.
    """
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    if not cost or memory is None:
        raise RuntimeError("this backend's compiler gives no cost or memory analysis")
    optimal = cost.get("optimal_seconds")
    return Analysis(
        flops=cost.get("flops", 0.0),
        transcendentals=cost.get("transcendentals", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=getattr(memory, "peak_memory_in_bytes", 0),  # not in every version
        optimal_seconds=optimal if optimal and optimal > 0 else None,
    )


@dataclass(frozen=True)
class Peak:
    """What a device can do at most."""

    flops_per_second: float
    bytes_per_second: float
    source: str


_GOOGLE = "published: dense bfloat16 matrix products and HBM, docs.cloud.google.com/tpu/docs"
_NVIDIA = "published: dense bfloat16 matrix products and HBM, SXM, nvidia.com data sheet"
# `device_kind` as JAX gives it -> peak of one JAX device.
PEAKS = {
    "TPU v4": Peak(275e12, 1228e9, _GOOGLE),
    "TPU v5 lite": Peak(197e12, 819e9, _GOOGLE),
    "TPU v5e": Peak(197e12, 819e9, _GOOGLE),
    "TPU v5": Peak(459e12, 2765e9, _GOOGLE),
    "TPU v5p": Peak(459e12, 2765e9, _GOOGLE),
    "TPU v6 lite": Peak(918e12, 1638e9, _GOOGLE),
    "TPU v6e": Peak(918e12, 1638e9, _GOOGLE),
    "TPU7x": Peak(2307e12 / 2, 7380e9 / 2, _GOOGLE + ", half a chip, as JAX sees two devices in one"),
    "NVIDIA H100 80GB HBM3": Peak(989.4e12, 3350e9, _NVIDIA),
    "NVIDIA H200": Peak(989.4e12, 4800e9, _NVIDIA),
}


def peak_of(device_kind: str, device_platform: str, working_set: int) -> Peak | None:
    """The peak of a device: from the table, measured where it is the CPU, None where it is unknown.

    Args:
      device_kind: as `jax.Device.device_kind`.
      device_platform: as `jax.Device.platform`.
      working_set: bytes that the program touches; the CPU's bandwidth is measured on as many, because caches hold
        small arrays and would otherwise beat the bound.
    """
    if device_platform == "cpu":
        size = min(max(working_set, 1 << 18), 1 << 29)
        bandwidth = _measured_bandwidth(1 << (size - 1).bit_length())
        return Peak(_measured_flops(), bandwidth, "measured here: float32 matrix product, x ← s·x + y of equal size")
    return PEAKS.get(device_kind)


def _best_seconds(call: Callable[[], Any], at_least: float = 0.3, repeats: int = 5) -> float:
    """The fastest of several runs, as a bound is what the device can do and not what it did on average."""
    jax.block_until_ready(call())
    best, started, runs = float("inf"), time.perf_counter(), 0
    while runs < repeats or time.perf_counter() - started < at_least:
        before = time.perf_counter()
        jax.block_until_ready(call())
        best, runs = min(best, time.perf_counter() - before), runs + 1
    return best


@functools.cache
def _measured_flops(size: int = 2048) -> float:
    matrix = jnp.full((size, size), 1 / size, jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / _best_seconds(lambda: product(matrix, matrix))


@functools.cache
def _measured_bandwidth(working_set: int) -> float:
    """Bytes read and written a second by x ← s·x + y, over two arrays of `working_set` bytes together."""
    count = working_set // 8
    x, y = jnp.ones(count, jnp.float32), jnp.ones(count, jnp.float32)
    passes = max(8, (1 << 26) // working_set)  # in one program, or calls and fresh pages would be what is timed

    @functools.partial(jax.jit, donate_argnums=0)
    def stream(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, passes, lambda _, x: x * jnp.float32(0.5) + y, x)

    def call() -> jax.Array:
        nonlocal x
        x = stream(x, y)
        return x

    return passes * 3 * 4 * count / _best_seconds(call)


class Bound(NamedTuple):
    """The least time that a device could need."""

    seconds: float
    limit: str
    """"compute" or "memory"."""


def roofline(flops: float, moved_bytes: float, peak: Peak) -> Bound:
    """The larger of the time for the arithmetic and the time for the bytes (Williams et al., "Roofline", 2009)."""
    compute, memory = flops / peak.flops_per_second, moved_bytes / peak.bytes_per_second
    return Bound(max(compute, memory), "compute" if compute > memory else "memory")


def describe_device(device: Any) -> dict[str, Any]:
    """What a report needs to say where its times come from, of a `jax.Device`."""
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def as_json(analysis: Analysis) -> dict[str, Any]:
    """An analysis as plain JSON."""
    return asdict(analysis) | {"compulsory_bytes": analysis.compulsory_bytes}
