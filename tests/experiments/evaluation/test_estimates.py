"""Estimates avg@k, pass@k and maj@k against every subset, and bootstrap intervals against every resample."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from experiments.evaluation.estimates import avg_at_k, bootstrap_intervals, majority_at_k, pass_at_k


def random_table(seed, problems=6, samples=6):
    """Return answers a to d or None, and verdicts: a is right, and b is now and then, as if the judge wavered."""
    generator = np.random.default_rng(seed)
    answers = generator.choice(np.array(["a", "b", "c", "d", None], object), (problems, samples))
    correct = (answers == "a") | ((answers == "b") & (generator.random(answers.shape) < 0.3))
    return [list(row) for row in answers], correct


def vote(answers, correct):
    """Return the probability that the winner of a vote is right, counting one ballot after the other."""
    counts = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        return Fraction(0)
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    shares = []
    for winner in winners:
        verdicts = [bool(right) for answer, right in zip(answers, correct, strict=True) if answer == winner]
        shares.append(Fraction(sum(verdicts), len(verdicts)))
    return sum(shares) / len(winners)


def mean_over_subsets(function, samples, k):
    values = [function(list(chosen)) for chosen in itertools.combinations(range(samples), k)]
    return float(sum(values, Fraction(0)) / len(values))


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    _, correct = random_table(seed=k)
    expected = [mean_over_subsets(lambda chosen, row=row: Fraction(int(row[chosen].any())), 6, k) for row in correct]
    np.testing.assert_allclose(pass_at_k(correct, k), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("seed", range(5))
def test_majority_at_k_is_the_mean_over_all_subsets(seed, k):
    answers, correct = random_table(seed)
    expected = [
        mean_over_subsets(lambda chosen, a=a, c=c: vote([a[index] for index in chosen], c[chosen]), 6, k)
        for a, c in zip(answers, correct, strict=True)
    ]
    np.testing.assert_allclose(majority_at_k(answers, correct, k), expected, rtol=0, atol=1e-13)


def test_votes_by_hand():
    right = np.array([[True, False, False, False]])
    assert majority_at_k([["1", "2", "2", "3"]], right, 4) == [0.0]
    assert majority_at_k([["1", "2", "3", None]], right, 4) == pytest.approx([1 / 3])
    assert majority_at_k([["1", None, None, None]], right, 4) == [1.0]
    assert majority_at_k([[None, None, None, None]], np.zeros((1, 4), bool), 2) == [0.0]


def test_a_right_response_without_an_answer_does_not_vote():
    assert majority_at_k([[None, "2"]], np.array([[True, False]]), 2) == [0.0]


def test_one_sample_is_the_share_of_right_ones():
    answers, correct = random_table(seed=3)
    np.testing.assert_allclose(pass_at_k(correct, 1), avg_at_k(correct), atol=1e-15)
    np.testing.assert_allclose(majority_at_k(answers, correct, 1), avg_at_k(correct), atol=1e-15)
    np.testing.assert_array_equal(avg_at_k(correct), [sum(row) / 6 for row in correct.tolist()])


def test_a_thousand_samples_do_not_overflow():
    correct = np.arange(1000)[None, :] < 1
    # The one right answer among a thousand is among 500 of them every other time.
    np.testing.assert_allclose(pass_at_k(correct, 500), [0.5], rtol=1e-12)
    answers = [["right", *["wrong"] * 399, *[None] * 600]]
    np.testing.assert_allclose(majority_at_k(answers, correct, 1), [0.001], rtol=1e-9)
    two = np.arange(1000)[None, :] < 500
    np.testing.assert_allclose(majority_at_k([["a"] * 500 + ["b"] * 500], two, 1000), [0.5], rtol=1e-9)
    np.testing.assert_allclose(majority_at_k([["a"] * 500 + ["b"] * 500], two, 64), [0.5], rtol=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_more_responses_than_there_are(k):
    with pytest.raises(ValueError, match=f"k must lie between 1 and the 4 samples, got {k}"):
        pass_at_k(np.zeros((2, 4), bool), k)
    with pytest.raises(ValueError, match="between 1 and the 4 samples"):
        majority_at_k([["a"] * 4] * 2, np.zeros((2, 4), bool), k)


def test_too_many_votes():
    with pytest.raises(ValueError, match="at most 1000 samples, got 1001"):
        majority_at_k([["a"] * 1001], np.zeros((1, 1001), bool), 2)


def test_the_interval_holds_what_all_resamples_say():
    """The bounds are the exact quantiles of all 5^5 equally likely resamples, whose neighbours are well away."""
    values = np.array([0.0, 0.25, 0.5, 1.0, 1.0])
    means = np.sort([np.mean(values[list(rows)]) for rows in itertools.product(range(5), repeat=5)])
    low, high = bootstrap_intervals(np.stack([values, 2 * values], axis=1), seed=1)
    for level, bound in ((0.025, low), (0.975, high)):
        below, at = np.mean(means < bound[0] - 1e-12), np.mean(means <= bound[0] + 1e-12)
        # The standard error of the quantile's level with 10,000 resamples is 0.0016.
        assert below < level + 0.008
        assert at > level - 0.008
    np.testing.assert_allclose(low[1], 2 * low[0])
    np.testing.assert_allclose(high[1], 2 * high[0])


def test_the_interval_shrinks_as_theory_says_and_depends_on_the_seed_alone():
    values = (np.arange(800) % 2).astype(np.float64)[:, None]
    low, high = bootstrap_intervals(values, seed=4)
    # A coin of 800 throws: the normal interval is ±1.96 · 0.5 / √800.
    np.testing.assert_allclose([low[0], high[0]], [0.5 - 0.03465, 0.5 + 0.03465], atol=0.002)
    again = bootstrap_intervals(values, seed=4)
    assert (again[0][0], again[1][0]) == (low[0], high[0])
    assert bootstrap_intervals(values[:200] * 1.0, seed=5)[0] < low


def test_values_without_spread_have_no_width():
    low, high = bootstrap_intervals(np.ones((7, 1)))
    assert (low[0], high[0]) == (1.0, 1.0)


def test_nothing_to_resample():
    with pytest.raises(ValueError, match="at least 1 problem"):
        bootstrap_intervals(np.ones((0, 2)))
