"""The mathematics task: problems, prompts, worked solutions and the judge, behind the trainer's `Task` protocol."""

import functools
from collections.abc import Sequence
from typing import Any

from experiments.tasks.marker import check_marker, judge_after, part_after
from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.dataset import load_problems
from experiments.tasks.mathematics.problems import Problem
from experiments.tasks.mathematics.references import unreadable_answers
from experiments.tasks.pool import WorkerPool
from experiments.tasks.splits import Overlaps
from experiments.text import ChatTokenizer, ask
from rspo_jax.hosts import say
from rspo_jax.types import Judgement

LONGEST_RESPONSE = 100_000
"""Number of characters at the end of a response that are judged; finding a box in them takes a few milliseconds."""

SHOWN = 20
"""Largest number of references that are printed because the judge cannot read them."""

_VERIFIER = "experiments.tasks.mathematics.verifier:judge"


class MathTask:
    """An `rspo_jax.types.Task`. Its judging processes start with the first judgement and end with the program."""

    def __init__(self, config: MathConfig, tokenizer: ChatTokenizer) -> None:
        """Raise ValueError if the config is wrong, or the tokenizer cannot write the text that judging starts after."""
        config.check()
        check_marker(config.judge_after, tokenizer)
        self.config = config
        self.tokenizer = tokenizer
        self._pool = WorkerPool(
            _VERIFIER,
            config.worker_count(),
            config.time_limit,
            memory_limit=int(config.memory_limit * 2**30),
            wall_limit=config.wall_limit,
        )
        self._overlaps = Overlaps()
        self._load_once = functools.cache(self._load)

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of a split. The first call says which references nothing but their own text earns."""
        return self._load_once(split)

    def _load(self, split: str) -> list[Problem]:
        problems = load_problems(self.config, split)
        for sentence in self._overlaps.note(split, [problem.question for problem in problems]):
            say(sentence)
        unreadable = unreadable_answers(problems)
        if unreadable:
            count = sum(len(problem.references) for problem in problems)
            shown = "".join(f"\n  {answer}" for answer in unreadable[:SHOWN])
            more = f"\n  and {len(unreadable) - SHOWN} more" if len(unreadable) > SHOWN else ""
            say(
                f"{split}: the judge cannot read {len(unreadable)} of {count} references, so that nothing but "
                f"their own text earns a reward:{shown}{more}"
            )
        return problems

    def prompt(self, problem: Problem) -> str:
        return ask(self.tokenizer, self.config.prompt, problem.question, self.config.system)

    def solution(self, problem: Problem) -> str:
        return self.config.judge_after + problem.solution

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judge responses in parallel; a response that cannot be judged within the limits counts as unanswered.

        Raises:
            ValueError: if the numbers of problems and responses differ.
        """
        marker, unanswered = self.config.judge_after, self.config.unanswered_reward
        return judge_after(marker, self._judge, problems, responses, unanswered)

    def _judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        judgements = []
        for verdict in self._verdicts(problems, responses):
            if verdict is None or not verdict["answered"]:
                judgements.append(Judgement(self.config.unanswered_reward, False, unjudged=verdict is None))
            elif verdict["correct"]:
                judgements.append(Judgement(self.config.correct_reward, True))
            else:
                judgements.append(Judgement(self.config.wrong_reward, False))
        return judgements

    def answers(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[str | None]:
        """Return the answer of each response: the same text for answers that mean the same, None without an answer."""
        judged = [part_after(self.config.judge_after, response) or "" for response in responses]
        verdicts = self._verdicts(problems, judged)
        return [None if verdict is None else verdict["answer"] for verdict in verdicts]

    def _verdicts(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[dict[str, Any] | None]:
        """Return what the verifier says of each response; None where it met a limit."""
        pairs = zip(problems, responses, strict=True)
        items = [
            (problem.references, response[-LONGEST_RESPONSE:], self.config.must_be_boxed) for problem, response in pairs
        ]
        return [outcome.value for outcome in self._pool.map(items)]

    def counts(self) -> dict[str, int]:
        """Return the numbers of responses judged so far and of those that met a limit: `WorkerPool.counts`."""
        return self._pool.counts()

    def close(self) -> None:
        """End the processes; a later judgement starts new ones."""
        self._pool.close()
