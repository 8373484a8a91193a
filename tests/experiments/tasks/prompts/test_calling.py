"""Calls of reward functions: the keywords that TRL hands over, and what counts as a list of rewards."""

import asyncio
import functools
import math
import time

import numpy as np
import pytest

from experiments.tasks.prompts.calling import (
    Batch,
    Failure,
    OutOfTime,
    call,
    call_asynchronously,
    is_asynchronous,
    limited,
    mistake_of,
)

BATCH = Batch(["p", "q"], ["one", "two"], [[3, 1], [4, 5, 1]], {"answer": ["1", None]}, step=(3, 10))


def no_log(name, value):
    raise AssertionError(name)


def test_a_function_is_called_by_keyword_as_trl_calls_it():
    seen = {}

    def reward(prompts, completions, **kwargs):
        seen.update(prompts=prompts, completions=completions, **kwargs)
        kwargs["log_extra"]("column", ["a", "b"])
        kwargs["log_metric"]("accuracy", 0.5)
        return [1, None]

    logged = []
    assert call(reward, BATCH, lambda *entry: logged.append(entry)) == [1.0, None]
    assert set(seen) == {
        "prompts",
        "completions",
        "completion_ids",
        "answer",
        "trainer_state",
        "log_extra",
        "log_metric",
    }
    assert (seen["prompts"], seen["completions"], seen["answer"]) == (["p", "q"], ["one", "two"], ["1", None])
    assert seen["completion_ids"] == [[3, 1], [4, 5, 1]]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (3, 10)
    assert logged == [("accuracy", 0.5)]


def test_a_function_that_takes_less_gets_what_it_names():
    def few(completions, answer, weight=2.0):
        return [weight * len(completions)] * len(answer)

    assert call(few, BATCH, no_log) == [4.0, 4.0]
    assert call(functools.partial(few, weight=1.0), BATCH, no_log) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([True, np.float32(0.5)], [1.0, 0.5]),
        (np.array([1, 2]), [1.0, 2.0]),
        ((value for value in (0, None)), [0.0, None]),
        ([1.0], "returned 1 rewards for 2 completions: return one for each"),
        ([1.0] * 3, "returned 3 rewards for 2 completions"),
        (1.0, "returned 1.0, not a list of 2 rewards"),
        ("12", "returned '12', not a list of 2 rewards"),
        ({"a": 1.0, "b": 1.0}, "not a list of 2 rewards"),
        (None, "returned None, not a list of 2 rewards"),
        ([1.0, math.nan], [1.0, "returned nan: rewards are finite"]),
        ([-math.inf, 1.0], ["returned -inf: rewards are finite", 1.0]),
        ([1e39, 10**400], ["returned 1e+39: rewards are finite", "which is no number"]),
        (["0.5", 1j], ["returned '0.5', which is no number", "returned 1j, which is no number"]),
        ([[0.5], {}], ["returned [0.5], which is no number", "returned {}, which is no number"]),
    ],
)
def test_what_counts_as_a_list_of_rewards(returned, expected):
    found = call(lambda **_: returned, BATCH, no_log)
    if isinstance(expected, str):
        assert all(isinstance(one, Failure) and expected in one.reason and not one.by_time for one in found)
        return
    for one, wanted in zip(found, expected, strict=True):
        assert (wanted in one.reason) if isinstance(wanted, str) else (one == wanted)


def test_what_a_function_raises():
    def failing(error):
        def reward(**_):
            raise error

        return call(reward, BATCH, no_log)

    for error, words in ((KeyError("x"), "raised KeyError: 'x'"), (SystemExit(3), "raised SystemExit: 3")):
        assert [one.reason for one in failing(error)] == [words] * 2
    assert len(failing(ValueError("x" * 10_000))[0].reason) == 500
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt())


def test_functions_that_wait():
    async def reward(completions, **_):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def late(**_):
        await asyncio.sleep(60)

    async def impatient(**_):
        raise TimeoutError("of its own")

    class Scorer:
        async def __call__(self, **_):
            return [1, 2]

    assert all(map(is_asynchronous, (reward, Scorer(), functools.partial(reward, x=1))))
    assert not any(map(is_asynchronous, (len, lambda: 0, Scorer)))
    for function, expected in ((reward, [3.0, 3.0]), (Scorer(), [1.0, 2.0])):
        assert asyncio.run(call_asynchronously(function, BATCH, no_log, 60)) == expected
    found = asyncio.run(call_asynchronously(late, BATCH, no_log, 0.01))
    assert found == [Failure("did not return within 0.01 s", by_time=True)] * 2
    (found, _) = asyncio.run(call_asynchronously(impatient, BATCH, no_log, 60))
    assert found.reason == "raised TimeoutError: of its own" and not found.by_time


def test_a_limit_of_time_ends_what_catches_every_exception():
    with pytest.raises(OutOfTime), limited(0.05):
        try:
            time.sleep(60)
        except Exception:
            time.sleep(60)
    with limited(60):
        pass
    time.sleep(0.01)  # no alarm is left over


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions, **_: 0, ""),
        (lambda prompts, completions, answer, completion_ids, trainer_state, log_extra, log_metric: 0, ""),
        (lambda completions, other=1, *rest: 0, ""),
        (
            lambda completions, reference, **_: 0,
            "takes reference, but the data has the columns answer: correct the name",
        ),
        (lambda completions, a, *, b: 0, "takes a, b, but the data has"),
        (eval("lambda completions, /, **_: 0"), "takes completions by position only"),
        (min, ""),
    ],
)
def test_functions_that_cannot_be_called_with_the_columns(function, words):
    found = mistake_of(function, ["answer"])
    assert words in found if words else not found
