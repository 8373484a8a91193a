"""A study: a base run, a grid of changes to it, seeds and figures; and the plan of every single run that follows.

Every mistake in a grid is refused here, before anything runs.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from experiments.ablation.grid import Cell, Grid, Level
from experiments.config import Run, differences

RunType = TypeVar("RunType", bound=Run)

METRICS = (
    "reward",
    "solve_rate",
    "eval_sampled",
    "eval_greedy",
    "eval_sampled_reward",
    "eval_greedy_reward",
    "entropy",
    "response_length",
    "gamma_mean",
    "gamma_p10",
    "gamma_floor_fraction",
    "clip_fraction",
    "clip_fraction_positive",
    "clip_fraction_negative",
    "ratio_max",
    "approx_kl",
    "grad_norm",
    "effective_sample_size",
    "shifted_sample_size",
    "route_stays",
    "drift",
    "max_violation",
)
"""Metrics that the table keeps of each step unless a study chooses others."""

START_FIELD = "start_from"
"""The field of a run that names the folder of another run, with whose parameters it begins."""


@dataclass(frozen=True)
class Style:
    """Look of a line and its dots."""

    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Study:
    """Declaration of a study: which runs are made, compared and drawn."""

    name: str
    base: Run
    """The run that the cells change. Its warm start is made once and shared by all runs."""
    grid: Grid
    seeds: tuple[int, ...] = (0, 1, 2)
    warm_starts: int = 1
    """Number of warm starts to make, each with a seed of its own; the run of seed s begins with number s modulo this.
    0 if each run makes its own."""
    defaults: Mapping[str, Level] = field(default_factory=dict)
    """Levels of factors for the runs of cells that do not have the factor. A figure that does not name a factor shows
    the runs at its default."""
    score: str = "test_sampled"
    """The metric of the last step by which runs are compared."""
    metrics: tuple[str, ...] = METRICS
    """Metrics that the table keeps of each step, where they were recorded."""
    figures: tuple[Any, ...] = ()
    """Figures of `experiments.reporting.study_figures`."""
    labels: Mapping[Any, str] = field(default_factory=dict)
    """Names of factors, levels and metrics in figures."""
    styles: Mapping[Any, Style] = field(default_factory=dict)
    """Looks of some levels in figures; the others take their colours in turn."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a study needs seeds, each once, got {self.seeds}")
        if self.warm_starts < 0:
            raise ValueError(f"warm_starts must be 0 or more, got {self.warm_starts}")
        if self.shares_warm_starts and not any(f.name == START_FIELD for f in dataclasses.fields(self.base)):
            raise ValueError(
                f"a {type(self.base).__name__} cannot begin with the parameters of another run: set warm_starts to 0"
            )
        for figure in self.figures:
            figure.check(self.factors, self.defaults)

    @property
    def factors(self) -> tuple[str, ...]:
        """The factors of all cells, and those that only have a default."""
        named = [name for cell in self.grid for name, _ in cell.factors]
        return tuple(dict.fromkeys(named + list(self.defaults)))

    @property
    def shares_warm_starts(self) -> bool:
        """True if runs begin with a warm start that is made once for several of them."""
        return self.warm_starts > 0 and self.base.trainer.warm_start.steps > 0


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    name: str
    """Name of the cell, and the seed; the same name always means the same configuration."""
    factors: Mapping[str, Level]
    """Levels of the cell's factors, and the study's defaults for all others."""
    seed: int
    changes: Mapping[str, Any]
    """Changes to the base run, including the seed."""
    run: Run
    """The run's configuration with a warm start of its own."""
    warm_start: str | None = None
    """Name of the warm start that it shares."""

    def starting_from(self, folder: str) -> Run:
        """Return the configuration with the parameters of another run's folder in place of the warm start."""
        return change_run(self.run, {"trainer.warm_start.steps": 0, START_FIELD: folder}, self.name)


@dataclass(frozen=True)
class Plan:
    """All runs of a study, and by name the warm starts that they share."""

    runs: tuple[PlannedRun, ...]
    warm_starts: Mapping[str, Run]


def plan_study(study: Study) -> Plan:
    """Plan every run of a study, all cells of the first seed first, so that an interrupted study has runs of each.

    Raises:
      ValueError: naming cell and field, if a cell changes a field that does not exist, gives it a value that it cannot
        have, or makes an impossible run; or if two cells are the same run.
    """
    runs: list[PlannedRun] = []
    warm_starts: dict[str, Run] = {}
    names: dict[str, str] = {}
    for cell in study.grid:
        for seed in cell.seeds if cell.seeds is not None else study.seeds:
            planned = _plan_run(study, cell, seed, warm_starts)
            content = json.dumps(dataclasses.asdict(planned.run), sort_keys=True, default=str)
            if content in names:
                raise ValueError(f"{planned.name} and {names[content]} are the same run: leave one of the cells out")
            names[content] = planned.name
            runs.append(planned)
    order = {seed: place for place, seed in enumerate(dict.fromkeys(run.seed for run in runs))}
    return Plan(tuple(sorted(runs, key=lambda run: order[run.seed])), warm_starts)


def _plan_run(study: Study, cell: Cell, seed: int, warm_starts: dict[str, Run]) -> PlannedRun:
    changes = dict(cell.changes)
    if "trainer.seed" in changes:
        raise ValueError(f"the cell {cell.name} changes trainer.seed: leave that to the seeds of the study")
    changes["trainer.seed"] = seed
    name = f"{cell.name},seed={seed}"
    run = change_run(study.base, changes, name)
    warm_start = _share_warm_start(study, changes, seed, warm_starts) if study.shares_warm_starts else None
    levels = {factor: study.defaults.get(factor) for factor in study.factors} | dict(cell.factors)
    planned = PlannedRun(name, levels, seed, changes, run, warm_start)
    if warm_start is not None:
        planned.starting_from(warm_start)  # checks that this is possible too
    return planned


def _share_warm_start(study: Study, changes: Mapping[str, Any], seed: int, warm_starts: dict[str, Run]) -> str:
    """Return the name of a run's warm start, and add it to the others unless an earlier run has the same one."""
    own = {
        name: value
        for name, value in changes.items()
        if name.startswith("trainer.warm_start.") or not name.startswith(("trainer.", "objective."))
    }
    number = seed % study.warm_starts
    name = ",".join([f"warm_start={number}", *(f"{field}={value}" for field, value in own.items())]).replace("/", "_")
    if name not in warm_starts:
        warm_starts[name] = change_run(study.base, own | {"trainer.seed": number, "trainer.steps": 0}, name)
    return name


def change_run(run: RunType, changes: Mapping[str, Any], who: str) -> RunType:
    """Return the run with other values of some dotted fields, all replaced at once.

    Args:
      run: the run.
      changes: dotted names of fields, and their values.
      who: the beginning of error messages.

    Raises:
      ValueError: if a field is unknown, or the run would be impossible.
    """
    tree: dict[str, Any] = {}
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{who}: {name} is changed both as a whole and in part")
        if last in node:
            raise ValueError(f"{who}: {name} is changed both as a whole and in part")
        node[last] = value
    return _replaced(run, tree, "", who)


def _replaced(config: Any, tree: Mapping[str, Any], prefix: str, who: str) -> Any:
    hints = typing.get_type_hints(type(config))
    values = {}
    for name, value in tree.items():
        if name not in hints:
            known = ", ".join(field.name for field in dataclasses.fields(config))
            raise ValueError(f"{who}: there is no field {prefix}{name}; {prefix.rstrip('.') or 'a run'} has {known}")
        before = getattr(config, name)
        if isinstance(value, dict) and dataclasses.is_dataclass(before):
            values[name] = _replaced(before, value, f"{prefix}{name}.", who)
        elif isinstance(value, dict):
            raise ValueError(f"{who}: {prefix}{name} has no fields of its own, such as {next(iter(value))}")
        elif not _fits(hints[name], value):
            choices = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Literal else ()
            expected = f"one of {', '.join(map(str, choices))}" if choices else ""
            expected = expected or "of type " + (getattr(hints[name], "__name__", None) or str(hints[name]))
            raise ValueError(f"{who}: {prefix}{name} cannot be {value!r}: it must be {expected}")
        else:
            values[name] = value
    try:
        return dataclasses.replace(config, **values)
    except ValueError as error:
        fields = ", ".join(f"{prefix}{name}" for name in values)
        raise ValueError(f"{who} ({fields}): {error}") from error


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value is of a hint's type, as far as plain types go; an int is a float, a bool is no number."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _fits(typing.get_args(hint)[0], value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if isinstance(value, bool) and hint in (int, float):
        return False
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint) if isinstance(origin or hint, type) else True


def declaration(study: Study, plan: Plan) -> dict[str, Any]:
    """Return the content of `study.json`, with which the next start is compared; the base run has a file of its own."""
    return {
        "name": study.name,
        "warm_starts": study.warm_starts,
        "runs": {run.name: dict(run.changes) for run in plan.runs},
    }


def changed_runs(study: Study, plan: Plan, saved_base: Run, saved: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the runs whose name meant another configuration when `declaration` was saved, each with the differences.

    Args:
      study: the study as it is now.
      plan: its plan.
      saved_base: the base run when the declaration was saved.
      saved: the declaration.
    """
    changed: dict[str, Sequence[str]] = {}
    for planned in plan.runs:
        if planned.name in saved["runs"]:
            changes = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in saved["runs"][planned.name].items()
            }
            before = change_run(saved_base, changes, planned.name)
            lines = differences(before, planned.run)
            if saved["warm_starts"] != study.warm_starts:
                lines.append(f"warm_starts: {saved['warm_starts']} -> {study.warm_starts}")
            if lines:
                changed[planned.name] = lines
    return changed
