"""CPU cores of this process, so that every framework is given the same number of threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def cpu_threads() -> int:
    """Return the number of cores that this process may use; JAX's thread pool has as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def on_cores(threads: int) -> Iterator[None]:
    """Keep this thread, and those it starts, on the first cores; the frameworks size their thread pools by that.

    Raises:
      ValueError: if there are not as many cores, or the system cannot restrict them.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("the number of threads can only be set on Linux")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"threads must lie between 1 and the {len(cores)} cores of this machine, got {threads}")
    os.sched_setaffinity(0, cores[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
