"""Estimates from a few runs, against SciPy, every possible resample and textbook values."""

import itertools

import numpy as np
import pytest
import scipy.stats

from experiments.ablation.intervals import (
    estimate,
    mean_of_strata,
    paired_difference,
    pooled_interquartile_mean,
    probability_of_improvement,
    rate,
)


def scores(*counts, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(stratum, 1.0, count) for stratum, count in enumerate(counts)]


def every_resample(strata):
    """Return all ways to draw each stratum's runs again."""
    drawn = [
        [scores[list(chosen)] for chosen in itertools.product(range(len(scores)), repeat=len(scores))]
        for scores in strata
    ]
    return list(itertools.product(*drawn))


@pytest.mark.parametrize("counts", [(1,), (3,), (4,), (5,), (8,), (3, 5, 4), (40, 17)])
def test_the_interquartile_mean_is_scipys_trimmed_mean(counts):
    strata = scores(*counts)
    found = estimate(strata, resamples=10)
    assert found.value == pytest.approx(scipy.stats.trim_mean(np.concatenate(strata), 0.25), rel=1e-12)
    assert found.runs == sum(counts)


def test_the_interquartile_mean_of_every_resample_of_a_stack():
    stack = np.random.default_rng(1).normal(size=(7, 9))
    expected = [scipy.stats.trim_mean(row, 0.25) for row in stack]
    np.testing.assert_allclose(pooled_interquartile_mean([stack[:, :4], stack[:, 4:]]), expected, rtol=1e-12)


def test_the_mean_of_strata_counts_each_stratum_once():
    assert estimate([[1.0], [2.0, 4.0, 6.0]], mean_of_strata, resamples=10).value == 2.5


@pytest.mark.parametrize("statistic", [pooled_interquartile_mean, mean_of_strata])
@pytest.mark.parametrize("counts", [(4,), (3, 2)])
def test_intervals_are_the_quantiles_of_all_resamples(statistic, counts):
    strata = scores(*counts)
    values = [float(statistic([drawn[None] for drawn in draw])[0]) for draw in every_resample(strata)]
    found = estimate(strata, statistic, resamples=30_000, level=0.8)
    # The bounds are two of finitely many values; with 30,000 draws they are hardly ever a neighbouring value.
    low, high = (np.quantile(values, level, method="inverted_cdf") for level in (0.1, 0.9))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_runs_are_drawn_within_their_stratum_only():
    found = estimate([[0.0, 0.0, 0.0], [10.0, 10.0]], mean_of_strata)
    assert (found.value, found.low, found.high) == (5.0, 5.0, 5.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(400):
        found = estimate([rng.normal(size=20)], mean_of_strata, resamples=400)
        inside += found.low <= 0 <= found.high
    assert 0.88 <= inside / 400 <= 0.98


def test_the_same_seed_gives_the_same_interval():
    assert estimate(scores(5), seed=3, resamples=100) == estimate(scores(5), seed=3, resamples=100)
    assert estimate(scores(5), seed=3, resamples=100) != estimate(scores(5), seed=4, resamples=100)


def test_the_probability_of_improvement_is_the_mann_whitney_statistic():
    ours, theirs = scores(6, 4, seed=5), scores(5, 7, seed=6)
    ours[0][:2] = theirs[0][:2]  # ties
    expected = np.mean(
        [scipy.stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in zip(ours, theirs, strict=True)]
    )
    assert probability_of_improvement(ours, theirs, resamples=10).value == pytest.approx(expected, rel=1e-12)


def test_the_probability_of_improvement_of_both_directions_adds_up():
    ours, theirs = [[1.0, 2.0, 2.0]], [[2.0, 0.0]]
    forward, back = (probability_of_improvement(*sides, resamples=500) for sides in ((ours, theirs), (theirs, ours)))
    assert forward.value + back.value == 1
    assert forward.value == pytest.approx(np.mean([[0, 1], [0.5, 1], [0.5, 1]]))


def test_the_interval_of_an_improvement_is_that_of_all_resamples():
    ours, theirs = np.array([0.0, 1.0, 3.0]), np.array([0.5, 2.0])
    values = [
        np.mean((x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])) for x, y in every_resample([ours, theirs])
    ]
    found = probability_of_improvement([ours], [theirs], resamples=30_000, level=0.7)
    low, high = (np.quantile(values, level, method="inverted_cdf") for level in (0.15, 0.85))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_differences_are_between_runs_of_one_seed():
    ours = [{0: 1.0, 1: 5.0, 7: 100.0}, {0: 2.0}, {3: 9.0}]
    theirs = [{0: 0.5, 1: 4.0, 8: -100.0}, {0: 0.0}, {4: 9.0}]
    found = paired_difference(ours, theirs)
    assert found.value == pytest.approx(((0.5 + 1.0) / 2 + 2.0) / 2)
    assert found.runs == 3
    assert found.low == pytest.approx((0.5 + 2.0) / 2)
    assert found.high == pytest.approx((1.0 + 2.0) / 2)


def test_a_rate_has_wilsons_interval():
    # R: prop.test(3, 5, correct = FALSE)
    found = rate([True, True, True, False, False])
    assert found.value == 0.6
    assert (found.low, found.high) == pytest.approx((0.2307, 0.8824), abs=5e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate([]), "each stratum needs"),
        (lambda: estimate([[1.0], []]), "each stratum needs"),
        (lambda: estimate([[[1.0]]]), "each stratum needs"),
        (lambda: estimate([[1.0, np.nan]]), "not finite"),
        (lambda: probability_of_improvement([[1.0]], [[1.0], [2.0]]), "the same strata, got 1 and 2"),
        (lambda: paired_difference([{0: 1.0}], []), "the same strata, got 1 and 0"),
        (lambda: paired_difference([{0: 1.0}], [{1: 1.0}]), "no seed is on both sides"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
