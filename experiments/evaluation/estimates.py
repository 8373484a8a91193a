"""Estimates of a model's ability from samples: avg@k, pass@k, maj@k, and intervals of their means.

Pure functions of numpy tables [problems, samples], in float64. Each estimate has one value per problem, the expectation
over all ways to choose k of the samples; means over problems and their intervals come last.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rspo_jax.records import wilson_interval


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


def rate_interval(of_problems: np.ndarray, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a rate: Wilson's, with as many trials as the spread over problems says.

    Samples of one problem are alike to a degree that differs between tasks. A rate r of P problems whose own rates have
    the variance v is worth P · r(1 − r) / v independent trials: P if each problem is solved always or never, as with
    one sample a problem, and at most all P·N samples, if they are independent. At r = 0 and r = 1 nothing is known of
    the spread, and the trials are the problems. The interval has a width even there.

    Source: Dean and Pagano, "Evaluating confidence interval methods for binomial proportions in clustered surveys",
    2015 (Wilson's interval with an effective sample size).

    Args:
      of_problems: float [P], a rate of each problem, in [0, 1].
      samples: number of samples N that a problem's rate comes from.

    Raises:
      ValueError: if there are no problems, or a value is no rate.
    """
    of_problems = np.asarray(of_problems, np.float64)
    rates = np.clip(of_problems, 0, 1)  # a vote's chance to win is a sum of many terms
    if not (rates.ndim == 1 and rates.size and np.allclose(rates, of_problems, rtol=0, atol=1e-9)):
        raise ValueError(f"rates must be [problems] with at least 1 problem, in [0, 1], got {of_problems}")
    problems, rate = rates.size, float(rates.mean())
    once, spread = rate * (1 - rate), float(rates.var())  # variances of one sample, and of a problem's rate
    if once < 1e-9:
        rate, trials = round(rate), problems
    else:
        trials = problems * min(samples, once / spread if spread > 0 else samples)
    return wilson_interval(rate * trials, trials)
