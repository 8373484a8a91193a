"""The sandbox: one piece of untrusted Python runs in a process of its own, under limits, and its output is returned.

The process locks itself down by means that the kernel offers to every user (see `inside.py`): Landlock for files,
seccomp for system calls, resource limits. This module watches time, threads and the scratch folder from outside. It
is never given an expected result: the caller compares, outside the sandbox.
"""

import contextlib
import functools
import json
import marshal
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

# The shared libraries of an interpreter, and the files that it opens by itself, beside its own library.
_SYSTEM_PATHS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/urandom", "/usr/share/zoneinfo")

PROTECTIONS_OF_STEP = {"landlock": {"files"}, "seccomp": {"files", "network", "processes", "disk"}}
"""The protections that rest on each step inside the sandbox that a machine may forbid. All other steps must succeed."""


class SandboxError(RuntimeError):
    """The sandbox does not hold or does not start on this machine. The code in it cannot cause this error."""


@dataclass(frozen=True)
class Limits:
    """Resources of one run of untrusted code."""

    seconds: float = 5.0
    """Wall-clock time, once the interpreter has started; all threads together get as many seconds of CPU time."""
    memory_mib: int = 512
    """Address space; the interpreter takes about 30 MiB."""
    output_mib: int = 1
    """Standard output, or the result as JSON. More counts as wrong."""
    disk_mib: int = 16
    """All files in the scratch folder together; also the limit of a single file."""
    files: int = 64
    """Number of files in the scratch folder, and number of open files."""
    threads: int = 32
    """Number of threads."""

    def check(self) -> None:
        """Raise ValueError, naming the mistake and the way out, if nothing could run within these limits."""
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds is {self.seconds}; set it to a finite number above 0.")
        for name, least in {"memory_mib": 64, "output_mib": 1, "disk_mib": 1, "files": 16, "threads": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to at least {least}.")
        if self.output_mib > self.disk_mib:
            raise ValueError(
                f"output_mib ({self.output_mib}) is above disk_mib ({self.disk_mib}), which bounds every file, "
                "including the output; raise disk_mib or lower output_mib."
            )


class Request(NamedTuple):
    """The code to run: a whole program, or one call of a function that the code defines."""

    code: str
    input: str = ""
    """The program's standard input."""
    entry_point: str | None = None
    """The function to call, or "Class.method" for a method of a new instance. None: a program."""
    arguments: tuple[Any, ...] = ()
    """The arguments of the call, as JSON values."""
    preamble: str = ""
    """Code that runs first in the same module. The entry point must be defined after it."""


Ending = Literal["finished", "failed", "time", "threads", "disk", "output"]


class Outcome(NamedTuple):
    """The result of a run."""

    ending: Ending
    """"finished": exit status 0. "failed": another exit status, or killed at a limit of the kernel. Otherwise the limit
    that the run exceeded."""
    output: bytes
    """Standard output of a program, or the result of a call as JSON. Empty unless the run finished."""


def run(request: Request, limits: Limits, accept_missing: frozenset[str] = frozenset()) -> Outcome:
    """Run code in a new sandbox, and return when its process has ended and its scratch folder is removed.

    Several threads may call this at once.

    Args:
        request: the code and its input; any text is allowed.
        limits: the resources of the run.
        accept_missing: protections (see `protections.PROTECTIONS`) that may be missing on this machine. They are still
            applied as far as possible.

    Returns:
        The outcome, whatever the code does.

    Raises:
        SandboxError: if the sandbox cannot be set up; the code has then not run.
    """
    for _ in range(_STARTS):
        with contextlib.ExitStack() as stack:
            # Plain files in one folder can always be removed. Only an accepted missing protection lets more be in it.
            folder = tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=bool(accept_missing))
            scratch = stack.enter_context(folder)
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            outcome = _run_once(request, limits, accept_missing, scratch, files)
        if outcome is not None:
            return outcome
    raise SandboxError(
        f"The interpreter of the sandbox ended {_STARTS} times before it could lock itself down; check whether "
        f"{_interpreter()} runs on this machine and whether memory is short."
    )


def _run_once(
    request: Request, limits: Limits, accept_missing: frozenset[str], scratch: str, files: Sequence[IO[bytes]]
) -> Outcome | None:
    """Run once; None if the process died before its report, which the code in it cannot cause."""
    standard_input, standard_output, request_file = files
    # A lone surrogate is text that a model can write but no file can hold.
    standard_input.write(request.input.encode("utf-8", "replace"))
    request_file.write(marshal.dumps({**request._asdict(), "input": None}))  # JSON has no integers of 4,301 digits
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
        for step, reason in failed.items():
            if not PROTECTIONS_OF_STEP.get(step, {step}) <= accept_missing:
                raise SandboxError(
                    f"The sandbox could not be closed at its step {step!r} ({reason}), so nothing was run in it."
                )
        ending = _watch(process, limits, scratch)
    finally:
        os.close(report)
        # The process leads a group, whose number stays taken until the process is waited for.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
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
        # Integers may have any number of digits: the limit of time is there for all else that is slow.
        [
            *(_interpreter(), "-B", "-P", "-S", "-s", "-X", "utf8", "-X", "int_max_str_digits=0"),
            *(str(_INSIDE), json.dumps(settings)),
        ],
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
    """Return the interpreter itself, not its link in a virtual environment, whose packages stay outside."""
    return os.path.realpath(sys.executable)


@functools.cache
def _readable_paths() -> list[str]:
    library = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"}
    return [path for path in (*sorted(library), *_SYSTEM_PATHS) if os.path.exists(path)]


@functools.cache
def _encoded_filter() -> str:
    return filter_program().hex()


def _read_report(report: int) -> dict[str, str] | None:
    """Return the steps of the lock-down that failed, with reasons; None if the process died first."""
    text = b""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if not _is_readable(report, deadline - time.monotonic()):
            raise SandboxError(f"The interpreter of the sandbox did not start within {_START_SECONDS:g} seconds.")
        chunk = os.read(report, 65536)
        if not chunk:
            return json.loads(text) if text else None
        text += chunk


def _is_readable(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _watch(process: subprocess.Popen[bytes], limits: Limits, scratch: str) -> Ending | None:
    """Wait until the process ends, or exceeds a limit that the kernel does not enforce."""
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
    except FileNotFoundError:  # /proc is not mounted, which the trials of the protections have found
        return 0
    return int(text.rpartition(b")")[2].split()[17])


def _is_full(scratch: str, limits: Limits) -> bool:
    """Return whether the folder, in which only plain files can be made, holds too many or too large ones."""
    used = 0
    with os.scandir(scratch) as entries:
        for count, entry in enumerate(entries, start=1):
            with contextlib.suppress(FileNotFoundError):  # files can vanish only if a missing protection was accepted
                used += entry.stat(follow_symlinks=False).st_blocks * 512
            if count > limits.files or used > limits.disk_mib * _MIB:
                return True
    return False
