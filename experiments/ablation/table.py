"""What a study leaves: one row a run, one row a step of each run, as JSON lines that any tool reads.

`runs.jsonl` holds factors, seed, state, scores and times of every run, `steps.jsonl.gz` the metrics of its steps; both
are enough to draw everything again without the folders of the runs. Both are written whole, so that a crash leaves
the old table or the new one. This file must never start a run or draw.
"""

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from experiments.ablation.study import Plan, PlannedRun, Study
from rspo_jax.records import judge_alarm, read_metrics, replace_file

RUNS_FILE, STEPS_FILE = "runs.jsonl", "steps.jsonl.gz"
MOST_STEPS = 200
"""Rows that the table keeps of a run: of a longer one every second step, every third, and so on."""
LATE_STEPS = 10
_DIGITS = 5

Row = dict[str, Any]


@dataclass
class Table:
    """Rows as they are in the files; a number that was not finite is None."""

    runs: dict[str, Row]
    """By the name of the run."""
    steps: dict[str, list[Row]]
    """By the name of the run; only of runs that are done."""

    def scores(self, name: str, runs: Iterable[Row]) -> dict[int, float]:
        """A number of each of the runs that are done and have it, by seed."""
        values = {row["seed"]: row.get(name) for row in runs if row["state"] == "done"}
        return {seed: value for seed, value in values.items() if value is not None}


def read_table(folder: epath.Path) -> Table:
    """The table in a folder; an empty one where there is none.

    Raises:
      ValueError: if a file is damaged.
    """
    runs, steps = folder / RUNS_FILE, folder / STEPS_FILE
    table = Table({}, {})
    try:
        if runs.exists():
            table.runs = {row["run"]: row for row in map(json.loads, runs.read_text().splitlines())}
        if steps.exists():
            for row in map(json.loads, gzip.decompress(steps.read_bytes()).decode().splitlines()):
                table.steps.setdefault(row["run"], []).append(row)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"the table in {folder} is damaged ({error}): restore it, or remove it to begin anew"
        ) from error
    return table


def with_factors(table: Table, plan: Plan) -> Table:
    """The table with the levels of factors that the study did not have yet when some of its runs were done."""
    levels = {planned.name: planned.factors for planned in plan.runs}
    runs = {name: row | dict(levels.get(name, {})) for name, row in table.runs.items()}
    steps = {name: [row | dict(levels.get(name, {})) for row in rows] for name, rows in table.steps.items()}
    return Table(runs, steps)


def write_table(folder: epath.Path, table: Table, order: Sequence[str]) -> None:
    """Writes both files, the runs in this order; those that it does not name are left out."""
    names = [name for name in order if name in table.runs]
    steps = "".join(_line(row) for name in names for row in table.steps.get(name, []))
    # Without a time stamp, so that the same rows are the same file.
    replace_file(folder / STEPS_FILE, gzip.compress(steps.encode(), compresslevel=6, mtime=0))
    replace_file(folder / RUNS_FILE, "".join(_line(table.runs[name]) for name in names).encode())


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def run_row(planned: PlannedRun, state: str, **more: Any) -> Row:
    """The row of a run that is not done."""
    return {"run": planned.name, **planned.factors, "seed": planned.seed, "state": state, **more}


def finished_rows(study: Study, planned: PlannedRun, run_dir: epath.Path) -> tuple[Row, list[Row]]:
    """The row of a finished run, and its rows of steps.

    Of the metrics of the first and the last step, all that begin with `eval_` and `test_` go to the row of the run:
    `start_test_sampled`, `test_sampled`. Beside them the best `eval_sampled` of any step, the mean `solve_rate` of the
    last 10 steps as `late_solve_rate` (many responses, so a precise number), and where the run collapsed
    (`rspo_jax.records.alarm`).
    """
    rows = [row for row in read_metrics(run_dir) if row["phase"] == "rl"]
    summary = json.loads((run_dir / "summary.json").read_text())
    first, last = rows[0], rows[-1]
    row = run_row(planned, "done")
    for prefix, source in (("start_", first), ("", last)):
        found = {name: source[name] for name in source if name.startswith(("eval_", "test_"))}
        row |= {f"{prefix}{name}": _rounded(value) for name, value in found.items()}
    row["best_eval_sampled"] = max(
        (_rounded(step["eval_sampled"]) or 0.0 for step in rows if "eval_sampled" in step), default=None
    )
    late = [step["solve_rate"] for step in rows[-LATE_STEPS:] if "solve_rate" in step]
    row["late_solve_rate"] = _rounded(float(np.mean(late))) if late else None
    judged = judge_alarm(rows)
    row |= {"collapsed": judged.collapse is not None, "collapse_step": judged.collapse, "alarm_step": judged.alarm}
    seconds = [step["step_seconds"] for step in rows if "step_seconds" in step]
    row |= {
        "steps": int(last["step"]),
        "skipped_updates": int(np.nansum([step.get("skipped_updates", 0) for step in rows])),
        "seconds": _rounded(summary["wall_seconds"]),
        "step_seconds": _rounded(float(np.median(seconds))) if seconds else None,
    }
    return row, [_step_row(study, planned, step) for step in _thinned(rows)]


def _thinned(rows: list[Row]) -> list[Row]:
    """Every n-th step, and all that have an evaluation."""
    stride = -(-len(rows) // MOST_STEPS)
    return [row for row in rows if row["step"] % stride == 0 or "eval_sampled" in row]


def _step_row(study: Study, planned: PlannedRun, step: Mapping[str, Any]) -> Row:
    kept = {name: _rounded(step[name]) for name in study.metrics if name in step}
    return {"run": planned.name, **planned.factors, "seed": planned.seed, "step": step["step"], **kept}


def _rounded(value: float) -> float | None:
    """To five digits, which is more than a figure shows; None where it is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
