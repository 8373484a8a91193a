"""The programming task: problems, prompts, worked solutions and the judge, behind the trainer's `Task` protocol.

The judge runs a response against the problem's tests, each in a sandbox of its own, and compares the output outside.
Expected values never enter a sandbox in which a response runs; a problem's checker has a sandbox to itself.
"""

import ast
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.tasks.chats import text_of
from experiments.tasks.code.blocks import extract_code, fenced
from experiments.tasks.code.comparison import is_result, same_output, same_result
from experiments.tasks.code.config import CodeConfig
from experiments.tasks.code.preamble import PREAMBLE
from experiments.tasks.code.problems import Problem, Test, load_problems
from experiments.tasks.code.protections import require_protections
from experiments.tasks.code.sandbox import Request, run
from experiments.tasks.marker import check_marker, judge_after
from experiments.tasks.splits import Overlaps, check_split, split_of
from experiments.text import ChatTokenizer, ask
from rspo_jax.hosts import say
from rspo_jax.types import Judgement

_OWN_CHECKERS = Path(__file__).with_name("checkers.py")
_CALL_WITH_JSON = """
def call_with_json(given, output, expected):
    return {name}(given, __import__("json").loads(output), expected)
"""


class CodeTask:
    """An `rspo_jax.types.Task`."""

    def __init__(self, config: CodeConfig, tokenizer: ChatTokenizer) -> None:
        """Try the sandbox on this machine, which takes about a second the first time.

        Raises:
            ValueError: if the config is wrong, or does not allow untrusted code to run; if the file of checkers holds
                none; if the tokenizer cannot write the text after which responses are judged.
            SandboxError: if a protection does not hold here and its absence is not accepted.
        """
        config.check()
        check_marker(config.judge_after, tokenizer)
        self._checkers = load_checkers(_OWN_CHECKERS)
        if config.checkers is not None:
            self._checkers |= load_checkers(Path(config.checkers))
        require_protections(config.accept_missing)
        self.config = config
        self.tokenizer = tokenizer
        self._accept_missing = frozenset(config.accept_missing)
        self._overlaps = Overlaps()
        self._load_once = functools.cache(self._load)

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of a split; raise ValueError if it has no file or a record is not a problem."""
        check_split(split)
        return self._load_once(split)

    def _load(self, split: str) -> list[Problem]:
        config = self.config
        shares = {"validation": config.validation_share, "test": config.test_share}
        path = config.train_path if shares.get(split) else getattr(config, f"{split}_path")
        if path is None:
            raise ValueError(f"The split {split!r} has no problems; set {split}_path to a file of them.")
        source = "train" if shares.get(split) else split
        problems = load_problems(path, self._checkers, source, config.prompt_field, config.system)
        if any(shares.values()) and source == "train":
            problems = [one for one in problems if split_of(one.prompt, **shares, seed=config.seed) == split]
            if not problems:
                raise ValueError(f"The split {split!r} is left without problems by its share of {path}: give more.")
        for sentence in self._overlaps.note(split, [problem.prompt for problem in problems]):
            say(sentence)
        return problems

    def prompt(self, problem: Problem) -> str:
        return ask(self.tokenizer, self.config.prompt, problem.prompt, self.config.system)

    def solution(self, problem: Problem) -> str:
        """Return the worked solution as a response; raise ValueError if the problem has none in its file."""
        if problem.solution is None:
            shown = text_of(problem.prompt)[:60]
            raise ValueError(
                f"The problem {shown!r} has no 'solution' in its file; add one, or train without a warm start."
            )
        return self.config.judge_after + fenced(problem.solution)

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judge several responses at once; each takes at most `response_seconds` plus the time of one test.

        Raises:
            ValueError: if the numbers of problems and responses differ.
            SandboxError: if no sandbox can be set up; a response cannot cause this.
        """
        if len(problems) != len(responses):
            raise ValueError(f"There are {len(problems)} problems but {len(responses)} responses; give one for each.")
        with ThreadPoolExecutor(self.config.worker_count(), thread_name_prefix="judge") as pool:

            def judge_all(problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
                return list(pool.map(self._judge, problems, responses))

            return judge_after(self.config.judge_after, judge_all, problems, responses)

    def _judge(self, problem: Problem, response: str) -> Judgement:
        code = extract_code(response)
        deadline = time.monotonic() + self.config.response_seconds
        passed = unjudged = 0
        for test in problem.tests:
            if time.monotonic() >= deadline:
                break
            verdict = self._verdict(code, problem, test)
            passed += verdict is True
            unjudged += verdict is None
            if not verdict and self.config.reward == "all":
                break
        correct = passed == len(problem.tests)
        share = passed / len(problem.tests)
        return Judgement(share if self.config.reward == "share" else float(correct), correct, unjudged=unjudged > 0)

    def _verdict(self, code: str, problem: Problem, test: Test) -> bool | None:
        """Return whether the code passes a test; None if the problem's checker did not say."""
        entry_point, preamble = problem.entry_point, self.config.preamble
        has_preamble = preamble == "always" or (preamble == "classes" and "." in (entry_point or ""))
        request = Request(code, entry_point=entry_point, preamble=PREAMBLE if has_preamble else "")
        if entry_point is None:
            request = request._replace(input=test.given)
        else:
            request = request._replace(arguments=tuple(test.given))
        outcome = run(request, self.config.limits, self._accept_missing)
        if outcome.ending != "finished":
            return False
        if problem.checker is not None:
            return self._checked(problem, test, outcome.output)
        same = same_output if entry_point is None else same_result
        return same(outcome.output, test.expected, self.config.tolerance)

    def _checked(self, problem: Problem, test: Test, output: bytes) -> bool | None:
        """Let the problem's checker decide, in a sandbox of its own; None if it fails or returns no boolean."""
        assert problem.checker is not None
        source, name = self._checkers[problem.checker], problem.checker
        try:
            text = output.decode("utf-8")
        except UnicodeDecodeError:
            return False
        if problem.entry_point is not None:
            if not is_result(text):
                return False
            source, name = source + _CALL_WITH_JSON.format(name=name), "call_with_json"
        request = Request(source, entry_point=name, arguments=(test.given, text, test.expected))
        outcome = run(request, self.config.limits, self._accept_missing)
        return {b"true": True, b"false": False}.get(outcome.output)


def load_checkers(path: Path) -> dict[str, str]:
    """Return the checkers of a Python file: name -> source of the whole file. Nothing of it runs here.

    Raises:
        ValueError: if there is no such file, it is not Python, or it defines no function.
    """
    if not path.is_file():
        raise ValueError(f"checkers is {path}, but there is no such file; give a Python file of functions.")
    source = path.read_text(encoding="utf-8")
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(f"checkers is {path}, which is not Python: {error}") from error
    names = [one.name for one in statements if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")]
    if not names:
        raise ValueError(f"checkers is {path}, which defines no function; write check(given, found, expected).")
    return dict.fromkeys(names, source)
