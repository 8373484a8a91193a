"""Problems of mathematics: the table of the known sets, and what is made of the records of these and of any others.

Answers are rewritten to the LaTeX that a person would put into a box, by rules for a whole set, never for a single
problem.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.tasks.chats import Prompt, read_prompt
from experiments.tasks.mathematics.boxes import last_box
from experiments.tasks.records import Record, make_all, read_records, require


class Problem(NamedTuple):
    """One problem.

    Attributes:
        question: the problem, as text and LaTeX, or the messages of a chat.
        answer: its answer, as LaTeX without dollar signs.
        solution: a worked solution that ends with the answer in a box.
        others: further answers, any of which is as right as `answer`.
    """

    question: Prompt
    answer: str
    solution: str
    others: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All answers that are right."""
        return (self.answer, *self.others)


@dataclass(frozen=True)
class Layout:
    """The layout of a set's records: the fields from which a `Problem` is made.

    Attributes:
        question: the field of the question. None: "prompt", or else "messages".
        answer: the field of the answer.
        read_answer: turns that field into LaTeX; raises ValueError with the reason if it cannot.
        solution: the field of the worked solution. None: it is the reply that a chat ends with, or the answer alone.
        builder: name of the set in TensorFlow Datasets; "" if it has no builder.
        any_of: True if a list in the field of the answer is one of answers any of which is right.
    """

    question: str | None
    answer: str
    read_answer: Callable[[Any], str]
    solution: str | None
    builder: str = ""
    any_of: bool = True


def layout_of(name: str, prompt_field: str | None = None, answer_field: str | None = None) -> Layout:
    """Return the layout of a set, or one of the two fields if either is named."""
    if prompt_field is None and answer_field is None:
        return SETS[name]
    return Layout(prompt_field, answer_field or "answer", _plain, None)


def read_problems(path: str, layout: Layout, split: str | None = None, system: str = "") -> list[Problem]:
    """Read the problems of a file or folder of any format of `experiments.tasks.records`.

    Args:
        path: the file or folder.
        layout: the layout of its records.
        split: the part of a folder of several.
        system: the system message that all prompts get.

    Returns:
        The problems, in the order of the file.

    Raises:
        ValueError: if there is no such file, if it holds no record, or if it is damaged or holds records that are no
            problems, naming the file and the lines.
    """
    return problems_of(read_records(path, split), layout, system)


def problems_of(records: Iterable[Record], layout: Layout, system: str = "") -> list[Problem]:
    """Make a problem of each record; raise ValueError, naming all records of which none can be made."""
    hint = "Name the fields of another layout with task.prompt_field and task.answer_field."
    return make_all(records, lambda fields: _problem_of(fields, layout, system), hint)


def _problem_of(fields: Mapping[str, Any], layout: Layout, system: str) -> Problem:
    require(fields, *[name for name in (layout.question, layout.answer, layout.solution) if name is not None])
    asked = read_prompt(fields, layout.question, system)
    value = fields[layout.answer]
    if layout.any_of and isinstance(value, list):
        if not value:
            raise ValueError(f"the list of answers in {layout.answer!r} is empty")
        answers = list(dict.fromkeys(layout.read_answer(one).strip() for one in value))
    else:
        answers = [layout.read_answer(value).strip()]
    if not all(answers):
        raise ValueError(f"the answer in the field {layout.answer!r} is empty")
    worked = asked.reply or "" if layout.solution is None else _text(fields[layout.solution], layout.solution)
    # The solution ends with a box, and has no calculator's notes or answers after ####, as in GSM8K.
    worked = re.sub(r"<<[^<>]*>>", "", worked)
    worked = re.sub(r"\s*####[^\n]*\s*\Z", "", worked)
    if not last_box(worked):
        worked = f"{worked}\n\nThe final answer is $\\boxed{{{answers[0]}}}$.".lstrip()
    return Problem(asked.prompt, answers[0], worked, tuple(answers[1:]))


def _text(value: Any, field: str) -> str:
    if isinstance(value, list) and value:  # several solutions
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {field!r} holds no text")
    return value


def _plain(value: Any) -> str:
    """Return text or a number as text; a float such as 27.0 was an integer before it came from a table."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"the answer is {value!r}, neither text nor a number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the answer is {value}")
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def _after_hashes(value: Any) -> str:
    *before, answer = _plain(value).split("####")
    if not before:
        raise ValueError("there is no #### before the answer")
    return answer.strip().replace(",", "")


def _in_last_box(value: Any) -> str:
    """Return the content of a solution's last box, with Python's notation turned into LaTeX."""
    answer = last_box(_plain(value))
    if answer is None:
        raise ValueError("the solution has no \\boxed{} answer")
    answer = re.sub(r"(\d)\.(?!\d|\\|\()", r"\1", answer.replace("$", "").replace("np.", "\\"))
    return re.sub(r"(?<![\w.\\])(\d+(?:\.\d+)?)e([+-]?\d+)(?!\w)", r"\1 \\times 10^{\2}", answer)


def _in_list(value: Any) -> str:
    """Return the only entry of a list; it may itself name several answers between dollar signs."""
    if not isinstance(value, list) or len(value) != 1:
        raise ValueError(f"the answer is {value!r}, not a list of one text")
    return _plain(value[0]).replace("$", "").strip().removesuffix(".")


SETS: dict[str, Layout] = {
    "gsm8k": Layout("question", "answer", _after_hashes, "answer", builder="gsm8k"),
    "math500": Layout("problem", "answer", _plain, "solution"),
    "aime24": Layout("problem", "answer", _plain, "solution"),
    "amc23": Layout("problem", "answer", _plain, None),
    "minerva": Layout("problem", "solution", _in_last_box, "solution"),
    "olympiadbench": Layout("question", "final_answer", _in_list, "solution", any_of=False),
}
