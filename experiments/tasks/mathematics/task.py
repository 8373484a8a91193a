"""Mathematics as the trainer sees it: problems, prompts, worked solutions and the judge, behind one Protocol.

This file must never know a model or an objective.
"""

import functools
from collections.abc import Sequence
from typing import Any

from experiments.tasks.mathematics.config import MathConfig
from experiments.tasks.mathematics.dataset import load_problems
from experiments.tasks.mathematics.problems import Problem
from experiments.tasks.pool import WorkerPool
from experiments.text import ChatTokenizer, ask
from rspo_jax.types import Judgement

LONGEST_RESPONSE = 100_000
"""Characters at the end of a response that are judged; finding a box in as many takes a few milliseconds."""

_VERIFIER = "experiments.tasks.mathematics.verifier:judge"


class MathTask:
    """An `rspo_jax.types.Task`. Its processes start with the first judgement and end with the program."""

    def __init__(self, config: MathConfig, tokenizer: ChatTokenizer) -> None:
        """Raises ValueError if the config is wrong."""
        config.check()
        self.config = config
        self.tokenizer = tokenizer
        self._pool = WorkerPool(
            _VERIFIER, config.worker_count(), config.time_limit, memory_limit=int(config.memory_limit * 2**30)
        )
        self._load_once = functools.cache(functools.partial(load_problems, config))

    def problems(self, split: str) -> Sequence[Problem]:
        return self._load_once(split)

    def prompt(self, problem: Problem) -> str:
        return ask(self.tokenizer, self.config.prompt, problem.question, self.config.system)

    def solution(self, problem: Problem) -> str:
        return problem.solution

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judges responses in parallel; one that cannot be judged within its limits counts as not answered.

        Raises:
            ValueError: if there are not as many problems as responses.
        """
        return [self._judgement(verdict) for verdict in self._verdicts(problems, responses)]

    def answers(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[str | None]:
        """The answer of each response, the same text where two are seen to mean the same; None where there is none."""
        verdicts = self._verdicts(problems, responses)
        return [None if verdict is None else verdict["answer"] for verdict in verdicts]

    def _verdicts(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[dict[str, Any] | None]:
        """What the verifier says of each response; None where it met a limit."""
        pairs = zip(problems, responses, strict=True)
        items = [
            (problem.answer, response[-LONGEST_RESPONSE:], self.config.must_be_boxed) for problem, response in pairs
        ]
        return [outcome.value for outcome in self._pool.map(items)]

    def _judgement(self, verdict: dict[str, Any] | None) -> Judgement:
        if verdict is None or not verdict["answered"]:
            return Judgement(self.config.unanswered_reward, False, unjudged=verdict is None)
        if not verdict["correct"]:
            return Judgement(self.config.wrong_reward, False)
        return Judgement(self.config.correct_reward, True)

    def counts(self) -> dict[str, int]:
        """How many responses were judged so far, and how many of them met a limit: `WorkerPool.counts`."""
        return self._pool.counts()

    def close(self) -> None:
        """Ends the processes; a later judgement starts new ones."""
        self._pool.close()
