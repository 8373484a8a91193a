"""The guessing game: its problems, hints and verdicts, written down by hand, and its worked conversations."""

import pytest

from experiments.tasks.guess import GuessConfig, GuessTask
from experiments.tasks.guess.game import Problem
from rspo_jax.types import DemonstrationTask, Judgement

TASK, PROBLEM = GuessTask(), Problem(35, 50, 45)
SPLITS = ("train", "validation", "test")


def test_every_range_is_in_one_split_with_all_of_its_numbers():
    whole = GuessTask(GuessConfig(held_out=10_000))
    problems = {split: whole.problems(split) for split in SPLITS}
    every = [
        (low, low + size - 1, low + n) for size in range(8, 17) for low in range(1, 101 - size) for n in range(size)
    ]
    assert sorted(problem for of_split in problems.values() for problem in of_split) == sorted(every)
    ranges = [{problem[:2] for problem in of_split} for of_split in problems.values()]
    assert sum(map(len, ranges)) == len(set.union(*ranges)) == sum(100 - size for size in range(8, 17))
    assert TASK.problems("train") == problems["train"]
    assert [TASK.problems(split) for split in SPLITS[1:]] == [problems[split][:512] for split in SPLITS[1:]]
    assert GuessTask(GuessConfig(seed=1)).problems("test") != TASK.problems("test") == GuessTask().problems("test")


def test_prompts_and_everything_that_is_said_are_one_token_a_character():
    assert isinstance(TASK, DemonstrationTask)
    assert TASK.prompt(PROBLEM) == "35-50:"
    for text in ("35-50:", "higher", "lower", "0123456789"):
        ids = TASK.tokenizer.encode(text)
        assert len(ids) == len(text) and TASK.tokenizer.decode([*ids, 1, 0]) == text
        assert min(ids) > 1 and max(ids) < TASK.tokenizer.vocabulary_size


@pytest.mark.parametrize(
    ("guess", "hint", "won"),
    [
        ("42", "higher", False),
        ("46", "lower", False),
        ("99", "lower", False),
        ("045", None, True),
        ("45", None, True),
        ("", None, False),
        ("4 5", None, False),
        ("higher", None, False),
        ("-45", None, False),
        ("４５", None, False),
        ("9" * 9, "lower", False),
        ("9" * 5000, None, False),
    ],
)
def test_hints_and_verdicts(guess, hint, won):
    conversation = ("40", "higher", guess)
    assert TASK.respond(PROBLEM, conversation) == hint
    assert TASK.judge([PROBLEM], [conversation]) == [Judgement(float(won), won)]


def test_worked_conversations_guess_what_the_hints_have_left():
    problems, won, firsts = TASK.problems("train"), 0, set()
    for problem in problems:
        turns = TASK.demonstration(problem)
        assert turns == TASK.demonstration(problem) and len(turns) in (1, 3, 5, 7)
        possible = set(range(problem.low, problem.high + 1))
        for index, guess in enumerate(map(int, turns[::2])):
            assert guess in possible
            hint = TASK.respond(problem, turns[: 2 * index + 1])
            assert turns[2 * index + 1 : 2 * index + 2] == ([hint] if 2 * index + 1 < len(turns) else [])
            possible = {number for number in possible if (number > guess) == (hint == "higher") and number != guess}
        firsts.add(int(turns[0]) - problem.low)
        won += turns[-1] == str(problem.number)
    assert firsts == set(range(16))
    assert 0.6 < won / len(problems) < 0.75


def test_impossible_games_are_refused():
    for changes, message in (
        ({"smallest": 1}, r"a range needs 2 or more numbers, up to 99 \(task.highest\), .* task.smallest is 1 and"),
        ({"largest": 100}, "task.smallest is 8 and task.largest 100"),
        ({"largest": 7}, "task.smallest is 8 and task.largest 7"),
        ({"guesses": 0}, "task.guesses must be at least 1, got 0"),
        ({"held_out": 0}, "task.held_out must be at least 1, got 0"),
        (
            {"smallest": 2, "largest": 2, "highest": 2},
            "too few to leave games for the validation split: raise task.highest",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            GuessConfig(**changes).check()
