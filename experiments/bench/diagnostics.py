"""Cost of the diagnostics of an update (`python -m experiments.bench_diagnostics`).

One update of RSPO on one packed batch runs with and without them. Both programs are compiled here from the same parts
and finish their statistics. The figure is the median of the ratios of runs in the same turn with its interval. The
ratio of a program to itself is printed for comparison, and so are the compiler's counts of both. A step samples and
scores as well, so that its ratio is smaller still.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import optax
import rich.console
import rich.table
import tyro

import models
from experiments.bench import timing
from experiments.bench.step_programs import Inputs, StepSettings, follow_updates, make_inputs, shape_of
from experiments.compilers.costs import read_costs
from experiments.errors import complain
from experiments.pod.programs import OPTIMIZER
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
class DiagnosticsBenchmark:
    """Time an update with and without diagnostics."""

    step: Annotated[StepSettings, tyro.conf.arg(name="")] = StepSettings()
    repeats: int = 100
    """Number of turns; the interval of the median narrows with its square root. 100 take about ten minutes."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, got {self.repeats}")


def update_once(
    policy: Any, diagnostics: bool, state: TrainState, batch: ScoredBatch
) -> tuple[TrainState, dict[str, Array]]:
    """Update once on the only part of a batch, and finish the statistics."""
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
    """Compile the update with or without diagnostics."""
    function = functools.partial(update_once, models.Transformer(inputs.config), diagnostics)
    return jax.jit(function, donate_argnums=0).lower(inputs.state, inputs.scored).compile()


def measure_model(inputs: Inputs, repeats: int) -> list[tuple[str, ...]]:
    """Return the rows of the table for one model."""
    compiled = {name: compile_update(inputs, diagnostics=name == WITH) for name in (WITHOUT, WITH)}
    compiled[CONTROL] = compiled[WITHOUT]
    costs = {name: read_costs(program) for name, program in compiled.items()}
    calls: dict[str, Callable[[], Any]] = {
        name: follow_updates(program, inputs.state, inputs.scored) for name, program in compiled.items()
    }
    times = timing.interleaved_seconds(calls, repeats)
    rows = []
    for name, taken in times.items():
        ratios = timing.paired_ratios(taken, times[WITHOUT])
        spread, interval = timing.quartiles(ratios), timing.median_interval(ratios)
        counted = [
            getattr(costs[name], count) / getattr(costs[WITHOUT], count)
            for count in ("flops", "transcendentals", "bytes_accessed")
        ]
        rows.append(
            (
                name,
                f"{1e3 * timing.quartiles(taken).median:.2f}",
                f"{spread.median:.3f}",
                "" if name == WITHOUT or interval is None else f"{interval[0]:.3f} – {interval[1]:.3f}",
                "" if name == WITHOUT else spread.range(3),
                *(f"{value:.4f}" for value in counted),
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each depth, and return the exit code: 0, or 2 for a mistake in the flags."""
    try:
        benchmark = tyro.cli(DiagnosticsBenchmark, args=arguments, prog="python -m experiments.bench_diagnostics")
        configs = benchmark.step.configs()
    except ValueError as error:
        return complain(error)
    device = jax.devices()[0].device_kind
    for config in configs:
        inputs = make_inputs(config, benchmark.step, benchmark.seed)
        table = rich.table.Table(
            title=f"An update of {shape_of(inputs)} with and without diagnostics, {device}, {benchmark.repeats} turns"
        )
        table.add_column("diagnostics", no_wrap=True)
        for column in ("ms", "ratio", "its 95 %", "quartiles", "FLOPs", "exp, log", "bytes"):
            table.add_column(column, justify="right")
        for row in measure_model(inputs, benchmark.repeats):
            table.add_row(*row)
        rich.console.Console(width=100).print(table)
    return 0
