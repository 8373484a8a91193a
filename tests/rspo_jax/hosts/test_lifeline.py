"""The lifeline between threads of this process: each end reports a process that dies, gives up or leaves, and a
stranger at the door changes nothing. Messages come over the loopback at once."""

import json
import queue
import socket
import threading

import pytest

from rspo_jax.hosts import lifeline
from rspo_jax.hosts.lifeline import Lifeline, Loss

SECONDS = 20  # after which a message is taken to have been lost
TOKEN = "a token"


class End:
    """One process's lifeline, the losses that it reports, and the sockets that would close if it died."""

    def __init__(self, process, peers):
        self.losses = queue.Queue()
        self.connections = [connection for _, connection in peers.values()]
        self.lifeline = Lifeline(process, peers, self.losses.put)

    def loss(self):
        return self.losses.get(timeout=SECONDS)

    def die(self):
        self.lifeline._finished.set()  # a dead process watches nobody
        for connection in self.connections:
            connection.shutdown(socket.SHUT_RDWR)


def meet(processes, strangers=()):
    """Connect processes by `accept` and `connect`, and return the peers of each."""
    listener = lifeline.open_listener()
    port = listener.getsockname()[1]
    found = {}
    thread = threading.Thread(
        target=lambda: found.update({0: lifeline.accept(listener, processes, TOKEN, SECONDS)}), daemon=True
    )
    thread.start()
    for stranger in strangers:
        stranger(port)
    for process in range(1, processes):
        found[process] = lifeline.connect("localhost", port, process, TOKEN, SECONDS)
    thread.join(SECONDS)
    return found


def close(peers):
    for of_process in peers.values():
        for _, connection in of_process.values():
            connection.close()


@pytest.fixture
def ends():
    peers = meet(3)
    ends = [End(process, peers[process]) for process in range(3)]
    yield ends
    for end in ends:
        end.lifeline.leave()
        end.lifeline._thread.join(SECONDS)
        for connection in end.connections:
            connection.close()


def test_process_0_knows_all_and_all_know_process_0():
    peers = meet(4)
    assert set(peers[0]) == {1, 2, 3}
    assert [set(peers[process]) for process in (1, 2, 3)] == [{0}] * 3
    assert {host for host, _ in peers[0].values()} == {socket.gethostname()}
    close(peers)


@pytest.mark.parametrize("dead", [1, 2])
def test_a_death_is_told_to_all(ends, dead):
    ends[dead].die()
    for process in {0, 1, 2} - {dead}:
        assert ends[process].loss() == Loss(dead, socket.gethostname(), None, 1)


def test_the_death_of_process_0(ends):
    ends[0].die()
    for process in (1, 2):
        loss = ends[process].loss()
        assert (loss.process, loss.reason, loss.code) == (0, None, 1)


@pytest.mark.parametrize("process", [0, 2])
def test_a_process_that_gives_up_says_why(ends, process):
    ends[process].lifeline.give_up("ValueError: a bad row\nin line 3 — “é”", 2)
    ends[process].die()
    for other in {0, 1, 2} - {process}:
        loss = ends[other].loss()
        assert (loss.process, loss.reason, loss.code) == (process, "ValueError: a bad row\nin line 3 — “é”", 2)


def test_a_reason_that_comes_in_pieces(ends):
    message = lifeline._encode(Loss(1, "host", "x" * 10_000, 3))
    (connection,) = ends[1].connections
    for part in (message[:1], message[1:5000], message[5000:]):
        connection.sendall(part)
    for process in (0, 2):
        assert ends[process].loss() == Loss(1, "host", "x" * 10_000, 3)


def test_to_leave_is_no_loss(ends):
    ends[1].lifeline.leave()
    ends[1].die()
    ends[2].die()  # is noticed all the same, and as the first
    assert ends[0].loss().process == 2
    assert ends[0].losses.empty()


def test_of_several_losses_the_first_is_reported_and_no_other(ends):
    ends[2].die()
    assert ends[0].loss().process == 2
    ends[1].die()
    ends[0].lifeline._thread.join(SECONDS)
    assert ends[0].losses.empty()


def test_who_has_left_reports_nothing(ends):
    ends[0].lifeline.leave()
    ends[1].die()
    ends[0].lifeline._thread.join(SECONDS)
    assert ends[0].losses.empty()


open_until_the_end = []


@pytest.fixture(autouse=True)
def strangers_go_in_the_end():
    yield
    while open_until_the_end:
        open_until_the_end.pop().close()


def say(words):
    def stranger(port):
        connection = socket.create_connection(("localhost", port))
        connection.sendall(words)
        open_until_the_end.append(connection)

    return stranger


def hang_up(port):
    socket.create_connection(("localhost", port)).close()


STRANGERS = {
    "hangs up": hang_up,
    "speaks HTTP": say(b"GET / HTTP/1.1\r\n\r\n"),
    "says a number": say(b"1\n"),
    "has another token": say(json.dumps({"token": "another", "process": 1, "host": "x"}).encode() + b"\n"),
    "has no process": say(json.dumps({"token": TOKEN}).encode() + b"\n"),
    "goes on without end": say(b"x" * (lifeline._LONGEST_LINE + 10)),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_at_the_door(stranger):
    peers = meet(2, [STRANGERS[stranger]])
    assert set(peers[0]) == {1}
    close(peers)


def test_a_silent_stranger_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(lifeline, "_HELLO_SECONDS", 0.05)
    peers = meet(2, [say(b"")])
    assert set(peers[0]) == {1}
    close(peers)


def test_process_0_goes_on_without_those_that_do_not_come():
    assert lifeline.accept(lifeline.open_listener(), 2, TOKEN, 0.05) == {}


def test_an_address_where_nobody_listens():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError):
        lifeline.connect("localhost", port, 1, TOKEN, SECONDS)


def test_what_answers_is_another_program():
    with socket.create_server(("localhost", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail ready\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(OSError, match="is not process 0 of this run"):
            lifeline.connect("localhost", server.getsockname()[1], 1, TOKEN, SECONDS)
        thread.join(SECONDS)
