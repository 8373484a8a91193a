"""The programming task: problems, prompts, worked solutions and the judge, behind the trainer's `Task` protocol.

The judge runs a response against the problem's tests, each in a sandbox of its own, and compares the output outside.
Expected values never enter a sandbox.
"""

import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from experiments.tasks.code.comparison import same_output, same_result
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.code.problems import Problem, Test, load_problems
from experiments.tasks.code.protections import require_protections
from experiments.tasks.code.sandbox import Request, run
from experiments.text import ChatTokenizer, ask
from rspo_jax.types import Judgement

_BLOCK_STARTS = ("```python", "```python3", "```py")
_BLOCK_END = "```"


class CodeTask:
    """An `rspo_jax.types.Task`."""

    def __init__(self, config: CodeConfig, tokenizer: ChatTokenizer) -> None:
        """Try the sandbox on this machine, which takes about a second the first time.

        Raises:
            ValueError: if the config is wrong, or does not allow untrusted code to run.
            SandboxError: if a protection does not hold here and its absence is not accepted.
        """
        config.check()
        require_protections(config.accept_missing)
        self.config = config
        self.tokenizer = tokenizer
        self._accept_missing = frozenset(config.accept_missing)
        self._load_once = functools.cache(load_problems)

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of a split; raise ValueError if it has no file or a line is not a problem."""
        paths = {
            "train": self.config.train_path,
            "validation": self.config.validation_path,
            "test": self.config.test_path,
        }
        if split not in paths:
            raise ValueError(f"There is no split {split!r}; choose one of {', '.join(paths)}.")
        path = paths[split]
        if path is None:
            raise ValueError(f"The split {split!r} has no problems; set {split}_path to a JSONL file.")
        return self._load_once(path)

    def prompt(self, problem: Problem) -> str:
        return ask(self.tokenizer, self.config.prompt, problem.prompt, self.config.system)

    def solution(self, problem: Problem) -> str:
        """Return the worked solution as a response; raise ValueError if the problem has none in its file."""
        if problem.solution is None:
            raise ValueError(
                f"The problem {problem.prompt[:60]!r} has no 'solution' in its file; add one, or train without a warm "
                "start."
            )
        return f"```python\n{problem.solution}\n```"

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judge several responses at once; each takes at most `response_seconds` plus the time of one test.

        Raises:
            ValueError: if the numbers of problems and responses differ.
            SandboxError: if no sandbox can be set up; a response cannot cause this.
        """
        if len(problems) != len(responses):
            raise ValueError(f"There are {len(problems)} problems but {len(responses)} responses; give one for each.")
        with ThreadPoolExecutor(self.config.worker_count(), thread_name_prefix="judge") as pool:
            return list(pool.map(self._judge, problems, responses))

    def _judge(self, problem: Problem, response: str) -> Judgement:
        code = extract_code(response)
        deadline = time.monotonic() + self.config.response_seconds
        passed = 0
        for test in problem.tests:
            if time.monotonic() >= deadline:
                break
            if self._passes(code, problem.entry_point, test):
                passed += 1
            elif self.config.reward == "all":
                break
        correct = passed == len(problem.tests)
        share = passed / len(problem.tests)
        return Judgement(share if self.config.reward == "share" else float(correct), correct)

    def _passes(self, code: str, entry_point: str | None, test: Test) -> bool:
        if entry_point is None:
            request = Request(code, input=test.given)
        else:
            request = Request(code, entry_point=entry_point, arguments=tuple(test.given))
        outcome = run(request, self.config.limits, self._accept_missing)
        if outcome.ending != "finished":
            return False
        same = same_output if entry_point is None else same_result
        return same(outcome.output, test.expected, self.config.tolerance)


def extract_code(response: str) -> str:
    """Return the last ```python block of a response, which may lack its end; without one, the whole response."""
    last: list[str] | None = None
    inside = False
    for line in response.split("\n"):
        mark = line.strip().lower()
        if mark in _BLOCK_STARTS:
            last, inside = [], True
        elif mark == _BLOCK_END:
            inside = False
        elif inside and last is not None:
            last.append(line)
    return response if last is None else "\n".join(last)
