"""The generator of Countdown problems, against a brute-force solver and Python's own parser."""

import ast
import dataclasses
import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.tasks.countdown import problems as problems_module
from experiments.tasks.countdown.problems import (
    SPLITS,
    CountdownConfig,
    Problem,
    generate_problems,
)
from experiments.tasks.countdown.verifier import verify

ROOT = Path(__file__).parents[4]

CONFIGS = [
    CountdownConfig(train=300, validation=30, test=60),
    CountdownConfig(2, 2, low=1, high=12, target_max=50, train=60, validation=5, test=5),
    CountdownConfig(2, 5, low=1, high=30, target_max=200, seed=3, train=400, validation=9, test=9),
    CountdownConfig(4, 4, low=5, high=9, target_max=999, seed=-1, train=200, validation=9, test=9),
    CountdownConfig(5, 5, low=1, high=100, target_max=999, train=100, validation=5, test=5),
]


def key_of(problem: Problem) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(problem.numbers)), problem.target


@functools.cache
def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Return all values of expressions over all of the sorted numbers, without negative or fractional steps."""
    if len(numbers) == 1:
        return frozenset(numbers)
    found: set[int] = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = tuple(numbers[i] for i in chosen)
            right = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            for a, b in itertools.product(reachable(left), reachable(right)):
                found |= {a + b, a * b}
                if a >= b:
                    found.add(a - b)
                if b > 0 and a % b == 0:
                    found.add(a // b)
    return frozenset(found)


def value_in_whole_steps(node: ast.expr) -> int:
    """Return the value of a parsed solution; fail at a step that is negative or fractional."""
    if isinstance(node, ast.Constant):
        assert type(node.value) is int
        return node.value
    assert isinstance(node, ast.BinOp)
    left, right = value_in_whole_steps(node.left), value_in_whole_steps(node.right)
    if isinstance(node.op, ast.Div):
        assert right != 0
        assert left % right == 0
        return left // right
    value = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
    assert value >= 0
    return value


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_is_within_its_config_and_solved_by_its_solution(config, split):
    problems = list(generate_problems(config, split))
    assert len(problems) == getattr(config, split)
    for problem in problems:
        assert config.numbers_min <= len(problem.numbers) <= config.numbers_max
        assert all(config.low <= number <= config.high for number in problem.numbers)
        assert 1 <= problem.target <= config.target_max
        verdict = verify(problem.solution, problem.numbers, problem.target)
        assert verdict.correct, (problem, verdict)


@pytest.mark.parametrize("config", CONFIGS)
def test_solutions_take_whole_steps_and_have_no_needless_parentheses(config):
    for problem in generate_problems(config, "train"):
        tree = ast.parse(problem.solution, mode="eval").body
        assert value_in_whole_steps(tree) == problem.target
        # Python prints only the parentheses that keep its own tree; of these, the ones on the
        # right of + around + and - and on the right of * around * and / change no value.
        assert ast.unparse(tree).replace(" ", "") == problem.solution
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.right, ast.BinOp):
                if isinstance(node.op, ast.Add):
                    assert not isinstance(node.right.op, (ast.Add, ast.Sub))
                if isinstance(node.op, ast.Mult):
                    assert not isinstance(node.right.op, (ast.Mult, ast.Div))


@pytest.mark.parametrize(
    ("config", "solved"),
    [(CONFIGS[0], 300), (CONFIGS[1], 60), (CONFIGS[2], 40), (CONFIGS[4], 4)],
)
def test_a_brute_force_solver_reaches_every_target(config, solved):
    for problem in itertools.islice(generate_problems(config, "train"), solved):
        assert problem.target in reachable(tuple(sorted(problem.numbers)))


def test_parentheses_and_all_operations_occur():
    text = "".join(problem.solution for problem in generate_problems(CONFIGS[2], "train"))
    for piece in ("+", "-", "*", "/", "-(", "/(", ")*", ")/"):
        assert piece in text, piece


def test_every_count_of_numbers_is_drawn_about_equally_often():
    config = CountdownConfig(2, 5, high=100, target_max=10_000, train=1_000)
    counts = [len(problem.numbers) for problem in generate_problems(config, "train")]
    for count in range(2, 6):
        assert 150 < counts.count(count) < 350


def test_the_splits_together_hold_exactly_the_problems_that_exist():
    config = CountdownConfig(2, 2, low=1, high=9, target_max=60, train=600, validation=90, test=90)
    expected = {
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 10), 2)
        for target in reachable(numbers)
        if 1 <= target <= 60
    }
    found = []
    for split in SPLITS:
        problems = generate_problems(config, split)
        with pytest.raises(ValueError, match="were found"):
            while True:
                found.append(key_of(next(problems)))
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.parametrize("config", CONFIGS)
def test_no_problem_occurs_twice_in_any_order_of_its_numbers(config):
    keys = [key_of(problem) for split in SPLITS for problem in generate_problems(config, split)]
    assert len(keys) == len(set(keys))


def test_splits_of_different_configs_with_one_seed_share_no_problem():
    few = CountdownConfig(train=4_000)
    wide = CountdownConfig(2, 4, low=1, high=15, target_max=60, train=8_000, test=600)
    keys = {
        (name, split): {key_of(problem) for problem in generate_problems(config, split)}
        for name, config in (("few", few), ("wide", wide))
        for split in SPLITS
    }
    assert keys["few", "train"] & keys["wide", "train"]
    assert not keys["few", "train"] & keys["wide", "test"]
    assert not keys["wide", "train"] & keys["few", "test"]
    assert not keys["wide", "train"] & keys["few", "validation"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_depends_on_neither_earlier_calls_nor_the_sizes_of_other_splits(split):
    config = CONFIGS[0]
    first = list(generate_problems(config, split))
    assert list(generate_problems(config, split)) == first
    others = {other: 7 for other in SPLITS if other != split}
    assert list(generate_problems(dataclasses.replace(config, **others), split)) == first
    larger = dataclasses.replace(config, **{split: 2 * len(first)})
    assert list(generate_problems(larger, split))[: len(first)] == first


def test_the_seed_changes_the_problems():
    first = list(generate_problems(CONFIGS[0], "test"))
    assert list(generate_problems(dataclasses.replace(CONFIGS[0], seed=1), "test")) != first


def test_known_problems_of_the_default_config():
    # If this fails on purpose, raise the VERSION of the data set builder too.
    problems = list(itertools.islice(generate_problems(CountdownConfig(), "test"), 3))
    assert problems == [
        Problem((8, 12, 2), 2, "12/(8-2)"),
        Problem((16, 19, 14), 11, "14-(19-16)"),
        Problem((14, 7, 1), 22, "7+1+14"),
    ]


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_problems_do_not_depend_on_the_hash_seed_of_the_process(hash_seed):
    code = (
        "from experiments.tasks.countdown.problems import *\n"
        "config = CountdownConfig(train=50)\n"
        "print([list(problem) for problem in generate_problems(config, 'train')])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": hash_seed},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    here = [Problem(*fields) for fields in ast.literal_eval(output)]
    assert here == list(generate_problems(CountdownConfig(train=50), "train"))


def test_an_exhausted_space_is_reported_with_what_was_found():
    # With one number only, 5+5, 5*5, 5/5 exist: three problems in all.
    config = CountdownConfig(2, 2, low=5, high=5, train=20, validation=20, test=20)
    found = 0
    for split in SPLITS:
        with pytest.raises(ValueError, match=r"Only \d of the 20 problems") as error:
            list(generate_problems(config, split))
        found_here = int(str(error.value).split()[1])
        assert f"set {split} to at most {found_here}" in str(error.value)
        exact = dataclasses.replace(config, **{split: found_here})
        assert len(list(generate_problems(exact, split))) == found_here
        found += found_here
    assert found == 3


def test_the_generator_gives_up_after_its_limit_of_draws(monkeypatch):
    draws = 0
    original = problems_module._draw_problem

    def counted(*arguments):
        nonlocal draws
        draws += 1
        return original(*arguments)

    monkeypatch.setattr(problems_module, "_MAX_DRAWS_WITHOUT_NEW", 50)
    monkeypatch.setattr(problems_module, "_draw_problem", counted)
    config = CountdownConfig(2, 2, low=5, high=5, train=4, validation=0, test=0)
    with pytest.raises(ValueError, match="were found"):
        list(generate_problems(config, "train"))
    assert draws <= 3 * 51 + 50


def test_a_split_of_size_zero_is_empty():
    assert list(generate_problems(CountdownConfig(validation=0), "validation")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers_min": 1}, "set numbers_min to at least 2"),
        ({"numbers_min": -3}, "set numbers_min to at least 2"),
        ({"numbers_min": 4}, r"numbers_min \(4\) is larger than numbers_max \(3\)"),
        ({"low": 0}, "set low to at least 1"),
        ({"low": -5}, "set low to at least 1"),
        ({"low": 21}, r"low \(21\) is above high \(20\); exchange them"),
        ({"target_max": 0}, "set target_max to at least 1"),
        ({"high": 2**31}, "set high to at most 2147483647"),
        ({"target_max": 2**31}, "set target_max to at most 2147483647"),
        ({"train": -1}, "set train to 0 or more"),
        ({"validation": -1}, "set validation to 0 or more"),
        ({"test": -1}, "set test to 0 or more"),
        # 1,540 ways to choose three of twenty numbers, 100 targets
        ({"train": 152_501}, "154001 problems are asked for"),
        ({"low": 20}, "there are only 1 ways"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_drawn(changes, message):
    config = CountdownConfig(**changes)
    with pytest.raises(ValueError, match=message):
        config.check()
    with pytest.raises(ValueError, match=message):
        generate_problems(config, "train")


@pytest.mark.parametrize(
    "changes",
    [{}, {"train": 152_500}, {"train": 0, "validation": 0, "test": 0}, {"seed": -1}],
)
def test_a_possible_config_is_accepted(changes):
    CountdownConfig(**changes).check()


@pytest.mark.parametrize("split", ["Train", "all", "", "train[:10]"])
def test_an_unknown_split_is_refused_at_once(split):
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        generate_problems(CountdownConfig(), split)
