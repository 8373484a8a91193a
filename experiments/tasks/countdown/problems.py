"""Countdown problems, their settings, and the random generator that draws them.

Every problem is made from a random expression over its numbers, so that it has a solution by construction. The split
of a problem follows from the problem alone.
"""

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

SPLITS = ("train", "validation", "test")

# A problem's hash falls into one of ten equal buckets. The shares are fixed, so that the size of one split never moves
# a problem out of another.
_BUCKET_TO_SPLIT = ("train",) * 8 + ("validation", "test")

# Draws in a row without a new problem of the wanted split, after which the generator gives up. With the default config,
# the test split needs about 13 draws per problem at first, and 70 once 1,200 of its 1,700 problems have been found.
_MAX_DRAWS_WITHOUT_NEW = 20_000

_INT32_MAX = 2**31 - 1

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_LITERAL_PRECEDENCE = 3


class Problem(NamedTuple):
    """One Countdown problem.

    Attributes:
        numbers: the given numbers, in the order in which they are shown.
        target: the value to reach.
        solution: an expression that uses every number exactly once and equals the target. No step of it has a
            negative or a fractional result. Other solutions may exist.
    """

    numbers: tuple[int, ...]
    target: int
    solution: str


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """The settings of Countdown problems. The defaults give short problems for small models.

    Problems that differ only in the order of their numbers count as one. By default about 16,300 of them exist: 80 %
    for training, 10 % for each of the other two splits.

    Attributes:
        numbers_min: smallest count of numbers in a problem, at least 2.
        numbers_max: largest count of numbers in a problem; each count is drawn equally often.
        low: smallest value of a given number, at least 1.
        high: largest value of a given number, inclusive.
        target_max: largest target, inclusive; the smallest is 1.
        seed: determines the problems drawn and the split of each.
        train: number of problems in the split "train".
        validation: number of problems in the split "validation".
        test: number of problems in the split "test".
        judge_after: only what follows the last occurrence of this text in a response is judged; a response without it
            is wrong. Empty: all of a response is judged.
    """

    numbers_min: int = 3
    numbers_max: int = 3
    low: int = 1
    high: int = 20
    target_max: int = 100
    seed: int = 0
    train: int = 10_000
    validation: int = 500
    test: int = 1_000
    judge_after: str = ""

    def check(self) -> None:
        """Raise ValueError, naming the mistake and the way out, if no such problems exist."""
        if self.numbers_min < 2:
            raise ValueError(
                f"numbers_min is {self.numbers_min}, but a problem needs two numbers or more; set numbers_min to at "
                "least 2."
            )
        if self.numbers_min > self.numbers_max:
            raise ValueError(
                f"numbers_min ({self.numbers_min}) is larger than numbers_max ({self.numbers_max}); raise numbers_max "
                "or lower numbers_min."
            )
        if self.low < 1:
            raise ValueError(f"low is {self.low}, but numbers are positive; set low to at least 1.")
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high}); exchange them.")
        if self.target_max < 1:
            raise ValueError(f"target_max is {self.target_max}; set target_max to at least 1.")
        for name in ("high", "target_max"):
            if getattr(self, name) > _INT32_MAX:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but values are stored as 32-bit integers; set {name} to at most "
                    f"{_INT32_MAX}."
                )
        for split in SPLITS:
            if getattr(self, split) < 0:
                raise ValueError(
                    f"{split} is {getattr(self, split)}, but a split cannot have a negative number of problems; set "
                    f"{split} to 0 or more."
                )
        # Enough problems must exist.
        values = self.high - self.low + 1
        counts = range(self.numbers_min, self.numbers_max + 1)
        selections = sum(math.comb(values + count - 1, count) for count in counts)
        wanted = sum(getattr(self, split) for split in SPLITS)
        if wanted > selections * self.target_max:
            raise ValueError(
                f"{wanted} problems are asked for, but there are only {selections} ways to choose the numbers and "
                f"{self.target_max} targets; lower train, validation or test, or widen the range of the numbers."
            )


def generate_problems(config: CountdownConfig, split: str) -> Iterator[Problem]:
    """Draw the problems of one split.

    The result depends on the config and the split alone. It does not depend on the sizes of the other splits, and a
    larger size of this one only adds problems at the end. No two problems of a split have the same numbers (in any
    order) and the same target. Two splits never share such a problem, whatever their configs, as long as the configs
    have the same seed.

    Args:
        config: the settings; they are checked before this function returns.
        split: one of `SPLITS`.

    Returns:
        An iterator over as many problems as the config asks for in this split.

    Raises:
        ValueError: at once if the config or the split is wrong, and while iterating if no further problem is found.
    """
    config.check()
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    return _generate(config, split)


def _generate(config: CountdownConfig, split: str) -> Iterator[Problem]:
    # Of all of `random`, only random() seeded with a string is guaranteed to return the same stream in every version.
    uniform = random.Random(f"countdown/{config.seed}/{split}").random
    wanted = getattr(config, split)
    seen: set[tuple[tuple[int, ...], int]] = set()
    draws_without_new = 0
    while len(seen) < wanted:
        problem = _draw_problem(config, uniform)
        key = (tuple(sorted(problem.numbers)), problem.target)
        is_new = 1 <= problem.target <= config.target_max and key not in seen
        if is_new and _split_of(key, config.seed) == split:
            seen.add(key)
            draws_without_new = 0
            yield problem
            continue
        draws_without_new += 1
        if draws_without_new == _MAX_DRAWS_WITHOUT_NEW:
            raise ValueError(
                f"Only {len(seen)} of the {wanted} problems asked for in {split!r} were found; set {split} to at most "
                f"{len(seen)}, or widen the range of the numbers, their count or the targets."
            )


def _split_of(key: tuple[tuple[int, ...], int], seed: int) -> str:
    """Return the split of a problem, the same in every process and for every order of the numbers."""
    digest = hashlib.blake2b(repr((seed, key)).encode(), digest_size=8).digest()
    return _BUCKET_TO_SPLIT[int.from_bytes(digest, "big") % len(_BUCKET_TO_SPLIT)]


class _Expression(NamedTuple):
    value: int
    text: str
    precedence: int


def _draw_problem(config: CountdownConfig, uniform: Callable[[], float]) -> Problem:
    """Draw numbers, and join two random expressions at a time until one is left.

    The target is its value: the caller drops zero and values beyond target_max.
    """
    count = config.numbers_min + int(uniform() * (config.numbers_max - config.numbers_min + 1))
    values = config.high - config.low + 1
    numbers = tuple([config.low + int(uniform() * values) for _ in range(count)])
    expressions = [_Expression(number, str(number), _LITERAL_PRECEDENCE) for number in numbers]
    while len(expressions) > 1:
        left = expressions.pop(int(uniform() * len(expressions)))
        right = expressions.pop(int(uniform() * len(expressions)))
        expressions.append(_join(left, right, uniform))
    return Problem(numbers, expressions[0].value, expressions[0].text)


def _join(left: _Expression, right: _Expression, uniform: Callable[[], float]) -> _Expression:
    """Join two expressions by a random operation with a non-negative integer result."""
    operation = "+-*/"[int(uniform() * 4)]
    if operation == "/" and not _divides(right.value, left.value):
        left, right = right, left
        if not _divides(right.value, left.value):
            operation = "+-*"[int(uniform() * 3)]
    if operation == "-" and left.value < right.value:
        left, right = right, left
    if operation == "+":
        value = left.value + right.value
    elif operation == "-":
        value = left.value - right.value
    elif operation == "*":
        value = left.value * right.value
    else:
        value = left.value // right.value
    precedence = _PRECEDENCE[operation]
    left_text = f"({left.text})" if left.precedence < precedence else left.text
    # Operators of equal precedence are read from the left: a-(b+c) and a/(b*c) must keep their parentheses; a+(b-c) and
    # a*(b/c) have the same value without them.
    lowest = precedence + 1 if operation in "-/" else precedence
    right_text = f"({right.text})" if right.precedence < lowest else right.text
    return _Expression(value, left_text + operation + right_text, precedence)


def _divides(divisor: int, dividend: int) -> bool:
    return divisor != 0 and dividend % divisor == 0
