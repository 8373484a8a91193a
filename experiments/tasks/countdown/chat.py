"""Countdown for chat models: the problem in words, and an answer that stands between <answer> and </answer>.

The prompt is that of TinyZero (https://github.com/Jiayi-Pan/TinyZero), whose data set has the public layout: a record
with "nums" and "target". The verifier is that of the small model.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.tasks.chats import Message
from experiments.tasks.countdown.problems import CountdownConfig, Problem, generate_problems
from experiments.tasks.countdown.verifier import verify
from experiments.tasks.marker import check_marker, judge_after
from experiments.tasks.records import make_all, read_records, require, shorten
from experiments.tasks.splits import Overlaps, check_shares, check_split, split_of
from experiments.text import ChatTokenizer, ask
from rspo_jax.hosts import say
from rspo_jax.types import Judgement

DEFAULT_PROMPT = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final "
    "answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
DEFAULT_SYSTEM = (
    "You are a helpful assistant. You first think about the reasoning process in the mind and then provide the user "
    "with the answer."
)
LONGEST_ANSWER = 500
"""Largest number of characters between the tags; an answer with four numbers has about 30."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_SIGNS = {
    **dict.fromkeys(("\\times", "\\cdot", "\\ast", "×", "⋅", "·", "∗"), "*"),
    **dict.fromkeys(("\\div", "÷", "∕"), "/"),
    **dict.fromkeys(("−", "–"), "-"),
    **dict.fromkeys(("\\left", "\\right", "\\(", "\\)", "\\[", "\\]", "$", "\\,", "\\;", "\\!", "\\ "), " "),
}
_SIGN = re.compile("|".join(map(re.escape, sorted(_SIGNS, key=len, reverse=True))))
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class ChatCountdownConfig(CountdownConfig):
    """The settings of Countdown for chat models: problems, prompts and rewards.

    Without files, problems are generated as for the small model, by the settings from numbers_min to test.

    Attributes:
        train_path: file of the training problems, in any format of docs/data.md; of a folder of several parts, "train".
        validation_path: file of the validation problems. When absent, they are a share of the training problems.
        test_path: file of the test problems. When absent, they are a share of the training problems.
        validation_share: the share of the training problems of a file that are for validation, where they have no file.
        test_share: the share that is for the test.
        numbers_field: the field of the given numbers, a list.
        target_field: the field of the target.
        prompt: the user's message, with {numbers} and {target} in place of those of the problem.
        system: the system message before it; none if empty.
        begin: the beginning of every response, which the model goes on with. TinyZero's is "Let me solve this step by
            step.\\n<think>"; empty, the model begins itself.
        format_reward: reward of a response with an answer between the tags that is not right; 0.1 in TinyZero. At least
            0, below 1, which a right answer earns.
        use_all: if True, an answer must use every number.
    """

    numbers_min: int = 3
    numbers_max: int = 4
    high: int = 99
    target_max: int = 99
    train_path: str | None = None
    validation_path: str | None = None
    test_path: str | None = None
    validation_share: float = 0.01
    test_share: float = 0.01
    numbers_field: str = "nums"
    target_field: str = "target"
    prompt: str = DEFAULT_PROMPT
    system: str = DEFAULT_SYSTEM
    begin: str = ""
    format_reward: float = 0.0
    use_all: bool = True

    def check(self) -> None:
        """Raise ValueError, naming the mistake and the way out, if a setting is impossible."""
        if missing := [name for name in ("{numbers}", "{target}") if name not in self.prompt]:
            raise ValueError(f"prompt has no {' and no '.join(missing)}; write it where the problem's own goes")
        if _OPEN not in self.prompt + self.system:
            raise ValueError(f"answers stand between {_OPEN} and {_CLOSE}, but neither prompt nor system asks for them")
        if not 0 <= self.format_reward < 1:
            raise ValueError(
                f"format_reward is {self.format_reward}, but a right answer earns 1; set it to at least 0 and below 1"
            )
        check_shares(self.validation_share, self.test_share)
        if self.train_path is None and self.test_path is None:
            if self.validation_path is not None:
                raise ValueError("validation_path is given alone; give the file of the training problems as train_path")
            super().check()


def load_problems(config: ChatCountdownConfig, split: str) -> list[Problem]:
    """Return the problems of a split, read from its file, drawn from the training file, or generated.

    A problem is the same in any order of its numbers, and never in two splits of one file.

    Raises:
        ValueError: if the config or the split is wrong, if the split has no file and no share of one, or if a file is
            damaged or holds records that are no problems, naming the file and the lines.
    """
    config.check()
    check_split(split)
    if config.train_path is None and config.test_path is None:
        return list(generate_problems(config, split))
    paths = {"train": config.train_path, "validation": config.validation_path, "test": config.test_path}
    path = paths[split]
    if split != "train" and path is not None:
        return _read(config, path, split)
    if config.train_path is None:
        raise ValueError(f"there are no {split} problems: give a file of them as train_path")
    shares = {name: 0.0 if paths[name] else getattr(config, f"{name}_share") for name in ("validation", "test")}
    problems = [
        problem
        for problem in _read(config, config.train_path, "train")
        if split_of(_name(problem), **shares, seed=config.seed) == split
    ]
    if not problems:
        raise ValueError(f"{split} is left without problems by its share of {config.train_path}: raise {split}_share")
    return problems


def _read(config: ChatCountdownConfig, path: str, split: str) -> list[Problem]:
    def problem_of(fields: Mapping[str, Any]) -> Problem:
        require(fields, config.numbers_field, config.target_field)
        numbers, target = fields[config.numbers_field], fields[config.target_field]
        if not isinstance(numbers, list) or len(numbers) < 2 or not all(_is_whole(one) and one >= 0 for one in numbers):
            raise ValueError(
                f"{config.numbers_field!r} is {shorten(numbers)}: it must be a list of two or more numbers from 0"
            )
        if not _is_whole(target):
            raise ValueError(f"{config.target_field!r} is {shorten(target)}: it must be a whole number")
        return Problem(tuple(numbers), target, "")

    hint = "Name the fields of another layout with task.numbers_field and task.target_field."
    return make_all(read_records(path, split), problem_of, hint)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(problem: Problem) -> str:
    return f"{sorted(problem.numbers)}={problem.target}"


def answer_of(response: str, is_cut: bool = False) -> str | None:
    """Return what stands between the last pair of tags in a response; None if there is no pair.

    Args:
        response: as the model wrote it.
        is_cut: True if responses end before "</answer>", because it is a stop string.
    """
    end = len(response) if is_cut else response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, max(end, 0))
    return None if start < 0 else response[start + len(_OPEN) : end]


def expression_of(answer: str, target: int) -> str:
    """Return the expression of an answer in the notation of the verifier, which refuses what is none.

    An answer may be an equation whose right side is the target, and have signs as LaTeX and typography write them.
    """
    if len(answer) > LONGEST_ANSWER:
        return ""
    text = re.sub(r"\s+", " ", answer).strip().removesuffix(".")
    text = _BOX.sub(r"\1", text)
    while (simpler := _FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = simpler
    text = _SIGN.sub(lambda sign: _SIGNS[sign.group()], text)
    expression, equals, right = text.partition("=")
    return "" if equals and right.strip() != str(target) else expression


class ChatCountdownTask:
    """An `rspo_jax.types.Task`."""

    def __init__(self, config: ChatCountdownConfig, tokenizer: ChatTokenizer) -> None:
        """Raise ValueError if the config is wrong, or responses cannot have the texts that judging looks for."""
        config.check()
        check_marker(config.judge_after, tokenizer)
        check_marker(_OPEN, tokenizer)
        self.config = config
        self.tokenizer = tokenizer
        self._is_cut = _CLOSE in getattr(tokenizer, "stop_strings", ())
        self._overlaps = Overlaps()
        self._load_once = functools.cache(self._load)

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of a split."""
        return self._load_once(split)

    def _load(self, split: str) -> list[Problem]:
        problems = load_problems(self.config, split)
        for sentence in self._overlaps.note(split, [_name(problem) for problem in problems]):
            say(sentence)
        return problems

    def prompt(self, problem: Problem) -> str:
        question = self.config.prompt.replace("{numbers}", str(list(problem.numbers)))
        messages = [Message("user", question.replace("{target}", str(problem.target)))]
        if self.config.begin:
            messages.append(Message("assistant", self.config.begin))
        return ask(self.tokenizer, "{problem}", tuple(messages), self.config.system)

    def solution(self, problem: Problem) -> str:
        """Return a worked response; raise ValueError if the problem is from a file, which has none."""
        if not problem.solution:
            raise ValueError("problems from a file have no worked solutions; train without a warm start")
        return f"{self.config.judge_after}{_OPEN} {problem.solution} {_CLOSE}"

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """Judge the last answer of each response, after the marker if there is one."""
        return judge_after(self.config.judge_after, self._judge, problems, responses)

    def _judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        judgements = []
        for problem, response in zip(problems, responses, strict=True):
            answer = answer_of(response, self._is_cut)
            if answer is None:
                judgements.append(Judgement(0.0, False))
                continue
            expression = expression_of(answer, problem.target)
            correct = verify(expression, problem.numbers, problem.target, self.config.use_all).correct
            judgements.append(Judgement(1.0 if correct else float(self.config.format_reward), correct))
        return judgements
