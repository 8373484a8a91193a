"""Countdown as the trainer sees it: problems, prompts, worked solutions and the judge, behind one Protocol.

This file must never know a model or an objective.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.tasks.countdown.dataset import load_problems
from experiments.tasks.countdown.problems import CountdownConfig, Problem
from experiments.tasks.countdown.text import CharacterTokenizer, prompt_text
from experiments.tasks.countdown.verifier import CountdownReward, verify

_load_once = functools.lru_cache(maxsize=6)(load_problems)


@dataclass(frozen=True)
class CountdownTask:
    """An `rspo_jax.types.Task`."""

    config: CountdownConfig
    rule: CountdownReward
    data_dir: str | None = None
    """The folder of the data set; TensorFlow Datasets' own when absent."""

    @property
    def tokenizer(self) -> CharacterTokenizer:
        return CharacterTokenizer()

    def problems(self, split: str) -> Sequence[Problem]:
        return _load_once(self.config, split, self.data_dir)

    def prompt(self, problem: Problem) -> str:
        return prompt_text(problem)

    def solution(self, problem: Problem) -> str:
        return problem.solution

    def reward(self, problem: Problem, response: str) -> float:
        return self.rule(problem, response)

    def is_correct(self, problem: Problem, response: str) -> bool:
        return verify(response, problem.numbers, problem.target, self.rule.use_all).correct
