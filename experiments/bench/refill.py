"""`python -m experiments.bench_refill`: what it brings to give a free slot the next prompt.

The same responses are drawn three times: all at once, batch after batch of as many rows as there are slots, and in
slots that are refilled. Random weights draw a stop token with about equal probability at every step, so that lengths
have a long tail; the mean is chosen by the number of stop tokens. All take turns in one process, and the figures are
medians of the ratios of neighbouring runs. This file must never be needed by a run.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tyro

import models
from experiments.bench.experts import interleaved_seconds
from rspo_jax.rollouts import SamplerConfig, generate
from rspo_jax.types import Array, Samples


@dataclass(frozen=True)
class Benchmark:
    """Time sampling with and without refilled slots; compilation is left out."""

    requests: int = 256
    slots: int = 32
    prompt_tokens: int = 8
    max_new_tokens: int = 128
    stop_tokens: tuple[int, ...] = (16, 4, 2, 1)
    """Tokens of 32 that end a response, one case each: the mean length is about 32 by that."""
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests % self.slots:
            raise ValueError(f"{self.requests} requests do not divide into batches of {self.slots} slots")
        if not all(1 <= count < VOCABULARY for count in self.stop_tokens):
            raise ValueError(f"stop_tokens must lie between 1 and {VOCABULARY - 1}, got {self.stop_tokens}")
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")


VOCABULARY = 32
MODEL = models.TransformerConfig(vocab_size=VOCABULARY, expert_size=96)


def contenders(benchmark: Benchmark, stop_count: int) -> dict[str, Callable[[], Samples]]:
    """name -> a call that draws all responses."""
    b, model = benchmark, models.Transformer(MODEL)
    params = models.init_params(MODEL, jax.random.key(b.seed))
    rng = np.random.default_rng(b.seed)
    prompts = jnp.asarray(rng.integers(1, VOCABULARY, (b.requests, b.prompt_tokens)).astype(np.int32))
    mask, keys = jnp.ones(prompts.shape, bool), jax.random.split(jax.random.key(b.seed + 1), b.requests)
    stops = tuple(range(VOCABULARY - stop_count, VOCABULARY))

    def draw(prompts: Array, mask: Array, keys: Array, slots: int | None) -> Samples:
        config = SamplerConfig(b.max_new_tokens, slots=slots)
        return generate(model, params, prompts, mask, keys, config, stops)

    def in_batches() -> Samples:
        batches = []
        for start in range(0, b.requests, b.slots):
            rows = slice(start, start + b.slots)
            # A batch ends before the next begins: the host decides what to draw next.
            batches.append(jax.block_until_ready(draw(prompts[rows], mask[rows], keys[rows], None)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)

    return {
        "refilled slots": lambda: draw(prompts, mask, keys, b.slots),
        "batch after batch": in_batches,
        "all at once": lambda: draw(prompts, mask, keys, None),
    }


def main(arguments: list[str] | None = None) -> int:
    benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_refill")
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
        seconds = interleaved_seconds(calls, b.repeats)
        for name, times in seconds.items():
            ratios = [time / ours for time, ours in zip(times, seconds["refilled slots"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            median = statistics.median(times)
            rate = f"{lengths[name].sum() / median:,.0f}"
            spread = f"{low:.2f} – {high:.2f}"
            table.add_row(f"{lengths[name].mean():.1f}", name, f"{1e3 * median:.0f}", rate, f"{middle:.2f}", spread)
        table.add_section()
    rich.console.Console().print(table)
    return 0
