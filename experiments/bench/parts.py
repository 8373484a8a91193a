"""Memory and FLOPs of the parts of a step, from the compilers of TPUs and GPUs (`python -m experiments.bench_parts`).

Experts, attention, output head and route are compiled one by one for one device, at the sizes of Qwen3-30B-A3B, each
compared with its plain form or the figure that it should reach. Nothing runs, and neither TPU nor GPU is needed.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro

import rspo_jax
from experiments.bench.experts import RunExperts, run_ragged_experts, top_experts
from experiments.compilers import gpu, tpu
from experiments.compilers.chips import MEBIBYTE
from experiments.compilers.costs import read_costs
from experiments.errors import complain
from experiments.pod import programs
from experiments.pod.meshes import MeshFlags
from experiments.pod.presets import MODELS
from models.attention import attend
from models.config import Dtype
from models.experts import Experts, run_experts
from models.kernels.megablox_matmul import tile_rows
from rspo_jax.records import write_json
from rspo_jax.sharding import make_mesh
from rspo_jax.types import Array

Part = Literal["experts", "attention", "head", "route", "step"]


@dataclass(frozen=True)
class PartsBenchmark:
    """Compile the parts of a step for a TPU or a GPU; the defaults are Qwen3-30B-A3B's sizes."""

    topology: str = "v5p:2x2x1"
    """A TPU pod, whose compiler is in libtpu, or one of a100, h100 and h200, whose compiler is in jax[cuda13]."""
    parts: tuple[Part, ...] = ("experts", "attention", "head", "route")
    """Parts to compile. "step", an update of the whole model on all devices, takes minutes and devices that it fits;
    the others are compiled for one device."""
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
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float32")
    json: Path | None = None
    """File for the figures as JSON."""


class Figure(NamedTuple):
    """One line of the table."""

    part: str
    form: str
    measure: str
    value: float
    expected: float | None
    """The plain form's figure, or the figure that is meant; None if there is nothing to compare with."""


class Compiler(NamedTuple):
    """A compiler of functions of arrays, for one device of a TPU pod or one GPU."""

    mesh: jax.sharding.Mesh
    """A mesh of the one device."""
    devices: Sequence[Any]
    """All devices of the topology."""
    is_gpu: bool

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Return an array without data on the one device."""
        return tpu.shape_on(self.mesh, shape, dtype)

    def mebibytes(self, function: Callable[..., Any], *arguments: Any) -> float:
        """Return the temporary memory of a function."""
        # NVIDIA's compiler counts no FLOPs for a device that is not there, which `read_costs` would refuse.
        memory: Any = tpu.compile_for(function, *arguments).memory_analysis()
        return memory.temp_size_in_bytes / MEBIBYTE

    def kernels(self, part: str, form: str, function: Callable[..., Any], *arguments: Any) -> Iterator[Figure]:
        """Yield the most bytes that a kernel with matrix products spills from its registers; on GPUs only."""
        found = gpu.kernels_of(function, *arguments) if self.is_gpu else []
        if found:
            worst = max(found, key=lambda kernel: kernel.spilled_bytes)
            which = f" ({worst.name})" if worst.spilled_bytes else ""
            measured = f"bytes that a thread spills, most of {len(found)} kernels{which}"
            yield Figure(part, form, measured, worst.spilled_bytes, None)


def experts(b: PartsBenchmark, compiler: Compiler) -> Iterator[Figure]:
    """Compile a block, router included, forward and backward.

    On a TPU, the figures are its FLOPs, as the kernel declares them to the compiler, against those of the chosen
    experts and the router. If an expert's rows end inside a tile, that tile is computed for two experts; the bound on
    that is another figure. On a GPU, whose compiler counts no FLOPs for a device that is not there, the figure is its
    memory against that of ragged_dot.
    """
    rows = b.tokens * b.experts_per_token
    for num_experts in b.num_experts:
        for dtype in b.dtypes:
            form = f"{num_experts} experts, {dtype}"
            parameters = {
                "router": compiler.array((b.hidden_size, num_experts), jnp.float32),
                "gate_up": compiler.array((num_experts, b.hidden_size, 2, b.expert_size), dtype),
                "down": compiler.array((num_experts, b.expert_size, b.hidden_size), dtype),
            }
            x = compiler.array((b.tokens, b.hidden_size), dtype)
            arguments = (parameters, x, x)
            ours = block_of(run_experts, b.experts_per_token)
            if compiler.is_gpu:
                plain = block_of(run_ragged_experts, b.experts_per_token)
                mebibytes = [compiler.mebibytes(block, *arguments) for block in (ours, plain)]
                yield Figure("experts", form, "temporary MiB", *mebibytes)
                yield from compiler.kernels("experts", form, ours, *arguments)
                continue
            costs = read_costs(tpu.compile_for(ours, *arguments))
            useful = 6 * (rows * 3 * b.hidden_size * b.expert_size + b.tokens * b.hidden_size * num_experts)
            yield Figure("experts", form, "GFLOP", costs.flops / 1e9, useful / 1e9)
            tiles = rows + (num_experts - 1) * tile_rows(rows, num_experts)
            yield Figure("experts", form, "thousand rows in tiles, at most", tiles / 1e3, rows / 1e3)
            yield Figure("experts", form, "temporary MiB", costs.temporary_bytes / MEBIBYTE, None)


def block_of(run: RunExperts, experts_per_token: int) -> Callable[..., tuple[Array, Any]]:
    """Return a function of a router and its experts, forward and backward."""

    def block(parameters: dict[str, Array], x: Array) -> Array:
        weights, expert_ids = top_experts(parameters["router"], x.astype(jnp.float32), experts_per_token)
        return run(x, weights.astype(x.dtype), expert_ids, Experts(parameters["gate_up"], parameters["down"]))

    def forward_and_backward(parameters: dict[str, Array], x: Array, gradient: Array) -> tuple[Array, Any]:
        output, vjp = jax.vjp(block, parameters, x)
        return output, vjp(gradient)

    return forward_and_backward


def gradient_of(form: Callable[..., Array], differentiated: int) -> Callable[..., Any]:
    """Return the gradient of Σ form(...)² in the first `differentiated` arguments."""

    def loss(*inputs: Array) -> Array:
        return jnp.sum(jnp.square(form(*inputs).astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=tuple(range(differentiated)))


def attention(b: PartsBenchmark, compiler: Compiler) -> Iterator[Figure]:
    """Compile attention with segments, forward and backward, at T/2 and T: its memory against the plain form's."""

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
        inputs, form = (queries, keys, keys, segments), f"{tokens} tokens, bfloat16"
        with jax.numpy_dtype_promotion("standard"):  # the plain form promotes bfloat16, in its gradient too
            mebibytes = [compiler.mebibytes(gradient_of(attended, 3), *inputs) for attended in (kernel, plain)]
            yield Figure("attention", form, "temporary MiB", *mebibytes)
            yield from compiler.kernels("attention", form, gradient_of(kernel, 3), *inputs)


def head(b: PartsBenchmark, compiler: Compiler) -> Iterator[Figure]:
    """Compile log-probs from hidden states, forward and backward: their memory against the plain form's."""

    def plain(hidden: Array, head: Array, targets: Array) -> Array:
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        return rspo_jax.token_log_probs(logits, targets)

    def blocked(hidden: Array, head: Array, targets: Array) -> Array:
        return rspo_jax.head_log_probs(hidden, head, targets).log_probs

    for dtype in b.dtypes:
        hidden = compiler.array((1, b.tokens, b.hidden_size), dtype)
        weights = compiler.array((b.hidden_size, b.vocab_size), dtype)
        targets = compiler.array((1, b.tokens), jnp.int32)
        mebibytes = [compiler.mebibytes(gradient_of(form, 2), hidden, weights, targets) for form in (blocked, plain)]
        yield Figure("head", f"{b.vocab_size} entries, {dtype}", "temporary MiB", *mebibytes)


def route(b: PartsBenchmark, compiler: Compiler) -> Iterator[Figure]:
    """Compile a program of the route alone: its bytes a token against 3 · L · K."""
    num_experts = max(b.num_experts)
    for tokens in (b.tokens, b.tokens - 1):
        logits = jax.ShapeDtypeStruct((b.num_layers, 1, tokens, num_experts), jnp.float32)
        trace = jax.eval_shape(lambda logits: rspo_jax.trace_router(logits, b.experts_per_token), logits)
        shapes = jax.tree.map(lambda leaf: compiler.array(leaf.shape, leaf.dtype), trace)
        compiled = tpu.compile_for(lambda trace: jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), trace), shapes)
        memory: Any = compiled.memory_analysis()
        meant = (3.0 if num_experts <= 256 else 4.0) * b.num_layers * b.experts_per_token
        yield Figure("route", f"{tokens} tokens", "bytes a token", memory.argument_size_in_bytes / tokens, meant)


def step(b: PartsBenchmark, compiler: Compiler) -> Iterator[Figure]:
    """Compile an update of the whole model on all devices, two rows for each: the memory of RSPO against GMPO."""
    rows = 2 * len(compiler.devices)
    config = replace(
        MODELS["qwen3-30b-a3b"],
        param_dtype="float32",
        vocab_size=b.vocab_size,
        hidden_size=b.hidden_size,
        num_layers=b.num_layers,
        num_heads=b.num_heads,
        num_kv_heads=b.num_kv_heads,
        head_dim=b.head_dim,
        num_experts=max(b.num_experts),
        num_experts_per_token=b.experts_per_token,
        expert_size=b.expert_size,
    )
    mesh_config = MeshFlags().config(config, len(compiler.devices), rows)
    mesh = make_mesh(mesh_config, list(compiler.devices))
    setting = programs.Setting(config, mesh_config, rows, b.tokens, max(1, b.tokens // 8))
    found: dict[str, Any] = {
        objective: programs.lower(programs.UPDATE, setting, objective, mesh).compile().memory_analysis()
        for objective in ("gmpo", "rspo")
    }
    split = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    for measured, attribute in (("argument", "argument_size_in_bytes"), ("temporary", "temp_size_in_bytes")):
        gmpo, rspo = (getattr(memory, attribute) / MEBIBYTE for memory in found.values())
        form = f"{b.num_layers} layers, {rows} rows, {split}"
        yield Figure("step", form, f"{measured} MiB, RSPO against GMPO", rspo, gmpo)


PARTS = {"experts": experts, "attention": attention, "head": head, "route": route, "step": step}


def find_devices(topology: str) -> tuple[jax.sharding.Mesh, bool]:
    """Return a mesh of one axis over all devices of a topology, and True if they are GPUs."""
    if topology.partition(":")[0] in gpu.TARGETS:
        return gpu.gpu_mesh(topology, "data"), True
    return tpu.topology_mesh(topology, {"data": -1}), False


def main(arguments: list[str] | None = None) -> int:
    """Print the figures, and return the exit code: 0, 1 if something does not compile or fit, 2 for a mistake."""
    benchmark = tyro.cli(PartsBenchmark, args=arguments, prog="python -m experiments.bench_parts")
    try:
        mesh, is_gpu = find_devices(benchmark.topology)
    except (RuntimeError, ValueError) as error:
        return complain(error)
    compiler = Compiler(jax.sharding.Mesh(mesh.devices[:1], mesh.axis_names), mesh.devices.tolist(), is_gpu)
    try:
        figures = [figure for part in benchmark.parts for figure in PARTS[part](benchmark, compiler)]
    except jax.errors.JaxRuntimeError as error:
        print(f"error: this does not compile for {benchmark.topology}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    table = rich.table.Table(title=f"compiled for {benchmark.topology}, {benchmark.tokens} tokens")
    for column in ("part", "form", "measure", "value", "plain or meant", "ratio"):
        table.add_column(column, justify="left" if column in ("part", "form", "measure") else "right")
    for part, form, measured, value, expected in figures:
        against = ("", "") if expected is None else (f"{expected:,.0f}", f"{value / expected:.4f}")
        table.add_row(part, form, measured, f"{value:,.0f}", *against)
    rich.console.Console(width=None if sys.stdout.isatty() else 180).print(table)
    if benchmark.json is not None:
        write_json(benchmark.json, {"topology": benchmark.topology, "figures": [f._asdict() for f in figures]})
    return 0
