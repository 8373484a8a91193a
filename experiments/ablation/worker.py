"""One run in a process of its own: `python -m experiments.ablation.worker FOLDER --cores 0,1`.

The process confines itself to its cores, waits until no other process works in the folder, and continues the run there.
Its standard input is a pipe that nothing is ever written to: when it closes, the process that started this one is gone,
and this one saves its state and leaves.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

LOCK_FILE = ".lock"


def main() -> int:
    """Run the command; return the exit code of `experiments.train`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--cores", default="")
    options = parser.parse_args()
    if options.cores and hasattr(os, "sched_setaffinity"):
        # Before JAX is imported: XLA makes as many threads as the process may use cores.
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})

    def leave_with_parent() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=leave_with_parent, name="leave with parent", daemon=True).start()
    with locked(options.folder):
        return _run(options.folder)


def _run(folder: str) -> int:
    from experiments import train
    from experiments.config import load_config
    from experiments.errors import complain
    from rspo_jax.records import as_path

    try:
        name, _ = load_config(as_path(folder) / "config.json")
    except ValueError as error:
        return complain(error)
    return train.main([name, "--run-dir", folder, "--resume"])


@contextlib.contextmanager
def locked(folder: str, wait: bool = True) -> Iterator[bool]:
    """Lock a folder against other processes that ask for it; the lock ends with this process at the latest.

    Args:
      folder: the folder's path.
      wait: if true, wait until no other process holds the lock.

    Yields:
      True if this process holds the lock, as it always does after waiting, and on systems without locks.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with open(os.path.join(folder, LOCK_FILE), "ab") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        yield held  # outside of the handler, or an error of the caller would count as the system's


if __name__ == "__main__":
    sys.exit(main())
