"""`python -m experiments.judge_alarm FOLDER`: how early, and how often rightly, the alarm rang over a study's runs.

Only the tables of `experiments.ablate` are read, so other thresholds can be tried on runs that are long over.
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
from experiments.errors import complain
from rspo_jax.records import AlarmRecord, AlarmRule, CollapseRule, alarm_record, as_path


@dataclass(frozen=True)
class JudgeAlarmOptions:
    """Measure the alarm's lead time, and count the collapses that it missed and its false alarms."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The folder of a study, with runs.jsonl and steps.jsonl.gz."""
    by: tuple[str, ...] = ()
    """Factors by whose levels the runs are grouped, with a line for each group."""
    alarm: AlarmRule = field(default_factory=AlarmRule)
    collapse: CollapseRule = field(default_factory=CollapseRule)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 0 or `MISTAKE`."""
    try:
        options = tyro.cli(JudgeAlarmOptions, args=arguments, prog="python -m experiments.judge_alarm")
        runs = finished_runs(read_table(as_path(options.folder)), options.folder)
        groups = group_runs(runs, options.by)
    except ValueError as error:
        return complain(error)
    records = {
        name: alarm_record([rows for _, rows in group], options.alarm, options.collapse)
        for name, group in groups.items()
    }
    print(describe_alarms(records))
    return 0


def finished_runs(table: Table, folder: Path) -> list[tuple[Row, list[Row]]]:
    """Return every run that is done, with the rows of its steps as `metrics.jsonl` had them.

    Args:
      table: the table of the study.
      folder: its folder, for messages.

    Raises:
      ValueError: if no run is done, or some of the steps of a run are not in the table.
    """
    found = []
    for name, run in table.runs.items():
        if run["state"] != "done":
            continue
        rows: list[Row] = [
            {"phase": "rl"} | {key: math.nan if value is None else value for key, value in row.items()}
            for row in table.steps.get(name, [])
        ]
        if sum(row["step"] >= 1 for row in rows) < run["steps"]:
            raise ValueError(
                f"the table in {folder} does not hold every step of {name}, and the rules count steps: judge runs of "
                "this length with `python -m experiments.compare` and their folders"
            )
        found.append((run, rows))
    if not found:
        raise ValueError(f"there is no finished run in the table in {folder}: name the folder of a study that ran")
    return found


def group_runs(runs: Sequence[tuple[Row, list[Row]]], factors: Sequence[str]) -> dict[str, list[tuple[Row, list[Row]]]]:
    """Return the runs by their levels of some factors, and at last all of them together.

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


def describe_alarms(records: Mapping[str, AlarmRecord]) -> str:
    """Return a table of plain text with a line for each group of runs."""
    width = max(5, *map(len, records))
    lines = [f"{'':{width}}   runs  collapsed  warned before  lead in steps: median (least–most)  missed  false  quiet"]
    for name, record in records.items():
        leads, collapsed = record.leads, len(record.leads) + record.missed
        runs = collapsed + record.false + record.quiet
        lead = f"{statistics.median(leads):g} ({min(leads)}–{max(leads)})" if leads else "–"
        lines.append(
            f"{name:{width}}  {runs:5}  {collapsed:9}  {len(leads):13}  {lead:35}  "
            f"{record.missed:6}  {record.false:5}  {record.quiet:5}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
