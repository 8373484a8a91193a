"""Estimates avg@k, pass@k and maj@k against every subset, and the interval of a rate."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from experiments.evaluation.estimates import avg_at_k, majority_at_k, pass_at_k, rate_interval


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


@pytest.mark.parametrize(
    ("rates", "samples", "low", "high"),
    [
        # Wilson's upper bound at 0 of n is z² / (n + z²), z² = 3.8415.
        ([0, 0], 1, 0.0, 0.6576),
        ([1, 1], 1, 0.3424, 1.0),
        ([0], 1, 0.0, 0.7935),
        # Sixteen samples of two problems are no more than two trials, as all samples of a problem may be alike.
        ([0, 0], 8, 0.0, 0.6576),
        # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3.
        ([1] * 81 + [0] * 182, 1, 0.2553, 0.3662),
        ([1] * 81 + [0] * 182, 4, 0.2553, 0.3662),
        # Equal rates of all problems: 4 · 2 independent trials, half of them right: 1/2 ± 1/2 · √(z² / (n + z²)).
        ([0.5] * 4, 2, 0.2152, 0.7848),
        # r = 3/8, v = 11/64: 4 · (15/64) / (11/64) = 60/11 trials, z²/n = 0.7043, and (0.7271 ± 0.5376) / 1.7043.
        ([0, 0, 1, 0.5], 2, 0.1112, 0.7421),
        ([1e-12, 0], 1, 0.0, 0.6576),
        ([1 + 1e-12, 1], 2, 0.3424, 1.0),
    ],
    ids=str,
)
def test_the_interval_of_a_rate(rates, samples, low, high):
    np.testing.assert_allclose(rate_interval(np.array(rates), samples), (low, high), atol=6e-5)


def test_the_interval_of_a_rate_covers_it_whether_samples_are_alike_or_not():
    """Of intervals from problems whose own rates vary, about 95 % hold the mean rate."""
    random = np.random.default_rng(0)
    for concentration in (0.2, 2.0, 1000.0):  # from problems solved always or never to problems of one rate
        held = 0
        for _ in range(400):
            rates = random.beta(0.3 * concentration, 0.7 * concentration, size=60)
            low, high = rate_interval(random.binomial(8, rates) / 8, 8)
            held += low <= 0.3 <= high
        assert 0.92 * 400 <= held <= 0.985 * 400


@pytest.mark.parametrize("rates", [[], [1.1], [-0.1, 0.5], [np.nan], [[0.5]]], ids=str)
def test_what_is_no_rate(rates):
    with pytest.raises(ValueError, match="rates must be"):
        rate_interval(np.array(rates), 1)
