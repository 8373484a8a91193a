"""Trials of the sandbox: hostile programs that show which protections hold on this machine.

A machine may lack what a protection needs, and a container may forbid it. So each protection is tried with real
programs before any code of a model runs, and a protection that does not hold is an error that names it. A user can
accept that failure, which never weakens the protection itself.
"""

import functools
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.tasks.code.sandbox import Limits, Outcome, Request, SandboxError, run
from experiments.tasks.code.system_calls import MACHINES

PROTECTIONS: dict[str, str] = {
    "files": (
        "files outside the scratch folder cannot be read or changed. This needs seccomp filters and Landlock: Linux "
        "5.13 or later with landlock in /sys/kernel/security/lsm (add it to the kernel's lsm= option), and a container "
        "that permits it"
    ),
    "network": (
        "no socket can be opened. This needs seccomp filters, which nearly every Linux has, on x86_64 or "
        "aarch64; let the container permit them"
    ),
    "processes": (
        "no process can be started or sent a signal, and threads are counted. This needs seccomp filters, which nearly "
        "every Linux has, on x86_64 or aarch64, and a mounted /proc; let the container permit them"
    ),
    "memory": "memory is bounded. This needs RLIMIT_AS, which some emulated kernels do not enforce; use another kernel",
    "time": "code that never ends is stopped. This needs only signals and a clock; use another kernel",
    "disk": (
        "the scratch folder cannot be filled beyond its limits. This needs seccomp filters, RLIMIT_FSIZE, and a "
        "temporary folder (TMPDIR) on a disk that counts blocks"
    ),
}
"""Each protection by its name: what it guarantees, what it needs, and what to do where it does not hold."""

# Generous, so that a busy machine does not look unsafe; where the protections hold, the programs end much sooner.
_LIMITS = Limits(seconds=20.0, memory_mib=256, disk_mib=4, files=32, threads=8)


def check_names(accept_missing: Collection[str]) -> None:
    """Raise ValueError if one of the names is not in `PROTECTIONS`."""
    for name in accept_missing:
        if name not in PROTECTIONS:
            raise ValueError(f"accept_missing names {name!r}; the protections are {', '.join(PROTECTIONS)}.")


def require_protections(accept_missing: Collection[str]) -> None:
    """Try every protection on this machine, once per process.

    Args:
        accept_missing: names of `PROTECTIONS` whose failure the user accepts.

    Raises:
        ValueError: if a name in `accept_missing` is not that of a protection.
        SandboxError: if a protection does not hold and its absence is not accepted, or if nothing runs at all.
    """
    check_names(accept_missing)
    if missing := [name for name in missing_protections() if name not in accept_missing]:
        reasons = " ".join(f"{name!r} does not hold; it guarantees that {PROTECTIONS[name]}." for name in missing)
        raise SandboxError(
            f"The sandbox is not safe on this machine, so no untrusted code is run. {reasons} To run without this "
            f"protection, at your own risk, set accept_missing={tuple(missing)!r}."
        )


@functools.cache
def missing_protections() -> tuple[str, ...]:
    """Return the names of the protections that do not hold on this machine, in the order of `PROTECTIONS`.

    Raises:
        SandboxError: if the sandbox cannot run even without them.
    """
    if sys.platform != "linux":
        raise SandboxError(
            f"The sandbox needs Linux, but this is {sys.platform}; run it on a Linux machine or in a container."
        )
    if platform.machine() not in MACHINES:
        raise SandboxError(
            f"The sandbox knows the system calls of {' and '.join(MACHINES)}, but this machine is "
            f"{platform.machine()}; run it on one of these."
        )
    if _printed("print('alive')") != "alive":
        raise SandboxError("The sandbox cannot run even a harmless program on this machine.")
    tries: dict[str, Callable[[], bool]] = {
        "files": _files_hold,
        "network": _network_holds,
        "processes": _processes_hold,
        "memory": _memory_holds,
        "time": _time_holds,
        "disk": _disk_holds,
    }
    with ThreadPoolExecutor(len(tries)) as pool:
        holds = dict(zip(tries, pool.map(_holds, tries.values()), strict=True))
    return tuple(name for name in PROTECTIONS if not holds[name])


def _holds(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except OSError:  # the machine does not permit the trial
        return False


def _outcome(code: str, limits: Limits = _LIMITS) -> Outcome:
    return run(Request(code), limits, accept_missing=frozenset(PROTECTIONS))


def _printed(code: str) -> str:
    return _outcome(code).output.decode().strip()


def _all_refused(attempts: Collection[str], before: str = "pass") -> bool:
    """Return whether each attempt, a Python expression, raises PermissionError in the sandbox."""
    lines = ["import os, socket, sys", before]
    for attempt in attempts:
        lines += ["try:", f"    {attempt}", "    print('done')", "except PermissionError:", "    print('refused')"]
    return _printed("\n".join(lines)).split() == ["refused"] * len(attempts)


def _files_hold() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outside"
        path.write_text("kept")
        attempts = [
            f"open({str(path)!r}).read()",
            f"open({str(path)!r}, 'a').write('changed')",
            f"os.truncate({str(path)!r}, 0)",
            f"os.remove({str(path)!r})",
            f"os.chmod({str(path)!r}, 0o777)",
            f"open({str(Path(folder) / 'new')!r}, 'w')",
            f"os.listdir({folder!r})",
            "os.symlink('/etc', 'link')",
            "open('/proc/self/environ').read()",
        ]
        refused = _all_refused(attempts)
        return refused and os.listdir(folder) == ["outside"] and path.read_text() == "kept"


def _network_holds() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return _all_refused(
            [
                f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))",
                "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
                "socket.socket(socket.AF_UNIX)",
                "socket.socketpair()",
            ]
        )


def _processes_hold() -> bool:
    refused = _all_refused(
        [
            "os.fork() or os._exit(1)",
            "os.posix_spawn(sys.executable, [sys.executable], {})",
            "os.execv(sys.executable, [sys.executable])",
            "os.kill(os.getppid(), 0)",
            "os.setpriority(os.PRIO_PROCESS, os.getppid(), 1)",
        ]
    )
    threads = (
        "import threading\nthreading.stack_size(65536)\n"
        "while True: threading.Thread(target=threading.Event().wait).start()"
    )
    return refused and _outcome(threads).ending == "threads"


def _memory_holds() -> bool:
    code = f"try: bytearray({_LIMITS.memory_mib} << 20)\nexcept MemoryError: print('refused')"
    return _printed(code) == "refused"


def _time_holds() -> bool:
    limits = Limits(seconds=0.2)
    return all(_outcome(code, limits).ending == "time" for code in ("import time; time.sleep(99)", "while True: pass"))


def _disk_holds() -> bool:
    # A removed file, one without a name or one in another folder would take space that is not counted.
    hidden = ["os.remove('kept')", "os.open('.', os.O_TMPFILE | os.O_RDWR)", "os.mkdir('folder')"]
    many = "import itertools\nfor number in itertools.count(): open(str(number), 'w')"
    large = f"open('large', 'wb').write(bytes({_LIMITS.disk_mib + 1} << 20))"
    return (
        _all_refused(hidden, before="open('kept', 'w').close()")
        and _outcome(many).ending == "disk"
        and _outcome(large).ending in ("failed", "disk")
    )
