"""Estimates of a model's ability from samples: avg@k, pass@k, maj@k, and intervals of their means.

Pure functions of numpy tables [problems, samples], in float64. Each estimate has one value per problem, the expectation
over all ways to choose k of the samples; means over problems and their intervals come last.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def avg_at_k(correct: np.ndarray) -> np.ndarray:
    """Return the share of right responses to each problem, which equals pass@1.

    Args:
      correct: bool [P, N].

    Returns:
      float64 [P].
    """
    return np.asarray(correct, bool).mean(axis=1, dtype=np.float64)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Return the probability that k of the samples, drawn without replacement, contain a right one.

    With c right samples among n it is 1 − C(n − c, k) / C(n, k).

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021, equation 1.

    Args:
      correct: bool [P, N].
      k: from 1 to N.

    Returns:
      float64 [P].

    Raises:
      ValueError: if there are not k samples.
    """
    correct = np.asarray(correct, bool)
    samples = _check_k(correct, k)
    wrong = samples - correct.sum(axis=1)
    # C(n − c, k) / C(n, k) is a product of k ratios; the binomials themselves would overflow.
    steps = np.arange(k)
    ratios = np.clip((wrong[:, None] - steps[None, :]) / (samples - steps)[None, :], 0.0, None)
    return 1.0 - np.prod(ratios, axis=1)


def majority_at_k(answers: Sequence[Sequence[str | None]], correct: np.ndarray, k: int) -> np.ndarray:
    """Return the probability that the most common answer among k of the samples, drawn without replacement, is right.

    Equal answers vote together, and None does not vote. Ties are broken at random. If none of the k samples has an
    answer, the vote is lost. If the judge called only some of several equal answers right, one of them is chosen at
    random.

    Args:
      answers: [P, N], in a form in which answers of the same meaning are equal.
      correct: bool [P, N].
      k: from 1 to N.

    Returns:
      float64 [P].

    Raises:
      ValueError: if there are not k samples, or more than 1,000 samples.
    """
    correct = np.asarray(correct, bool)
    if _check_k(correct, k) > 1000:
        raise ValueError(f"votes are counted among at most 1000 samples, got {correct.shape[1]}")
    return np.array([_majority(row, right, k) for row, right in zip(answers, correct, strict=True)], np.float64)


def _check_k(correct: np.ndarray, k: int) -> int:
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie between 1 and the {samples} samples, got {k}")
    return samples


def _majority(answers: Sequence[str | None], correct: np.ndarray, k: int) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    right = Counter(answer for answer, is_right in zip(answers, correct, strict=True) if is_right)
    chance = 0.0
    for answer, count in votes.items():
        if right[answer]:
            others = votes.copy()
            del others[answer]
            chance += right[answer] / count * _chance_to_win(count, tuple(sorted(others.values())), len(answers), k)
    return chance


@functools.lru_cache(maxsize=65536)
def _chance_to_win(own: int, others: tuple[int, ...], samples: int, k: int) -> float:
    """Return the probability that one group of equal answers wins the vote of k samples.

    A tie with t other groups counts as 1 / (t + 1) of a win. The draws are counted: for each number of own votes, the
    other groups are added one after the other, and `ways[chosen, tied]` is the number of ways to draw `chosen` samples
    from them such that `tied` of them have as many votes.

    Args:
      own: size of the group.
      others: sizes of the other groups.
      samples: number of all samples, including those without an answer.
      k: number of samples drawn.
    """
    silent = samples - own - sum(others)
    total = 0.0
    for votes in range(1, min(own, k) + 1):
        rest = k - votes
        ways = np.zeros((rest + 1, min(len(others), rest // votes) + 1))
        # Counts are in units of 2^(size of the group), which keeps them below 1.
        ways[: min(silent, rest) + 1, 0] = [_scaled_binomial(silent, drawn) for drawn in range(min(silent, rest) + 1)]
        for size in others:
            # Up to `votes` samples come from each other group; with more, that group would win.
            added = np.zeros_like(ways)
            for drawn in range(min(size, votes, rest) + 1):
                tied = int(drawn == votes)
                added[drawn:, tied:] += _scaled_binomial(size, drawn) * ways[: rest + 1 - drawn, : ways.shape[1] - tied]
            ways = added
        total += _scaled_binomial(own, votes) * float(np.sum(ways[rest] / np.arange(1, ways.shape[1] + 1)))
    return total / _scaled_binomial(samples, k)


@functools.lru_cache(maxsize=65536)
def _scaled_binomial(size: int, drawn: int) -> float:
    """Return C(size, drawn) / 2^size."""
    return math.comb(size, drawn) / 2**size


def bootstrap_intervals(
    values: np.ndarray, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return percentile intervals of means over problems, from problems drawn with replacement.

    They show how far the means would move with other problems of the same kind. If all problems have the same value,
    they have no width, however few the problems are.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Args:
      values: float [P, M], M quantities of P problems; all quantities see the same draws.
      seed: seed of the draws.
      resamples: number of times that P problems are drawn.
      level: share of the means inside the interval.

    Returns:
      The lower and the upper bounds, each float64 [M].

    Raises:
      ValueError: if there are no problems, or the values are no table.
    """
    values = np.asarray(values, np.float64)
    count = values.shape[0]
    if not (values.ndim == 2 and count >= 1):
        raise ValueError(f"values must be [problems, quantities] with at least 1 problem, got shape {values.shape}")
    generator = np.random.default_rng(seed)
    block = max(1, 2**22 // count)  # keeps memory below some 100 MB
    means = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.reshape(-1), minlength=rows * count).reshape(rows, count)
        means.append(weights @ values / count)
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
