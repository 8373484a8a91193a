"""`python -m experiments.ablate STUDY`: runs every cell of a declared grid with every seed, and summarizes the results.

A study is one short file with a `STUDY`, in `experiments/studies/` or anywhere else. Runs have processes of their own
and continue where they were after any interruption.
"""

import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.ablation.folder import StudyFolder
from experiments.ablation.jobs import (
    TRIES,
    Job,
    Jobs,
    JobsStopped,
    describe_seconds,
    remaining_seconds,
)
from experiments.ablation.results import describe_study
from experiments.ablation.study import PlannedRun, Study, plan_study
from experiments.ablation.worker import locked
from experiments.errors import STOPPED, complain

STUDIES = Path(__file__).with_name("studies")
RESULTS = Path("runs/ablations")
FAILED = 1
"""Exit code: a run was given up."""


@dataclass(frozen=True)
class AblateOptions:
    """Run a study, continue it, or draw it again."""

    study: Annotated[str, tyro.conf.Positional]
    """The name of a file in experiments/studies, or the path of a Python file, with a STUDY."""
    out: Path | None = None
    """The folder for tables and figures, with everything else in work/; runs/ablations/NAME by default."""
    workers: int = 2
    """Number of runs at a time. They share the cores that this process may use."""
    only: str = ""
    """Use only runs whose name contains this; * and ? stand for anything."""
    list: bool = False
    """Only print every run with its state."""
    draw_only: bool = False
    """Only draw the figures again, from the tables alone."""
    retry: bool = False
    """Give failed runs another chance."""
    forget: str | None = None
    """First delete all results of runs whose name contains this ("*": all of them)."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs, which are deleted otherwise."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, `FAILED`, `MISTAKE`, or `STOPPED` if the same command continues."""
    try:
        options = tyro.cli(AblateOptions, args=arguments, prog="python -m experiments.ablate")
        study = load_study(options.study)
        plan = plan_study(study)
        folder = StudyFolder(study, plan, options.out or RESULTS / study.name)
        chosen = folder.chosen(options.only)
        if not chosen:
            raise ValueError(f"no run of {study.name} has {options.only!r} in its name; --list shows them all")
        if options.list:
            return list_runs(folder, chosen)
        if options.draw_only:
            if not folder.table.runs:
                raise ValueError(f"there is no table in {folder.path} to draw from: run the study, or name its --out")
            return conclude(folder, chosen)
        return run_study(folder, chosen, options)
    except ValueError as error:
        return complain(error)


def load_study(place: str) -> Study:
    """Load the study of a file.

    Args:
      place: the name of a file in experiments/studies, or the path of a Python file.

    Raises:
      ValueError: if there is no such file, or it has no STUDY.
    """
    if place.isidentifier() and (STUDIES / f"{place}.py").exists():
        module = importlib.import_module(f"experiments.studies.{place}")
    elif place.endswith(".py") and Path(place).exists():
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None:
            raise ValueError(f"{place} cannot be read as Python")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        known = ", ".join(sorted(path.stem for path in STUDIES.glob("*.py") if path.stem != "__init__"))
        raise ValueError(f"there is no study {place!r}: name a Python file with a STUDY, or one of {known}")
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise ValueError(f"{place} has no STUDY of type experiments.ablation.study.Study")
    return study


def list_runs(folder: StudyFolder, chosen: Sequence[PlannedRun]) -> int:
    """Print the chosen runs with their states; return the exit code."""
    all_jobs = folder.jobs(folder.plan.runs)
    jobs, by_name = Jobs(all_jobs, folder.work, workers=1), {job.name: job for job in all_jobs}
    states = {
        planned.name: jobs.state(by_name[planned.name]) if planned.name in by_name else "done" for planned in chosen
    }
    for name, state in states.items():
        print(f"{state:8} {name}")
    counts = Counter(states.values())
    print(f"{len(chosen)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def run_study(folder: StudyFolder, chosen: Sequence[PlannedRun], options: AblateOptions) -> int:
    """Run what is left of the chosen runs, then draw; return the exit code.

    Raises:
      ValueError: if another process works in the folder, or the study gives a name another meaning.
    """
    folder.work.mkdir(parents=True, exist_ok=True)
    with locked(str(folder.work), wait=False) as held:
        if not held:
            raise ValueError(f"another process runs a study in {folder.path}: let it end, or choose another --out")
        if options.forget is not None:
            print(f"deleted the results of {folder.forget(folder.chosen(options.forget))} runs")
        folder.check_unchanged()
        folder.prepare(chosen)
        jobs = Jobs(folder.jobs(chosen), folder.work, options.workers)
        progress = StudyProgress(folder, jobs, chosen, options)
        progress.begin()
        try:
            jobs.work(progress.on_end)
        except JobsStopped as stop:
            print(f"{stop}: all runs have saved their state. The same command continues.")
            return STOPPED
        progress.note_failures()
        return conclude(folder, chosen)


class StudyProgress:
    """Progress of a study: it is printed, and finished runs are added to the table."""

    def __init__(self, folder: StudyFolder, jobs: Jobs, chosen: Sequence[PlannedRun], options: AblateOptions) -> None:
        """Take the study's folder, its jobs, and the runs that the options choose."""
        self._folder, self._jobs, self._options = folder, jobs, options
        self._chosen = {planned.name: planned for planned in chosen}
        self._left = {job.name: job for job in folder.jobs(chosen)}
        self._durations: list[float] = []

    def begin(self) -> None:
        """Add what a killed process left behind to the table, and print what there is to do."""
        for name, job in list(self._left.items()):
            if self._options.retry:
                self._jobs.failures.forget(name)
            if job.is_done:
                self._add_to_table(name)
        runs = [name for name in self._left if name in self._chosen]
        print(
            f"{self._folder.study.name}: {len(self._chosen)} runs, {len(runs)} to go, {self._options.workers} at a time"
        )
        print(f"  in {self._folder.path}")
        for name, job in self._left.items():
            if self._jobs.state(job) == "failed":
                print(f"  {name} failed before and is left out; --retry gives it another chance")

    def on_end(self, job: Job, code: int, seconds: float) -> None:
        """Print the outcome of a process that has ended, and add a finished run to the table."""
        if code != 0:
            failures = self._jobs.failures
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            again = f"will be tried again ({len(failures.of(job))} of {TRIES} tries)"
            outlook = "is given up" if failures.given_up(job) else again
            tail = "\n".join(f"    {line}" for line in self._jobs.tail_of(job).splitlines())
            print(f"{job.name} {how} and {outlook}; the end of {self._jobs.log_of(job)}:\n{tail}", flush=True)
            return
        self._add_to_table(job.name)
        if job.name not in self._chosen:
            print(f"{job.name} done in {describe_seconds(seconds)}", flush=True)
            return
        self._durations.append(seconds)
        runs = [name for name, job in self._left.items() if name in self._chosen and self._jobs.state(job) != "failed"]
        row, score = self._folder.table.runs[job.name], self._folder.study.score
        left = describe_seconds(remaining_seconds(self._durations, len(runs), self._options.workers))
        collapsed = f", collapsed at step {row['collapse_step']}" if row["collapsed"] else ""
        value = row.get(score)
        print(
            f"[{len(self._chosen) - len(runs)}/{len(self._chosen)}] {job.name}: {score} "
            f"{'–' if value is None else f'{value:.3f}'}{collapsed}, in {describe_seconds(seconds)}, about {left} left",
            flush=True,
        )

    def _add_to_table(self, name: str) -> None:
        self._left.pop(name, None)
        if name in self._chosen:
            self._folder.collect(self._chosen[name], self._options.keep_checkpoints)

    def note_failures(self) -> None:
        """Record in the table which runs were given up."""
        for name, job in self._left.items():
            state = self._jobs.state(job)
            if name in self._chosen and state in ("failed", "blocked"):
                self._folder.note(self._chosen[name], state, self._jobs.failures.of(job))


def conclude(folder: StudyFolder, chosen: Sequence[PlannedRun]) -> int:
    """Draw the figures and print the summary; return the exit code."""
    print(describe_study(folder.summarize()))
    figures = folder.draw()
    others = folder.rows_of_other_studies()
    if others:
        print(f"{len(others)} runs in the table are not part of the study any more: figures leave them out")
    print(f"tables and {len(figures)} figures: {folder.path}")
    failed = [run.name for run in chosen if folder.table.runs.get(run.name, {}).get("state") in ("failed", "blocked")]
    if failed:
        print(f"{len(failed)} runs failed, for example {failed[0]}; --retry gives them another chance")
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
