"""Many processes, some at a time: each confined to its share of the cores, resumed and retried until it is done.

Everything that has to outlive this process is on disk: a job's progress in its own folder, its failures in `failures/`,
its output in `logs/`. A job is a folder with a config.json; what it computes does not matter here.
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
from typing import Literal

from experiments.errors import MISTAKE
from rspo_jax.hosts import StopSignal
from rspo_jax.records import write_json

State = Literal["done", "failed", "blocked", "stopped", "waiting"]
"""States of a job: done, failed (given up), blocked (a job that it needs was given up), stopped (begun) or waiting."""

DONE_FILE = "summary.json"
"""The last file that a run writes."""
TRIES = 3
"""Number of failures after which a job is given up."""
FAILURES_FOLDER = "failures"
_POLL_SECONDS = 0.1
_TAIL_LINES = 12


@dataclass(frozen=True)
class Job:
    """A folder to work in until it is done."""

    name: str
    folder: Path
    after: str | None = None
    """The name of a job that has to be done first."""

    @property
    def is_done(self) -> bool:
        """True if the job has written its last file."""
        return (self.folder / DONE_FILE).exists()


class Failures:
    """The failures of each job with their exit codes, kept in a folder with one file per job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, job: Job) -> list[int]:
        """Return the exit codes of a job's failures; a negative one is the number of the signal that killed it."""
        path = self._folder / f"{job.name}.json"
        return json.loads(path.read_text()) if path.exists() else []

    def add(self, job: Job, code: int) -> None:
        """Record a failure."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{job.name}.json", [*self.of(job), code])

    def forget(self, name: str) -> None:
        """Delete the failures of the job with this name, if there are any."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def given_up(self, job: Job) -> bool:
        """Return whether a job failed `TRIES` times, or once with the exit code that promises to fail again."""
        codes = self.of(job)
        return MISTAKE in codes or len(codes) >= TRIES


@dataclass
class _Running:
    """A job's process, and the share of the cores that it has."""

    job: Job
    process: subprocess.Popen[bytes]
    share: int
    started: float = field(default_factory=time.monotonic)

    def let_go(self) -> None:
        """Close the pipe by which the process knows that this one is alive."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


class JobsStopped(Exception):
    """The process was asked to stop by the signal that the message names; all jobs have saved their state and left."""


class Jobs:
    """A queue of jobs that are worked off in their order."""

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        workers: int,
        command: Callable[[Job, Sequence[int]], list[str]] | None = None,
    ) -> None:
        """Prepare the queue; `work` starts it. The cores that this process may use are shared among the workers.

        Args:
          jobs: all jobs, including those that are done.
          folder: the folder for logs, failures and compiled programs.
          workers: number of processes at a time.
          command: returns the command that runs a job on some cores; `worker_command` by default.
        """
        self._jobs = {job.name: job for job in jobs}
        self._folder = folder
        self._command = command or worker_command
        self._shares = share_cores(usable_cores(), workers)
        self._environment = worker_environment(folder / "compiled", workers, len(self._shares[0]))
        self._running: list[_Running] = []
        self.failures = Failures(folder / FAILURES_FOLDER)

    def log_of(self, job: Job) -> Path:
        """Return the path of a job's log."""
        return self._folder / "logs" / f"{job.name}.log"

    def tail_of(self, job: Job) -> str:
        """Return the last lines of a job's log."""
        path = self.log_of(job)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-_TAIL_LINES:])

    def state(self, job: Job) -> State:
        """Return the state of a job that is not running."""
        if job.is_done:
            return "done"
        if self.failures.given_up(job):
            return "failed"
        if job.after is not None and self.state(self._jobs[job.after]) in ("failed", "blocked"):
            return "blocked"
        return "stopped" if (job.folder / "metrics.jsonl").exists() else "waiting"

    def work(self, on_end: Callable[[Job, int, float], None]) -> None:
        """Work until every job is done or given up.

        Args:
          on_end: called when a process has ended, with its job, its exit code, and its duration in seconds.

        Raises:
          JobsStopped: after SIGTERM or SIGINT, once all processes have ended.
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
                raise JobsStopped(stop.requested)

    def _start_next(self) -> bool:
        """Start a job for every free share of the cores; return whether any was started."""
        taken, running = {each.share for each in self._running}, {each.job.name for each in self._running}
        free = [share for share in range(len(self._shares)) if share not in taken]
        ready = [
            job
            for job in self._jobs.values()
            if job.name not in running
            and self.state(job) in ("waiting", "stopped")
            and (job.after is None or self._jobs[job.after].is_done)
        ]
        for share, job in zip(free, ready, strict=False):
            log = self.log_of(job)
            log.parent.mkdir(parents=True, exist_ok=True)
            command = self._command(job, self._shares[share])
            with open(log, "ab") as file:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=self._environment
                )
            self._running.append(_Running(job, process, share))
        return bool(free and ready)

    def _collect(self, on_end: Callable[[Job, int, float], None]) -> None:
        """Take the processes that have ended off the list, and record failures."""
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
        """Let every process save its state and leave; a second SIGINT in the meantime kills them."""
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
    """Return the command that continues a job on some cores (`experiments.ablation.worker`)."""
    command = [sys.executable, "-m", "experiments.ablation.worker", os.fspath(job.folder)]
    return [*command, "--cores", ",".join(map(str, cores))]


def usable_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share_cores(cores: Sequence[int], workers: int) -> list[list[int]]:
    """Return the cores of each worker: equal shares, or one core for several workers if there are more workers."""
    if workers >= len(cores):
        return [[cores[worker % len(cores)]] for worker in range(workers)]
    bounds = [worker * len(cores) // workers for worker in range(workers + 1)]
    return [list(cores[low:high]) for low, high in itertools.pairwise(bounds)]


def worker_environment(compiled: Path, workers: int, cores: int) -> dict[str, str]:
    """Return the environment of a worker. All workers share compiled programs, and a GPU's memory if there is one.

    A program fits the very processor that it was compiled on, so each kind of processor has a folder of its own.

    Args:
      compiled: the folder of compiled programs.
      workers: number of workers.
      cores: number of cores of each worker.
    """
    # Processors with different instructions are told apart as far as the operating system describes them.
    description = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = ("model name", "flags", "Features")
        description += list(dict.fromkeys(line.strip() for line in file if line.startswith(names)))
    processor = f"{platform.machine()}-{hashlib.sha256(repr(description).encode()).hexdigest()[:12]}"
    environment = dict(os.environ)
    environment["JAX_COMPILATION_CACHE_DIR"] = os.fspath(compiled / processor)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["OMP_NUM_THREADS"] = str(cores)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / workers:.3f}")
    return environment


def remaining_seconds(durations: Iterable[float], left: int, workers: int) -> float | None:
    """Estimate the time that the remaining jobs will take from those that are done; None if none is."""
    durations = list(durations)
    return sum(durations) / len(durations) * left / workers if durations else None


def describe_seconds(seconds: float | None) -> str:
    """Return a duration in its largest two units."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
