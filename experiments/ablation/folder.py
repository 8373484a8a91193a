"""The folder of a study: the place of every file, and the guarantee that a name in it keeps its meaning.

study.json       changes of each run, as declared when the study was last started
base.json        the run that they change
runs.jsonl       one row per run: factors, scores, times
steps.jsonl.gz   one row per step of each run
summary.json     scores and collapse rates of each cell
*.png            figures
work/            folders of runs and warm starts, logs, compiled programs; nothing that the files above need
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from experiments.ablation.jobs import FAILURES_FOLDER, Failures, Job
from experiments.ablation.results import Results, summarize_study
from experiments.ablation.study import START_FIELD, Plan, PlannedRun, Study, change_run, changed_runs, declaration
from experiments.ablation.table import Row, finished_rows, read_table, run_row, with_factors, write_table
from experiments.config import RUNS, Run, differences, load_config, save_config
from rspo_jax.records import as_path, replace_file, write_json

STUDY_FILE, BASE_FILE, SUMMARY_FILE, WORK_FOLDER = "study.json", "base.json", "summary.json", "work"
_HEAVY = ("checkpoints", "tensorboard")


class StudyFolder:
    """A study's plan together with the contents of its folder."""

    def __init__(self, study: Study, plan: Plan, path: Path) -> None:
        """Read the table.

        Raises:
          ValueError: if the table is damaged.
        """
        self.study, self.plan, self.path = study, plan, path
        self.work = path / WORK_FOLDER
        self.table = with_factors(read_table(as_path(path)), plan)
        self._task = next(name for name, run_type in RUNS.items() if type(study.base) is run_type)

    def run_dir(self, planned: PlannedRun) -> Path:
        """Return the folder of a run."""
        return self.work / "runs" / planned.name

    def warm_start_dir(self, name: str) -> Path:
        """Return the folder of a warm start."""
        return self.work / "warm_starts" / name

    def config_of(self, planned: PlannedRun) -> Run:
        """Return the configuration that a run's process gets: with a shared warm start in place of its own."""
        if planned.warm_start is None:
            return planned.run
        return planned.starting_from(os.fspath(self.warm_start_dir(planned.warm_start).resolve()))

    def is_in_table(self, planned: PlannedRun) -> bool:
        """Return whether a run is done and in the table."""
        return self.table.runs.get(planned.name, {}).get("state") == "done"

    def chosen(self, pattern: str) -> list[PlannedRun]:
        """Return the runs whose name contains a pattern, in which * and ? stand for anything."""
        return [planned for planned in self.plan.runs if fnmatch.fnmatchcase(planned.name, f"*{pattern}*")]

    def jobs(self, runs: Iterable[PlannedRun]) -> list[Job]:
        """Return the jobs of the runs that are not in the table yet, after those of the warm starts that they need."""
        left = [planned for planned in runs if not self.is_in_table(planned)]
        needed = [name for name in self.plan.warm_starts if any(planned.warm_start == name for planned in left)]
        jobs = [Job(name, self.warm_start_dir(name)) for name in needed]
        return jobs + [Job(planned.name, self.run_dir(planned), planned.warm_start) for planned in left]

    def check_unchanged(self) -> None:
        """Check that no name of a run or warm start that was begun has got another meaning.

        Raises:
          ValueError: if one has; the message names the difference and the way out.
        """
        changed: dict[str, list[str]] = {}
        if (self.path / STUDY_FILE).exists():
            saved = json.loads((self.path / STUDY_FILE).read_text())
            _, saved_base = load_config(self.path / BASE_FILE)
            for name, lines in changed_runs(self.study, self.plan, saved_base, saved).items():
                if name in self.table.runs:
                    changed[name] = list(lines)
        folders = [(planned.name, self.run_dir(planned), planned.run) for planned in self.plan.runs]
        folders += [(name, self.warm_start_dir(name), run) for name, run in self.plan.warm_starts.items()]
        for name, folder, run in folders:
            if (folder / "metrics.jsonl").exists():
                lines = differences(self._as_declared(load_config(folder / "config.json")[1], run), run)
                if lines:
                    changed[name] = lines
        if changed:
            name, lines = next(iter(changed.items()))
            raise ValueError(
                f"{len(changed)} runs in {self.path} were begun with another configuration, for example {name} "
                f"({'; '.join(lines)}): choose another --out, or delete their results with --forget PATTERN"
            )

    def _as_declared(self, saved: Run, run: Run) -> Run:
        """Return a saved configuration with a warm start of its own in place of the shared one."""
        if getattr(saved, START_FIELD, None) is None:
            return saved
        return change_run(
            saved, {START_FIELD: None, "trainer.warm_start.steps": run.trainer.warm_start.steps}, "a saved run"
        )

    def prepare(self, runs: Iterable[PlannedRun]) -> None:
        """Write `study.json`, and the configurations of all runs that were not begun yet."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_config(self.path / BASE_FILE, self._task, self.study.base)
        write_json(self.path / STUDY_FILE, declaration(self.study, self.plan))
        replace_file(self.work / ".gitignore", b"*\n")
        folders = [
            (self.run_dir(planned), self.config_of(planned)) for planned in runs if not self.is_in_table(planned)
        ]
        folders += [(self.warm_start_dir(name), run) for name, run in self.plan.warm_starts.items()]
        for folder, run in folders:
            if not (folder / "metrics.jsonl").exists():
                folder.mkdir(parents=True, exist_ok=True)
                save_config(folder / "config.json", self._task, run)

    def forget(self, runs: Iterable[PlannedRun]) -> int:
        """Delete the results of these runs, and the warm starts that only they need.

        Returns:
          The number of runs that had any results.
        """
        runs, failures = list(runs), Failures(self.work / FAILURES_FOLDER)
        count = sum(planned.name in self.table.runs or self.run_dir(planned).exists() for planned in runs)
        for planned in runs:
            self.table.runs.pop(planned.name, None)
            self.table.steps.pop(planned.name, None)
            shutil.rmtree(self.run_dir(planned), ignore_errors=True)
            failures.forget(planned.name)
        others = {planned.warm_start for planned in self.plan.runs if planned not in runs}
        for name in {planned.warm_start for planned in runs} - others - {None}:
            shutil.rmtree(self.warm_start_dir(str(name)), ignore_errors=True)
            failures.forget(str(name))
        if count:
            self.write_table()
        return count

    def collect(self, planned: PlannedRun, keep_checkpoints: bool) -> None:
        """Add a finished run to the table; delete the large parts of its folder unless they are to be kept."""
        row, steps = finished_rows(self.study, planned, as_path(self.run_dir(planned)))
        self.table.runs[planned.name], self.table.steps[planned.name] = row, steps
        self.write_table()
        if not keep_checkpoints:
            for name in _HEAVY:
                shutil.rmtree(self.run_dir(planned) / name, ignore_errors=True)

    def note(self, planned: PlannedRun, state: Literal["failed", "blocked"], codes: list[int]) -> None:
        """Record in the table that a run was given up, and the exit codes of its failures."""
        self.table.runs[planned.name] = run_row(planned, state, exit_codes=codes)
        self.write_table()

    def write_table(self) -> None:
        """Write the table: the runs of the plan in its order, then those of an older study, which are not dropped."""
        planned = [run.name for run in self.plan.runs]
        write_table(as_path(self.path), self.table, planned + [name for name in self.table.runs if name not in planned])

    def summarize(self) -> dict[str, Any]:
        """Write the results of the study in numbers, and return them."""
        results = Results(self.study, self.plan, self.table)
        comparisons = {figure.name: found for figure in self.study.figures if (found := figure.comparisons(results))}
        means = {figure.name: found for figure in self.study.figures if (found := figure.means(results))}
        summary = summarize_study(results) | {"comparisons": comparisons, "means": means}
        write_json(self.path / SUMMARY_FILE, summary)
        return summary

    def draw(self) -> list[Path]:
        """Write the figures for which there are runs; return their paths."""
        results = Results(self.study, self.plan, self.table)
        paths = []
        for figure in self.study.figures:
            picture = figure.draw(results)
            if picture is not None:
                paths.append(self.path / f"{figure.name}.png")
                replace_file(paths[-1], picture)
        return paths

    def rows_of_other_studies(self) -> list[Row]:
        """Return the rows of runs that the study does not declare any more."""
        planned = {run.name for run in self.plan.runs}
        return [row for name, row in self.table.runs.items() if name not in planned]
