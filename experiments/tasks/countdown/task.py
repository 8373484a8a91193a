"""The Countdown task: problems, prompts, worked solutions and the judge, behind the trainer's `Task` protocol."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.tasks.countdown.dataset import load_problems
from experiments.tasks.countdown.problems import CountdownConfig, Problem
from experiments.tasks.countdown.text import CharacterTokenizer, prompt_text
from experiments.tasks.countdown.verifier import CountdownReward, verify
from experiments.tasks.marker import check_marker, judge_after
from rspo_jax.types import Judgement

_load_once = functools.lru_cache(maxsize=6)(load_problems)


@dataclass(frozen=True)
class CountdownTask:
    """An `rspo_jax.types.Task`."""

    config: CountdownConfig
    rule: CountdownReward
    data_dir: str | None = None
    """The folder of the data set. None: that of TensorFlow Datasets."""

    def __post_init__(self) -> None:
        check_marker(self.config.judge_after, self.tokenizer)

    @property
    def tokenizer(self) -> CharacterTokenizer:
        return CharacterTokenizer()

    def problems(self, split: str) -> Sequence[Problem]:
        return _load_once(dataclasses.replace(self.config, judge_after=""), split, self.data_dir)

    def prompt(self, problem: Problem) -> str:
        return prompt_text(problem)

    def solution(self, problem: Problem) -> str:
        return self.config.judge_after + problem.solution

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        return judge_after(self.config.judge_after, self._judge, problems, responses)

    def _judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        judgements = []
        for problem, response in zip(problems, responses, strict=True):
            verdict = verify(response, problem.numbers, problem.target, self.rule.use_all)
            judgements.append(Judgement(self.rule(problem, response), verdict.correct))
        return judgements
