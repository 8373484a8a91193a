"""`python -m experiments.bench_experts`: what a block of experts costs beside a dense one of equal FLOPs.

Both blocks run in one process, in turn, and the figure is the median of the ratios of neighbouring runs, so that a
noisy machine disturbs both alike. On a TPU, note that XLA's cost analysis counts the useful FLOPs that the kernel
declares, not the tiles that it computes: see `grouped_matmul`. This file must never be needed by a run.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro

from models.experts import Activation, Experts, run_experts

Array = jax.Array


class Shape(NamedTuple):
    """One block of experts."""

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
class Benchmark:
    """Time blocks, forward and backward, against a dense SwiGLU block of width K·F."""

    shapes: tuple[tuple[int, int, int, int, int], ...] = ((4096, 96, 192, 8, 2), (2048, 512, 256, 16, 4))
    """Tokens, hidden size, expert size, experts and experts per token of each block."""
    repeats: int = 30
    ragged_dot: bool = False
    """Also time the block by `jax.lax.ragged_dot`, which computes all experts."""
    biases: bool = False
    """Also time the block with the biases and the clamped activation of gpt-oss."""
    seed: int = 0


def route(router: Array, x: Array, experts_per_token: int) -> tuple[Array, Array]:
    """Combine weights and ids of the chosen experts: [N, D] -> [N, K], [N, K]."""
    weights, expert_ids = jax.lax.top_k(jax.nn.softmax(x @ router, axis=-1), experts_per_token)
    return weights / jnp.sum(weights, axis=-1, keepdims=True), expert_ids


class Block(NamedTuple):
    """A router and its experts."""

    router: Array
    experts: Experts


def expert_block(parameters: Block, x: Array, experts_per_token: int, activation: Activation = "silu") -> Array:
    """Router, top-K and the chosen experts: [N, D] -> [N, D]."""
    weights, expert_ids = route(parameters.router, x, experts_per_token)
    return run_experts(x, weights, expert_ids, parameters.experts, activation)


def ragged_block(parameters: Block, x: Array, experts_per_token: int) -> Array:
    """The same by `jax.lax.ragged_dot`, for comparison."""
    weights, expert_ids = route(parameters.router, x, experts_per_token)
    return run_ragged_experts(x, weights, expert_ids, parameters.experts)


def run_ragged_experts(x: Array, weights: Array, expert_ids: Array, experts: Experts) -> Array:
    """`models.experts.run_experts` by `jax.lax.ragged_dot`."""
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
    """One SwiGLU: [N, D] -> [N, D]."""
    gate, up = jnp.split(x @ parameters["gate_up"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ parameters["down"]


def programs(b: Shape, seed: int, ragged_dot: bool, biases: bool = False) -> dict[str, dict[str, Callable[[], Array]]]:
    """name -> direction -> a compiled call."""
    keys = jax.random.split(jax.random.key(seed), 8)
    x = jax.random.normal(keys[0], (b.tokens, b.hidden_size))
    sparse = Block(
        jax.random.normal(keys[1], (b.hidden_size, b.num_experts)),
        Experts(
            0.05 * jax.random.normal(keys[2], (b.num_experts, b.hidden_size, 2, b.expert_size)),
            0.05 * jax.random.normal(keys[3], (b.num_experts, b.expert_size, b.hidden_size)),
        ),
    )
    width = b.experts_per_token * b.expert_size
    dense = {
        "gate_up": 0.05 * jax.random.normal(keys[4], (b.hidden_size, 2 * width)),
        "down": 0.05 * jax.random.normal(keys[5], (width, b.hidden_size)),
    }
    run = functools.partial(expert_block, experts_per_token=b.experts_per_token)
    blocks: dict[str, tuple[Callable[..., Array], Any]] = {"dense": (dense_block, dense), "experts": (run, sparse)}
    if biases:
        of_gate_up = jax.random.normal(keys[6], (b.num_experts, 2, b.expert_size))
        of_down = jax.random.normal(keys[7], (b.num_experts, b.hidden_size))
        experts = sparse.experts._replace(gate_up_bias=of_gate_up, down_bias=of_down)
        biased = sparse._replace(experts=experts)
        blocks["experts with biases"] = (functools.partial(run, activation="clamped"), biased)
    if ragged_dot:
        blocks["ragged_dot"] = (functools.partial(ragged_block, experts_per_token=b.experts_per_token), sparse)

    def compile_both(block: Callable[..., Array], parameters: Any) -> dict[str, Callable[[], Array]]:
        forward = jax.jit(block)
        gradient = jax.jit(jax.grad(lambda parameters, x: jnp.sum(block(parameters, x) ** 2), argnums=(0, 1)))
        return {"forward": lambda: forward(parameters, x), "forward + backward": lambda: gradient(parameters, x)}

    return {name: compile_both(*block) for name, block in blocks.items()}


def interleaved_seconds(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times each call in turn, `repeats` times, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_experts")
    table = rich.table.Table(title=f"Experts beside a dense block of equal FLOPs, {jax.devices()[0].device_kind}")
    for column in ("shape", "direction", "block"):
        table.add_column(column)
    for column in ("median ms", "median ratio to dense", "ratio, quartiles"):
        table.add_column(column, justify="right")
    for shape in (Shape(*sizes) for sizes in benchmark.shapes):
        compiled = programs(shape, benchmark.seed, benchmark.ragged_dot, benchmark.biases)
        for direction in ("forward", "forward + backward"):
            calls = {name: calls[direction] for name, calls in compiled.items()}
            seconds = interleaved_seconds(calls, benchmark.repeats)
            for name, times in seconds.items():
                ratios = [time / dense for time, dense in zip(times, seconds["dense"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                milliseconds = f"{1e3 * statistics.median(times):.2f}"
                table.add_row(str(shape), direction, name, milliseconds, f"{middle:.2f}", f"{low:.2f} – {high:.2f}")
    rich.console.Console().print(table)
    return 0
