"""Weights in bfloat16 that AdamW moves, rounded to the nearest and at random (`python -m experiments.bench_rounding`).

Weights are normal, of the deviation of a trained matrix, and gradients have a mean of their own under noise as large.
Two figures: the share of the weights that have moved at all, and how far all of them have come along the way that
float32 weights went, which is 1 if nothing is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import rich.console
import rich.table
import tyro

from rspo_jax.training import OptimizerConfig
from rspo_jax.training.rounding import round_like, widen
from rspo_jax.types import Array

Rounding = Callable[[Any, Any, Array], Any]
"""(float32 arrays, arrays of the dtypes to keep, number of the update) -> the rounded arrays."""


@dataclass(frozen=True)
class RoundingBenchmark:
    """Count the weights that updates move, and measure how far they come."""

    learning_rates: tuple[float, ...] = (1e-6, 1e-5)
    updates: tuple[int, ...] = (1, 10, 100)
    weights: int = 100_000
    deviation: float = 0.02
    seed: int = 0


def to_nearest(tree: Any, like: Any, draw: Array) -> Any:
    """Round as a cast does."""
    del draw
    return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), tree, like)


ROUNDINGS: dict[str, Rounding] = {"to the nearest": to_nearest, "at random": round_like}


def displacements(benchmark: RoundingBenchmark, learning_rate: float, dtype: str, way: str) -> list[np.ndarray]:
    """Return by how much each weight has moved after each number of updates, float64 [weights]."""
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_updates=0).build()
    keys = jax.random.split(jax.random.key(benchmark.seed), 3)
    start = benchmark.deviation * jax.random.normal(keys[0], (benchmark.weights,))
    start = start.astype("bfloat16").astype(dtype)  # both dtypes begin at the same weights
    mean = jax.random.normal(keys[1], start.shape)

    def update(number: Array, kept: tuple[Array, Any]) -> tuple[Array, Any]:
        weights, state = widen(kept)
        gradient = mean + jax.random.normal(jax.random.fold_in(keys[2], number), mean.shape)
        changes, state = optimizer.update(gradient, state, weights)
        return ROUNDINGS[way]((optax.apply_updates(weights, changes), state), kept, number)

    @jax.jit
    def run(updates: int) -> Array:
        return jax.lax.fori_loop(0, updates, update, (start, optimizer.init(start)))[0]

    with jax.numpy_dtype_promotion("standard"):
        ends = [run(updates) for updates in benchmark.updates]
    return [np.asarray(end, np.float64) - np.asarray(start, np.float64) for end in ends]


def main(arguments: list[str] | None = None) -> int:
    """Print a table with a row for each learning rate, number of updates and way of rounding."""
    benchmark = tyro.cli(RoundingBenchmark, args=arguments, description=__doc__)
    table = rich.table.Table("learning rate", "updates", "rounded", "weights moved", "way made")
    for learning_rate in benchmark.learning_rates:
        wholes = displacements(benchmark, learning_rate, "float32", "to the nearest")
        for way in ROUNDINGS:
            found = displacements(benchmark, learning_rate, "bfloat16", way)
            for updates, moved, whole in zip(benchmark.updates, found, wholes, strict=True):
                made = moved @ whole / (whole @ whole)
                table.add_row(f"{learning_rate:g}", str(updates), way, f"{np.mean(moved != 0):.1%}", f"{made:.3f}")
    rich.console.Console().print(table)
    return 0
