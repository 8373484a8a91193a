"""A line between the processes of a run that tells all of them at once when one dies or gives up.

Each process holds a TCP connection to process 0. The kernel closes it together with the process, and gives it up when
the other machine has not answered for a while. No process has to report in time, so one that is merely slow, or
compiling, is never taken for dead.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

SILENCE_SECONDS = 25
"""Time after which a machine that does not even answer TCP's own probes is taken for dead."""
_KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 1000 * SILENCE_SECONDS,  # in milliseconds, for data that was sent but not acknowledged
}
_HELLO_SECONDS = 5
_LONGEST_LINE = 1 << 16
_LEFT = b"{}\n"
"""Goodbye of a process that leaves in good order; also process 0's answer to a newcomer."""


class Loss(NamedTuple):
    """A process that is gone, or is about to be."""

    process: int
    host: str
    reason: str | None
    """Its own reason for giving up; None if it died without a word."""
    code: int
    """Its exit code; 1 if that is not known."""


class Lifeline:
    """One process's end of the line, which watches the others from a thread until `leave` or `give_up`."""

    def __init__(
        self, process: int, peers: dict[int, tuple[str, socket.socket]], on_loss: Callable[[Loss], object]
    ) -> None:
        """Start to watch.

        Args:
          process: index of this process.
          peers: process -> its host's name and the connection to it: for process 0 all the others, and for these
            process 0.
          on_loss: called once, in the watching thread, for the first process that is lost.
        """
        self._process, self._peers, self._on_loss = process, dict(peers), on_loss
        self._received = dict.fromkeys(peers, b"")
        self._finished = threading.Event()
        for _, connection in self._peers.values():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):  # Linux has all of them
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Say goodbye, so that the end of this process is not a loss."""
        self._finish(_LEFT)

    def give_up(self, reason: str, code: int) -> None:
        """Tell all the others that this process is about to end, and why."""
        self._finish(_encode(Loss(self._process, socket.gethostname(), reason, code)))

    def _finish(self, message: bytes) -> bool:
        """Send the last message to all the others; return False if there was one before."""
        if self._finished.is_set():
            return False
        self._finished.set()
        for _, connection in self._peers.values():
            with contextlib.suppress(OSError):  # a process that is gone needs no message
                connection.sendall(message)
        return True

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, (_, connection) in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map() and not self._finished.is_set():
                for key, _ in selector.select(timeout=1.0):
                    for loss in self._read(key.data):
                        if loss is None:
                            selector.unregister(key.fileobj)
                            continue
                        if self._finish(_encode(loss)):
                            self._on_loss(loss)
                        return

    def _read(self, process: int) -> Iterator[Loss | None]:
        """Read from the connection to a process: yield a loss, None for a goodbye, or nothing yet."""
        host, connection = self._peers[process]
        try:
            received = connection.recv(4096)
        except OSError:  # the other machine does not answer, for one
            received = b""
        if not received:
            yield Loss(process, host, None, 1)
            return
        self._received[process] += received
        line, newline, _ = self._received[process].partition(b"\n")
        if newline:
            yield None if line + newline == _LEFT else Loss(**json.loads(line))


def open_listener() -> socket.socket:
    """Open a socket for process 0, on a free port of all its addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def accept(
    listener: socket.socket, num_processes: int, token: str, seconds: float
) -> dict[int, tuple[str, socket.socket]]:
    """Wait for all the others to `connect` to process 0, then close the listener.

    Args:
      listener: from `open_listener`.
      num_processes: number of processes, with process 0.
      token: secret of the run, by which strangers are told apart.
      seconds: time to wait for all of them.

    Returns:
      Process -> its host's name and the connection to it, without the processes that did not come in time.
    """
    peers: dict[int, tuple[str, socket.socket]] = {}
    deadline = time.monotonic() + seconds
    with listener:
        while len(peers) < num_processes - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with (
                contextlib.suppress(OSError, ValueError, KeyError, TypeError),  # a stranger, or nobody
                contextlib.ExitStack() as on_error,
            ):
                connection, _ = listener.accept()
                on_error.enter_context(connection)
                connection.settimeout(min(left, _HELLO_SECONDS))
                hello = json.loads(_read_line(connection))
                if hello["token"] != token:
                    raise ValueError("a process of another run")
                process, host = int(hello["process"]), str(hello["host"])
                connection.sendall(_LEFT)
                connection.settimeout(None)
                peers[process] = host, connection
                on_error.pop_all()
    return peers


def connect(host: str, port: int, process: int, token: str, seconds: float) -> dict[int, tuple[str, socket.socket]]:
    """Connect to process 0, which waits in `accept`.

    Args:
      host: the host of process 0.
      port: its listener's port.
      process: index of this process.
      token: secret of the run.
      seconds: time to wait for an answer.

    Returns:
      Process 0 -> its host's name and the connection to it.

    Raises:
      OSError: if process 0 cannot be reached in time.
    """
    connection = socket.create_connection((host, port), timeout=seconds)
    with contextlib.ExitStack() as on_error:
        on_error.enter_context(connection)
        hello = {"token": token, "process": process, "host": socket.gethostname()}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        if _read_line(connection) != _LEFT:
            raise OSError(f"the program that answers at {host}:{port} is not process 0 of this run")
        connection.settimeout(None)
        on_error.pop_all()
    return {0: (host, connection)}


def _read_line(connection: socket.socket) -> bytes:
    """Read a line byte by byte, so that nothing beyond it is taken."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > _LONGEST_LINE:
            raise OSError("the connection was closed too early")
        line += byte
    return line


def _encode(loss: Loss) -> bytes:
    return json.dumps(loss._asdict()).encode() + b"\n"
