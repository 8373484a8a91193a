"""Estimates with intervals from the scores of a few runs: interquartile means, probabilities of improvement, paired
differences and rates.

Pure functions of numpy arrays, in float64. Scores come in strata, one array per task or level of difficulty with one
score per run; runs are drawn again within each stratum, never across strata. The estimators are those of Agarwal et
al., "Deep reinforcement learning at the edge of the statistical precipice", 2021 (arXiv 2108.13264; their library
rliable), reimplemented here. With a handful of runs per stratum, percentile intervals of the bootstrap are somewhat too
narrow, and those of a single run have no width at all: they are no substitute for more seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax.records import wilson_interval

RESAMPLES = 10_000
"""Number of times that the bootstrap draws all runs again."""
_VALUES_AT_ONCE = 2**22  # keeps memory below some 100 MB


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float
    runs: int
    """Number of scores that the value rests on."""


Strata = Sequence[Sequence[float] | np.ndarray]
"""Finite scores by stratum, at least one in each."""
Statistic = Callable[[list[np.ndarray]], np.ndarray]
"""A function of strata, each [resamples, runs], that returns [resamples]."""


def pooled_interquartile_mean(strata: list[np.ndarray]) -> np.ndarray:
    """Return the mean of the middle half of all scores of all strata; up to 3 scores all belong to it.

    As in rliable, a quarter of the scores, rounded down, is left out on either side.
    """
    scores = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def mean_of_strata(strata: list[np.ndarray]) -> np.ndarray:
    """Return the mean over strata of their means, so that each stratum counts the same whatever its number of runs."""
    return np.mean([scores.mean(axis=-1) for scores in strata], axis=0)


def estimate(
    strata: Strata,
    statistic: Statistic = pooled_interquartile_mean,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Return a statistic of scores with its stratified bootstrap interval (percentiles).

    Args:
      strata: the scores.
      statistic: the statistic.
      seed: seed of the draws.
      resamples: number of times that all runs are drawn again.
      level: share of the resamples inside the interval.

    Raises:
      ValueError: if there is no stratum, or one is empty or holds a value that is not finite.
    """
    arrays = _checked(strata)
    value = float(statistic([scores[None] for scores in arrays])[0])
    low, high = _bootstrap(arrays, statistic, seed, resamples, level)
    return Estimate(value, low, high, sum(len(scores) for scores in arrays))


def probability_of_improvement(
    scores: Strata,
    others: Strata,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Return the probability that a run X of the one scores better than a run Y of the other.

    P(X > Y) + P(X = Y) / 2 is taken over all pairs of runs of a stratum (the Mann-Whitney statistic divided by their
    number) and averaged over strata. Both sides are drawn again independently.

    Args:
      scores: the scores of the one.
      others: the scores of the other, by the same strata.
      seed: seed of the draws.
      resamples: number of times that all runs are drawn again.
      level: share of the resamples inside the interval.

    Raises:
      ValueError: if the numbers of strata differ, or `estimate` refuses one of them.
    """
    ours, theirs = _checked(scores), _checked(others)
    if len(ours) != len(theirs):
        raise ValueError(f"both sides need the same strata, got {len(ours)} and {len(theirs)}")

    def statistic(both: list[np.ndarray]) -> np.ndarray:
        chances = []
        for ours, theirs in zip(both[::2], both[1::2], strict=True):
            difference = ours[..., :, None] - theirs[..., None, :]
            chances.append(((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-2, -1)))
        return np.mean(chances, axis=0)

    both = [side for pair in zip(ours, theirs, strict=True) for side in pair]
    return estimate(both, statistic, seed, resamples, level)


def paired_difference(
    scores: Sequence[Mapping[int, float]],
    others: Sequence[Mapping[int, float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """Return the mean difference between runs of the same seed: mean over strata, seeds drawn again within each.

    Runs of one seed share their warm start and the order of their prompts, so the difference varies less than either
    score. Seeds that only one side has are left out, as are strata without a common seed.

    Args:
      scores: the scores of the one, by stratum and seed.
      others: the scores of the other, by the same strata and seeds.
      seed: seed of the draws.
      resamples: number of times that all seeds are drawn again.
      level: share of the resamples inside the interval.

    Raises:
      ValueError: if the numbers of strata differ, or no seed is common to both sides.
    """
    if len(scores) != len(others):
        raise ValueError(f"both sides need the same strata, got {len(scores)} and {len(others)}")
    common = [
        [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        for ours, theirs in zip(scores, others, strict=True)
    ]
    common = [differences for differences in common if differences]
    if not common:
        raise ValueError("no seed is on both sides")
    return estimate(common, mean_of_strata, seed, resamples, level)


def rate(events: Sequence[bool] | np.ndarray) -> Estimate:
    """Return the share of runs to which an event happened, with its 95 % Wilson interval."""
    happened, count = int(np.sum(events)), len(events)
    low, high = wilson_interval(happened, count)
    return Estimate(happened / count, low, high, count)


def _checked(strata: Strata) -> list[np.ndarray]:
    arrays = [np.asarray(scores, np.float64) for scores in strata]
    if not arrays or any(scores.ndim != 1 or scores.size == 0 for scores in arrays):
        raise ValueError(f"each stratum needs a list of at least 1 score, got {[scores.shape for scores in arrays]}")
    if not all(np.isfinite(scores).all() for scores in arrays):
        raise ValueError("a score is not finite: leave such runs out and report it, or give them the worst score")
    return arrays


def _bootstrap(
    strata: list[np.ndarray], statistic: Statistic, seed: int, resamples: int, level: float
) -> tuple[float, float]:
    """Return the bounds between which a share `level` of the resampled statistics lies."""
    generator = np.random.default_rng(seed)
    largest = max(len(scores) for scores in strata)
    block = max(1, _VALUES_AT_ONCE // (largest**2 * len(strata)))
    values = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = [scores[generator.integers(len(scores), size=(rows, len(scores)))] for scores in strata]
        values.append(statistic(drawn))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
