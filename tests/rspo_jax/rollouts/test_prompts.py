"""The stream of problem indices: shuffled epochs, a function of seed and cursor alone. Knows no problem."""

import numpy as np
import pytest

from rspo_jax.rollouts import take


def test_every_epoch_is_a_permutation_of_its_own():
    stream = take(50, (3,), 0, 200)
    epochs = [tuple(stream[start : start + 50]) for start in range(0, 200, 50)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len(set(epochs)) == 4 and tuple(range(50)) not in epochs


@pytest.mark.parametrize("count", [1, 4, 7, 1000])
def test_taking_twice_equals_taking_once(count):
    assert take(count, (0,), 0, 10) + take(count, (0,), 10, 5) == take(count, (0,), 0, 15)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 25])
def test_the_stream_does_not_depend_on_the_batch_size(batch_size):
    stream = [index for cursor in range(0, 100, batch_size) for index in take(7, (1, 2), cursor, batch_size)]
    assert stream[:100] == take(7, (1, 2), 0, 100)


def test_streams_of_different_seeds_differ_and_do_not_disturb_each_other():
    seeds = [(0,), (1,), (0, 0), (0, 1), (1, 0), (5, 1)]
    streams = [take(100, seed, 90, 30) for seed in seeds]
    assert len({tuple(stream) for stream in streams}) == len(seeds)
    assert [take(100, seed, 90, 30) for seed in reversed(seeds)] == streams[::-1]


def test_any_place_of_the_stream_is_reached_at_once():
    stream = take(6, (9,), 6 * 10**12, 12)
    assert sorted(stream[:6]) == sorted(stream[6:]) == list(range(6))


def test_plain_integers_and_nothing_for_nothing():
    assert all(type(index) is int for index in take(5, (0,), 3, 4))
    assert take(5, (0,), 3, 0) == []


def test_first_indices_are_uniform():
    counts = np.bincount([take(4, (seed,), 0, 1)[0] for seed in range(2000)], minlength=4)
    assert np.sum((counts - 500) ** 2 / 500) < 16.27  # the 0.999 quantile of chi-square with 3 degrees of freedom
