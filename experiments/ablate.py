"""`python -m experiments.ablate STUDY`: runs every cell of a declared grid with every seed, and says what came out.

A study is one short file in `experiments/studies/`, or anywhere, with a `STUDY`. Runs go in processes of their own and
go on where they were after any interruption. This file wires the parts together; it must hold none of their logic.
"""

import importlib
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.ablation.comparison import describe
from experiments.ablation.folder import StudyFolder
from experiments.ablation.jobs import (
    TRIES,
    Job,
    Jobs,
    Stopped,
    describe_seconds,
    remaining_seconds,
)
from experiments.ablation.study import PlannedRun, Study, plan_study
from experiments.ablation.worker import locked

STUDIES = Path(__file__).with_name("studies")
RESULTS = Path("runs/ablations")
FAILED, MISTAKE, STOPPED = 1, 2, 75
"""Exit codes: a run was given up; the user has something to mend; asked to stop, the same command goes on."""


@dataclass(frozen=True)
class Options:
    """Run a study, go on with it, or draw it again."""

    study: Annotated[str, tyro.conf.Positional]
    """The name of a file in experiments/studies, or the path of a Python file, with a STUDY."""
    out: Path | None = None
    """Gets tables and figures, and work/ with all else; runs/ablations/NAME when absent."""
    workers: int = 2
    """Runs at a time. The cores that this process may use are shared among them."""
    only: str = ""
    """Only runs whose name holds this; * and ? stand for anything."""
    list: bool = False
    """Only print every run with its state."""
    draw_only: bool = False
    """Only draw the figures again, from the tables alone."""
    retry: bool = False
    """Give failed runs another chance."""
    forget: str | None = None
    """First drop all that the runs did whose name holds this ("*": all of them)."""
    keep_checkpoints: bool = False
    """Of finished runs; they are removed otherwise."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or one of those above."""
    try:
        options = tyro.cli(Options, args=arguments, prog="python -m experiments.ablate")
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
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


def load_study(place: str) -> Study:
    """The study of a file.

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
    """Prints every run with its state."""
    jobs = Jobs(folder.jobs(folder.plan.runs), folder.work, workers=1)
    by_name = {job.name: job for job in folder.jobs(folder.plan.runs)}
    states = {
        planned.name: jobs.state(by_name[planned.name]) if planned.name in by_name else "done" for planned in chosen
    }
    for name, state in states.items():
        print(f"{state:8} {name}")
    counts = Counter(states.values())
    print(f"{len(chosen)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def run_study(folder: StudyFolder, chosen: Sequence[PlannedRun], options: Options) -> int:
    """Runs what is left of the chosen runs, then draws.

    Raises:
      ValueError: if another process works in the folder, or the study gives a name another meaning.
    """
    folder.work.mkdir(parents=True, exist_ok=True)
    with locked(str(folder.work), wait=False) as held:
        if not held:
            raise ValueError(f"another process runs a study in {folder.path}: let it end, or choose another --out")
        return _run_locked(folder, chosen, options)


def _run_locked(folder: StudyFolder, chosen: Sequence[PlannedRun], options: Options) -> int:
    if options.forget is not None:
        print(f"forgot what {folder.forget(folder.chosen(options.forget))} runs did")
    folder.check_unchanged()
    folder.prepare(chosen)
    jobs = Jobs(folder.jobs(chosen), folder.work, options.workers)
    report = Report(folder, jobs, chosen, options)
    report.begin()
    try:
        jobs.work(report.on_end)
    except Stopped as stop:
        print(f"{stop}: all runs have saved their state. The same command goes on.")
        return STOPPED
    report.note_failures()
    return conclude(folder, chosen)


class Report:
    """Says how the study is going, and takes what is done into the table."""

    def __init__(self, folder: StudyFolder, jobs: Jobs, chosen: Sequence[PlannedRun], options: Options) -> None:
        self._folder, self._jobs, self._options = folder, jobs, options
        self._chosen = {planned.name: planned for planned in chosen}
        self._left = {job.name: job for job in folder.jobs(chosen)}
        self._durations: list[float] = []
        self._started = time.monotonic()

    def begin(self) -> None:
        """Takes what a killed process left behind, and says what there is to do."""
        for name, job in list(self._left.items()):
            if self._options.retry:
                self._jobs.failures.forget(name)
            if job.is_done:
                self._finish(name)
        runs = [name for name in self._left if name in self._chosen]
        print(
            f"{self._folder.study.name}: {len(self._chosen)} runs, {len(runs)} to go, {self._options.workers} at a time"
        )
        print(f"  in {self._folder.path}")
        for name, job in self._left.items():
            if self._jobs.state(job) == "failed":
                print(f"  {name} failed before and is left out; --retry gives it another chance")

    def on_end(self, job: Job, code: int, seconds: float) -> None:
        """Says what became of a process."""
        if code != 0:
            self._describe_failure(job, code)
            return
        self._finish(job.name)
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

    def _finish(self, name: str) -> None:
        self._left.pop(name, None)
        if name in self._chosen:
            self._folder.collect(self._chosen[name], self._options.keep_checkpoints)

    def _describe_failure(self, job: Job, code: int) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        tries = len(self._jobs.failures.of(job))
        next_try = (
            "is given up" if self._jobs.failures.given_up(job) else f"will be tried again ({tries} of {TRIES} tries)"
        )
        tail = "\n".join(f"    {line}" for line in self._jobs.tail_of(job).splitlines())
        print(f"{job.name} {how} and {next_try}; the end of {self._jobs.log_of(job)}:\n{tail}", flush=True)

    def note_failures(self) -> None:
        """Puts into the table what is not to be had."""
        for name, job in self._left.items():
            state = self._jobs.state(job)
            if name in self._chosen and state in ("failed", "blocked"):
                self._folder.note(self._chosen[name], state, self._jobs.failures.of(job))


def conclude(folder: StudyFolder, chosen: Sequence[PlannedRun]) -> int:
    """Draws, and prints the summary. Returns the exit code."""
    print(describe(folder.summarize()))
    figures = folder.draw()
    others = folder.rows_of_other_studies()
    if others:
        print(f"{len(others)} runs in the table are not part of the study any more: figures leave them out")
    print(f"tables and {len(figures)} figures: {folder.path}")
    failed = [run.name for run in chosen if folder.table.runs.get(run.name, {}).get("state") in ("failed", "blocked")]
    if failed:
        print(f"{len(failed)} runs failed, {failed[0]} for one; --retry gives them another chance")
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
