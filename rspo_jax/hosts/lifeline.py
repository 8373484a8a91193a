"""Tells every process of a run at once when one of them dies or gives up.

Each process holds a TCP connection to process 0. The kernel closes it together with the process, and gives it up when
the other machine has not answered for a while. So nobody has to say anything in time: a process that is merely slow,
or compiling, is never taken for dead. This file must never know JAX, or what the processes are working on.
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
"""After which a machine that does not answer, even to TCP's own probes, is taken for dead."""
_KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 1000 * SILENCE_SECONDS,  # milliseconds, for what was sent and not acknowledged
}
_HELLO_SECONDS = 5
_LONGEST_LINE = 1 << 16
_LEFT = b"{}\n"
"""Also process 0's answer to a newcomer."""


class Loss(NamedTuple):
    """That a process is gone, or is about to be."""

    process: int
    host: str
    reason: str | None
    """Why it gave up, in its own words; None if it died without any."""
    code: int
    """The exit code that it leaves with; 1 if that is not known."""


class Lifeline:
    """One process's end: watches the others in a thread of its own until `leave` or `give_up`."""

    def __init__(
        self, process: int, peers: dict[int, tuple[str, socket.socket]], on_loss: Callable[[Loss], object]
    ) -> None:
        """Starts to watch.

        Args:
          process: which one this is.
          peers: process -> its host's name and the connection to it: all the others for process 0, and process 0 for
            all the others.
          on_loss: is called in the watching thread, once, for the first process that is lost.
        """
        self._process, self._peers, self._on_loss = process, dict(peers), on_loss
        self._received = dict.fromkeys(peers, b"")
        self._finished = threading.Event()
        for _, connection in self._peers.values():
            _keep_alive(connection)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Says goodbye: that this process ends is not a loss."""
        self._finish(_LEFT)

    def give_up(self, reason: str, code: int) -> None:
        """Tells all the others that this process is about to end, and why."""
        self._finish(_encode(Loss(self._process, socket.gethostname(), reason, code)))

    def _finish(self, message: bytes) -> None:
        if not self._finished.is_set():
            self._finished.set()
            self._tell_all(message)

    def _tell_all(self, message: bytes) -> None:
        for _, connection in self._peers.values():
            with contextlib.suppress(OSError):  # one that is gone needs no word
                connection.sendall(message)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, (_, connection) in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map() and not self._finished.is_set():
                for key, _ in selector.select(timeout=1.0):
                    for loss in self._read(key.data):
                        if loss is not None:
                            self._report(loss)
                            return
                        selector.unregister(key.fileobj)

    def _read(self, process: int) -> Iterator[Loss | None]:
        """A loss that the connection to a process tells of; None if that process has left in good order."""
        host, connection = self._peers[process]
        try:
            received = connection.recv(4096)
        except OSError:  # among them: the other machine does not answer
            received = b""
        if not received:
            yield Loss(process, host, None, 1)
            return
        self._received[process] += received
        line, newline, _ = self._received[process].partition(b"\n")
        if newline:
            yield None if line + newline == _LEFT else Loss(**json.loads(line))

    def _report(self, loss: Loss) -> None:
        if self._finished.is_set():
            return
        self._finished.set()
        self._tell_all(_encode(loss))
        self._on_loss(loss)


def open_listener() -> socket.socket:
    """A socket for process 0, on a free port of all its addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def accept(
    listener: socket.socket, num_processes: int, token: str, seconds: float
) -> dict[int, tuple[str, socket.socket]]:
    """Process 0's side of `connect`: waits for all the others, and closes the listener.

    Returns:
      Process -> its host's name and the connection to it; without those that did not come in time.
    """
    peers: dict[int, tuple[str, socket.socket]] = {}
    deadline = time.monotonic() + seconds
    with listener:
        while len(peers) < num_processes - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger, or nobody
                connection, _ = listener.accept()
                with _closed_on_error(connection):
                    connection.settimeout(min(left, _HELLO_SECONDS))
                    hello = json.loads(_read_line(connection))
                    if hello["token"] != token:
                        raise ValueError("of another run")
                    process, host = int(hello["process"]), str(hello["host"])
                    connection.sendall(_LEFT)
                    connection.settimeout(None)
                    peers[process] = host, connection
    return peers


def connect(host: str, port: int, process: int, token: str, seconds: float) -> dict[int, tuple[str, socket.socket]]:
    """The side of `accept` that all the others take.

    Returns:
      Process 0 -> the name of its host and the connection to it.

    Raises:
      OSError: if process 0 cannot be reached in time.
    """
    connection = socket.create_connection((host, port), timeout=seconds)
    with _closed_on_error(connection):
        hello = {"token": token, "process": process, "host": socket.gethostname()}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        if _read_line(connection) != _LEFT:
            raise OSError(f"what answers at {host}:{port} is not process 0 of this run")
        connection.settimeout(None)
    return {0: (host, connection)}


@contextlib.contextmanager
def _closed_on_error(connection: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _read_line(connection: socket.socket) -> bytes:
    """One byte after the other, so that nothing of what follows is taken."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > _LONGEST_LINE:
            raise OSError("the connection was closed too early")
        line += byte
    return line


def _encode(loss: Loss) -> bytes:
    return json.dumps(loss._asdict()).encode() + b"\n"


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
