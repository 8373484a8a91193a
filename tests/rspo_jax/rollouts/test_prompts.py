"""The problems of a step: shuffled epochs of problem indices, and endless streams of problems.

Both are functions of seed and cursor alone.
"""

import numpy as np
import pytest
from support.tasks import Characters

from rspo_jax.rollouts import SamplerConfig, UsableStream, load_problems, take, usable_problems, with_solutions
from rspo_jax.rollouts.conversation import ConversationConfig, limits_of
from rspo_jax.types import ProblemStream


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


class Numbers:
    """A task and its stream: position p of the stream of seed (s, phase) is the text of 10 s + p; tens are held out."""

    tokenizer = Characters("0123456789")

    def problems(self, split):
        return self if split == "train" else ["10", "20"]

    def prompt(self, problem):
        return problem

    def solution(self, problem):
        if problem.endswith("3"):
            raise ValueError("no solution")
        return problem * int(problem[-1])

    def judge(self, problems, responses):
        raise NotImplementedError

    def draw(self, seed, positions):
        numbers = [10 * seed[0] + position for position in positions]
        return [None if number % 10 == 0 else str(number) for number in numbers]


def test_a_stream_is_taken_in_order_without_what_does_not_fit():
    stream = load_problems(Numbers(), 2).train
    assert isinstance(stream, UsableStream) and isinstance(Numbers(), ProblemStream)
    # 0, 10 and 20 are held out; the cursor goes on after the last position that was looked at.
    assert stream.take((0, 1), 0, 12) == (["1", "2", "3", "4", "5", "6", "7", "8", "9", "11", "12", "13"], 14)
    # Two digits fit, so of the stream from 95 on nothing comes after 99.
    assert stream.take((9, 1), 5, 4) == (["95", "96", "97", "98"], 9)
    with pytest.raises(ValueError, match=r"1000 problems in a row were skipped.*max_prompt_tokens, 2: raise"):
        stream.take((9, 1), 5, 6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1), (3, 4), (6, 1)])
def test_a_stream_taken_in_parts_is_the_stream_taken_at_once(sizes):
    stream, cursor, parts = load_problems(Numbers(), 4).train, 0, []
    for size in sizes:
        problems, cursor = stream.take((4, 0), cursor, size)
        parts += problems
    assert parts == stream.take((4, 0), 0, 7).problems == ["41", "42", "43", "44", "45", "46", "47"]


def test_a_warm_start_skips_the_problems_of_a_stream_without_a_solution_that_fits():
    def warm_start(tokens):
        sampler = SamplerConfig(tokens)
        limits = limits_of(Numbers(), sampler, ConversationConfig())
        return with_solutions(Numbers(), load_problems(Numbers(), 2).train, sampler, limits)

    # Two digits twice are four tokens, and the end is the fifth: "2" and "12" fit, "3" and "13" have no solution.
    assert warm_start(5).take((0, 0), 0, 6).problems == ["1", "2", "4", "11", "12", "21"]
    with pytest.raises(ValueError, match="no worked solution within the limits of responses"):
        warm_start(1)


def test_an_endless_stream_is_refused_where_its_end_matters():
    with pytest.raises(ValueError, match=r"endless stream.*set max_prompt_tokens"):
        load_problems(Numbers())
    with pytest.raises(ValueError, match=r"endless stream.*validation or test"):
        usable_problems(Numbers(), Numbers().problems("train"), 2)
    problems = load_problems(Numbers(), 4)
    assert problems.width == 4  # problems to come may need all of it
    assert {split: found.problems for split, found in problems.held_out.items()} == {
        "validation": ["10", "20"],
        "test": ["10", "20"],
    }
