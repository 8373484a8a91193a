"""Keeps the memory that XLA frees in the process, for programs that run on CPUs.

XLA takes the buffers of a program from the C library anew each time it runs. glibc gives large ones back to the system,
so that every run pays for having every page mapped again, a tenth to a third of the time of a training step. This file
must never know what runs.
"""

import ctypes
import sys

# From glibc's malloc.h; what a name asks for is said beside its value in `_SETTINGS`.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_SETTINGS = {
    _MMAP_THRESHOLD: 1 << 30,  # from the heap, not from the system
    _TRIM_THRESHOLD: (1 << 31) - 1,  # do not shrink the heap
    _TOP_PAD: 1 << 28,  # grow it in large steps
    _ARENA_MAX: 1,  # other arenas than the first are too small for such buffers
}


def keep_freed_memory() -> bool:
    """Sets glibc's allocator to reuse large buffers; call it before anything large is allocated.

    Returns:
      Whether it could be set: only where the C library is glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(setting, value) == 1 for setting, value in _SETTINGS.items())
