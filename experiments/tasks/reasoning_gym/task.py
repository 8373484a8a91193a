"""The reasoning-gym task: streams of fresh problems, prompts, worked answers and the judge, behind `Task`."""

import functools
import hashlib
import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.tasks.pool import Outcome, WorkerPool
from experiments.tasks.reasoning_gym.config import DataSet, ReasoningGymConfig
from experiments.tasks.reasoning_gym.text import GymTokenizer
from experiments.text import ChatTokenizer
from rspo_jax.hosts import say
from rspo_jax.types import Judgement

LONGEST_RESPONSE = 100_000
"""Number of characters at the end of a response that are scored."""
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""Some generators draw from sets of texts, whose order follows the seed of the hashes."""
_STREAM = 2**30
"""Numbers of problems set aside for each stream: 0 for held-out problems, then one a phase of training."""
_STARTS = 2**29
"""Numbers of a stream at which it may begin."""
_DRAWN_AT_ONCE = 100
_REPEATED = 10
"""A data set is small if one in so many of its problems has been drawn before."""


class GymProblem(NamedTuple):
    """A problem of a data set."""

    name: str
    """The data set."""
    number: int
    """The number that the library makes it from, with the data set's settings."""
    question: str
    answer: str | None
    """A right answer; None where the library gives none."""
    entry: str
    """The library's own record of it, which its verifier reads."""


class GymTask:
    """An `rspo_jax.types.Task`. Its processes, which hold the library, start at once and end with the program."""

    def __init__(self, config: ReasoningGymConfig, tokenizer: GymTokenizer | ChatTokenizer) -> None:
        """Check the data sets and their difficulty against the library.

        Raises:
            ValueError: with all mistakes.
        """
        config.check()
        self.config = config
        self.tokenizer = tokenizer
        self._pool = WorkerPool(
            "experiments.tasks.reasoning_gym.library:work",
            config.worker_count(),
            config.time_limit,
            memory_limit=int(config.memory_limit * 2**30),
            wall_limit=config.wall_limit,
            environment=_ENVIRONMENT,
        )
        self._data_sets = {one.name: one for one in config.data_sets()}
        outcomes = self._pool.map([{"check": [one]} for one in self._data_sets.values()])
        if mistakes := [sentence for outcome in outcomes for sentence in outcome.value or [outcome.detail] if sentence]:
            raise ValueError("; ".join(mistakes))
        chat = isinstance(tokenizer, ChatTokenizer)
        self._tags = chat if config.answer_tags is None else config.answer_tags
        self._system = self._system_message() if chat else ""
        self._held_out = functools.cache(self._hold_out)

    def _system_message(self) -> str:
        name = self.config.system
        if not name or not name.isidentifier():
            return name
        (outcome,) = self._pool.map([{"system_prompts": []}])
        if name not in outcome.value:
            raise ValueError(
                f"task.system is {name!r}; choose one of {', '.join(outcome.value)}, or write a text of your own"
            )
        return outcome.value[name]

    # Problems

    def problems(self, split: str) -> "Sequence[GymProblem] | GymTask":
        """Return the problems of a split: this task itself, which is a stream, for "train"."""
        return self if split == "train" else self._held_out()[split]

    def draw(self, seed: tuple[int, ...], positions: Sequence[int]) -> list[GymProblem | None]:
        """Return the problems at some positions of the stream of training problems; None for one that is held out, that
        the tokenizer cannot write, or that the library fails to make."""
        start = _STREAM * (1 + seed[-1] % 2) + _hash(self.config.seed, *seed) % _STARTS
        names, weights = list(self._data_sets), [one.weight for one in self._data_sets.values()]
        wanted = []
        for position in positions:
            # Of all of `random`, only random() seeded with a text is guaranteed to stay the same in every version.
            uniform = random.Random(f"reasoning-gym/{self.config.seed}/{seed}/{position}").random() * sum(weights)
            chosen = sum(uniform >= bound for bound in itertools.accumulate(weights[:-1]))
            wanted.append((names[chosen], start + position))
        held_out = {problem.question for split in self._held_out().values() for problem in split}
        made = self._make(wanted)
        return [problem if problem is not None and problem.question not in held_out else None for problem in made]

    def _make(self, wanted: Sequence[tuple[str, int]]) -> list[GymProblem | None]:
        outcomes = self._pool.map([{"make": [self._data_sets[name], number]} for name, number in wanted])
        made: list[GymProblem | None] = []
        for (name, number), outcome in zip(wanted, outcomes, strict=True):
            problem = None if outcome.failure else GymProblem(name, number, **outcome.value)
            made.append(problem if problem is not None and self._can_be_written(problem) else None)
        return made

    def _can_be_written(self, problem: GymProblem) -> bool:
        if not isinstance(self.tokenizer, GymTokenizer):
            return True
        return not self.tokenizer.missing(problem.question + (problem.answer or ""))

    def _hold_out(self) -> dict[str, list[GymProblem]]:
        """Draw the problems of validation and test, all of them different; each data set gives its share."""
        splits: dict[str, list[tuple[float, GymProblem]]] = {"validation": [], "test": []}
        total, asked = sum(one.weight for one in self._data_sets.values()), set()
        for one in self._data_sets.values():
            sizes = [max(1, round(size * one.weight / total)) for size in (self.config.validation, self.config.test)]
            found = self._different(one, sum(sizes), asked)
            if len(found) < sum(sizes):
                share = sizes[0] / sum(sizes)
                sizes[0] = min(len(found) - 1, max(1, round(share * len(found))))
            parts = {"validation": found[: sizes[0]], "test": found[sizes[0] :]}
            for split, problems in parts.items():
                splits[split] += [((index + 0.5) / len(problems), problem) for index, problem in enumerate(problems)]
        # Mixed, so that the first problems of a split are of all data sets.
        return {
            split: [problem for _, problem in sorted(problems, key=lambda pair: (pair[0], pair[1].name))]
            for split, problems in splits.items()
        }

    def _different(self, data_set: DataSet, wanted: int, asked: set[str]) -> list[GymProblem]:
        """Draw problems of a data set to hold out, whose questions are not among those asked and are added to them.

        Fewer than wanted, and a half of those found, if it has so few that they repeat.
        """
        start = _hash(self.config.seed, data_set.name) % _STARTS
        found: list[GymProblem] = []
        drawn = repeated = failed = 0
        while len(found) < wanted and repeated <= max(1, drawn // _REPEATED):
            numbers = range(start + drawn, start + drawn + min(_DRAWN_AT_ONCE, wanted - len(found)))
            for problem in self._make([(data_set.name, number) for number in numbers]):
                drawn += 1
                if problem is None:
                    failed += 1
                elif problem.question in asked:
                    repeated += 1
                elif repeated <= max(1, drawn // _REPEATED):
                    asked.add(problem.question)
                    found.append(problem)
            if failed > drawn / 2:
                raise ValueError(self._why_unusable(data_set, numbers[0]))
        if len(found) >= wanted:
            return found
        if len(found) < 4:
            raise ValueError(
                f"{data_set.name} has only {len(found)} different problems with these settings, too few to hold some "
                "out: widen its options with task.difficulty"
            )
        kept = found[: len(found) // 2]
        say(
            f"{data_set.name}: {len(kept)} problems are held out, not {wanted}, because it has few: {repeated} of "
            f"{drawn} drawn were repeated"
        )
        return kept

    def _why_unusable(self, data_set: DataSet, number: int) -> str:
        """Return why most problems of a data set cannot be used, from one that cannot."""
        (outcome,) = self._pool.map([{"make": [data_set, number]}])
        if outcome.failure:
            return f"reasoning-gym fails to make most problems of {data_set.name}: {outcome.detail}"
        text = outcome.value["question"] + (outcome.value["answer"] or "")
        missing = self.tokenizer.missing(text) if isinstance(self.tokenizer, GymTokenizer) else []
        return (
            f"most problems of {data_set.name} have characters that the small model's tokenizer does not have, such as "
            f"{', '.join(map(repr, missing[:5]))}: leave it out, or train a chat model with --model"
        )

    # Texts

    def prompt(self, problem: GymProblem) -> str:
        if not isinstance(self.tokenizer, ChatTokenizer):
            return problem.question + "\n"
        before = [{"role": "system", "content": self._system}] if self._system else []
        return self.tokenizer.chat([*before, {"role": "user", "content": problem.question}])

    def solution(self, problem: GymProblem) -> str:
        """Return the library's answer as a response; raise ValueError if it gives none."""
        if problem.answer is None:
            raise ValueError(f"{problem.name} gives no answers, so there is no warm start on it")
        return f"<answer>{problem.answer}</answer>" if self._tags else problem.answer

    def kind(self, problem: GymProblem) -> str:
        """Return the data set of a problem."""
        return problem.name

    # Judging

    def judge(self, problems: Sequence[GymProblem], responses: Sequence[str]) -> list[Judgement]:
        """Reward each response with the library's score of its answer, 0 to 1."""
        items = [
            {
                "score": [
                    self._data_sets[problem.name],
                    problem.number,
                    problem.entry,
                    response[-LONGEST_RESPONSE:],
                    self._tags,
                ]
            }
            for problem, response in zip(problems, responses, strict=True)
        ]
        return [self._judgement(outcome) for outcome in self._pool.map(items)]

    def _judgement(self, outcome: Outcome) -> Judgement:
        if outcome.failure:
            return Judgement(0.0, False, unjudged=True)
        if outcome.value is None:
            return Judgement(0.0, False, unmarked=True)
        return Judgement(outcome.value, outcome.value >= self.config.correct_at)

    def counts(self) -> dict[str, int]:
        """Return the numbers of problems and responses so far and of those that met a limit: `WorkerPool.counts`."""
        return self._pool.counts()

    def close(self) -> None:
        """End the processes; the next problem or judgement starts new ones."""
        self._pool.close()


def _hash(*values: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big")
