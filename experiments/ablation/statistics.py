"""What the scores of a few runs allow to say: interquartile means, stratified bootstrap intervals, the probability of
improvement, collapse rates and paired differences.

Pure functions of numpy arrays, in float64. Scores come in strata: one array for each task, or level of difficulty,
with one score a run; runs are drawn again within each stratum, never across. The estimators are those of Agarwal et
al., "Deep reinforcement learning at the edge of the statistical precipice", 2021 (arXiv 2108.13264; their library
rliable), written anew here. With a handful of runs a stratum, percentile intervals of the bootstrap are somewhat too
narrow, and those of a single run have no width at all: they are no substitute for more seeds. This file must never
know where the scores are from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rspo_jax.records import wilson_interval

RESAMPLES = 10_000
_VALUES_AT_ONCE = 2**22  # so that memory stays below some 100 MB


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float
    runs: int
    """That it rests on."""


Statistic = Callable[[list[np.ndarray]], np.ndarray]
"""From strata, each [resamples, runs], to one value a resample."""


def pooled_interquartile_mean(strata: list[np.ndarray]) -> np.ndarray:
    """The mean of the middle half of all scores of all strata; up to 3 scores are all in the middle half.

    As rliable does, a quarter of the scores, rounded down, is left out on either side.
    """
    scores = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def mean_of_strata(strata: list[np.ndarray]) -> np.ndarray:
    """The mean over strata of their means, so that each counts alike whatever its number of runs."""
    return np.mean([scores.mean(axis=-1) for scores in strata], axis=0)


def estimate(
    strata: Sequence[Sequence[float] | np.ndarray],
    statistic: Statistic = pooled_interquartile_mean,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """A statistic of scores with its stratified bootstrap interval (percentiles).

    Args:
      strata: the scores of each stratum, finite, in any number from 1.
      statistic: of them.
      seed: of the draws.
      resamples: how often all runs are drawn again.
      level: the share of the resamples that lies inside.

    Raises:
      ValueError: if there is no stratum, or one is empty or holds what is not finite.
    """
    arrays = _checked(strata)
    value = float(statistic([scores[None] for scores in arrays])[0])
    low, high = _bootstrap(arrays, statistic, seed, resamples, level)
    return Estimate(value, low, high, sum(len(scores) for scores in arrays))


def probability_of_improvement(
    scores: Sequence[Sequence[float] | np.ndarray],
    others: Sequence[Sequence[float] | np.ndarray],
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """How likely a run of the one has a better score than a run of the other: P(X > Y) + P(X = Y) / 2.

    In each stratum over all pairs of runs (the Mann-Whitney statistic divided by their number), then the mean over
    strata. Both sides are drawn again independently.

    Args:
      scores: of the one, by stratum.
      others: of the other, by the same strata.
      seed: of the draws.
      resamples: how often.
      level: of the interval.

    Raises:
      ValueError: if the strata are not as many, or not as `estimate` wants them.
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
    """The mean difference between runs with the same seed: mean over strata, seeds drawn again within each.

    Runs with one seed share their warm start and the order of their prompts, so that the difference varies less than
    either score. Seeds that only one side has are left out, and strata without a common seed.

    Args:
      scores: of the one, by stratum and seed.
      others: of the other, by the same strata and seeds.
      seed: of the draws.
      resamples: how often.
      level: of the interval.

    Raises:
      ValueError: if the strata are not as many, or no seed is common.
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
    """The share of runs to which something happened, with its Wilson interval."""
    happened, count = int(np.sum(events)), len(events)
    low, high = wilson_interval(happened, count)
    return Estimate(happened / count, low, high, count)


def _checked(strata: Sequence[Sequence[float] | np.ndarray]) -> list[np.ndarray]:
    arrays = [np.asarray(scores, np.float64) for scores in strata]
    if not arrays or any(scores.ndim != 1 or scores.size == 0 for scores in arrays):
        raise ValueError(f"each stratum needs a list of 1 score or more, got {[scores.shape for scores in arrays]}")
    if not all(np.isfinite(scores).all() for scores in arrays):
        raise ValueError("a score is not finite: leave such runs out, and say so, or give them the worst score")
    return arrays


def _bootstrap(
    strata: list[np.ndarray], statistic: Statistic, seed: int, resamples: int, level: float
) -> tuple[float, float]:
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
