"""Programming problems in a JSONL file, read and checked line by line.

Each line is an object with "prompt", "tests" and, if the tests call a function, "entry_point"; "solution" and "checker"
are optional.
"""

import json
import keyword
import math
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

_FIELDS = {"prompt", "tests", "entry_point", "solution", "checker"}
_DIGITS_OF_INT = 4300


class Test(NamedTuple):
    """One test: the input of a response and the output that it must produce."""

    __test__ = False  # tells pytest that this is no test case

    given: Any
    """Standard input as text for a program, the list of arguments for a function."""
    expected: Any
    """Standard output as text for a program, a JSON value for a function."""


class Problem(NamedTuple):
    """One programming problem."""

    prompt: str
    tests: tuple[Test, ...]
    entry_point: str | None
    """The function that the tests call, or "Class.method". None: the response is a program that reads and prints."""
    solution: str | None
    """Python code that passes the tests, for the warm start."""
    checker: str | None = None
    """The checker that compares what a test gives with what is expected (see `checkers`). None: equality, with a
    tolerance."""


def load_problems(path: str, checkers: Collection[str] = ()) -> list[Problem]:
    """Read all problems of a file, skipping empty lines.

    Args:
        path: the file.
        checkers: the checkers that a problem may name.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a line is not a problem, naming file and line, or if the file holds no problem.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}; give a file with one problem per line, as JSON.")
    problems = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            problems.append(_problem(line, checkers))
        except (ValueError, RecursionError) as error:  # everything that a damaged line can raise
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not problems:
        raise ValueError(f"{path} holds no problem; write one per line, as JSON.")
    return problems


def _problem(line: bytes, checkers: Collection[str]) -> Problem:
    fields = json.loads(
        line.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_integer
    )
    _check_object(fields, "the line", required={"prompt", "tests"}, allowed=_FIELDS)
    for name in ("prompt", "entry_point", "solution", "checker"):
        value = fields.get(name)
        if not isinstance(value, str | None) or (name == "prompt" and not value):
            raise ValueError(f"{name!r} is {_short(value)}, but it must be text.")
    entry_point, tests = fields.get("entry_point"), fields["tests"]
    parts = [] if entry_point is None else entry_point.split(".")
    if len(parts) > 2 or not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise ValueError(
            f"'entry_point' is {_short(entry_point)}; it must name a function, or a method as 'Class.method'."
        )
    checker = fields.get("checker")
    if checker is not None and checker not in checkers:
        raise ValueError(
            f"there is no checker {_short(checker)}; there are {_listed(checkers) or 'none'}. Put others into a file "
            "of functions and name it with task.checkers."
        )
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"'tests' is {_short(tests)}, but it must be a list of one or more tests.")
    make = _program_test if entry_point is None else _call_test
    return Problem(
        prompt=fields["prompt"],
        tests=tuple(make(test, f"test {number}") for number, test in enumerate(tests, start=1)),
        entry_point=entry_point,
        solution=fields.get("solution"),
        checker=checker,
    )


def _program_test(test: Any, name: str) -> Test:
    _check_object(test, name, required={"input", "output"})
    for field in ("input", "output"):
        if not isinstance(test[field], str):
            raise ValueError(f"{field!r} of {name} is {_short(test[field])}, but it must be text.")
    if not test["output"].strip():
        raise ValueError(f"'output' of {name} is empty, so a program that does nothing would pass; leave the test out.")
    return Test(test["input"], test["output"])


def _call_test(test: Any, name: str) -> Test:
    _check_object(test, name, required={"arguments", "result"})
    if not isinstance(test["arguments"], list):
        raise ValueError(f"'arguments' of {name} is {_short(test['arguments'])}, but it must be a list.")
    return Test(test["arguments"], test["result"])


def _check_object(value: Any, name: str, required: set[str], allowed: set[str] | None = None) -> None:
    if isinstance(value, str):
        raise ValueError(
            f"{name} is the text {_short(value)}, but it must be an object with {_listed(required)}. A statement "
            "such as an assert would run in the same process as the response, which could change its meaning."
        )
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)}, but it must be an object with {_listed(required)}.")
    if missing := required - set(value):
        raise ValueError(f"{name} has no {_listed(missing)}.")
    if unknown := set(value) - (allowed or required):
        raise ValueError(f"{name} has the unknown {_listed(unknown)}; its fields are {_listed(allowed or required)}.")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value, and no result equals it.")


def _finite_float(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{_short(text)} is beyond the largest float, and no result equals it.")
    return float(text)


def _integer(text: str) -> int:
    # Python's own conversion refuses more digits, because its time grows with their square.
    return int(text) if len(text) <= _DIGITS_OF_INT else int(Decimal(text))


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
