"""Gain from giving a free slot of the sampler the next prompt (`python -m experiments.bench_refill`).

The same responses are drawn three times: all at once, batch after batch of as many rows as there are slots, and in
slots that are refilled. Random weights draw a stop token with about equal probability at every step, so that lengths
have a long tail; the number of stop tokens sets their mean. The figures are medians of the ratios of runs in the same
turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tyro

import models
from experiments.bench import timing
from rspo_jax.rollouts import SamplerConfig, generate
from rspo_jax.types import Samples

VOCABULARY = 32
MODEL = models.TransformerConfig(vocab_size=VOCABULARY, expert_size=96)


@dataclass(frozen=True)
class RefillBenchmark:
    """Time sampling with and without refilled slots; compilation is left out."""

    requests: int = 256
    slots: int = 32
    prompt_tokens: int = 8
    max_new_tokens: int = 128
    stop_tokens: tuple[int, ...] = (16, 4, 2, 1)
    """Numbers of tokens, of 32, that end a response, one case each; the mean length is about 32 over that number."""
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests % self.slots:
            raise ValueError(f"{self.requests} requests do not divide into batches of {self.slots} slots")
        if not all(1 <= count < VOCABULARY for count in self.stop_tokens):
            raise ValueError(f"stop_tokens must lie between 1 and {VOCABULARY - 1}, got {self.stop_tokens}")
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")


def contenders(benchmark: RefillBenchmark, stop_count: int) -> dict[str, Callable[[], Samples]]:
    """Return name -> a call that draws all responses."""
    b, model = benchmark, models.Transformer(MODEL)
    params = models.init_params(MODEL, jax.random.key(b.seed))
    rng = np.random.default_rng(b.seed)
    prompts = rng.integers(1, VOCABULARY, (b.requests, b.prompt_tokens)).astype(np.int32)
    mask, keys = np.ones(prompts.shape, bool), jax.random.split(jax.random.key(b.seed + 1), b.requests)
    stops = tuple(range(VOCABULARY - stop_count, VOCABULARY))

    def draw(rows: slice, slots: int | None) -> Samples:
        config = SamplerConfig(b.max_new_tokens, slots=slots)
        return generate(model, params, prompts[rows], mask[rows], keys[rows], config, stops)

    def in_batches() -> Samples:
        batches = []
        for start in range(0, b.requests, b.slots):
            # A batch ends before the next begins: the host decides what to draw next.
            batches.append(jax.block_until_ready(draw(slice(start, start + b.slots), None)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)

    return {
        "refilled slots": lambda: draw(slice(None), b.slots),
        "batch after batch": in_batches,
        "all at once": lambda: draw(slice(None), None),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a row for each number of stop tokens and way to draw, and return the exit code."""
    benchmark = tyro.cli(RefillBenchmark, args=arguments, prog="python -m experiments.bench_refill")
    b = benchmark
    table = rich.table.Table(
        title=f"{b.requests} responses of at most {b.max_new_tokens} tokens, prompts of {b.prompt_tokens}, {b.slots} "
        f"slots, {jax.devices()[0].device_kind}"
    )
    for column in ("mean length", "", "median ms", "tokens/s", "time by refilled", "quartiles"):
        table.add_column(column, justify="left" if not column else "right")
    for stop_count in b.stop_tokens:
        calls = contenders(b, stop_count)
        lengths = {name: np.asarray(call().mask).sum(axis=1) for name, call in calls.items()}
        seconds = timing.interleaved_seconds(calls, b.repeats)
        for name, times in seconds.items():
            ratios = timing.quartiles(timing.paired_ratios(times, seconds["refilled slots"]))
            median = timing.quartiles(times).median
            rate, mean_length = f"{lengths[name].sum() / median:,.0f}", f"{lengths[name].mean():.1f}"
            table.add_row(mean_length, name, f"{1e3 * median:.0f}", rate, f"{ratios.median:.2f}", ratios.range())
        table.add_section()
    rich.console.Console().print(table)
    return 0
