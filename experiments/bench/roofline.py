"""The least time that a device could need for a program: its peak rates, from a table or measured, and the bound."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments.compilers.chips import find_chip


@dataclass(frozen=True)
class Peak:
    """The rates that a device reaches at most."""

    flops_per_second: float
    bytes_per_second: float
    source: str


class Bound(NamedTuple):
    """The least time that a device could need."""

    seconds: float
    limit: Literal["compute", "memory"]


def roofline(flops: float, moved_bytes: float, peak: Peak) -> Bound:
    """Return the larger of the times for the arithmetic and for the bytes (Williams et al., "Roofline", 2009)."""
    compute, memory = flops / peak.flops_per_second, moved_bytes / peak.bytes_per_second
    return Bound(max(compute, memory), "compute" if compute > memory else "memory")


def peak_of(device: Any, working_set: int) -> Peak | None:
    """Return the peak of a device: measured if it is the CPU, else from the table; None if it is not there.

    Args:
      device: a `jax.Device`.
      working_set: bytes that the program touches. The CPU's bandwidth is measured on the same number, because
        caches hold small arrays and would otherwise beat the bound.
    """
    if device.platform == "cpu":
        size = min(max(working_set, 1 << 18), 1 << 29)
        bandwidth = _measured_bandwidth(1 << (size - 1).bit_length())
        return Peak(_measured_flops(), bandwidth, "measured here: float32 matrix product, x ← s·x + y of equal size")
    chip = find_chip(device.device_kind)
    return chip and Peak(chip.flops_per_second, chip.bytes_per_second, chip.source)


def _best_seconds(call: Callable[[], Any], at_least: float = 0.3, repeats: int = 5) -> float:
    """Return the fastest of several runs: a bound is the best that the device can do, not its average."""
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
    """Return the bytes that x ← s·x + y reads and writes a second, on two arrays of `working_set` bytes together."""
    count = working_set // 8
    x, y = jnp.ones(count, jnp.float32), jnp.ones(count, jnp.float32)
    passes = max(8, (1 << 26) // working_set)  # in one program, so that calls and fresh pages are not timed

    @functools.partial(jax.jit, donate_argnums=0)
    def stream(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, passes, lambda _, x: x * jnp.float32(0.5) + y, x)

    def call() -> jax.Array:
        nonlocal x
        x = stream(x, y)
        return x

    return passes * 3 * 4 * count / _best_seconds(call)
