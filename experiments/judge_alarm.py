"""`python -m experiments.judge_alarm FOLDER`: how early, and how often rightly, the alarm rang over a study's runs.

Reads the tables of `experiments.ablate` alone, so that other thresholds can be tried on runs that are long over. This
file must never run or draw anything, and holds no rule of its own.
"""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.ablation.table import Row, Table, read_table
from rspo_jax.records import AlarmRecord, AlarmRule, CollapseRule, alarm_record, as_path

MISTAKE = 2


@dataclass(frozen=True)
class Options:
    """Measure the alarm's lead time, and count what it missed and where it was wrong."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Of a study: has runs.jsonl and steps.jsonl.gz."""
    by: tuple[str, ...] = ()
    """Factors: a line for each of their levels."""
    alarm: AlarmRule = field(default_factory=AlarmRule)
    collapse: CollapseRule = field(default_factory=CollapseRule)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.judge_alarm")
        runs = finished_runs(read_table(as_path(options.folder)), options.folder)
        groups = grouped(runs, options.by)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    records = {
        name: alarm_record([rows for _, rows in group], options.alarm, options.collapse)
        for name, group in groups.items()
    }
    print(describe(records))
    return 0


def finished_runs(table: Table, folder: Path) -> list[tuple[Row, list[Row]]]:
    """Every run that is done, with its rows of steps as `metrics.jsonl` had them.

    Raises:
      ValueError: if there is none, or some of the steps of a run are not in the table.
    """
    found = []
    for name, run in table.runs.items():
        if run["state"] != "done":
            continue
        rows = [_as_recorded(row) for row in table.steps.get(name, [])]
        if sum(row["step"] >= 1 for row in rows) < run["steps"]:
            raise ValueError(
                f"the table in {folder} does not hold every step of {name}, and the rules count steps: judge runs that "
                "are as long with `python -m experiments.compare` and their folders"
            )
        found.append((run, rows))
    if not found:
        raise ValueError(f"there is no finished run in the table in {folder}: name the folder of a study that ran")
    return found


def _as_recorded(row: Row) -> Row:
    return {"phase": "rl"} | {name: math.nan if value is None else value for name, value in row.items()}


def grouped(runs: Sequence[tuple[Row, list[Row]]], factors: Sequence[str]) -> dict[str, list[tuple[Row, list[Row]]]]:
    """The runs by their levels of some factors, all of them together at last.

    Raises:
      ValueError: if the runs have no such factor.
    """
    groups: dict[str, list[tuple[Row, list[Row]]]] = {}
    for run, rows in runs:
        for factor in factors:
            if factor not in run:
                raise ValueError(f"no run has the factor {factor}; there are {', '.join(run)}")
        if factors:
            groups.setdefault(", ".join(str(run[factor]) for factor in factors), []).append((run, rows))
    return groups | {"all": list(runs)}


def describe(records: Mapping[str, AlarmRecord]) -> str:
    """A table of plain text."""
    width = max(5, *map(len, records))
    lines = [f"{'':{width}}   runs  collapsed  warned before  lead in steps: median (least–most)  missed  false  quiet"]
    for name, record in records.items():
        collapsed = len(record.leads) + record.missed
        runs = collapsed + record.false + record.quiet
        lines.append(
            f"{name:{width}}  {runs:5}  {collapsed:9}  {len(record.leads):13}  {_lead(record.leads):35}  "
            f"{record.missed:6}  {record.false:5}  {record.quiet:5}"
        )
    return "\n".join(lines)


def _lead(leads: Sequence[int]) -> str:
    return f"{statistics.median(leads):g} ({min(leads)}–{max(leads)})" if leads else "–"


if __name__ == "__main__":
    sys.exit(main())
