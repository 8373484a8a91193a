"""Results of a study in numbers: scores and collapse rates of every cell, and comparisons between levels of a factor.

They come from the study's table, never from the folders of runs. Figures and the summary both take their numbers here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.ablation.grid import Level
from experiments.ablation.intervals import (
    Estimate,
    estimate,
    paired_difference,
    probability_of_improvement,
    rate,
)
from experiments.ablation.study import Plan, Study
from experiments.ablation.table import Row, Table

_ENDS = ("value", "low", "high")
_COMPARED = ("first", "second", "probability", "probability_interval", "difference", "difference_interval")
Where = Mapping[str, Level | tuple[Level, ...]]
"""Levels at which factors are held; a tuple allows any of several."""
Strata = Sequence[tuple[Sequence[Row], Sequence[Row]]]
"""Runs of the one and runs of the other, by stratum."""


@dataclass(frozen=True)
class Results:
    """A study with its table, and the questions that figures ask of them."""

    study: Study
    plan: Plan
    table: Table

    def runs(self, free: Sequence[str], where: Where) -> list[Row]:
        """Return the rows of runs that are done, in the order of the plan.

        Args:
          free: factors that may have any level, but must have one.
          where: levels of other factors. Factors named in neither are at their default.
        """
        rows = [self.table.runs.get(planned.name) for planned in self.plan.runs]
        return [row for row in rows if row is not None and row["state"] == "done" and self._fits(row, free, where)]

    def _fits(self, row: Row, free: Sequence[str], where: Where) -> bool:
        for factor in self.study.factors:
            level, wanted = row.get(factor), where.get(factor, self.study.defaults.get(factor))
            if factor in where or factor not in free:
                if level not in (wanted if isinstance(wanted, tuple) else (wanted,)):
                    return False
            elif level is None:
                return False
        return True

    def levels(self, factor: str, rows: Sequence[Row]) -> list[Level]:
        """Return the levels that some of the runs have: numbers by size, others in the order of declaration."""
        present = {row[factor] for row in rows}
        declared = [planned.factors[factor] for planned in self.plan.runs]
        levels = [level for level in dict.fromkeys(declared) if level in present]
        numbers = [level for level in levels if isinstance(level, int | float)]
        return [*sorted(numbers)] if len(numbers) == len(levels) else levels

    def by_level(self, factor: str | None, rows: Sequence[Row]) -> list[tuple[Level | None, list[Row]]]:
        """Return the rows of each level of a factor; without a factor, all rows under None."""
        if factor is None:
            return [(None, list(rows))]
        return [(level, [row for row in rows if row[factor] == level]) for level in self.levels(factor, rows)]

    def score(self, rows: Sequence[Row], metric: str | None = None) -> Estimate | None:
        """Return the interquartile mean of a score over runs, by default the study's; None without any."""
        scores = list(self.table.scores(metric or self.study.score, rows).values())
        return estimate([scores]) if scores else None

    def improvement(self, strata: Strata) -> Estimate | None:
        """Return the probability that a run of the one scores better than one of the other; None without runs."""
        sides = [(list(ours.values()), list(theirs.values())) for ours, theirs in self._by_seed(strata)]
        sides = [(ours, theirs) for ours, theirs in sides if ours and theirs]
        if not sides:
            return None
        return probability_of_improvement([ours for ours, _ in sides], [theirs for _, theirs in sides])

    def comparison(self, strata: Strata) -> dict[str, Any]:
        """Return `improvement` and the mean difference on common seeds, with intervals, as entries of a JSON file."""
        sides = self._by_seed(strata)
        difference = None
        if any(ours.keys() & theirs.keys() for ours, theirs in sides):
            difference = paired_difference([ours for ours, _ in sides], [theirs for _, theirs in sides])
        return flat("probability", self.improvement(strata)) | flat("difference", difference)

    def _by_seed(self, strata: Strata) -> list[tuple[dict[int, float], dict[int, float]]]:
        score = self.study.score
        return [(self.table.scores(score, ours), self.table.scores(score, theirs)) for ours, theirs in strata]

    def mean_of_steps(
        self, metric: str, rows: Sequence[Row], log: bool = False, last: int | None = None
    ) -> Estimate | None:
        """Return the interquartile mean over runs of a metric's mean over steps; None if it was never recorded.

        Args:
          metric: a metric of the table of steps; steps without it are left out.
          rows: the runs.
          log: if true, means are geometric, and values must be positive.
          last: the number of last steps to use; all steps by default.
        """
        values = []
        for row in rows:
            steps = self.table.steps.get(row["run"], [])
            after = max((step["step"] for step in steps), default=0) - (last or math.inf)
            found = [step[metric] for step in steps if step["step"] > after and step.get(metric) is not None]
            if found:
                values.append(np.mean(np.log(found) if log else found))
        if not values:
            return None
        mean = estimate([values])
        return mean._replace(**{end: float(np.exp(getattr(mean, end))) for end in _ENDS}) if log else mean

    def curves(self, rows: Sequence[Row], metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a metric of runs over the steps at which any of them recorded it.

        Returns:
          The steps, int64 [steps], and the values, float64 [runs, steps], NaN where a run has none.
        """
        recorded = [self.table.steps.get(row["run"], []) for row in rows]
        found = [{step["step"]: step[metric] for step in run if step.get(metric) is not None} for run in recorded]
        steps = sorted({step for values in found for step in values})
        values = [[values.get(step, np.nan) for step in steps] for values in found]
        return np.array(steps, np.int64), np.array(values, np.float64).reshape(len(rows), len(steps))


def collapse_rate(rows: Sequence[Row]) -> Estimate | None:
    """Return the share of runs that collapsed (`rspo_jax.records.alarm`); None without any."""
    return rate([bool(row["collapsed"]) for row in rows]) if rows else None


def summarize_study(results: Results) -> dict[str, Any]:
    """Return the content of `summary.json`: runs, score, collapse rate and costs of each cell."""
    cells = []
    states = {
        planned.name: results.table.runs.get(planned.name, {}).get("state", "waiting") for planned in results.plan.runs
    }
    for cell in results.study.grid:
        names = [planned.name for planned in results.plan.runs if planned.name.rsplit(",seed=", 1)[0] == cell.name]
        rows = [results.table.runs[name] for name in names if states[name] == "done"]
        seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
        cells.append(
            {"cell": cell.name, "runs": len(names), "done": len(rows)}
            | {"failed": sum(states[name] in ("failed", "blocked") for name in names)}
            | flat("score", results.score(rows))
            | flat("collapse_rate", collapse_rate(rows))
            | {"seconds": sum(seconds) / len(seconds) if seconds else None}
        )
    counts = {state: sum(found == state for found in states.values()) for state in dict.fromkeys(states.values())}
    return {"study": results.study.name, "score": results.study.score, "states": counts, "cells": cells}


def flat(name: str, found: Estimate | None) -> dict[str, Any]:
    """Return an estimate as entries of a JSON file, its value and its interval; only a null value for None."""
    return {name: None} if found is None else {name: found.value, f"{name}_interval": [found.low, found.high]}


def describe_study(summary: Mapping[str, Any]) -> str:
    """Return the summary as plain text: a table of the cells, and one for each figure with comparisons or means."""
    parts = [_describe_cells(summary)]
    parts += [_describe_comparisons(name, found) for name, found in summary.get("comparisons", {}).items()]
    parts += [_describe_means(name, found) for name, found in summary.get("means", {}).items()]
    return "\n\n".join(parts)


def _describe_cells(summary: Mapping[str, Any]) -> str:
    width = max(len(cell["cell"]) for cell in summary["cells"])
    lines = [f"{'cell':{width}}   runs   {summary['score']} (interquartile mean, 95 %)   collapsed"]
    for cell in summary["cells"]:
        runs = f"{cell['done']}/{cell['runs']}"
        score = collapsed = "–"
        if cell["score"] is not None:
            low, high = cell["score_interval"]
            score = f"{100 * cell['score']:5.1f} %"
            if cell["done"] > 1:  # a single run says nothing about how runs differ
                score += f" [{100 * low:5.1f}, {100 * high:5.1f}]"
        if cell["collapse_rate"] is not None:
            low, high = cell["collapse_rate_interval"]
            collapsed = f"{100 * cell['collapse_rate']:3.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        lines.append(f"{cell['cell']:{width}}  {runs:>5}   {score:<{len(summary['score']) + 29}}   {collapsed}")
    return "\n".join(lines)


def _describe_comparisons(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    labels = []
    for one in found:
        where = [str(level) for key, level in one.items() if key not in _COMPARED]
        labels.append(f"{one['first']} over {one['second']}, {', '.join(where) or 'all together'}")
    width = max(len(name), *map(len, labels))
    lines = [f"{name:{width}}   P(first better), 95 %     difference on common seeds, 95 %"]
    for label, one in zip(labels, found, strict=True):
        chance = difference = "–"
        if one["probability"] is not None:
            low, high = one["probability_interval"]
            chance = f"{one['probability']:.2f} [{low:.2f}, {high:.2f}]"
        if one["difference"] is not None:
            low, high = one["difference_interval"]
            difference = f"{100 * one['difference']:+5.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        lines.append(f"{label:{width}}   {chance:<22}    {difference}")
    return "\n".join(lines)


def _describe_means(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for each curve or metric and a column for each panel."""
    panels = list(dict.fromkeys(one["panel"] for one in found))
    title = f"{name}: {found[0]['what']}, 95 %"
    lines = [[title, *("" if panel is None else str(panel) for panel in panels)]]
    for line in dict.fromkeys(one["line"] for one in found):
        shown = dict.fromkeys(panels, "–")
        for one in found:
            if one["line"] == line and one["mean"] is not None:
                low, high = one["mean_interval"]
                shown[one["panel"]] = f"{one['mean']:.4g} [{low:.4g}, {high:.4g}]"
        lines.append([str(line), *shown.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
