"""Processes for tests of several of them, forked from a server that has imported JAX once: an import takes seconds.

The standard library's fork server is forked while it has one thread and no devices, so that a fork is as good as a
process started from nothing, except that imports are not repeated, and that what JAX does at exit is left out.
"""

import faulthandler
import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

SECONDS = 600
"""Time after which a process is taken to hang."""
IMPORTED = ["jax.numpy", "orbax.checkpoint", "pytest", "rspo_jax.hosts", "rspo_jax.records.checkpoint"]
"""Modules that the server has imported when it forks; `preload` adds more."""
_context = multiprocessing.get_context("forkserver")


class Member:
    """A process that runs a program, from its start on."""

    def __init__(
        self, log: Path, program: str, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process.

        Args:
          log: a path whose folder exists; the output goes to files of this name with the endings .out and .err.
          program: source text, run as a main program. Warnings are errors in it.
          arguments: what `sys.argv[1:]` holds, as text.
          environment: the environment variables; those of this process when absent. JAX sees CPUs only.
        """
        self._out, self._err = Path(f"{log}.out"), Path(f"{log}.err")
        self._out.touch()
        self._err.touch()
        environment = dict(os.environ if environment is None else environment)
        _start_server()
        self._process = _context.Process(
            target=_run, args=(program, [str(argument) for argument in arguments], environment, self._out, self._err)
        )
        self._process.start()

    @property
    def printed(self) -> str:
        """The text that the program has printed so far, without what libraries write to the standard output."""
        return self._out.read_text()

    @property
    def errors(self) -> str:
        """Everything else that it has written so far."""
        return self._err.read_text()

    @property
    def code(self) -> int | None:
        """The exit code, −n after signal n, None while the process runs."""
        return self._process.exitcode

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def lines(self, number: int) -> list[str]:
        """Return the first lines that it prints, once there are so many."""
        deadline = time.monotonic() + SECONDS
        while self.printed.count("\n") < number:
            assert self.code is None and time.monotonic() < deadline, (self.code, self.printed, self.errors)
            time.sleep(0.002)
        return self.printed.splitlines()[:number]

    def wait(self) -> int | None:
        """Wait until the process ends, and return its exit code; fail if it hangs, with the stacks of its threads."""
        self._process.join(SECONDS)
        if self.code is None:
            os.kill(self._process.pid, signal.SIGABRT)
            self._process.join(SECONDS)
            raise AssertionError(f"the process hangs: {self.printed}\n{self.errors}")
        return self.code

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        self._process.kill()
        self._process.join()


def finish(members: Iterable[Member]) -> list[str]:
    """Wait for processes that should end well, and return what each printed."""
    members = list(members)
    try:
        codes = [member.wait() for member in members]
    finally:
        for member in members:
            member.kill()
    errors = "\n".join(f"--- process {number}\n{member.errors}" for number, member in enumerate(members))
    assert codes == [0] * len(members), errors
    return [member.printed for member in members]


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def preload(*modules: str) -> None:
    """Let the processes that start from now on find these modules imported; the server starts anew where it must."""
    missing = [module for module in modules if module not in IMPORTED]
    if missing:
        IMPORTED.extend(missing)
        forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
        _start_server.cache_clear()


@functools.cache
def _start_server() -> None:
    _context.set_forkserver_preload(IMPORTED)
    # NumPy's OpenBLAS would start threads.
    with mock.patch.dict(os.environ, JAX_PLATFORMS="cpu", OPENBLAS_NUM_THREADS="1"):
        forkserver.ensure_running()


def _run(program: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    threads = Path(f"/proc/{os.getppid()}/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "a process with threads was forked"
    os.environ.clear()
    os.environ.update(environment, JAX_PLATFORMS="cpu")
    with open(err, "a") as file:  # where Gloo's words go as well, which it prints in pieces
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(out, "w", buffering=1)  # noqa: SIM115
    sys.argv[1:] = arguments
    faulthandler.enable(2)
    warnings.simplefilter("error")
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
