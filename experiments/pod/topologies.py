"""TPU topologies by name, such as "v5p:4x4x4": their chips, and pods of doubling size."""

import math

from experiments.compilers.chips import TPUS, Chip

_CUBES = ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SQUARES = ("4x4", "4x8", "8x8", "8x16", "16x16")
_PODS = {"v4": _CUBES, "v5e": _SQUARES, "v5p": _CUBES, "v6e": _SQUARES, "tpu7x": _CUBES}
"""Generation -> topologies of 16, 32, 64, … chips."""


def chip_of(topology: str) -> Chip:
    """Return the chip of a topology.

    Raises:
      ValueError: if the generation is not in the table.
    """
    generation = topology.partition(":")[0]
    if generation not in TPUS:
        raise ValueError(f"unknown TPU generation {generation!r} in {topology!r}; choose one of {', '.join(TPUS)}")
    return TPUS[generation]


def count_chips(topology: str) -> int:
    """Return the number of chips of a topology."""
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))


def pods_of(generation: str, fewest: int = 16, most: int = 512) -> list[str]:
    """Return topologies with `fewest` to `most` chips, each twice as large as the one before.

    Raises:
      ValueError: if the generation is not in the table.
    """
    chip_of(generation)
    pods = [f"{generation}:{pod}" for pod in _PODS[generation]]
    return [pod for pod in pods if fewest <= count_chips(pod) <= most]
