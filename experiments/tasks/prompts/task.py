"""The task of prompts and reward functions, behind the trainer's `Task` protocol."""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.errors import UserError
from experiments.tasks.prompts.calling import Batch, Failure, Value
from experiments.tasks.prompts.config import PromptsConfig
from experiments.tasks.prompts.dataset import Problem, column_names, load_splits
from experiments.tasks.prompts.judges import InProcess, InWorkers, Judge
from experiments.tasks.prompts.rewards import Reward, parse_all
from experiments.text import HuggingFaceTokenizer
from rspo_jax.hosts import say
from rspo_jax.types import Judgement

SHOWN = 3
"""Number of failures of each reward that are printed; the others are counted only."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """The sources of the rewards, which decide verdicts as the settings do."""

    digests: tuple[str | None, ...]


class PromptsTask:
    """An `rspo_jax.types.RewardsTask`. Its processes start when it is made and end with the program."""

    def __init__(self, config: PromptsConfig, tokenizer: HuggingFaceTokenizer) -> None:
        """Read the prompts and try whether the rewards can be called with their columns.

        Raises:
          ValueError: with all mistakes in the settings, in the data, or in the rewards.
        """
        config.check()
        self.config, self.tokenizer = config, tokenizer
        self._rewards: list[Reward] = parse_all(config.rewards)
        self.sources = Sources(tuple(reward.source_digest() for reward in self._rewards))
        self._splits = load_splits(config)
        self._judge: Judge
        if config.rewards_in_process or any(reward.function for reward in self._rewards):
            self._judge = InProcess(self._rewards, config.time_limit)
        else:
            _check_json(self._splits)
            self._judge = InWorkers(self._rewards, config.rewards, config.time_limit, config.worker_count())
        if mistakes := self._judge.mistakes(column_names(self._splits["train"])):
            self._judge.close()
            raise ValueError("; ".join(mistakes))
        self._step, self._steps = 0, 0
        self._failed = collections.Counter[str]()
        self._printed = collections.Counter[str]()
        self._logged: dict[str, list[float]] = {}

    @property
    def reward_names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self._rewards)

    @property
    def tells_correct(self) -> bool:
        return self.config.correct_at is not None

    @property
    def judges_truncated(self) -> bool:
        return self.config.judge_truncated

    def problems(self, split: str) -> Sequence[Problem]:
        if split not in self._splits:
            raise ValueError(f"there is no split {split!r}; choose one of {', '.join(self._splits)}")
        return self._splits[split]

    def prompt(self, problem: Problem) -> str:
        """Return a text as it is, after the mark that the tokenizer puts at the beginning; a chat by its template."""
        if isinstance(problem.prompt, str):
            return self.tokenizer.plain(problem.prompt)
        begun = problem.prompt[-1].content if problem.prompt[-1].role == "assistant" else ""
        messages = problem.prompt[:-1] if begun else problem.prompt
        return self.tokenizer.chat([message._asdict() for message in messages]) + begun

    def solution(self, problem: Problem) -> str:
        """Return the assistant's last message, as a worked response; raise ValueError if the record has none."""
        if problem.reply is None:
            raise ValueError(
                f"{problem.place} has no response to imitate: give conversations that end with one in a field "
                "messages, or train without a warm start (warm_start.steps 0)"
            )
        return problem.reply

    def begin_step(self, step: int, steps: int) -> None:
        self._step, self._steps = step, steps
        self._failed.clear()
        self._logged.clear()

    def step_metrics(self) -> Mapping[str, float]:
        """Return the failures of each reward, and the means of what the functions have logged."""
        failed = {f"rewards/{name}/failed": float(self._failed[name]) for name in self.reward_names}
        return failed | {f"task/{name}": sum(values) / len(values) for name, values in self._logged.items()}

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judge texts whose tokens are not known: they are encoded again, and followed by a stop token."""
        token_ids = [[*self.tokenizer.encode(response), self.tokenizer.eos_id] for response in responses]
        return self.judge_tokens(problems, responses, token_ids)

    def judge_tokens(
        self, problems: Sequence[Problem], responses: Sequence[str], token_ids: Sequence[Sequence[int]]
    ) -> list[Judgement]:
        """Call the rewards, and add up those that apply to each response.

        Raises:
          UserError: if a reward fails, and the run is to stop then.
        """
        names = column_names(problems)
        batch = Batch(
            prompts=[_prompt_of(problem) for problem in problems],
            completions=[_completion_of(problem, text) for problem, text in zip(problems, responses, strict=True)],
            completion_ids=[list(ids) for ids in token_ids],
            columns={name: [problem.columns[name] for problem in problems] for name in names},
            step=(self._step, self._steps),
        )
        table = self._judge.score(batch, lambda name, value: self._logged.setdefault(name, []).append(value))
        for reward, values in zip(self._rewards, table, strict=True):
            for problem, value in zip(problems, values, strict=True):
                if isinstance(value, Failure):
                    self._note(reward, problem, value)
        return [self._judgement(values) for values in zip(*table, strict=True)]

    def close(self) -> None:
        """End the processes."""
        self._judge.close()

    def _judgement(self, values: Sequence[Value]) -> Judgement:
        parts = tuple(math.nan if value is None or isinstance(value, Failure) else value for value in values)
        given = [
            (part, reward.weight) for part, reward in zip(parts, self._rewards, strict=True) if not math.isnan(part)
        ]
        decisive = parts[max(range(len(parts)), key=lambda index: self._rewards[index].weight)]
        return Judgement(
            reward=math.fsum(part * weight for part, weight in given),
            correct=self.config.correct_at is not None and decisive >= self.config.correct_at,
            unjudged=any(isinstance(value, Failure) for value in values),
            left_out=not given,
            parts=parts,
        )

    def _note(self, reward: Reward, problem: Problem, failure: Failure) -> None:
        """Count a failure, and print the first ones; stop the run if this is wanted."""
        prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1].content
        shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
        sentence = f"{reward.words} {failure.reason}; the response is one to {problem.place}, {shown!r}"
        if self.config.on_error == "stop":
            raise UserError(f"{sentence}. The run stops, as on_error is stop")
        self._failed[reward.name] += 1
        self._printed[reward.name] += 1
        if self._printed[reward.name] <= SHOWN:
            say(f"{sentence}. It goes without this reward")
        if self._printed[reward.name] == SHOWN:
            say(f"further failures of {reward.words} are counted only, as rewards/{reward.name}/failed")


def _prompt_of(problem: Problem) -> Any:
    return problem.prompt if isinstance(problem.prompt, str) else [message._asdict() for message in problem.prompt]


def _completion_of(problem: Problem, text: str) -> Any:
    """Return a response as TRL gives it: a text, or a message that begins with what the prompt's last one has begun."""
    if isinstance(problem.prompt, str):
        return text
    begun = problem.prompt[-1].content if problem.prompt[-1].role == "assistant" else ""
    return [{"role": "assistant", "content": begun + text}]


def _check_json(splits: Mapping[str, Sequence[Problem]]) -> None:
    """Raise ValueError if a column cannot be sent to a process."""
    for problem in [problem for problems in splits.values() for problem in problems]:
        for name, value in problem.columns.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(
                    f"{problem.place}: the column {name} holds what cannot be sent to the rewards' processes "
                    f"({error}): call the rewards in the trainer's own, --task.rewards-in-process"
                ) from error
