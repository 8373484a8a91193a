"""The lock of a run's folder: who gets it, who waits, and who notices that it is gone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import Member

from rspo_jax.records import lock
from rspo_jax.records.lock import LOCK_FILE, LockHeld, LockLost, RunLock

BOUNDS = {"RENEW_SECONDS": 0.05, "PATIENCE_SECONDS": 0.4, "SETTLE_SECONDS": 0.01, "_LOOK_SECONDS": 0.0}


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in BOUNDS.items():
        monkeypatch.setattr(lock, name, seconds)


def content_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / LOCK_FILE).read_text())


def held_by(process: int, **changes: Any) -> bytes:
    """Return the lock of another process of this machine, but for the changes."""
    ours = json.loads(lock._content(3))
    return json.dumps(
        ours | {"token": "other", "process": process, "started": lock._start_of(process)} | changes
    ).encode()


def put(run_dir: Path, content: bytes) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / LOCK_FILE).write_bytes(content)


def wait_for(moment: Any) -> None:
    deadline = time.monotonic() + 60
    while not moment():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_taken_renewed_and_released(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    with RunLock(run_dir) as held:
        first = content_of(run_dir)
        assert (first["process"], first["renewals"]) == (os.getpid(), 0)
        wait_for(lambda: content_of(run_dir)["renewals"] > 2)
        assert {**content_of(run_dir), "renewals": 0} == first
        assert (run_dir / LOCK_FILE).stat().st_size == 512
        held.check()
    assert list(run_dir.iterdir()) == []


def test_inside_itself_it_changes_nothing(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with RunLock(tmp_path) as inner:
            inner.check()
        assert content_of(tmp_path)["process"] == os.getpid()
        with RunLock(tmp_path) as inner:
            (tmp_path / LOCK_FILE).unlink()
            with pytest.raises(LockLost):
                inner.check()


def test_a_living_process_of_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    put(tmp_path, held_by(os.getppid()))
    before, said = (tmp_path / LOCK_FILE).read_bytes(), []
    with pytest.raises(LockHeld, match=rf"a run is going on in {tmp_path}, by process {os.getppid()} on") as error:
        RunLock(tmp_path, said.append).__enter__()
    assert (error.value.passes, said) == (False, [])
    assert (tmp_path / LOCK_FILE).read_bytes() == before


@pytest.mark.parametrize("death", ["long ago", "not waited for", "id used again"])
def test_the_lock_of_a_dead_process_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 3600.0)
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    content = held_by(process.pid)
    process.kill()
    if death == "long ago":
        process.wait()
    else:
        wait_for(lambda: lock._start_of(process.pid) == -1)
    if death == "id used again":
        content = held_by(os.getppid(), started=json.loads(content)["started"])
    put(tmp_path, content)
    with RunLock(tmp_path) as held:
        held.check()
        assert content_of(tmp_path)["process"] == os.getpid()
    process.communicate()


ELSEWHERE = {
    "another host": {"host": "another"},
    "another start of the host": {"boot": "another"},
    "another container": {"namespace": "pid:[1]"},
    "a system that tells nothing": {"boot": None, "namespace": None},
}


@pytest.mark.parametrize("content", [*ELSEWHERE, "", "{", "[]", "null", '{"process": "many"}', '{"process": 0}'])
def test_an_abandoned_lock_from_elsewhere_is_taken_over_after_a_time(tmp_path: Path, content: str) -> None:
    """Its process id is that of a living process here, which means nothing, as do the times of the file."""
    put(tmp_path, held_by(os.getppid(), **ELSEWHERE[content]) if content in ELSEWHERE else content.encode())
    os.utime(tmp_path / LOCK_FILE, (2e9, 2e9))
    said: list[str] = []
    started = time.monotonic()
    touching = threading.Timer(0.1, os.utime, (tmp_path / LOCK_FILE, (1, 1)))
    touching.start()
    with RunLock(tmp_path, said.append) as held:
        assert time.monotonic() - started >= lock.PATIENCE_SECONDS
        held.check()
    touching.join()
    assert len(said) == 2 and "waiting for up to" in said[0] and said[1].endswith("is taken over.")


def test_a_lock_that_is_renewed_elsewhere_is_refused_and_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60.0)  # the renewal comes before, however busy the machine is
    put(tmp_path, held_by(7, host="another", renewals=3))
    renewed = _written(tmp_path / "new", held_by(7, host="another", renewals=4))
    renewal = threading.Timer(0.1, os.replace, (renewed, tmp_path / LOCK_FILE))
    renewal.start()
    with pytest.raises(LockHeld, match="by process 7 on another: wait for its end") as error:
        RunLock(tmp_path, lambda _: None).__enter__()
    assert error.value.passes
    renewal.join()


def test_a_lock_that_is_released_elsewhere_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 5.0)
    put(tmp_path, held_by(7, host="another"))
    release = threading.Timer(0.1, (tmp_path / LOCK_FILE).unlink)
    release.start()
    with RunLock(tmp_path, lambda _: None) as held:
        held.check()
    release.join()


@pytest.mark.parametrize("loss", ["taken over", "deleted", "damaged", "folder deleted"])
def test_a_process_that_lost_it_notices_and_leaves_it_alone(tmp_path: Path, loss: str) -> None:
    run_dir = tmp_path / "run"
    with RunLock(run_dir) as held:
        if loss == "taken over":
            os.replace(_written(tmp_path / "new", held_by(os.getppid())), run_dir / LOCK_FILE)
        elif loss == "damaged":
            os.replace(_written(tmp_path / "new", b"x"), run_dir / LOCK_FILE)
        else:
            (run_dir / LOCK_FILE).unlink()
        if loss == "folder deleted":
            run_dir.rmdir()
        left = sorted(path.read_bytes() for path in run_dir.glob("*"))
        with pytest.raises(LockLost, match=rf"{run_dir / LOCK_FILE} is no longer this process's"):
            held.check()
        time.sleep(3 * lock.RENEW_SECONDS)
        with pytest.raises(LockLost):
            held.check()
    assert sorted(path.read_bytes() for path in run_dir.glob("*")) == left


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_trouble_with_reading_it_is_borne_as_long_as_nobody_may_take_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLock(tmp_path) as held:
        with monkeypatch.context() as patch:
            patch.setattr(RunLock, "_is_mine", lambda _: (_ for _ in ()).throw(ConnectionError("no answer")))
            held.check()
            wait_for(lambda: time.monotonic() - held._confirmed > lock.PATIENCE_SECONDS)
            with pytest.raises(ConnectionError, match="no answer"):
                held.check()
        held.check()


RACER = """
import sys, time
from rspo_jax.records.lock import LockHeld, RunLock
print("ready")
sys.stdin = open(sys.argv[2])  # waits for the other end
try:
    with RunLock(sys.argv[1]):
        print("held")
        time.sleep(600)
except LockHeld as error:
    print(error)
"""


@pytest.mark.parametrize("left", [b"", b"dead"], ids=["a new run", "after a dead process"])
def test_of_several_processes_that_start_at_once_one_gets_it(tmp_path: Path, left: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    run_dir = tmp_path / "run"
    if left:
        put(run_dir, held_by(2**22 + 1, started=1))
    members = [Member(tmp_path / f"log-{number}", RACER, run_dir, pipe) for number in range(3)]
    try:
        for member in members:
            member.lines(1)
        with open(pipe, "w"):
            ends = [member.lines(2)[1] for member in members]
        assert ends.count("held") == 1
        holder = members[ends.index("held")]
        refused = f"a run is going on in {run_dir}, by process {holder.pid} on "
        assert [end.startswith(refused) for end in ends].count(True) == 2
        os.kill(holder.pid, signal.SIGKILL)
        holder.kill()
        with RunLock(run_dir) as held:
            held.check()
    finally:
        for member in members:
            member.kill()
