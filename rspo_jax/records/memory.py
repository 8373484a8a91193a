"""The peak of memory so far: of the devices where they tell, else of this process."""

import resource
import sys

import jax

_KIBIBYTES_PER_GIB = 2**20


def peak_memory_gib() -> float:
    """Return the most memory in use so far, in GiB.

    Of this process's devices it is that of the fullest one, if they count their memory. CPUs do not: there it is the
    peak of the process's resident set, which the host's own data, programs and compilers belong to.
    """
    counted = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    peaks = [stats["peak_bytes_in_use"] for stats in counted if "peak_bytes_in_use" in stats]
    if peaks:
        return max(peaks) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return resident / (2**30 if sys.platform == "darwin" else _KIBIBYTES_PER_GIB)
