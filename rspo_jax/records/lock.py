"""The lock of a run's folder, so that one run at a time writes there, whichever hosts it runs on.

The lock is the file `run.lock`. Its holder renews it every ten seconds by a new count in it. A start that finds the
lock of a process that has died on the same machine takes it over at once. A lock from elsewhere is watched: it is
abandoned once its content has stayed the same for a minute of the watching process's own monotonic clock. Clocks of two
machines are never compared, nor are times of files, so that neither a clock that jumps nor one that is wrong matters.

Between machines no file system can do better than this: a holder may be suspended for longer than the minute. It
therefore looks again before it writes (`RunLock.check`), and stops if the lock has become another's.
"""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from etils import epath

from rspo_jax.hosts import Agreement, is_primary, say
from rspo_jax.records.files import FilePath, as_path, is_bucket, replace_file

LOCK_FILE = "run.lock"
RENEW_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
"""Time without a renewal after which a lock from elsewhere is abandoned."""
SETTLE_SECONDS = 1.0
"""Time for another start, which has seen no lock either, to show itself where nothing can be created exclusively."""
_LOOK_SECONDS = 1.0
_SIZE = 512
"""Bytes of the file. As it never grows, it can also be renewed on a full disk."""
_TOKEN = secrets.token_hex(16)


class LockHeld(RuntimeError):
    """Another run is going on in the folder."""

    def __init__(self, message: str, passes: bool) -> None:
        """Make the error.

        Args:
          message: names the other process and the way out.
          passes: True if the same command may succeed later, although nobody corrects it.
        """
        super().__init__(message, passes)
        self.passes = passes

    def __str__(self) -> str:
        return self.args[0]


class LockLost(RuntimeError):
    """The folder belongs to another run now, or to none; this process must write no more."""


class RunLock:
    """The lock of a run's folder, a context manager.

    Process 0 of a run holds it for all of them, which enter together. Inside a lock that this process holds already,
    for the same folder, another one changes nothing.
    """

    def __init__(self, run_dir: FilePath, say: Callable[[str], object] = say) -> None:
        """Prepare the lock; entering takes it.

        Args:
          run_dir: the run's folder, which is made if it does not exist, or its address in a bucket.
          say: called with a sentence when the lock is waited for or taken over.
        """
        self._path, self._say = as_path(run_dir) / LOCK_FILE, say
        self._agreement = Agreement("lock")
        self._holds = False
        """True once this object has taken the lock, and has to renew and to release it."""
        self._lost = False
        self._confirmed = 0.0
        self._finished = threading.Event()

    def __enter__(self) -> Self:
        """Take the lock, in process 0.

        Raises:
          LockHeld: in every process, if another run is going on in the folder.
        """
        self._agreement.from_primary(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._holds:
            return
        self._finished.set()
        self._renewing.join()
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(Exception):  # a lock that stays is taken over by the next run
            if self._is_mine():
                self._path.unlink()

    def check(self) -> None:
        """Make sure, before something is written, that the lock is still this process's.

        The file is read at most once a second. If it cannot be read, for as long as nobody may take it over, it counts
        as it was.

        Raises:
          LockLost: if it is not; in process 0 only, as the others do not write.
        """
        if not is_primary() or (time.monotonic() - self._confirmed < _LOOK_SECONDS and not self._lost):
            return
        try:
            self._lost = self._lost or not self._is_mine()
        except Exception:  # each way to a bucket has errors of its own
            if time.monotonic() - self._confirmed > PATIENCE_SECONDS:
                raise
            return
        if self._lost:
            raise LockLost(
                f"{self._path} is no longer this process's: another run has taken the folder over, or the file was "
                "deleted; this process stops without writing"
            )
        self._confirmed = time.monotonic()

    # --- process 0 ---

    def _take(self) -> None:
        if not is_bucket(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        seen: bytes | None = None
        since = 0.0
        while True:
            with _alone_on_this_machine(self._path.parent):  # not while another start is writing it
                found = self._read()
            holder = _parse(found)
            if _is_of_this_process(holder):
                return
            if found is None or _has_died(holder):
                if self._replace(found, settle=is_bucket(self._path)):
                    break
                continue
            if _is_of_this_machine(holder):
                raise LockHeld(self._describe(holder, "end it first, or choose another folder"), passes=False)
            if found == seen and time.monotonic() - since >= PATIENCE_SECONDS:
                if self._replace(found, settle=True):
                    self._say(f"{self._path} was not renewed for {PATIENCE_SECONDS:.0f} s, and is taken over.")
                    break
                continue
            if found != seen:
                if seen is not None and holder.get("token") == _parse(seen).get("token"):
                    raise LockHeld(self._describe(holder, "wait for its end, or choose another folder"), passes=True)
                self._say(
                    f"{self._path} is of {_name(holder)}: waiting for up to {PATIENCE_SECONDS:.0f} s to see whether "
                    "that is still going on."
                )
                seen, since = found, time.monotonic()
            time.sleep(min(_LOOK_SECONDS, PATIENCE_SECONDS / 10))
        # Renewals go to the file that was taken, and not to the one that has its name by then, which may be another's.
        self._file = None if is_bucket(self._path) else open(self._path, "r+b", buffering=0)  # noqa: SIM115
        self._holds, self._confirmed = True, time.monotonic()
        self._renewing = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._renewing.start()

    def _replace(self, found: bytes | None, settle: bool) -> bool:
        """Put this process's lock in the place of `found`; return False if another process has been faster."""
        with _alone_on_this_machine(self._path.parent):
            if self._read() != found:
                return False
            if found is None and not is_bucket(self._path):
                try:
                    with open(self._path, "xb") as file:
                        file.write(_content(0))
                except FileExistsError:
                    return False
            else:
                replace_file(self._path, _content(0))
            if settle:
                time.sleep(SETTLE_SECONDS)
            return self._is_mine()

    def _renew(self) -> None:
        count = 0
        while not self._lost and not self._finished.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # the next attempt follows; each way to a bucket has errors of its own
                self._lost = not self._is_mine()
                if self._lost:
                    break
                count += 1
                if self._file is None:
                    self._path.write_bytes(_content(count))
                else:
                    os.pwrite(self._file.fileno(), _content(count), 0)
                    os.fsync(self._file.fileno())
                self._confirmed = time.monotonic()

    def _is_mine(self) -> bool:
        return _is_of_this_process(_parse(self._read()))

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _describe(self, holder: dict[str, Any], way_out: str) -> str:
        return f"a run is going on in {self._path.parent}, by {_name(holder)}: {way_out}"


def _content(count: int) -> bytes:
    """Return the lock of this process after a number of renewals."""
    lock = {"token": _TOKEN, "process": os.getpid(), "started": _start_of(os.getpid()), **_machine(), "renewals": count}
    return json.dumps(lock).encode().ljust(_SIZE - 1) + b"\n"


def _parse(content: bytes | None) -> dict[str, Any]:
    """Return what a lock says; nothing if it is missing or damaged."""
    try:
        lock = json.loads(content or b"")
    except ValueError:
        return {}
    return lock if isinstance(lock, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}" if holder else "an unknown process"


def _machine() -> dict[str, str | None]:
    """Return where the ids of processes mean the same as here: a host, since its start, in one container.

    Where the system does not say, no process but this one is known to be on this machine.
    """
    try:
        boot: str | None = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace: str | None = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = None
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _is_of_this_process(holder: dict[str, Any]) -> bool:
    return holder.get("token") == _TOKEN and holder.get("process") == os.getpid()  # a fork has the token too


def _is_of_this_machine(holder: dict[str, Any]) -> bool:
    machine = _machine()
    return machine["boot"] is not None and all(holder.get(name) == value for name, value in machine.items())


def _has_died(holder: dict[str, Any]) -> bool:
    """Return whether a lock is of a process of this machine that is no more."""
    process = holder.get("process")
    if not (_is_of_this_machine(holder) and isinstance(process, int) and 0 < process < 2**31):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        pass
    started = _start_of(process)
    return started is not None and started != holder.get("started")


def _start_of(process: int) -> int | None:
    """Return the time at which a process started, in ticks since the machine did.

    It is −1 for one that has died and that its parent has not asked after yet, and None if the system does not say.
    """
    try:
        state, *fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return -1 if state in "ZX" else int(fields[18])


@contextlib.contextmanager
def _alone_on_this_machine(folder: epath.Path) -> Iterator[None]:
    """Keep other processes of this machine from taking the lock at the same moment, where the system can."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
