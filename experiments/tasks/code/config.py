"""What a programming task is, checked in one place. This module must never read problems or start a process."""

import dataclasses
import math
import os
from typing import Literal

from experiments.tasks.code.protections import PROTECTIONS
from experiments.tasks.code.sandbox import Limits

DEFAULT_PROMPT = (
    "{problem}\nPlease reason step by step, and put your final Python code into one block that begins with ```python."
)


@dataclasses.dataclass(frozen=True)
class CodeConfig:
    """Which problems, how they are asked, how their tests are run, and what a response earns.

    Attributes:
        run_untrusted_code: has to be True, since the task runs on this machine what a model writes. Read
            docs/code_rewards.md first: it says what the sandbox does not protect from.
        train_path: JSONL file of the problems to train on; see `experiments.tasks.code.problems`.
        validation_path: the same for validation.
        test_path: the same for the last test.
        prompt: what the user asks, with {problem} in the place of the problem's text.
        system: what the system says before; nothing when empty.
        reward: "all": 1 if every test passes, else 0. "share": the share of tests that pass. In both, a response is
            correct if every test passes.
        tolerance: how far a number with a decimal point may be off, absolute or relative to the larger number.
        limits: what the run of one test may use. Each test is run in a new process.
        response_seconds: how long the tests of one response may take together; those left then count as failed.
        workers: how many tests run at once. None: one for each core but one, at most 64.
        accept_missing: names of `experiments.tasks.code.protections.PROTECTIONS` that may fail on this machine. Each
            is applied nevertheless where it can be.
    """

    run_untrusted_code: bool = False
    train_path: str | None = None
    validation_path: str | None = None
    test_path: str | None = None
    prompt: str = DEFAULT_PROMPT
    system: str = ""
    reward: Literal["all", "share"] = "all"
    tolerance: float = 1e-6
    limits: Limits = Limits()
    response_seconds: float = 30.0
    workers: int | None = None
    accept_missing: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError, naming the mistake and the way out."""
        if not self.run_untrusted_code:
            raise ValueError(
                "This task runs Python that a model wrote on this machine, in a sandbox that keeps out much but not "
                "everything. Read docs/code_rewards.md, and set run_untrusted_code to True if you accept that."
            )
        if self.train_path is None and self.validation_path is None and self.test_path is None:
            raise ValueError("No problems are given; set train_path, validation_path or test_path to a JSONL file.")
        if self.prompt.count("{problem}") != 1:
            raise ValueError(
                f"prompt has {{problem}} {self.prompt.count('{problem}')} times, and the problem has one place; put "
                "{problem} into it once."
            )
        if self.reward not in ("all", "share"):
            raise ValueError(f"reward is {self.reward!r}; choose 'all' or 'share'.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; set it to at least 0 and below 1.")
        if not (math.isfinite(self.response_seconds) and self.response_seconds > 0):
            raise ValueError(f"response_seconds is {self.response_seconds}; set it to a finite number above 0.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; set it to 1 or more, or leave it out.")
        for name in self.accept_missing:
            if name not in PROTECTIONS:
                raise ValueError(f"accept_missing names {name!r}; the protections are {', '.join(PROTECTIONS)}.")
        self.limits.check()

    def worker_count(self) -> int:
        """How many tests run at once."""
        if self.workers is not None:
            return self.workers
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return min(64, max(1, cores - 1))
