"""A pool of processes that run one function on untrusted items, each item under a limit of time and memory.

The pools of the standard library have neither limit: a `concurrent.futures` pool breaks as a whole when one worker
dies and cannot end a running call, a `multiprocessing` pool waits forever for the item of a dead worker, and both
unpickle what workers send.

Here an item costs at most its time limits: the process that works on it is killed and replaced, the item gets a
failure, and no other item is affected. The first limit is one of CPU time, which the kernel counts, so that a busy host
does not fail what is quick; a larger one of wall time ends what waits instead of working. The caller may hold JAX and
its threads, so it is never forked. A server process is started from scratch, imports only the module of the function,
and forks the workers, so that a new worker takes milliseconds. Workers reply in JSON, which cannot harm the process
that reads it.

    caller -> server    fork a worker, with the worker's end of a channel; or end one
    caller -> worker    one line of JSON: the item
    worker -> caller    one line of JSON: the value, or the error that the function raised

The server ends itself and its workers when the caller's end of its channel closes, as it also does when the caller
dies. If the server is gone as well, an alarm of the kernel ends a worker that is deep inside C code.
"""

import collections
import contextlib
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

FAILURES = ("time limit", "died", "error")
"""The reasons why an item has no value: it took too long; its process ended; the function raised."""
WALL_FACTOR = 10.0
"""Limit of wall time over limit of CPU time, where none is given."""

_START_SECONDS = 120.0
_END_SECONDS = 10.0
_LONGEST_REPLY = 2**20
_ALARM_SECONDS = 1.0
"""Seconds after its time limit at which the kernel ends a worker that nobody else has ended."""
_OUT_OF_TIME = "signal SIGPROF"
"""The end, in words, of a worker that reached its limit of CPU time."""
_OUT_OF_MEMORY = 99
"""Exit status of a worker that reached its memory limit."""
_CHUNK = 2**16
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from experiments.tasks import pool; pool._serve()"


class Outcome(NamedTuple):
    """The result of one item.

    Attributes:
        value: the return value of the function after a round trip through JSON; None after a failure.
        failure: one of `FAILURES`, or "" if the function returned.
        detail: a few words on the failure.
    """

    value: Any
    failure: str = ""
    detail: str = ""


class WorkerPool:
    """Several processes that run a function on items; they start at the first call and stay for later ones.

    Threads may share a pool: their calls take turns.

    Attributes:
        workers: number of items that are worked on at a time.
        time_limit: seconds of CPU time that one item may take in its process.
        wall_limit: seconds that one item may take from being handed out to being answered.
    """

    def __init__(
        self,
        function: str,
        workers: int,
        time_limit: float,
        memory_limit: int | None = None,
        wall_limit: float | None = None,
        arguments: Sequence[Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Check the arguments; nothing is started yet.

        Args:
            function: "package.module:name" of a function that takes and returns JSON values. Importing its module must
                not start a thread.
            workers: number of worker processes.
            time_limit: seconds of CPU time per item.
            memory_limit: bytes of address space of a process, including everything that it imports. None: no limit.
            wall_limit: seconds of wall time per item. None: `WALL_FACTOR` times the limit of CPU time.
            arguments: JSON values. If they are given, the function is called with them once, before any worker is
                forked and without limits, and what it returns is run on the items.
            environment: variables of the processes' environment, beside those of the caller's.

        Raises:
            ValueError: if an argument is wrong.
        """
        if not all(part.isidentifier() for part in function.replace(":", ".", 1).split(".")) or ":" not in function:
            raise ValueError(f'the function of a pool is named like "package.module:name", got {function!r}')
        if workers < 1:
            raise ValueError(f"a pool needs a worker, got workers={workers}")
        if not (time_limit > 0 and math.isfinite(time_limit)):
            raise ValueError(f"time_limit is in seconds and above 0, got {time_limit}")
        wall_limit = WALL_FACTOR * time_limit if wall_limit is None else wall_limit
        if not (wall_limit >= time_limit and math.isfinite(wall_limit)):
            raise ValueError(f"wall_limit is in seconds and at least time_limit ({time_limit}), got {wall_limit}")
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit is in bytes and above 0, got {memory_limit}")
        self.workers = workers
        self.time_limit = time_limit
        self.wall_limit = wall_limit
        self._arguments = (function, time_limit, memory_limit, wall_limit, arguments, dict(environment or {}))
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._servers: list[_Server] = []  # one at most
        self._finalizer = weakref.finalize(self, _end_all, self._workers, self._servers, os.getpid())

    def map(self, items: Sequence[Any]) -> list[Outcome]:
        """Run the function on every item.

        Args:
            items: JSON values.

        Returns:
            One `Outcome` for each item, in the order of the items.

        Raises:
            RuntimeError: if the function cannot be imported.
            TypeError: if an item is not a JSON value.
        """
        results: list[Outcome | None] = [None] * len(items)
        with self._lock:
            waiting = collections.deque(range(len(items)))
            try:
                while waiting or self._busy():
                    self._listen(0.0, results)  # a worker that died while idle is not handed an item
                    self._start_workers(len(waiting), results)
                    for worker in [worker for worker in self._workers if worker.item is None][: len(waiting)]:
                        line = json.dumps(items[waiting[0]]).encode() + b"\n"
                        if worker.hand(waiting[0], line, self.wall_limit):
                            waiting.popleft()
                        else:
                            self._remove(worker)
                    # Wait for an answer or the next deadline, but not if a worker was just found dead.
                    seconds = 0.0
                    if self._busy() and not self._missing(len(waiting)):
                        seconds = max(0.0, min(worker.deadline for worker in self._workers) - time.monotonic())
                    self._listen(seconds, results)
                    now = time.monotonic()
                    for worker in [worker for worker in self._workers if worker.deadline <= now]:
                        self._settle(worker, "time limit", f"no answer within {self.wall_limit:g} s", results)
            finally:
                for worker in [worker for worker in self._workers if worker.item is not None]:
                    self._remove(worker)  # the call was interrupted; the next call would receive its answer
        return [outcome for outcome in results if outcome is not None]

    def counts(self) -> dict[str, int]:
        """Return the numbers of items so far, of items that met each of `FAILURES`, and of workers started."""
        return {name: self._counts[name] for name in ("items", *FAILURES, "starts")}

    def close(self) -> None:
        """End all processes. A later call of `map` starts new ones."""
        with self._lock:
            _end_all(self._workers, self._servers, os.getpid())

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _busy(self) -> int:
        return sum(worker.item is not None for worker in self._workers)

    def _missing(self, waiting: int) -> bool:
        return len(self._workers) < min(self.workers, self._busy() + waiting)

    def _start_workers(self, waiting: int, results: list[Outcome | None]) -> None:
        while self._missing(waiting):
            if not self._servers:
                self._servers.append(_Server(*self._arguments))
            try:
                self._workers.append(_Worker(self._servers[0]))
                self._counts["starts"] += 1
            except OSError:  # the server was killed from outside, and nobody else can end its workers
                for worker in list(self._workers):
                    self._settle(worker, "died", "its server was killed", results)
                self._servers.pop().end()

    def _listen(self, seconds: float, results: list[Outcome | None]) -> None:
        """Receive what workers send and note those that ended; wait up to `seconds` for the first event."""
        poll = select.poll()
        for worker in self._workers:
            poll.register(worker.channel, select.POLLIN | (select.POLLOUT if worker.outgoing else 0))
        descriptors = {descriptor for descriptor, _ in poll.poll(math.ceil(1000 * seconds))}
        for worker in [worker for worker in self._workers if worker.channel.fileno() in descriptors]:
            alive = worker.exchange()
            for reply in worker.replies():
                alive = self._take(worker, reply, results) and alive
            if not alive:
                self._settle(worker, "died", "", results)

    def _take(self, worker: "_Worker", reply: bytes, results: list[Outcome | None]) -> bool:
        """Note one line of a worker. Return whether it was the expected answer."""
        try:
            ((kind, content),) = json.loads(reply).items()
        except (ValueError, AttributeError):
            return False
        if worker.item is None or kind not in ("value", "error"):
            return False
        outcome = Outcome(content) if kind == "value" else Outcome(None, "error", str(content))
        self._finish(worker, outcome, results)
        return True

    def _settle(self, worker: "_Worker", failure: str, detail: str, results: list[Outcome | None]) -> None:
        """End a worker; the item that it worked on fails. Without a detail, the outcome says how the worker ended."""
        how_it_ended = self._remove(worker)
        if how_it_ended == _OUT_OF_TIME:
            failure, detail = "time limit", f"no answer within {self.time_limit:g} s of CPU time"
        if worker.item is not None:
            self._finish(worker, Outcome(None, failure, detail or how_it_ended), results)

    def _finish(self, worker: "_Worker", outcome: Outcome, results: list[Outcome | None]) -> None:
        assert worker.item is not None
        results[worker.item] = outcome
        worker.item, worker.deadline = None, math.inf
        self._counts["items"] += 1
        if outcome.failure:
            self._counts[outcome.failure] += 1

    def _remove(self, worker: "_Worker") -> str:
        self._workers.remove(worker)
        try:
            return _in_words(self._servers[0].ask({"end": worker.pid}))
        except OSError:
            return "killed"
        finally:
            worker.channel.close()


class _Server:
    """The process that forks workers, and the caller's end of its channel."""

    def __init__(
        self,
        function: str,
        time_limit: float,
        memory_limit: int | None,
        wall_limit: float,
        arguments: Sequence[Any] | None,
        environment: Mapping[str, str],
    ) -> None:
        self.channel, other = socket.socketpair()
        with other:
            setting = [other.fileno(), function, time_limit, memory_limit, wall_limit, arguments]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps(setting)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | environment,
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C is for the caller
            )
        self.channel.settimeout(_START_SECONDS)
        try:
            broken = self.receive()
        except BaseException as error:
            self.end()
            if not isinstance(error, OSError):
                raise
            how = _in_words(self.process.returncode)
            raise RuntimeError(f"a process that imports {function} does not become ready ({how})") from error
        if broken:
            self.end()
            raise RuntimeError(f"{function} cannot be imported by a worker process:\n{broken}")

    def ask(self, request: dict[str, Any], descriptor: int | None = None) -> Any:
        """Send a request, with a descriptor if one is given, and return the reply; OSError if the server is gone."""
        try:
            line = json.dumps(request).encode() + b"\n"
            socket.send_fds(self.channel, [line], [] if descriptor is None else [descriptor])
            return self.receive()
        except BaseException:  # after an interruption as well: the reply would be taken for that of the next request
            self.channel.close()
            raise

    def receive(self) -> Any:
        line = b""
        while not line.endswith(b"\n"):
            chunk = self.channel.recv(_CHUNK)
            if not chunk:
                raise ConnectionResetError("the server of a pool has ended")
            line += chunk
        return json.loads(line)

    def end(self) -> None:
        """Let the server end its workers and itself."""
        self.channel.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Worker:
    """One worker process, the caller's end of its channel, and the item that it works on."""

    def __init__(self, server: _Server) -> None:
        self.channel, other = socket.socketpair()
        with other:
            try:
                self.pid: int = server.ask({"fork": None}, other.fileno())
            except BaseException:
                self.channel.close()
                raise
        self.channel.setblocking(False)
        self.item: int | None = None
        self.deadline = math.inf
        self.outgoing = memoryview(b"")
        self.incoming = bytearray()

    def hand(self, item: int, line: bytes, wall_limit: float) -> bool:
        """Start to send an item. Return False, with nothing sent, if the process has ended."""
        try:
            sent = self.channel.send(line)
        except OSError:
            return False
        self.outgoing = memoryview(line)[sent:]
        self.item, self.deadline = item, time.monotonic() + wall_limit
        return True

    def exchange(self) -> bool:
        """Send and receive what is possible at once. Return False if the process has ended or floods the caller."""
        try:
            if self.outgoing:
                with contextlib.suppress(BlockingIOError):
                    self.outgoing = self.outgoing[self.channel.send(self.outgoing) :]
            while True:
                chunk = self.channel.recv(_CHUNK)
                self.incoming += chunk
                if not chunk or len(self.incoming) > _LONGEST_REPLY:
                    return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def replies(self) -> list[bytes]:
        """Return the complete lines received since the last call."""
        *lines, rest = self.incoming.split(b"\n")
        self.incoming = rest
        return [bytes(line) for line in lines]


def _in_words(status: int) -> str:
    """Say how a process ended, from its exit status, which is negative for a signal."""
    if status == _OUT_OF_MEMORY:
        return "out of memory"
    if status == -signal.SIGKILL:
        return "killed"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _end_all(workers: list[_Worker], servers: list[_Server], owner: int) -> None:
    if os.getpid() != owner:  # this is a fork: the processes belong to its parent
        return
    for worker in workers:
        worker.channel.close()
    for server in servers:
        server.end()
    workers.clear()
    servers.clear()


def _serve() -> None:
    """Run the server, until its channel closes."""
    descriptor, name, time_limit, memory_limit, wall_limit, arguments = json.loads(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_limit is not None:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        memory_limit = memory_limit if most == resource.RLIM_INFINITY else min(memory_limit, most)
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)  # lets the kernel end a worker, whatever it is busy with
    children: set[int] = set()
    with socket.socket(fileno=descriptor) as channel:
        try:
            module, function_name = name.split(":")
            function = getattr(importlib.import_module(module), function_name)
            function = function if arguments is None else function(*arguments)
        except Exception:
            channel.sendall(json.dumps(traceback.format_exc(limit=-3)).encode() + b"\n")
            return
        gc.freeze()  # so that collections in workers touch, and thus copy, none of it
        channel.sendall(b"null\n")
        try:
            while _obey(channel, children, function, (time_limit, wall_limit)):
                pass
        finally:
            for child in list(children):
                _end(child, children)


def _obey(
    channel: socket.socket, children: set[int], function: Callable[[Any], Any], limits: tuple[float, float]
) -> bool:
    """Serve one request. Return False when there are no more."""
    line, descriptors, _, _ = socket.recv_fds(channel, _CHUNK, 1)
    if not line:
        return False
    request = json.loads(line)
    if "end" in request:
        reply = _end(request["end"], children)
    else:
        reply = os.fork()
        if reply == 0:
            try:
                channel.close()
                os.setpgid(0, 0)  # processes that the function starts are ended with the worker
                _work(descriptors[0], function, *limits)
            finally:
                os._exit(1)
        with contextlib.suppress(OSError):  # the worker has already done it
            os.setpgid(reply, reply)
        os.close(descriptors[0])
        children.add(reply)
    channel.sendall(json.dumps(reply).encode() + b"\n")
    return True


def _end(child: int, children: set[int]) -> int:
    """Kill a worker and everything that it started. Return its exit status; it may have ended before."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    children.discard(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _work(descriptor: int, function: Callable[[Any], Any], time_limit: float, wall_limit: float) -> None:
    """Run a worker, until its channel closes."""
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rb") as lines:
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, time_limit)
            signal.setitimer(signal.ITIMER_REAL, wall_limit + _ALARM_SECONDS)
            reply = _reply(function, line)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.sendall(reply)


def _reply(function: Callable[[Any], Any], line: bytes) -> bytes:
    try:
        return _line("value", function(json.loads(line)))
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)  # the state of the process is unknown now; a fresh one takes its place
    except BaseException as error:  # including SystemExit and the timeouts of libraries
        return _line("error", f"{type(error).__name__}: {error}"[:500])


def _line(kind: str, content: Any) -> bytes:
    return json.dumps({kind: content}).encode() + b"\n"
