"""Tokens per second of our sampler, compared with Hugging Face's and Tunix's (`python -m experiments.bench_sampler`).

All draw greedily with the same weights, from the same left-padded prompts, for the same number of new tokens, in
float32 on the same CPU cores. Their answers are checked before anything is timed, and compilation is left out.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import rich.console
import rich.table
import tyro

import models
from experiments.bench import timing
from experiments.bench.cores import on_cores
from experiments.bench.roofline import peak_of
from experiments.bench.sampler_cases import CASES, Case, Contender, make_prompts, responses
from experiments.bench.sampler_rivals import RIVAL_SAMPLERS, check_installed
from experiments.errors import complain
from rspo_jax.rollouts import SamplerConfig, generate
from rspo_jax.types import Array, Params

TIE = 1e-4
"""Largest distance in logits below the likeliest token at which a token still counts as greedy: float32 rounds
differently in every framework, and near ties fall either way."""


def our_sampler(case: Case, params: Params, prompts: np.ndarray, mask: np.ndarray) -> dict[str, Contender]:
    """Build a contender of `rspo_jax.rollouts.generate`."""
    model, keys = models.Transformer(case.model), jax.random.split(jax.random.key(0), case.rows)
    config = SamplerConfig(max_new_tokens=case.new_tokens, temperature=0.0, slots=case.slots)
    prompts, mask = prompts[:: case.group], mask[:: case.group]
    stops = () if case.stop_token is None else (case.stop_token,)

    def answer() -> np.ndarray:
        return np.asarray(generate(model, params, prompts, mask, keys, config, stops, repeats=case.group).tokens)

    return {"rspo_jax": answer}


def check_greedy(case: Case, params: Params, prompts: np.ndarray, mask: np.ndarray, tokens: np.ndarray) -> None:
    """Check every token of a response against the likeliest of one uncached forward pass over prompt and answer.

    Raises:
      ValueError: if a token is more than `TIE` below the likeliest, or there are too few or too many tokens.
    """
    if tokens.shape != (case.rows, case.new_tokens):
        raise ValueError(f"gave tokens of shape {tokens.shape} instead of {(case.rows, case.new_tokens)}")
    inputs = np.concatenate([prompts, tokens[:, :-1]], axis=1)
    segment_ids = np.concatenate([mask, np.ones_like(tokens[:, :-1], bool)], axis=1).astype(np.int32)
    logits = np.asarray(_forward(case.model, params, inputs, segment_ids))[:, case.prompt_tokens - 1 :]
    below = logits.max(-1) - np.take_along_axis(logits, tokens[:, :, None], -1)[..., 0]
    below = np.where(responses(case, tokens), below, 0)
    if not below.max() <= TIE:
        row, step = np.unravel_index(np.argmax(below), below.shape)
        raise ValueError(f"is not greedy: token {step} of row {row} is {below[row, step]:.2g} below the likeliest one")


@functools.partial(jax.jit, static_argnames="config")
def _forward(config: models.TransformerConfig, params: Params, tokens: Array, segment_ids: Array) -> Array:
    output: Any = models.Transformer(config).apply({"params": params}, tokens, segment_ids=segment_ids)
    return output.logits


def product_flops(case: Case, params: Params, new_tokens: int) -> float:
    """Return the FLOPs of all products with weights.

    They are each token of each row once through its chosen experts, and the head for each of the new tokens of all
    rows. Attention and routing, and whatever a sampler saves or wastes, are left out.
    """
    c = case.model
    layers = jax.tree.map(lambda leaf: leaf.size, params["layers"])
    experts = layers["moe"]["gate_up"] + layers["moe"]["down"]
    active = sum(jax.tree.leaves(layers)) - experts + experts * c.num_experts_per_token / c.num_experts
    head = c.hidden_size * c.vocab_size
    return 2.0 * ((case.rows * (case.prompt_tokens - 1) + new_tokens) * active + new_tokens * head)


def measure_case(name: str, case: Case, against: tuple[str, ...], repeats: int, seed: int) -> rich.table.Table:
    """Build the contenders of a case, check their answers and time them.

    Raises:
      ValueError: if a contender's answer is wrong.
    """
    params = models.init_params(case.model, jax.random.key(seed))
    prompts, mask = make_prompts(case, seed)
    contenders = our_sampler(case, params, prompts, mask)
    for rival in against:
        contenders |= RIVAL_SAMPLERS[rival].build(case, params, prompts, mask)
    answers = {}
    for contender, answer in contenders.items():
        tokens = answer()
        try:
            check_greedy(case, params, prompts, mask, tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {contender} {error}") from error
        answers[contender] = np.where(responses(case, tokens), tokens, 0)
    lengths = responses(case, answers["rspo_jax"]).sum(axis=1)
    seconds = timing.interleaved_seconds(contenders, repeats)
    title = f"{name}: {case.rows} rows, prompts up to {case.prompt_tokens}, {case.new_tokens} new tokens"
    if case.stop_token is not None:
        title += f" at most, {lengths.mean():.1f} on average, {case.slots} rows at once"
    table = rich.table.Table(title=title)
    flops = product_flops(case, params, lengths.sum())
    for column in ("sampler", "same answers", "median ms", "tokens/s", "GFLOP/s", "rspo_jax is faster by", "quartiles"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for contender, times in seconds.items():
        ratios = timing.quartiles(timing.paired_ratios(times, seconds["rspo_jax"]))
        same = np.mean(np.all(answers[contender] == answers["rspo_jax"], axis=1))
        median = timing.quartiles(times).median
        rate = f"{lengths.sum() / median:,.0f}"
        ratio = (f"{ratios.median:.2f} ×", ratios.range()) if contender != "rspo_jax" else ("", "")
        table.add_row(
            contender, f"{100 * same:.1f} %", f"{1e3 * median:.1f}", rate, f"{1e-9 * flops / median:.1f}", *ratio
        )
    return table


@dataclass(frozen=True)
class SamplerBenchmark:
    """Time greedy sampling from random weights, compilation left out."""

    against: tuple[Literal["hf", "tunix"], ...] = ()
    """Samplers to compare with: hf needs torch and transformers, tunix needs google-tunix."""
    cases: tuple[str, ...] = tuple(CASES)
    """Cases to run."""
    threads: int = 2
    """Number of CPU cores for every sampler."""
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for case in self.cases:
            if case not in CASES:
                raise ValueError(f"unknown case {case!r}; choose among {', '.join(CASES)}")
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each case, and return the exit code: 0, or 2 for a mistake in the flags or a wrong answer."""
    try:
        benchmark = tyro.cli(SamplerBenchmark, args=arguments, prog="python -m experiments.bench_sampler")
        with on_cores(benchmark.threads):
            check_installed(benchmark.against)
            console = rich.console.Console()
            console.print(f"greedy, float32, {benchmark.threads} threads, compilation left out", highlight=False)
            peak = peak_of(jax.devices()[0], working_set=1 << 20)
            if peak is not None:
                console.print(
                    f"One large product runs at {1e-9 * peak.flops_per_second:.0f} GFLOP/s here. GFLOP/s count the "
                    "products with weights that the answers need."
                )
            for name in benchmark.cases:
                console.print(measure_case(name, CASES[name], benchmark.against, benchmark.repeats, benchmark.seed))
    except ValueError as error:
        return complain(error)
    return 0
