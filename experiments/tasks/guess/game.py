"""Guess a number: a task of several turns (`rspo_jax.types.DemonstrationTask`).

The prompt names a range, such as "35-50:". The model guesses, the environment answers "higher" or "lower", and so on
until the number is found or the turns are used up. A guess that is no number ends the game.

    35-50:  42  higher  47  lower  45

Ranges have 8 to 16 numbers. Four guesses reach 15 of 16 numbers, if each halves what is left. The worked conversations
of the warm start only guess at random among the numbers that the hints have left, and often run out of turns. The rest
is for the policy to find.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

from experiments.tasks.characters import Characters
from rspo_jax.types import Conversation, Judgement

_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Problem(NamedTuple):
    """One game: a number between `low` and `high`, both of which are possible too."""

    low: int
    high: int
    number: int


@dataclasses.dataclass(frozen=True)
class GuessConfig:
    """The settings of the games. Each pair of a range and a number in it is one problem.

    A range is in one split as a whole. If single numbers were held out, a policy would learn never to guess them.
    """

    smallest: int = 8
    """Numbers in the smallest range."""
    largest: int = 16
    """Numbers in the largest range."""
    highest: int = 99
    """The largest number; the smallest is 1."""
    guesses: int = 4
    """Guesses of a worked conversation, at most. (conversation.max_turns is the limit of the model's.)"""
    held_out: int = 512
    """Problems of the validation split, and of the test split, at most."""
    seed: int = 0
    """Decides which problems are for training, and the guesses of worked conversations."""

    def check(self) -> None:
        """Raise ValueError, naming the mistake and the way out, if there are no such games."""
        if not 2 <= self.smallest <= self.largest <= self.highest:
            raise ValueError(
                f"a range needs 2 or more numbers, up to {self.highest} (task.highest), and the largest no fewer than "
                f"the smallest; task.smallest is {self.smallest} and task.largest {self.largest}"
            )
        for name in ("guesses", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} must be at least 1, got {getattr(self, name)}")
        for split in _SHARES:
            if not _problems(self, split):
                raise ValueError(f"these ranges are too few to leave games for the {split} split: raise task.highest")


class GuessTokenizer(Characters):
    """One id for each character of the games."""

    characters = "".join(dict.fromkeys("0123456789-:higherlow"))


@functools.lru_cache(maxsize=6)
def _problems(config: GuessConfig, split: str) -> list[Problem]:
    """Return the problems of a split: every number of its share of the ranges, shuffled."""
    sizes = range(config.smallest, config.largest + 1)
    ranges = [(low, low + size - 1) for size in sizes for low in range(1, config.highest - size + 2)]
    chance = random.Random(config.seed)
    chance.shuffle(ranges)
    start = 0
    for name, share in _SHARES.items():
        end = start + round(share * len(ranges))
        if name == split:
            problems = [
                Problem(low, high, number) for low, high in ranges[start:end] for number in range(low, high + 1)
            ]
            chance.shuffle(problems)
            return problems if split == "train" else problems[: config.held_out]
        start = end
    raise ValueError(f"there is no split {split!r}; there are {', '.join(_SHARES)}")


@dataclasses.dataclass(frozen=True)
class GuessTask:
    """An `rspo_jax.types.DemonstrationTask`."""

    config: GuessConfig = GuessConfig()

    @property
    def tokenizer(self) -> GuessTokenizer:
        return GuessTokenizer()

    def problems(self, split: str) -> Sequence[Problem]:
        return _problems(self.config, split)

    def prompt(self, problem: Problem) -> str:
        return f"{problem.low}-{problem.high}:"

    def respond(self, problem: Problem, conversation: Conversation) -> str | None:
        guess = _number(conversation[-1])
        if guess is None or guess == problem.number:
            return None
        return "higher" if guess < problem.number else "lower"

    def judge(self, problems: Sequence[Problem], responses: Sequence[Conversation]) -> list[Judgement]:
        found = [_number(turns[-1]) == problem.number for problem, turns in zip(problems, responses, strict=True)]
        return [Judgement(float(one), one) for one in found]

    def solution(self, problem: Problem) -> str:
        return str(problem.number)

    def demonstration(self, problem: Problem) -> Conversation:
        """Return a game of guesses at random among the numbers that are still possible, which may be lost."""
        chance = random.Random(f"{self.config.seed} {problem}")
        low, high, turns = problem.low, problem.high, list[str]()
        while True:
            guess = chance.randint(low, high)
            turns.append(str(guess))
            hint = self.respond(problem, turns)
            if hint is None or len(turns) == 2 * self.config.guesses - 1:
                return turns
            turns.append(hint)
            low, high = (guess + 1, high) if hint == "higher" else (low, guess - 1)


def _number(guess: str) -> int | None:
    """Return the number that a guess is, or None: only digits count, and few enough of them for Python to read."""
    return int(guess) if guess.isascii() and guess.isdecimal() and len(guess) < 10 else None
