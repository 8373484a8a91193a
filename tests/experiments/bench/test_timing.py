"""Times in turns: the order of the calls, the ratios of a turn, and the interval of a median."""

import numpy as np
import pytest
import scipy.stats

from experiments.bench import timing


def test_ratios_are_taken_turn_by_turn():
    # The machine was four times slower in the second turn; the ratios do not see it.
    ratios = timing.paired_ratios([2.0, 8.0, 2.0], [1.0, 4.0, 1.0])
    assert ratios == [2.0, 2.0, 2.0] and timing.quartiles(ratios) == (2.0, 2.0, 2.0)
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([1.5]) == (1.5, 1.5, 1.5)


def test_a_range_is_shown_with_its_digits():
    assert timing.Quartiles(1.0, 2.0, 3.456).range() == "1.00 – 3.46"
    assert timing.Quartiles(1.0, 2.0, 3.456).range(1) == "1.0 – 3.5"


@pytest.mark.parametrize("count", [6, 7, 20, 101, 150])
def test_the_interval_of_a_median_is_that_of_the_sign_test(count):
    values = np.random.default_rng(count).lognormal(size=count)
    expected = scipy.stats.quantile_test(values, q=1.0, p=0.5).confidence_interval(0.95)
    assert timing.median_interval(list(values)) == (expected.low, expected.high)


def test_few_values_have_no_interval():
    assert timing.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None


def test_calls_take_turns_in_alternating_order_and_the_second_of_two_counts(monkeypatch):
    log, clock = [], iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: log.append("clock") or next(clock))
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    seconds = timing.interleaved_seconds({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, 3)
    a, b = (["a", "clock", "a", "clock"], ["b", "clock", "b", "clock"])
    assert log == [*a, *b, *b, *a, *a, *b] and seconds == {"a": [1] * 3, "b": [1] * 3}


def test_a_steady_drift_cancels_over_two_turns():
    clock = iter(range(6))
    measured = timing.take_turns({name: lambda: next(clock) for name in "abc"}, 2)
    assert {sum(values) for values in measured.values()} == {5}
