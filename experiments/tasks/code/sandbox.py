"""Runs one piece of untrusted Python in a process of its own, under limits, and brings back what it wrote.

The process locks itself down with what the kernel offers any user (see `inside.py`): Landlock for files, seccomp for
system calls, resource limits. From outside this module watches time, threads and the scratch folder. It must never
know an expected result: whoever holds that compares, outside the sandbox.
"""

import contextlib
import functools
import json
import math
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from experiments.tasks.code.system_calls import filter_program

_INSIDE = Path(__file__).with_name("inside.py")
_START_SECONDS = 60.0
_STARTS = 3
_WATCH_SECONDS = 0.02
_MIB = 2**20

# Where an interpreter finds its shared libraries and what it opens by itself, beside its own library.
_SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/urandom", "/usr/share/zoneinfo")

PROTECTIONS_OF_STEP = {"landlock": {"files"}, "seccomp": {"files", "network", "processes", "disk"}}
"""What rests on a step inside the sandbox that a machine may not permit. The other steps always have to succeed."""


class SandboxError(RuntimeError):
    """The sandbox does not hold or does not start on this machine; nothing that the code in it does raises this."""


@dataclass(frozen=True)
class Limits:
    """What one run of untrusted code may use."""

    seconds: float = 5.0
    """Of wall-clock time, once the interpreter has started; all threads together get as many seconds of CPU time."""
    memory_mib: int = 512
    """Of address space; the interpreter takes about 30."""
    output_mib: int = 1
    """Of standard output, or of the result as JSON. More counts as wrong."""
    disk_mib: int = 16
    """Of all files in the scratch folder together; no single file grows beyond this."""
    files: int = 64
    """How many files the scratch folder may hold, and how many may be open."""
    threads: int = 32

    def check(self) -> None:
        """Raises ValueError, naming the mistake and the way out, if nothing could run within these limits."""
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds is {self.seconds}; set it to a finite number above 0.")
        for name, least in {"memory_mib": 64, "output_mib": 1, "disk_mib": 1, "files": 16, "threads": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to at least {least}.")
        if self.output_mib > self.disk_mib:
            raise ValueError(
                f"output_mib ({self.output_mib}) is above disk_mib ({self.disk_mib}), which bounds every file, the "
                "output too; raise disk_mib or lower output_mib."
            )


class Request(NamedTuple):
    """What to run: a whole program, or one call of something that the code defines."""

    code: str
    input: str = ""
    """The program's standard input."""
    entry_point: str | None = None
    """The function to call, or "Class.method" for a method of a new instance. None: a program."""
    arguments: tuple[Any, ...] = ()
    """Of the call; JSON values."""


Ending = Literal["finished", "failed", "time", "threads", "disk", "output"]


class Outcome(NamedTuple):
    """How a run ended."""

    ending: Ending
    """"finished": it exited with status 0. "failed": with another one, or a limit of the kernel killed it. Others: the
    limit that it went over."""
    output: bytes
    """Standard output of a program, or the result of a call as JSON. Empty unless it finished."""


def run(request: Request, limits: Limits, accept_missing: frozenset[str] = frozenset()) -> Outcome:
    """Runs code in a new sandbox, and returns when its process is gone and its scratch folder removed.

    Several threads may call this at once.

    Args:
        request: the code and what it is given; any text at all.
        limits: what it may use.
        accept_missing: protections (see `protections.PROTECTIONS`) that may fail on this machine. They are applied
            nevertheless where they can be.

    Returns:
        The outcome, whatever the code does.

    Raises:
        SandboxError: if the sandbox cannot be set up; the code was not run then.
    """
    for _ in range(_STARTS):
        with contextlib.ExitStack() as stack:
            # Plain files in one folder can always be removed. Only a protection that was given up leaves more there.
            folder = tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=bool(accept_missing))
            scratch = stack.enter_context(folder)
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            outcome = _run_once(request, limits, accept_missing, scratch, files)
        if outcome is not None:
            return outcome
    raise SandboxError(
        f"The interpreter of the sandbox ended {_STARTS} times before it could lock itself down; see whether "
        f"{_interpreter()} runs on this machine and whether memory is short."
    )


def _run_once(
    request: Request, limits: Limits, accept_missing: frozenset[str], scratch: str, files: Sequence[IO[bytes]]
) -> Outcome | None:
    """None if the process died before it reported, which the code in it cannot bring about."""
    standard_input, standard_output, request_file = files
    # A lone surrogate is text that a model can write but no file can hold.
    standard_input.write(request.input.encode("utf-8", "replace"))
    request_file.write(json.dumps({**request._asdict(), "input": None}).encode())
    for file in (standard_input, request_file):
        file.seek(0)
    report, report_end = os.pipe()
    try:
        process = _start(limits, accept_missing, scratch, files, report_end)
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(report_end)
    try:
        failed = _read_report(report)
        if failed is None:
            return None
        _check_report(failed, accept_missing)
        ending = _watch(process, limits, scratch)
    finally:
        os.close(report)
        _end(process)
    if ending is None:
        ending = "finished" if process.returncode == 0 else "failed"
    if os.fstat(standard_output.fileno()).st_size > limits.output_mib * _MIB:
        ending = "output"
    output = os.pread(standard_output.fileno(), limits.output_mib * _MIB, 0) if ending == "finished" else b""
    return Outcome(ending, output)


def _start(
    limits: Limits, accept_missing: frozenset[str], scratch: str, files: Sequence[IO[bytes]], report: int
) -> subprocess.Popen[bytes]:
    standard_input, standard_output, request_file = files
    may_fail = [step for step, protections in PROTECTIONS_OF_STEP.items() if protections <= accept_missing]
    settings = {
        "parent": os.getpid(),
        "report": report,
        "request": request_file.fileno(),
        "readable": _readable_paths(),
        "filter": _encoded_filter(),
        "may_fail": may_fail,
        "limits": {
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_CPU": math.ceil(limits.seconds),
            "RLIMIT_AS": limits.memory_mib * _MIB,
            "RLIMIT_FSIZE": limits.disk_mib * _MIB,
            "RLIMIT_NOFILE": limits.files,
        },
    }
    return subprocess.Popen(
        # Not -I, which would ignore PYTHONHASHSEED: the order of a set must not decide a reward.
        [_interpreter(), "-B", "-P", "-S", "-s", "-X", "utf8", str(_INSIDE), json.dumps(settings)],
        stdin=standard_input,
        stdout=standard_output,
        stderr=subprocess.DEVNULL,
        cwd=scratch,
        env={"HOME": scratch, "TMPDIR": scratch, "PATH": "", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        pass_fds=(request_file.fileno(), report),
        start_new_session=True,
    )


@functools.cache
def _interpreter() -> str:
    """The interpreter itself rather than its link in a virtual environment, whose packages stay outside."""
    return os.path.realpath(sys.executable)


@functools.cache
def _readable_paths() -> list[str]:
    library = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"}
    return [path for path in (*sorted(library), *_SYSTEM_PATHS) if os.path.exists(path)]


@functools.cache
def _encoded_filter() -> str:
    return filter_program().hex()


def _read_report(report: int) -> dict[str, str] | None:
    """What failed while the sandbox was locked down; None if its process died first."""
    text = b""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if not _is_readable(report, deadline - time.monotonic()):
            raise SandboxError(f"The interpreter of the sandbox did not start within {_START_SECONDS:g} seconds.")
        chunk = os.read(report, 65536)
        if not chunk:
            return json.loads(text) if text else None
        text += chunk


def _check_report(failed: dict[str, str], accept_missing: frozenset[str]) -> None:
    for step, reason in failed.items():
        if not PROTECTIONS_OF_STEP.get(step, {step}) <= accept_missing:
            raise SandboxError(
                f"The sandbox could not be closed at its step {step!r} ({reason}), so nothing was run in it."
            )


def _is_readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _watch(process: subprocess.Popen[bytes], limits: Limits, scratch: str) -> Ending | None:
    """Waits for the end of the process, or until it goes over a limit that the kernel does not know."""
    deadline = time.monotonic() + limits.seconds
    try:
        ended = os.pidfd_open(process.pid)
    except OSError as error:
        raise SandboxError(f"The sandbox needs pidfd_open to watch a process (Linux 5.3 or later): {error}.") from error
    try:
        while not _is_readable(ended, min(_WATCH_SECONDS, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                return "time"
            if _threads(process.pid) > limits.threads:
                return "threads"
            if _is_full(scratch, limits):
                return "disk"
    finally:
        os.close(ended)
    return None


def _threads(process_id: int) -> int:
    try:
        text = Path(f"/proc/{process_id}/stat").read_bytes()
    except FileNotFoundError:  # /proc is not mounted, which the trial of the protections has found out
        return 0
    return int(text.rpartition(b")")[2].split()[17])


def _is_full(scratch: str, limits: Limits) -> bool:
    """Whether the folder, in which nothing but plain files can be made, holds too many or too large ones."""
    used = 0
    with os.scandir(scratch) as entries:
        for count, entry in enumerate(entries, start=1):
            with contextlib.suppress(FileNotFoundError):  # none can be removed unless a protection was given up
                used += entry.stat(follow_symlinks=False).st_blocks * 512
            if count > limits.files or used > limits.disk_mib * _MIB:
                return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    # The process leads a group, whose number is taken until it is waited for.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
