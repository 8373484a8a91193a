"""The table of a study: one row per run and one row per step of each run, as JSON lines that any tool can read.

`runs.jsonl` holds factors, seed, state, scores and times of every run, `steps.jsonl.gz` the metrics of its steps; both
are enough to draw everything again without the folders of the runs. Both are written whole, so that a crash leaves
the old table or the new one.
"""

import gzip
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from experiments.ablation.study import Plan, PlannedRun, Study
from rspo_jax.records import judge_alarm, read_metrics, replace_file

RUNS_FILE, STEPS_FILE = "runs.jsonl", "steps.jsonl.gz"
MOST_STEPS = 200
"""Most rows of steps that the table keeps of a run, evaluations aside: of a longer run every second, third, … step."""
LATE_STEPS = 10
"""Number of last steps over which late means are taken."""
_DIGITS = 5

Row = dict[str, Any]


@dataclass
class Table:
    """Rows as they are in the files; None stands for a number that was not finite."""

    runs: dict[str, Row]
    """Row of each run, by its name."""
    steps: dict[str, list[Row]]
    """Rows of the steps of each run that is done, by its name."""

    def scores(self, name: str, runs: Iterable[Row]) -> dict[int, float]:
        """Return a column of those of the runs that are done and have a number in it, by seed."""
        values = {row["seed"]: row.get(name) for row in runs if row["state"] == "done"}
        return {seed: value for seed, value in values.items() if value is not None}


def read_table(folder: epath.Path) -> Table:
    """Read the table in a folder; without one, return an empty table.

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
            f"the table in {folder} is damaged ({error}): restore it, or remove it to start over"
        ) from error
    return table


def with_factors(table: Table, plan: Plan) -> Table:
    """Return the table with all factors of the plan, also in rows of runs that are older than some of them."""
    levels = {planned.name: planned.factors for planned in plan.runs}
    runs = {name: row | dict(levels.get(name, {})) for name, row in table.runs.items()}
    steps = {name: [row | dict(levels.get(name, {})) for row in rows] for name, rows in table.steps.items()}
    return Table(runs, steps)


def write_table(folder: epath.Path, table: Table, order: Sequence[str]) -> None:
    """Write both files with the runs in this order; runs that it does not name are left out."""
    names = [name for name in order if name in table.runs]
    steps = "".join(_line(row) for name in names for row in table.steps.get(name, []))
    # No time stamp, so that equal rows give equal files.
    replace_file(folder / STEPS_FILE, gzip.compress(steps.encode(), compresslevel=6, mtime=0))
    replace_file(folder / RUNS_FILE, "".join(_line(table.runs[name]) for name in names).encode())


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def run_row(planned: PlannedRun, state: str, **more: Any) -> Row:
    """Return the row of a run with its factors and its state, and more columns if given."""
    return {"run": planned.name, **planned.factors, "seed": planned.seed, "state": state, **more}


def finished_rows(study: Study, planned: PlannedRun, run_dir: epath.Path) -> tuple[Row, list[Row]]:
    """Return the row of a finished run, and the rows of its steps.

    The row has all metrics of the first and the last step that begin with `eval_` and `test_`, as `start_test_sampled`
    and `test_sampled`. It also has the best `eval_sampled` of any step, the mean `solve_rate` of the last 10 steps as
    `late_solve_rate` (precise, as it covers many responses), and the step at which the run collapsed
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
    # Every n-th step is kept, and all that have an evaluation.
    stride = -(-len(rows) // MOST_STEPS)
    steps = []
    for step in rows:
        if step["step"] % stride == 0 or "eval_sampled" in step or "eval_sampled_reward" in step:
            kept = {name: _rounded(step[name]) for name in study.metrics if name in step}
            base = {"run": planned.name, **planned.factors, "seed": planned.seed, "step": step["step"]}
            steps.append(base | kept)
    return row, steps


def _rounded(value: float) -> float | None:
    """Return the value rounded to five digits, more than a figure shows; None if it is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
