"""`python -m experiments.bench_head`: what log-probs without logits cost beside the form that holds the logits.

Both forms run in one process, in turn, and the figure is the median of the ratios of neighbouring runs, so that a
noisy machine disturbs both alike. Temporary memory is the compiler's own count. This file must never be needed by a
run.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro

from experiments.bench import measure
from experiments.bench.experts import interleaved_seconds
from rspo_jax.log_probs import TokenScores, head_log_probs, token_entropy, token_log_probs

Array = jax.Array
Scores = Callable[[Array, Array, Array], TokenScores]


@dataclass(frozen=True)
class Benchmark:
    """Time log-probs and entropy from hidden states, forward and backward, with and without the logits."""

    shapes: tuple[str, ...] = ("1,1024,256,151936", "8,512,96,32")
    """Each B,T,D,V."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 5
    seed: int = 0


def plain(hidden: Array, head: Array, targets: Array) -> TokenScores:
    """The form with logits: what `head_log_probs` must equal."""
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    return TokenScores(token_log_probs(logits, targets), token_entropy(jax.lax.stop_gradient(logits)))


FORMS: dict[str, Scores] = {"with logits": plain, "head_log_probs": head_log_probs}


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """ "B,T,D,V" as four positive integers.

    Raises:
      ValueError: on anything else.
    """
    sizes = tuple(int(part) if part.strip().isdigit() else 0 for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"a shape is B,T,D,V, four positive integers; got {text!r}")
    return sizes


def inputs(shape: tuple[int, int, int, int], dtype: str, seed: int) -> tuple[Array, Array, Array]:
    """Random hidden states, head and targets; the logits have unit variance."""
    rows, tokens, hidden_size, vocab_size = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (rows, tokens, hidden_size)).astype(dtype)
    head = (hidden_size**-0.5 * jax.random.normal(keys[1], (hidden_size, vocab_size))).astype(dtype)
    return hidden, head, jax.random.randint(keys[2], (rows, tokens), 0, vocab_size)


def directions(form: Scores) -> dict[str, Callable[..., Any]]:
    """Forward alone, and the gradient in hidden and head together with the scores."""

    def loss(hidden: Array, head: Array, targets: Array) -> tuple[Array, TokenScores]:
        scores = form(hidden, head, targets)
        return jnp.sum(scores.log_probs), scores

    return {"forward": form, "forward + backward": jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)}


def compile_forms(arguments: tuple[Array, ...], direction: str) -> dict[str, jax.stages.Compiled]:
    """Each form, compiled for one direction."""
    return {name: jax.jit(directions(form)[direction]).lower(*arguments).compile() for name, form in FORMS.items()}


def rows_of(shape: tuple[int, int, int, int], direction: str, benchmark: Benchmark) -> list[tuple[str, ...]]:
    """The table's lines for one shape and direction."""
    arguments = inputs(shape, benchmark.dtype, benchmark.seed)
    forms = compile_forms(arguments, direction)
    calls = {name: lambda compiled=compiled: compiled(*arguments) for name, compiled in forms.items()}
    seconds = interleaved_seconds(calls, benchmark.repeats)
    base = next(iter(forms))
    lines = []
    for name, times in seconds.items():
        low, middle, high = measure.paired_ratios(times, seconds[base])
        size, base_size = (measure.analyse(forms[form]).temporary_bytes for form in (name, base))
        lines.append(
            (
                ",".join(map(str, shape)),
                direction,
                name,
                f"{1e3 * statistics.median(times):.2f}",
                f"{middle:.2f}",
                f"{low:.2f} – {high:.2f}",
                f"{size / 2**20:.1f}",
                f"{size / max(base_size, 1):.4f}",
            )
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_head")
    shapes = [parse_shape(text) for text in benchmark.shapes]
    if benchmark.repeats < 2:
        raise ValueError(f"repeats must be at least 2 for quartiles, got {benchmark.repeats}")
    table = rich.table.Table(title=f"log-probs and entropy, {benchmark.dtype}, {jax.devices()[0].device_kind}")
    for column in ("B,T,D,V", "", "form", "median ms", "ratio", "quartiles", "temporary MiB", "ratio"):
        table.add_column(column, justify="right" if column[-2:] in ("ms", "io", "iB") else "left")
    for shape in shapes:
        for direction in ("forward", "forward + backward"):
            for line in rows_of(shape, direction, benchmark):
                table.add_row(*line)
    console = rich.console.Console()
    console.width = max(console.width, 130)
    console.print(table)
    return 0
