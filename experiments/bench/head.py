"""Cost of log-probs without logits against the form that holds the logits (`python -m experiments.bench_head`).

The figure is the median of the ratios of runs in the same turn. Temporary memory is the compiler's own count.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro

from experiments.bench import timing
from experiments.compilers.costs import read_costs
from models.config import Dtype
from rspo_jax.log_probs import TokenScores, head_log_probs, token_entropy, token_log_probs
from rspo_jax.types import Array

Form = Callable[[Array, Array, Array], TokenScores]
"""(hidden [B, T, D], head [D, V], targets [B, T]) -> log-probs and entropy, [B, T] each."""


@dataclass(frozen=True)
class HeadBenchmark:
    """Time log-probs and entropy from hidden states, forward and backward, with and without the logits."""

    shapes: tuple[str, ...] = ("1,1024,256,151936", "8,512,96,32")
    """Each B,T,D,V."""
    dtype: Dtype = "float32"
    repeats: int = 5
    seed: int = 0


def plain(hidden: Array, head: Array, targets: Array) -> TokenScores:
    """Compute `head_log_probs` by way of the logits."""
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    return TokenScores(token_log_probs(logits, targets), token_entropy(jax.lax.stop_gradient(logits)))


FORMS: dict[str, Form] = {"with logits": plain, "head_log_probs": head_log_probs}
"""The first one is the reference of the ratios."""


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Read "B,T,D,V" as four positive integers.

    Raises:
      ValueError: if the text is anything else.
    """
    sizes = tuple(int(part) if part.strip().isdigit() else 0 for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"a shape is B,T,D,V, four positive integers; got {text!r}")
    return sizes


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_inputs(shape: tuple[int, int, int, int], dtype: Dtype, seed: int | Array) -> tuple[Array, Array, Array]:
    """Return random hidden states, head and targets; the logits have unit variance."""
    rows, tokens, hidden_size, vocab_size = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (rows, tokens, hidden_size)).astype(dtype)
    head = (hidden_size**-0.5 * jax.random.normal(keys[1], (hidden_size, vocab_size))).astype(dtype)
    return hidden, head, jax.random.randint(keys[2], (rows, tokens), 0, vocab_size)


def compile_form(form: Form, direction: timing.Direction, arguments: tuple[Array, ...]) -> jax.stages.Compiled:
    """Compile the scores alone, or with the gradient of Σ log π in hidden states and head."""

    def loss(hidden: Array, head: Array, targets: Array) -> tuple[Array, TokenScores]:
        scores = form(hidden, head, targets)
        return jnp.sum(scores.log_probs), scores

    backward: Callable[..., Any] = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(form if direction == "forward" else backward).lower(*arguments).compile()


def measure_shape(
    shape: tuple[int, int, int, int], direction: timing.Direction, benchmark: HeadBenchmark
) -> list[tuple[str, ...]]:
    """Return the table's lines for one shape and direction."""
    arguments = random_inputs(shape, benchmark.dtype, benchmark.seed)
    compiled = {name: compile_form(form, direction, arguments) for name, form in FORMS.items()}
    calls = {name: lambda program=program: program(*arguments) for name, program in compiled.items()}
    seconds = timing.interleaved_seconds(calls, benchmark.repeats)
    base, lines = next(iter(FORMS)), []
    base_bytes = read_costs(compiled[base]).temporary_bytes
    for name, times in seconds.items():
        ratios = timing.quartiles(timing.paired_ratios(times, seconds[base]))
        temporary_bytes = read_costs(compiled[name]).temporary_bytes
        lines.append(
            (
                ",".join(map(str, shape)),
                direction,
                name,
                f"{1e3 * timing.quartiles(times).median:.2f}",
                f"{ratios.median:.2f}",
                ratios.range(),
                f"{temporary_bytes / 2**20:.1f}",
                f"{temporary_bytes / max(base_bytes, 1):.4f}",
            )
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print a row for each shape, direction and form, and return the exit code."""
    benchmark = tyro.cli(HeadBenchmark, args=arguments, prog="python -m experiments.bench_head")
    shapes = [parse_shape(text) for text in benchmark.shapes]
    if benchmark.repeats < 2:
        raise ValueError(f"repeats must be at least 2 for quartiles, got {benchmark.repeats}")
    table = rich.table.Table(title=f"log-probs and entropy, {benchmark.dtype}, {jax.devices()[0].device_kind}")
    for column in ("B,T,D,V", "", "form", "median ms", "ratio", "quartiles", "temporary MiB", "ratio"):
        table.add_column(column, justify="right" if column[-2:] in ("ms", "io", "iB") else "left")
    for shape in shapes:
        for direction in timing.DIRECTIONS:
            for line in measure_shape(shape, direction, benchmark):
                table.add_row(*line)
    console = rich.console.Console()
    console.width = max(console.width, 130)
    console.print(table)
    return 0
