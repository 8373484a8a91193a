"""The settings of a task of prompts and reward functions, checked in one place."""

import dataclasses
import math
import os
from typing import Literal

from experiments.tasks.prompts.rewards import parse_all
from experiments.tasks.splits import check_shares
from rspo_jax.types import check_choice

OnError = Literal["go-on", "stop"]


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """The settings of a task of prompts and reward functions; docs/own_reward.md explains them."""

    data: str | None = None
    """The prompts: JSON lines, a JSON array, Parquet, or a folder that datasets.save_to_disk wrote. Fields other than
    the prompt are handed to the rewards by their names."""
    validation_path: str | None = None
    """The prompts to evaluate on during the run. When absent: the part "validation" of a folder that has one, or else
    a share of `data`."""
    test_path: str | None = None
    """The prompts to evaluate on at the beginning and the end. When absent: the part "test" of a folder that has one,
    or else a share of `data`."""
    validation_share: float = 0.1
    """Share of the prompts in `data` to evaluate on during the run, and not to train on: at least one prompt."""
    test_share: float = 0.1
    """Share of the prompts in `data` to evaluate on at the beginning and the end: at least one prompt."""
    seed: int = 0
    """Decides which prompts these are."""
    prompt_field: str | None = None
    """The field of the prompt, a text or a list of chat messages; "prompt", or else "messages", when absent."""
    system: str = ""
    """A system message for every prompt. Prompts that are texts then become the user's message of a chat."""
    rewards: tuple[str, ...] = ()
    """The reward functions: FILE.py:NAME or package.module:NAME, each with a weight as in FILE.py:NAME@0.2 unless it
    is 1. The reward of a response is the weighted sum of those that apply to it."""
    correct_at: float | None = 1.0
    """A response counts as solved where the reward of the largest weight (the first of them), before its weight, is at
    least this. None: nothing counts as solved, and mean rewards are reported in place of solve rates."""
    judge_truncated: bool = True
    """Give responses that were cut off at the limit to the rewards too, as TRL does. Otherwise their reward is 0."""
    rewards_in_process: bool = False
    """Call the rewards in the trainer's own process, with a whole batch at a time, as TRL does: for rewards that hold a
    model, compare the responses of a batch, or need the device."""
    time_limit: float = 10.0
    """Seconds that one response may take in one reward. In the trainer's process a whole batch may take six times as
    long."""
    workers: int | None = None
    """Number of processes that the rewards run in; one less than there are cores, at most 16, when absent."""
    on_error: OnError = "go-on"
    """What becomes of an exception in a reward, a value that is none, or a limit: the response goes without this
    reward, which is counted and printed at first (go-on), or the run stops (stop)."""

    def check(self) -> None:
        """Raise ValueError with all mistakes, each with its way out, if a setting is impossible."""
        mistakes = []
        if not self.data:
            mistakes.append("a run needs prompts: name their file with --task.data")
        if not self.rewards:
            mistakes.append("a run needs a reward: name one with --task.rewards FILE.py:NAME")
        for check in (
            lambda: parse_all(self.rewards),
            lambda: check_shares(self.validation_share, self.test_share),
            lambda: check_choice("on_error", self.on_error, OnError),
        ):
            try:
                check()
            except ValueError as error:
                mistakes.append(str(error))
        for split in ("validation", "test"):
            if not getattr(self, f"{split}_share") and getattr(self, f"{split}_path") is None:
                mistakes.append(f"{split}_share is 0 and there is no {split}_path, but a run is evaluated: give one")
        if self.correct_at is not None and not math.isfinite(self.correct_at):
            mistakes.append(f"correct_at is {self.correct_at}; set it to a number, or to None")
        if not (math.isfinite(self.time_limit) and self.time_limit > 0):
            mistakes.append(f"time_limit is {self.time_limit}; set it to a number of seconds above 0")
        if self.workers is not None and self.workers < 1:
            mistakes.append(f"workers is {self.workers}; set it to 1 or more, or leave it out")
        if mistakes:
            raise ValueError("; ".join(mistakes))

    def worker_count(self) -> int:
        """Return the number of processes that the rewards run in."""
        if self.workers is not None:
            return self.workers
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return min(16, max(1, cores - 1))
