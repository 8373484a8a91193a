"""The settings of a programming task, checked in one place."""

import dataclasses
import math
import os
from typing import Literal

from experiments.tasks.code.protections import check_names
from experiments.tasks.code.sandbox import Limits
from experiments.tasks.splits import check_shares
from rspo_jax.types import check_choice

Reward = Literal["all", "share"]
PreambleUse = Literal["classes", "always", "never"]
DEFAULT_PROMPT = (
    "{problem}\nPlease reason step by step, and put your final Python code into one block that begins with ```python."
)


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """The settings of a programming task: problems, prompts, the sandbox and rewards.

    Attributes:
        run_untrusted_code: must be True, because the task runs code that a model writes on this machine. Read
            docs/code_rewards.md first: it says what the sandbox does not protect from.
        train_path: file of the training problems: JSON lines, a JSON array, Parquet, or a folder that
            datasets.save_to_disk wrote (the part "train" of several). docs/data.md and docs/code_rewards.md show them.
        validation_path: file of the validation problems.
        test_path: file of the test problems.
        prompt_field: the field of the prompt, a text or chat messages, in files with fields that are not known here.
            None: "prompt", or else "messages", and no unknown fields.
        validation_share: in place of validation_path, the share of the training problems' prompts.
        test_share: in place of test_path, the share of the training problems' prompts.
        seed: determines which prompts these are.
        prompt: the user's message, with {problem} in place of the problem's text; of a chat, the user's last message.
        system: the system message before it; none if empty. Chats that bring their own are refused if there is one.
        reward: "all": 1 if every test passes, else 0. "share": the share of tests that pass. Either way, a response
            is correct if every test passes.
        tolerance: the largest error of a number with a decimal point, absolute or relative to the larger number.
        preamble: where the names of the standard library that such problems take for granted are imported first, as
            in `class Solution` with List[int] and no import. "classes": for methods; "always"; "never".
        checkers: a Python file of functions that problems name as their "checker", beside those of
            `experiments.tasks.code.checkers`. None: no others.
        judge_after: only the code after the last occurrence of this text is judged, such as "</think>"; a response
            without it is wrong. Empty: all of a response is judged.
        limits: the resources of one test. Each test runs in a new process.
        response_seconds: seconds for all tests of a response together; tests that have not run by then count as
            failed.
        workers: number of tests that run at once. None: one less than there are cores, at most 64.
        accept_missing: names from `experiments.tasks.code.protections.PROTECTIONS` that may be missing on this
            machine. They are still applied as far as possible.
    """

    run_untrusted_code: bool = False
    train_path: str | None = None
    validation_path: str | None = None
    test_path: str | None = None
    prompt_field: str | None = None
    validation_share: float = 0.0
    test_share: float = 0.0
    seed: int = 0
    prompt: str = DEFAULT_PROMPT
    system: str = ""
    reward: Reward = "all"
    tolerance: float = 1e-6
    preamble: PreambleUse = "classes"
    checkers: str | None = None
    judge_after: str = ""
    limits: Limits = Limits()
    response_seconds: float = 30.0
    workers: int | None = None
    accept_missing: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ValueError, naming the mistake and the way out, if a setting is impossible."""
        if not self.run_untrusted_code:
            raise ValueError(
                "This task runs Python code written by a model on this machine, in a sandbox that does not stop "
                "everything. Read docs/code_rewards.md, and set run_untrusted_code to True if you accept the risk."
            )
        if self.train_path is None and self.validation_path is None and self.test_path is None:
            raise ValueError("No problems are given; set train_path, validation_path or test_path to a file of them.")
        check_shares(self.validation_share, self.test_share)
        for split in ("validation", "test"):
            if getattr(self, f"{split}_share") and (getattr(self, f"{split}_path") or self.train_path is None):
                raise ValueError(f"{split}_share is a share of train_path: give that, and no {split}_path.")
        if self.prompt.count("{problem}") != 1:
            raise ValueError(
                f"prompt contains {{problem}} {self.prompt.count('{problem}')} times; write it exactly once, where the "
                "problem's text goes."
            )
        check_choice("reward", self.reward, Reward)
        check_choice("preamble", self.preamble, PreambleUse)
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; set it to at least 0 and below 1.")
        if not (math.isfinite(self.response_seconds) and self.response_seconds > 0):
            raise ValueError(f"response_seconds is {self.response_seconds}; set it to a finite number above 0.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; set it to 1 or more, or leave it out.")
        check_names(self.accept_missing)
        self.limits.check()

    def worker_count(self) -> int:
        """Return the number of tests that run at once."""
        if self.workers is not None:
            return self.workers
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return min(64, max(1, cores - 1))
