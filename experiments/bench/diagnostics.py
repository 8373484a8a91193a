"""`python -m experiments.bench_diagnostics`: what the diagnostics of an update cost.

One update of RSPO on one packed batch, with and without them, both compiled here from the same parts and run in turn:
the figure is the median of the ratios of neighbouring runs with its interval, beside that of a program to itself, and
what the compiler counts of both. Statistics are finished in either program. A step samples and scores as well, so that
its ratio is smaller still. This file must never be needed by a run.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import optax
import rich.console
import rich.table
import tyro

import models
from experiments.bench import measure
from experiments.bench.step_programs import OPTIMIZER, Inputs, StepSettings, make_inputs, shape_of
from rspo_jax.objectives import OBJECTIVES
from rspo_jax.rollouts import unpack
from rspo_jax.routing import (
    drift_reader,
    drift_reading,
    gamma_of,
    ratio_statistics,
    response_inputs,
    routing_reader,
    routing_statistics,
)
from rspo_jax.statistics import Statistic, reduce
from rspo_jax.training import TrainState, score_rows
from rspo_jax.types import Array, Params, ScoredBatch

WITHOUT, WITH, CONTROL = "without", "with", "without, again"


@dataclass(frozen=True)
class Benchmark:
    """Time an update with and without diagnostics."""

    step: Annotated[StepSettings, tyro.conf.arg(name="")] = StepSettings()
    repeats: int = 100
    """The interval of the median becomes narrower with the root of it; 100 take about ten minutes."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")


def update(
    policy: Any, diagnostics: bool, state: TrainState, batch: ScoredBatch
) -> tuple[TrainState, dict[str, Array]]:
    """One update on the only part of a batch, with finished statistics."""
    part = jax.tree.map(lambda leaf: leaf[0], batch)
    objective = OBJECTIVES["rspo"]
    config = objective.config_type()

    def loss(params: Params) -> tuple[Array, dict[str, Statistic]]:
        packed, route = part.batch, part.old_route
        drift = reader = drift_reader(route, policy.router_score)
        if diagnostics:
            responses = response_inputs(packed.places, packed.mask, packed.rows.inputs.shape)
            reader = routing_reader(drift, route.expert_ids, responses, policy.router_score)
        scores, reading = score_rows(policy, params, packed.rows, 1.0, reader)
        assert reading is not None
        gamma = unpack(gamma_of(drift_reading(reading) if diagnostics else reading, route), packed.places)
        log_probs = unpack(scores.log_probs, packed.places)
        mean, statistics = objective.terms(log_probs, part.old_log_probs, packed.advantages, packed.mask, gamma, config)
        if diagnostics:
            log_ratio = log_probs - part.old_log_probs
            statistics = statistics | routing_statistics(reading)
            statistics |= ratio_statistics(log_ratio, packed.mask, gamma, config.gamma_min)
        return mean.reduce(), statistics

    gradient, statistics = jax.grad(loss, has_aux=True)(state.params)
    changes, opt_state = OPTIMIZER.build().update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    return TrainState(params, opt_state, state.updates + 1, state.skipped), reduce(statistics)


def compile_update(inputs: Inputs, diagnostics: bool) -> jax.stages.Compiled:
    """The program of one kind."""
    function = functools.partial(update, models.Transformer(inputs.config), diagnostics)
    return jax.jit(function, donate_argnums=0).lower(inputs.state, inputs.scored).compile()


def follow(compiled: jax.stages.Compiled, inputs: Inputs) -> Callable[[], Any]:
    """Updates one after the other, each of which takes the state that it is given."""
    state = jax.tree.map(jax.numpy.copy, inputs.state)

    def call() -> Any:
        nonlocal state
        state, shown = compiled(state, inputs.scored)
        return state, shown

    return call


def measure_case(inputs: Inputs, repeats: int) -> list[tuple[str, ...]]:
    """The rows of the table for one model."""
    compiled = {name: compile_update(inputs, diagnostics=name == WITH) for name in (WITHOUT, WITH)}
    analyses = {name: measure.analyse(program) for name, program in compiled.items()}
    calls = {name: follow(compiled.get(name, compiled[WITHOUT]), inputs) for name in (WITHOUT, WITH, CONTROL)}
    times = measure.interleaved_seconds(calls, repeats)
    plain = analyses[WITHOUT]
    rows = []
    for name, taken in times.items():
        ratios = measure.ratios(taken, times[WITHOUT])
        quartiles, interval = measure.spread(ratios), measure.median_interval(ratios)
        analysis = analyses.get(name, plain)
        counted = [
            getattr(analysis, what) / getattr(plain, what) for what in ("flops", "transcendentals", "bytes_accessed")
        ]
        rows.append(
            (
                name,
                f"{1e3 * measure.spread(taken).median:.2f}",
                f"{quartiles.median:.3f}",
                "" if name == WITHOUT or interval is None else f"{interval[0]:.3f} - {interval[1]:.3f}",
                "" if name == WITHOUT else f"{quartiles.low:.3f} - {quartiles.high:.3f}",
                *(f"{value:.4f}" for value in counted),
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    try:
        benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_diagnostics")
        configs = benchmark.step.configs()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = jax.devices()[0].device_kind
    for config in configs:
        inputs = make_inputs(config, benchmark.step, benchmark.seed)
        table = rich.table.Table(
            title=f"An update of {shape_of(inputs)} with and without diagnostics, {device}, {benchmark.repeats} turns"
        )
        table.add_column("diagnostics", no_wrap=True)
        for column in ("ms", "ratio", "its 95 %", "quartiles", "FLOPs", "exp, log", "bytes"):
            table.add_column(column, justify="right")
        for row in measure_case(inputs, benchmark.repeats):
            table.add_row(*row)
        rich.console.Console(width=100).print(table)
    return 0
