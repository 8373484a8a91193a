"""Which problems a step gets: a stream that is a pure function of a seed and a cursor, and so resumes exactly.

This file must never know what a problem is.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    return np.random.default_rng([*seed, epoch]).permutation(count)


def take(count: int, seed: tuple[int, ...], cursor: int, size: int) -> list[int]:
    """The indices at positions cursor … cursor + size − 1 of an endless stream of shuffled epochs.

    Args:
      count: size of the data set; each epoch visits every index once, in an order of its own.
      seed: which stream.
      cursor: how many were taken before.
      size: how many to take.

    Returns:
      `size` indices in [0, count).
    """
    positions = range(cursor, cursor + size)
    return [int(_permutation(count, seed, position // count)[position % count]) for position in positions]
