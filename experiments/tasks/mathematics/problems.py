"""Problems of the mathematics sets: the table of the sets, and the reader of their JSON lines.

Answers are rewritten to the LaTeX that a person would put into a box, by rules for a whole set, never for a single
problem.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from experiments.tasks.mathematics.boxes import last_box

SPLITS = ("train", "validation", "test")


class Problem(NamedTuple):
    """One problem.

    Attributes:
        question: the problem, as text and LaTeX.
        answer: its answer, as LaTeX without dollar signs.
        solution: a worked solution that ends with the answer in a box.
    """

    question: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Layout:
    """The layout of a set's records: the fields from which a `Problem` is made.

    Attributes:
        question: the field of the question.
        answer: the field of the answer.
        read_answer: turns that field into LaTeX; raises ValueError with the reason if it cannot.
        solution: the field of the worked solution. None: there is none, and the solution is the answer alone.
        builder: name of the set in TensorFlow Datasets; "" if it has no builder.
    """

    question: str
    answer: str
    read_answer: Callable[[Any], str]
    solution: str | None
    builder: str = ""


def read_problems(path: str, name: str) -> list[Problem]:
    """Read a file with one JSON object per line, skipping empty lines.

    Args:
        path: a local path, or one that `etils.epath` reads.
        name: a key of `SETS`.

    Returns:
        The problems, in the order of the file.

    Raises:
        ValueError: if the file does not exist or holds no problem, or if a line is damaged, naming file and line.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {path}: give the path of the problems of {name}, one JSON object per line")
    problems = []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            problems.append(problem_of(json.loads(line.decode()), SETS[name]))
        except ValueError as error:  # from decoding, from JSON, or from the record
            raise ValueError(f"{path}, line {number}, is not a problem of {name}: {error}") from error
    if not problems:
        raise ValueError(f"{path} holds no problem of {name}: the file is empty")
    return problems


def problem_of(record: Any, layout: Layout) -> Problem:
    """Make a `Problem` of a record.

    Raises:
        ValueError: if a field is missing, empty or of the wrong type.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"it holds {type(record).__name__}, not an object with fields")
    for field in (layout.question, layout.answer, layout.solution):
        if field is not None and field not in record:
            raise ValueError(f"the field {field!r} is missing")
    question = _text(record[layout.question], layout.question)
    answer = layout.read_answer(record[layout.answer]).strip()
    if not answer:
        raise ValueError(f"the answer in the field {layout.answer!r} is empty")
    worked = "" if layout.solution is None else _text(record[layout.solution], layout.solution)
    # The solution ends with a box, and has no calculator's notes or answers after ####, as in GSM8K.
    worked = re.sub(r"<<[^<>]*>>", "", worked)
    worked = re.sub(r"\s*####[^\n]*\s*\Z", "", worked)
    if not last_box(worked):
        worked = f"{worked}\n\nThe final answer is $\\boxed{{{answer}}}$.".lstrip()
    return Problem(question, answer, worked)


def draw(problems: list[Problem], count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Split problems in two, by a hash of the seed and the question.

    The draw depends neither on the order of the problems nor on the version of a random generator, and a larger
    `count` includes what a smaller one draws.

    Returns:
        All but `count` of the problems, and those `count`, both in their original order.

    Raises:
        ValueError: if no problem would be left.
    """
    if count >= len(problems):
        raise ValueError(
            f"validation is {count}, but there are {len(problems)} problems to draw it from; lower validation"
        )

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{problems[index].question}".encode()).digest()

    drawn = set(sorted(range(len(problems)), key=rank)[:count])
    rest = [problem for index, problem in enumerate(problems) if index not in drawn]
    return rest, [problems[index] for index in sorted(drawn)]


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
    "olympiadbench": Layout("question", "final_answer", _in_list, "solution"),
}
