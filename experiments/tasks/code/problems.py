"""Programming problems from files of any format of `experiments.tasks.records`, each of them checked.

A record has "prompt", "tests" and, if the tests call a function, "entry_point"; "solution" and "checker" are optional.
"""

import keyword
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from experiments.tasks.chats import Prompt, read_prompt
from experiments.tasks.records import decode_json, make_all, read_records, require, shorten

_FIELDS = {"prompt", "messages", "tests", "entry_point", "solution", "checker"}
_TEXTS = ("entry_point", "solution", "checker")


class Test(NamedTuple):
    """One test: the input of a response and the output that it must produce."""

    __test__ = False  # tells pytest that this is no test case

    given: Any
    """Standard input as text for a program, the list of arguments for a function."""
    expected: Any
    """Standard output as text for a program, a JSON value for a function."""


class Problem(NamedTuple):
    """One programming problem."""

    prompt: Prompt
    tests: tuple[Test, ...]
    entry_point: str | None
    """The function that the tests call, or "Class.method". None: the response is a program that reads and prints."""
    solution: str | None
    """Python code that passes the tests, for the warm start."""
    checker: str | None = None
    """The checker that compares what a test gives with what is expected (see `checkers`). None: equality, with a
    tolerance."""


def load_problems(
    path: str,
    checkers: Collection[str] = (),
    split: str | None = None,
    prompt_field: str | None = None,
    system: str = "",
) -> list[Problem]:
    """Read all problems of a file or folder.

    Args:
        path: the file or folder.
        checkers: the checkers that a problem may name.
        split: the part of a folder of several.
        prompt_field: the field of the prompt; records may then have fields that are not used. None: "prompt" or
            "messages".
        system: the system message that all prompts get.

    Raises:
        ValueError: if there is no such file, if it holds no record, or if it is damaged or holds records that are no
            problems, naming the file and the lines.
    """
    return make_all(read_records(path, split), lambda fields: _problem(fields, checkers, prompt_field, system))


def _problem(fields: Mapping[str, Any], checkers: Collection[str], prompt_field: str | None, system: str) -> Problem:
    asked = read_prompt(fields, prompt_field, system)
    require(fields, "tests")
    present = {name for name, value in fields.items() if value is not None}
    if prompt_field is None and (unknown := present - _FIELDS):
        raise ValueError(
            f"the record has the unknown {_listed(unknown)}; its fields are {_listed(_FIELDS)}. If it has others too, "
            "name that of its prompt with task.prompt_field"
        )
    for name in _TEXTS:
        if not isinstance(fields.get(name), str | None):
            raise ValueError(f"{name!r} is {shorten(fields[name])}, but it must be text.")
    entry_point, tests = fields.get("entry_point"), fields["tests"]
    parts = [] if entry_point is None else entry_point.split(".")
    if len(parts) > 2 or not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise ValueError(
            f"'entry_point' is {shorten(entry_point)}; it must name a function, or a method as 'Class.method'."
        )
    checker = fields.get("checker")
    if checker is not None and checker not in checkers:
        raise ValueError(
            f"there is no checker {shorten(checker)}; there are {_listed(checkers) or 'none'}. Put others into a file "
            "of functions and name it with task.checkers."
        )
    if isinstance(tests, str):  # tables, whose columns have one type, hold tests as a text of JSON
        try:
            tests = decode_json(tests)
        except ValueError as error:
            raise ValueError(f"'tests' is a text, but not of JSON: {error}") from error
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"'tests' is {shorten(tests)}, but it must be a list of one or more tests.")
    make = _program_test if entry_point is None else _call_test
    return Problem(
        prompt=asked.prompt,
        tests=tuple(make(test, f"test {number}") for number, test in enumerate(tests, start=1)),
        entry_point=entry_point,
        solution=fields.get("solution"),
        checker=checker,
    )


def _program_test(test: Any, name: str) -> Test:
    _check_object(test, name, required={"input", "output"})
    for field in ("input", "output"):
        if not isinstance(test[field], str):
            raise ValueError(f"{field!r} of {name} is {shorten(test[field])}, but it must be text.")
    if not test["output"].strip():
        raise ValueError(f"'output' of {name} is empty, so a program that does nothing would pass; leave the test out.")
    return Test(test["input"], test["output"])


def _call_test(test: Any, name: str) -> Test:
    _check_object(test, name, required={"arguments", "result"})
    if not isinstance(test["arguments"], list):
        raise ValueError(f"'arguments' of {name} is {shorten(test['arguments'])}, but it must be a list.")
    return Test(test["arguments"], test["result"])


def _check_object(value: Any, name: str, required: set[str]) -> None:
    if isinstance(value, str):
        raise ValueError(
            f"{name} is the text {shorten(value)}, but it must be an object with {_listed(required)}. A statement "
            "such as an assert would run in the same process as the response, which could change its meaning."
        )
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shorten(value)}, but it must be an object with {_listed(required)}.")
    if missing := required - set(value):
        raise ValueError(f"{name} has no {_listed(missing)}.")
    # Tables give every object the fields that another one has.
    if unknown := {field for field, inner in value.items() if inner is not None} - required:
        raise ValueError(f"{name} has the unknown {_listed(unknown)}; its fields are {_listed(required)}.")


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
