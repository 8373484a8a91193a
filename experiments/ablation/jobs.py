"""Runs many processes, some at a time, each held to its share of the cores, and survives them and itself being killed.

Everything that has to outlive this process is on disk: what a job has done in its own folder, how often it failed in
`failures/`, what it said in `logs/`. This file must never know what a study, a table or a figure is; a job is a
folder with a config.json.
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rspo_jax.hosts import StopSignal
from rspo_jax.records import write_json

DONE_FILE = "summary.json"
"""The last file that a run writes."""
MISTAKE = 2
"""Exit code of a run that would end the same at every try."""
TRIES = 3
FAILURES_FOLDER = "failures"
_POLL_SECONDS = 0.1
_TAIL_LINES = 12


@dataclass(frozen=True)
class Job:
    """A folder to work in until it is done."""

    name: str
    folder: Path
    after: str | None = None
    """Another job, which has to be done first."""

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE_FILE).exists()


class Failures:
    """How often each job failed, and with which exit code; kept in a folder, a file a job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, job: Job) -> list[int]:
        """Exit codes; below 0 the number of the signal that killed it."""
        path = self._folder / f"{job.name}.json"
        return json.loads(path.read_text()) if path.exists() else []

    def add(self, job: Job, code: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{job.name}.json", [*self.of(job), code])

    def forget(self, name: str) -> None:
        """Of a job; nothing where it never failed."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def given_up(self, job: Job) -> bool:
        """Whether it is not worth another try: three failures, or one that says itself that it would fail again."""
        codes = self.of(job)
        return MISTAKE in codes or len(codes) >= TRIES


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    share: int
    started: float = field(default_factory=time.monotonic)

    def let_go(self) -> None:
        """Closes the pipe by which the process knows that this one lives."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


class Stopped(Exception):
    """This process was asked to stop by the signal that it names; all jobs have saved and left."""


class Jobs:
    """Works jobs off, in their order."""

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        workers: int,
        command: Callable[[Job, Sequence[int]], list[str]] | None = None,
    ) -> None:
        """Prepares; `work` starts. The cores that this process may use are shared among the workers.

        Args:
          jobs: all of them, those that are done included.
          folder: for logs, failures and compiled programs.
          workers: how many processes at most.
          command: how a job is run on some cores; by `experiments.ablation.worker` when absent.
        """
        self._jobs = {job.name: job for job in jobs}
        self._folder = folder
        self._command = command or worker_command
        self._shares = share_cores(usable_cores(), workers)
        self._environment = worker_environment(folder / "compiled", workers, len(self._shares[0]))
        self._running: list[_Running] = []
        self.failures = Failures(folder / FAILURES_FOLDER)

    def log_of(self, job: Job) -> Path:
        return self._folder / "logs" / f"{job.name}.log"

    def tail_of(self, job: Job) -> str:
        """The last lines that it said."""
        path = self.log_of(job)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-_TAIL_LINES:])

    def state(self, job: Job) -> str:
        """done, failed (given up), blocked (what it needs was given up), stopped (begun) or waiting."""
        if job.is_done:
            return "done"
        if self.failures.given_up(job):
            return "failed"
        if job.after is not None and self.state(self._jobs[job.after]) in ("failed", "blocked"):
            return "blocked"
        return "stopped" if (job.folder / "metrics.jsonl").exists() else "waiting"

    def work(self, on_end: Callable[[Job, int, float], None]) -> None:
        """Returns once every job is done or given up.

        Args:
          on_end: is told of each process that ended: its job, the exit code, and its seconds.

        Raises:
          Stopped: after SIGTERM or SIGINT, when all processes have ended.
        """
        with StopSignal() as stop:
            try:
                while not stop.requested and (self._start_next() or self._running):
                    self._collect(on_end)
                    if self._running:
                        time.sleep(_POLL_SECONDS)
            finally:
                self._end_all()
            if stop.requested:
                for running in self._running:
                    if running.job.is_done:
                        on_end(running.job, 0, time.monotonic() - running.started)
                raise Stopped(stop.requested)

    def _start_next(self) -> bool:
        """Fills free places; whether anything was started."""
        free = [share for share in range(len(self._shares)) if share not in {r.share for r in self._running}]
        ready = [job for job in self._jobs.values() if self._is_ready(job)]
        for share, job in zip(free, ready, strict=False):
            self._running.append(_Running(job, self._start(job, self._shares[share]), share))
        return bool(free and ready)

    def _is_ready(self, job: Job) -> bool:
        if any(running.job is job for running in self._running) or self.state(job) in ("done", "failed", "blocked"):
            return False
        return job.after is None or self._jobs[job.after].is_done

    def _start(self, job: Job, cores: Sequence[int]) -> subprocess.Popen[bytes]:
        log = self.log_of(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = self._command(job, cores)
        with open(log, "ab") as file:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=self._environment
            )

    def _collect(self, on_end: Callable[[Job, int, float], None]) -> None:
        """Takes note of the processes that have ended."""
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            running.let_go()
            code = running.process.returncode
            if code == 0 and not running.job.is_done:
                code = 1
            if code != 0:
                self.failures.add(running.job, code)
            on_end(running.job, code, time.monotonic() - running.started)

    def _end_all(self) -> None:
        """Lets every process save and leave; a second SIGINT here kills them."""
        try:
            for running in self._running:
                running.process.terminate()
            for running in self._running:
                running.process.wait()
        finally:
            for running in self._running:
                running.let_go()
                with contextlib.suppress(OSError):
                    running.process.kill()


def worker_command(job: Job, cores: Sequence[int]) -> list[str]:
    """That goes on with a job on some cores."""
    command = [sys.executable, "-m", "experiments.ablation.worker", os.fspath(job.folder)]
    return [*command, "--cores", ",".join(map(str, cores))]


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share_cores(cores: Sequence[int], workers: int) -> list[list[int]]:
    """A share of the cores for each worker: equal ones, or one core for several where there are more workers."""
    if workers >= len(cores):
        return [[cores[worker % len(cores)]] for worker in range(workers)]
    bounds = [worker * len(cores) // workers for worker in range(workers + 1)]
    return [list(cores[low:high]) for low, high in itertools.pairwise(bounds)]


def worker_environment(compiled: Path, workers: int, cores: int) -> dict[str, str]:
    """The environment of a worker: all of them share compiled programs, and a GPU's memory if there is one.

    A program fits the very processor that it was compiled on, so each kind of processor has a folder of its own.
    """
    environment = dict(os.environ)
    environment["JAX_COMPILATION_CACHE_DIR"] = os.fspath(compiled / processor_name())
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["OMP_NUM_THREADS"] = str(cores)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / workers:.3f}")
    return environment


def processor_name() -> str:
    """Tells processors with different instructions apart, as far as the operating system says."""
    description = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = ("model name", "flags", "Features")
        description += list(dict.fromkeys(line.strip() for line in file if line.startswith(names)))
    return f"{platform.machine()}-{hashlib.sha256(repr(description).encode()).hexdigest()[:12]}"


def remaining_seconds(durations: Iterable[float], left: int, workers: int) -> float | None:
    """How long the rest will take, if it is as what was done; None if nothing was."""
    durations = list(durations)
    return sum(durations) / len(durations) * left / workers if durations else None


def describe_seconds(seconds: float | None) -> str:
    """In the largest two units."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
