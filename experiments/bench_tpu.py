"""`python -m experiments.bench_tpu`: what the TPU compiler says of the parts of a training step, without a TPU.

Experts, attention, output head and route are compiled one by one for one device of a pod, at the sizes of
Qwen3-30B-A3B, each beside its plain form or the figure that it should reach. Nothing runs and nothing is timed. This
file must never be needed by a run.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro

import rspo_jax
from experiments.bench import measure, tpu
from experiments.bench_experts import route as route_tokens
from models.attention import attend
from models.experts import Experts, run_experts
from models.grouped_matmul import tile_rows
from rspo_jax.metrics import write_json

Array = jax.Array
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Benchmark:
    """Compile the parts of a step for a TPU; the defaults are Qwen3-30B-A3B's sizes."""

    topology: str = "v5p:2x2x1"
    parts: tuple[Literal["experts", "attention", "head", "route"], ...] = ("experts", "attention", "head", "route")
    tokens: int = 8192
    hidden_size: int = 2048
    expert_size: int = 768
    num_experts: tuple[int, ...] = (32, 128)
    experts_per_token: int = 8
    num_layers: int = 48
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    vocab_size: int = 151_936
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    json: Path | None = None
    """Also write the figures there."""


class Figure(NamedTuple):
    """One line of the table."""

    part: str
    form: str
    measure: str
    value: float
    expected: float | None
    """What it is compared with: the plain form's figure, or the figure meant."""


class Compiler(NamedTuple):
    """Compiles functions of arrays for one device of a pod."""

    mesh: jax.sharding.Mesh

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return tpu.shape_on(self.mesh, shape, dtype)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
        return tpu.compile_for(function, *arguments)


def experts(b: Benchmark, compiler: Compiler) -> Iterator[Figure]:
    """FLOPs of a block, router included, forward and backward, beside those of the chosen experts and the router.

    The kernel declares the FLOPs of its rows to the compiler. Where an expert's rows end inside a tile, that tile is
    computed for two experts; the bound on that is shown beside.
    """
    for num_experts in b.num_experts:
        for dtype in b.dtypes:

            def block(parameters: dict[str, Array], x: Array) -> Array:
                weights, expert_ids = route_tokens(parameters["router"], x.astype(jnp.float32), b.experts_per_token)
                experts = Experts(parameters["gate_up"], parameters["down"])
                return run_experts(x, weights.astype(x.dtype), expert_ids, experts)

            def forward_and_backward(parameters: dict[str, Array], x: Array, gradient: Array) -> tuple[Array, Any]:
                output, vjp = jax.vjp(block, parameters, x)
                return output, vjp(gradient)

            parameters = {
                "router": compiler.array((b.hidden_size, num_experts), jnp.float32),
                "gate_up": compiler.array((num_experts, b.hidden_size, 2, b.expert_size), dtype),
                "down": compiler.array((num_experts, b.expert_size, b.hidden_size), dtype),
            }
            x = compiler.array((b.tokens, b.hidden_size), dtype)
            analysis = measure.analyse(compiler(forward_and_backward, parameters, x, x))
            rows = b.tokens * b.experts_per_token
            useful = 6 * (rows * 3 * b.hidden_size * b.expert_size + b.tokens * b.hidden_size * num_experts)
            form = f"{num_experts} experts, {dtype}"
            yield Figure("experts", form, "GFLOP", analysis.flops / 1e9, useful / 1e9)
            tiles = rows + (num_experts - 1) * tile_rows(rows, num_experts)
            yield Figure("experts", form, "thousand rows in tiles, at most", tiles / 1e3, rows / 1e3)
            yield Figure("experts", form, "temporary MiB", analysis.temporary_bytes / MEBIBYTE, None)


def gradient_mebibytes(compiler: Compiler, form: Callable[..., Array], differentiated: int, *arguments: Any) -> float:
    """Temporary memory of the gradient of Σ form(...)² in the first `differentiated` arguments."""

    def loss(*inputs: Array) -> Array:
        return jnp.sum(jnp.square(form(*inputs).astype(jnp.float32)))

    compiled = compiler(jax.value_and_grad(loss, argnums=tuple(range(differentiated))), *arguments)
    return measure.analyse(compiled).temporary_bytes / MEBIBYTE


def attention(b: Benchmark, compiler: Compiler) -> Iterator[Figure]:
    """Temporary memory of attention with segments, forward and backward, as T doubles, beside the plain form's."""

    def plain(queries: Array, keys: Array, values: Array, segments: Array) -> Array:
        earlier = jnp.tril(jnp.ones((queries.shape[1],) * 2, bool))[None]
        mask = (segments[:, :, None] == segments[:, None, :]) & earlier
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None])

    def kernel(queries: Array, keys: Array, values: Array, segments: Array) -> Array:
        return attend(queries, keys, values, segments, segments)

    for tokens in (b.tokens // 2, b.tokens):
        queries = compiler.array((1, tokens, b.num_heads, b.head_dim), jnp.bfloat16)
        keys = compiler.array((1, tokens, b.num_kv_heads, b.head_dim), jnp.bfloat16)
        segments = compiler.array((1, tokens), jnp.int32)
        with jax.numpy_dtype_promotion("standard"):  # the plain form promotes bfloat16, in its gradient too
            forms = (kernel, plain)
            mebibytes = [gradient_mebibytes(compiler, form, 3, queries, keys, keys, segments) for form in forms]
        yield Figure("attention", f"{tokens} tokens, bfloat16", "temporary MiB", *mebibytes)


def head(b: Benchmark, compiler: Compiler) -> Iterator[Figure]:
    """Temporary memory of log-probabilities from hidden states, forward and backward, beside the plain form."""

    def plain(hidden: Array, head: Array, targets: Array) -> Array:
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        return rspo_jax.token_log_probs(logits, targets)

    def blocked(hidden: Array, head: Array, targets: Array) -> Array:
        return rspo_jax.head_log_probs(hidden, head, targets).log_probs

    for dtype in b.dtypes:
        hidden = compiler.array((1, b.tokens, b.hidden_size), dtype)
        weights = compiler.array((b.hidden_size, b.vocab_size), dtype)
        targets = compiler.array((1, b.tokens), jnp.int32)
        mebibytes = [gradient_mebibytes(compiler, form, 2, hidden, weights, targets) for form in (blocked, plain)]
        yield Figure("head", f"{b.vocab_size} entries, {dtype}", "temporary MiB", *mebibytes)


def route(b: Benchmark, compiler: Compiler) -> Iterator[Figure]:
    """Bytes a token of the route as the compiler lays it out, beside 3 · L · K."""
    num_experts = max(b.num_experts)
    for tokens in (b.tokens, b.tokens - 1):
        logits = jax.ShapeDtypeStruct((b.num_layers, 1, tokens, num_experts), jnp.float32)
        trace = jax.eval_shape(lambda logits: rspo_jax.trace_router(logits, b.experts_per_token), logits)
        shapes = jax.tree.map(lambda leaf: compiler.array(leaf.shape, leaf.dtype), trace)
        compiled = compiler(lambda trace: jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), trace), shapes)
        argument_bytes = measure.analyse(compiled).argument_bytes
        meant = 3.0 if num_experts <= 256 else 4.0
        meant *= b.num_layers * b.experts_per_token
        yield Figure("route", f"{tokens} tokens", "bytes a token", argument_bytes / tokens, meant)


PARTS = {"experts": experts, "attention": attention, "head": head, "route": route}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_tpu")
    try:
        devices = tpu.topology_mesh(benchmark.topology, {"data": -1}).devices
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    compiler = Compiler(jax.sharding.Mesh(devices[:1], ("data",)))
    figures = [figure for part in benchmark.parts for figure in PARTS[part](benchmark, compiler)]
    table = rich.table.Table(title=f"compiled for one device of {benchmark.topology}, {benchmark.tokens} tokens")
    for column in ("part", "form", "measure", "value", "plain or meant", "ratio"):
        table.add_column(column, justify="left" if column in ("part", "form", "measure") else "right")
    for part, form, measured, value, expected in figures:
        against = ("", "") if expected is None else (f"{expected:,.0f}", f"{value / expected:.4f}")
        table.add_row(part, form, measured, f"{value:,.0f}", *against)
    rich.console.Console().print(table)
    if benchmark.json is not None:
        write_json(benchmark.json, {"topology": benchmark.topology, "figures": [f._asdict() for f in figures]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
