"""The folder of a study: where everything is, and that a name in it never means two things.

    study.json       what each run changes, as declared when the study was last started
    base.json        the run that they change
    runs.jsonl       one row a run: factors, scores, times
    steps.jsonl.gz   one row a step of each run
    summary.json     scores and collapse rates of each cell
    *.png            the figures
    work/            folders of runs and warm starts, logs, compiled programs; what the files above do not need

This file must never know how a process is run.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.ablation.comparison import Results, summarize
from experiments.ablation.jobs import FAILURES_FOLDER, Failures, Job
from experiments.ablation.study import START_FIELD, Plan, PlannedRun, Study, change_run, changed_runs, declaration
from experiments.ablation.table import Row, finished_rows, read_table, run_row, with_factors, write_table
from experiments.config import RUNS, Run, differences, load_config, save_config
from rspo_jax.records import as_path, replace_file, write_json

STUDY_FILE, BASE_FILE, SUMMARY_FILE, WORK_FOLDER = "study.json", "base.json", "summary.json", "work"
_HEAVY = ("checkpoints", "tensorboard")


class StudyFolder:
    """A study's plan together with what its folder holds."""

    def __init__(self, study: Study, plan: Plan, path: Path) -> None:
        """Reads the table.

        Raises:
          ValueError: if it is damaged.
        """
        self.study, self.plan, self.path = study, plan, path
        self.work = path / WORK_FOLDER
        self.table = with_factors(read_table(as_path(path)), plan)
        self._task = next(name for name, run_type in RUNS.items() if type(study.base) is run_type)

    def run_dir(self, planned: PlannedRun) -> Path:
        return self.work / "runs" / planned.name

    def warm_start_dir(self, name: str) -> Path:
        return self.work / "warm_starts" / name

    def config_of(self, planned: PlannedRun) -> Run:
        """What the process of a run is told."""
        if planned.warm_start is None:
            return planned.run
        return planned.starting_from(os.fspath(self.warm_start_dir(planned.warm_start).resolve()))

    def is_in_table(self, planned: PlannedRun) -> bool:
        return self.table.runs.get(planned.name, {}).get("state") == "done"

    def chosen(self, pattern: str) -> list[PlannedRun]:
        """The runs whose name holds the pattern: a part of it, or with * and ? for anything."""
        return [planned for planned in self.plan.runs if fnmatch.fnmatchcase(planned.name, f"*{pattern}*")]

    def jobs(self, runs: Iterable[PlannedRun]) -> list[Job]:
        """What is left to do for these runs, with the warm starts that they need; those in the table are done."""
        left = [planned for planned in runs if not self.is_in_table(planned)]
        needed = [name for name in self.plan.warm_starts if any(planned.warm_start == name for planned in left)]
        jobs = [Job(name, self.warm_start_dir(name)) for name in needed]
        return jobs + [Job(planned.name, self.run_dir(planned), planned.warm_start) for planned in left]

    def check_unchanged(self) -> None:
        """Refuses a study that gives another meaning to the name of a run or warm start that was begun.

        Raises:
          ValueError: with what is different, and the way out.
        """
        changed: dict[str, list[str]] = {}
        if (self.path / STUDY_FILE).exists():
            saved, (_, saved_base) = (
                json.loads((self.path / STUDY_FILE).read_text()),
                load_config(self.path / BASE_FILE),
            )
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
                f"{len(changed)} runs in {self.path} were begun with another configuration, {name} for one "
                f"({'; '.join(lines)}): choose another --out, or drop what they did with --forget PATTERN"
            )

    def _as_declared(self, saved: Run, run: Run) -> Run:
        """A saved configuration with the warm start of its own that the shared one took the place of."""
        if getattr(saved, START_FIELD, None) is None:
            return saved
        return change_run(
            saved, {START_FIELD: None, "trainer.warm_start.steps": run.trainer.warm_start.steps}, "a saved run"
        )

    def prepare(self, runs: Iterable[PlannedRun]) -> None:
        """Writes `study.json`, and the configurations of all runs that were not begun yet."""
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
        """Removes what these runs did; a warm start goes with the last of its runs. Returns how many had done any."""
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
        """Takes a finished run into the table, and removes what is heavy from its folder unless it is to be kept."""
        row, steps = finished_rows(self.study, planned, as_path(self.run_dir(planned)))
        self.table.runs[planned.name], self.table.steps[planned.name] = row, steps
        self.write_table()
        if not keep_checkpoints:
            for name in _HEAVY:
                shutil.rmtree(self.run_dir(planned) / name, ignore_errors=True)

    def note(self, planned: PlannedRun, state: str, codes: list[int]) -> None:
        """Says in the table that a run is not to be had."""
        self.table.runs[planned.name] = run_row(planned, state, exit_codes=codes)
        self.write_table()

    def write_table(self) -> None:
        planned = [run.name for run in self.plan.runs]
        others = [name for name in self.table.runs if name not in planned]  # of an older study: results are not dropped
        write_table(as_path(self.path), self.table, planned + others)

    def summarize(self) -> dict[str, Any]:
        """Writes what the study found, in numbers, and returns it."""
        results = Results(self.study, self.plan, self.table)
        comparisons = {figure.name: numbers for figure in self.study.figures if (numbers := figure.numbers(results))}
        means = {figure.name: numbers for figure in self.study.figures if (numbers := figure.means(results))}
        summary = summarize(results) | {"comparisons": comparisons, "means": means}
        write_json(self.path / SUMMARY_FILE, summary)
        return summary

    def draw(self) -> list[Path]:
        """Writes the figures for which there are runs; returns their paths."""
        results = Results(self.study, self.plan, self.table)
        paths = []
        for figure in self.study.figures:
            picture = figure.draw(results)
            if picture is not None:
                paths.append(self.path / f"{figure.name}.png")
                replace_file(paths[-1], picture)
        return paths

    def rows_of_other_studies(self) -> list[Row]:
        """Of runs that the study does not declare any more."""
        planned = {run.name for run in self.plan.runs}
        return [row for name, row in self.table.runs.items() if name not in planned]
