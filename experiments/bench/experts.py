"""Cost of a block of experts against a dense block of equal FLOPs (`python -m experiments.bench_experts`).

The figure is the median of the ratios of runs in the same turn. On a TPU, XLA's cost analysis counts the useful FLOPs
that the kernel declares, not the tiles that it computes: see `grouped_matmul`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tyro

from experiments.bench import timing
from models.experts import Experts, run_experts
from rspo_jax.types import Array


class BlockSize(NamedTuple):
    """Sizes of one block of experts and of its input."""

    tokens: int
    hidden_size: int
    expert_size: int
    num_experts: int
    experts_per_token: int

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.hidden_size} → {self.expert_size}, "
            f"top-{self.experts_per_token} of {self.num_experts}"
        )


@dataclass(frozen=True)
class ExpertsBenchmark:
    """Time blocks, forward and backward, against a dense SwiGLU block of width K·F."""

    shapes: tuple[tuple[int, int, int, int, int], ...] = ((4096, 96, 192, 8, 2), (2048, 512, 256, 16, 4))
    """Tokens, hidden size, expert size, experts and experts per token of each block."""
    repeats: int = 30
    ragged_dot: bool = False
    """Also time the block by `jax.lax.ragged_dot`, which computes all experts."""
    biases: bool = False
    """Also time the block with the biases and the clamped activation of gpt-oss."""
    seed: int = 0


def top_experts(router: Array, x: Array, experts_per_token: int) -> tuple[Array, Array]:
    """Return combine weights and ids of the chosen experts: [N, D] -> [N, K], [N, K]."""
    weights, expert_ids = jax.lax.top_k(jax.nn.softmax(x @ router, axis=-1), experts_per_token)
    return weights / jnp.sum(weights, axis=-1, keepdims=True), expert_ids


class Block(NamedTuple):
    """A router and its experts."""

    router: Array
    experts: Experts


RunExperts = Callable[[Array, Array, Array, Experts], Array]
"""(x [N, D], weights [N, K], expert_ids [N, K], experts) -> [N, D]."""


def run_ragged_experts(x: Array, weights: Array, expert_ids: Array, experts: Experts) -> Array:
    """Compute `models.experts.run_experts` by `jax.lax.ragged_dot`, for comparison."""
    experts_per_token = weights.shape[1]
    num_experts, hidden_size, _, expert_size = experts.gate_up.shape
    order = jnp.argsort(expert_ids.reshape(-1))
    sizes = jnp.bincount(expert_ids.reshape(-1), length=num_experts).astype(jnp.int32)
    rows = x[order // experts_per_token]
    gate_up = experts.gate_up.reshape(num_experts, hidden_size, 2 * expert_size)
    gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
    rows = jax.lax.ragged_dot(jax.nn.silu(gate) * up, experts.down, sizes) * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[order // experts_per_token].add(rows)


def dense_block(parameters: dict[str, Array], x: Array) -> Array:
    """Run one SwiGLU: [N, D] -> [N, D]."""
    gate, up = jnp.split(x @ parameters["gate_up"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ parameters["down"]


def programs(b: BlockSize, seed: int, ragged_dot: bool, biases: bool) -> dict[str, dict[str, Callable[[], Array]]]:
    """Return name -> direction -> a compiled call, on the same random input."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, deviation: float = 1.0) -> Array:
        return jnp.asarray(deviation * rng.standard_normal(shape, np.float32))

    x = normal(b.tokens, b.hidden_size)
    gate_up = normal(b.num_experts, b.hidden_size, 2, b.expert_size, deviation=0.05)
    down = normal(b.num_experts, b.expert_size, b.hidden_size, deviation=0.05)
    sparse = Block(normal(b.hidden_size, b.num_experts), Experts(gate_up, down))
    width = b.experts_per_token * b.expert_size
    dense = {
        "gate_up": normal(b.hidden_size, 2 * width, deviation=0.05),
        "down": normal(width, b.hidden_size, deviation=0.05),
    }

    def block_of(run: RunExperts) -> Callable[..., Array]:
        return lambda parameters, x: run(x, *top_experts(parameters.router, x, b.experts_per_token), parameters.experts)

    blocks: dict[str, tuple[Callable[..., Array], Any]] = {
        "dense": (dense_block, dense),
        "experts": (block_of(run_experts), sparse),
    }
    if biases:
        experts = sparse.experts._replace(
            gate_up_bias=normal(b.num_experts, 2, b.expert_size), down_bias=normal(b.num_experts, b.hidden_size)
        )
        clamped = functools.partial(run_experts, activation="clamped")
        blocks["experts with biases"] = (block_of(clamped), sparse._replace(experts=experts))
    if ragged_dot:
        blocks["ragged_dot"] = (block_of(run_ragged_experts), sparse)

    def compile_both(block: Callable[..., Array], parameters: Any) -> dict[str, Callable[[], Array]]:
        forward = jax.jit(block)
        gradient = jax.jit(jax.grad(lambda parameters, x: jnp.sum(block(parameters, x) ** 2), argnums=(0, 1)))
        calls = (lambda: forward(parameters, x), lambda: gradient(parameters, x))
        return dict(zip(timing.DIRECTIONS, calls, strict=True))

    return {name: compile_both(*block) for name, block in blocks.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print a row for each shape, direction and block, and return the exit code."""
    benchmark = tyro.cli(ExpertsBenchmark, args=arguments, prog="python -m experiments.bench_experts")
    table = rich.table.Table(title=f"Experts against a dense block of equal FLOPs, {jax.devices()[0].device_kind}")
    for column in ("shape", "direction", "block"):
        table.add_column(column)
    for column in ("median ms", "median ratio to dense", "ratio, quartiles"):
        table.add_column(column, justify="right")
    for size in (BlockSize(*sizes) for sizes in benchmark.shapes):
        compiled = programs(size, benchmark.seed, benchmark.ragged_dot, benchmark.biases)
        for direction in timing.DIRECTIONS:
            calls = {name: of_block[direction] for name, of_block in compiled.items()}
            seconds = timing.interleaved_seconds(calls, benchmark.repeats)
            for name, times in seconds.items():
                ratios = timing.quartiles(timing.paired_ratios(times, seconds["dense"]))
                milliseconds = f"{1e3 * timing.quartiles(times).median:.2f}"
                table.add_row(str(size), direction, name, milliseconds, f"{ratios.median:.2f}", ratios.range())
    rich.console.Console().print(table)
    return 0
