"""The library's side of the task, in processes of their own: data sets are checked, problems made, responses scored.

Generators and verifiers are the library's code. Some are slow, some draw from Python's global random numbers, some
depend on the order of sets, and verifiers read whatever a model wrote. So all of it runs in the processes of a
`WorkerPool`: with limits, with one seed of the hashes of texts (`ENVIRONMENT`), and with global random numbers seeded
by the problem's own number. A problem then depends on its data set and number alone.

Only worker processes import this module, because it imports the library, which takes seconds.
"""

import ast
import base64
import dataclasses
import difflib
import functools
import json
import math
import pickle
import random
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from reasoning_gym.factory import (  # pyright: ignore[reportMissingImports]
    CURRICULA,
    DATASETS,
    create_curriculum,
    create_dataset,
)
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer  # pyright: ignore[reportMissingImports]

from experiments.tasks.reasoning_gym.config import DataSet

BLOCK = 500
"""Problems of one instance of a data set. Some prepare all of an instance's problems when it is made."""
BY_EVAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Data sets whose verifiers hand an answer that is not the reference's text to `eval`."""
BY_SYMPY = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Data sets whose verifiers hand an answer to sympy's `parse_expr`, which edits it and evaluates it as Python."""
_FUNCTIONS = frozenset({"Abs", "Integral", "exp", "ln", "log", "sqrt", "sin", "cos", "tan", "sec", "csc", "cot"})
_FUNCTIONS |= {"asin", "acos", "atan", "sinh", "cosh", "tanh"}
_INERT = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.List,
    ast.Tuple,
    ast.BinOp,
    ast.UnaryOp,
    ast.Call,
    ast.operator,
    ast.unaryop,
)


def work(request: dict[str, Any]) -> Any:
    """Serve one request of `experiments.tasks.reasoning_gym.task`: {name of a function below: its arguments}."""
    ((name, arguments),) = request.items()
    functions: dict[str, Callable[..., Any]] = {
        "check": check,
        "make": make,
        "score": score,
        "system_prompts": system_prompts,
    }
    return functions[name](*arguments)


def check(fields: list[Any]) -> list[str]:
    """Return what is wrong with a data set's name and difficulty, a sentence each."""
    data_set = DataSet(*fields)
    if data_set.name == "composite" or data_set.name not in DATASETS:
        return [_unknown("data set", data_set.name, set(DATASETS) - {"composite"})]
    mistakes, name = [], data_set.name
    if data_set.level is not None or data_set.levels:
        mistakes += _level_mistakes(data_set)
    options = {option.name for option in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    mistakes += [_unknown(f"option of {name}", one, options) for one in data_set.options if one not in options]
    if mistakes:
        return mistakes
    try:
        config = _config(data_set)
        mistakes += [
            f"{name}.{option} is {value!r}, but the library's is a {type(default).__name__}, such as {default!r}"
            for option, value in data_set.options.items()
            if not _same_type(value, default := _default(name, option))
        ]
        if not mistakes and hasattr(config, "validate"):
            config.validate()
        return mistakes
    except Exception as error:
        return [f"{name} refuses these settings: {error or type(error).__name__}"]


def _level_mistakes(data_set: DataSet) -> list[str]:
    name = data_set.name
    if name not in CURRICULA:
        return [f"{name} has no curriculum, so it has no levels: set its options instead, as {name}.OPTION=VALUE"]
    attributes = create_curriculum(name).attributes
    last = {attribute: len(of_attribute.levels) - 1 for attribute, of_attribute in attributes.items()}
    mistakes = [
        _unknown(f"attribute of the curriculum of {name}", attribute, last)
        if attribute not in last
        else f"{name}.{attribute} has the levels 0 to {last[attribute]}, not {level}"
        for attribute, level in data_set.levels.items()
        if level > last.get(attribute, -1)
    ]
    highest = max(last.values(), default=0)
    if data_set.level is not None and data_set.level > highest:
        mistakes.append(f"the curriculum of {name} has the levels 0 to {highest}, not {data_set.level}")
    return mistakes


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3) or [one for one in sorted(known) if name and name in one]
    if not near and len(known) > 20:
        return f"there is no {what} {name!r}; the library's documentation lists all {len(known)}"
    if near:
        return f"there is no {what} {name!r}; did you mean {', '.join(near)}?"
    return f"there is no {what} {name!r}; choose one of {', '.join(sorted(known))}"


def _default(name: str, option: str) -> Any:
    (field,) = [one for one in dataclasses.fields(DATASETS[name][1]) if one.name == option]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _same_type(value: Any, default: Any) -> bool:
    """Return whether a value may stand in place of a default, of which None says nothing about the type."""
    if default is None or value is None:
        return True
    if isinstance(default, list | tuple | set | frozenset):
        return isinstance(value, list | tuple | set)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default) or (isinstance(default, str) and isinstance(value, str))


def _config(data_set: DataSet, **more: Any) -> Any:
    """Return the library's config of a data set: its defaults, the curriculum's levels over them, options over both."""
    if data_set.level is None and not data_set.levels:
        return DATASETS[data_set.name][1](**data_set.options, **more)
    curriculum = create_curriculum(data_set.name)
    if data_set.level is not None:
        curriculum.set_global_level(data_set.level)
    for attribute, level in data_set.levels.items():
        curriculum.set_attr_level(attribute, level)
    return dataclasses.replace(curriculum.generate_configuration(more), **data_set.options)


@functools.lru_cache(maxsize=32)
def _instance(fields: str, block: int) -> Any:
    """Return the instance of a data set that makes the problems of a block.

    Instance and index are chosen so that their sum, from which most data sets seed a problem, is the problem's number.
    """
    data_set = DataSet(*json.loads(fields))
    _seed_globally(block)
    config = _config(data_set, seed=block * BLOCK, size=BLOCK)
    options = {option.name: getattr(config, option.name) for option in dataclasses.fields(config) if option.init}
    return create_dataset(data_set.name, **options)


def _seed_globally(number: int) -> None:
    random.seed(number)
    np.random.seed(number % 2**32)


def make(fields: list[Any], number: int) -> dict[str, Any]:
    """Make a problem.

    Args:
      fields: of the data set.
      number: below 2**32.

    Returns:
      For JSON: "question"; "answer", None if the library gives none; and "entry", which `score` needs.
    """
    block, index = divmod(number, BLOCK)
    instance = _instance(json.dumps(fields), block)
    _seed_globally(number)
    entry = instance[index]
    question, answer = entry["question"], entry["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the problem has no question")
    kept = base64.b64encode(pickle.dumps(entry)).decode()
    return {"question": question, "answer": None if answer is None else str(answer), "entry": kept}


def score(fields: list[Any], number: int, kept: str, response: str, tags: bool) -> float | None:
    """Score a response; None if it has no answer between tags, though they are asked for.

    Raises:
      ValueError: if the verifier gives no number.
    """
    answer = extract_answer(response) if tags else response
    if answer is None:
        return None
    if not may_be_scored(fields[0], answer):
        answer = None
    entry = pickle.loads(base64.b64decode(kept))  # from `make`
    found = float(_instance(json.dumps(fields), number // BLOCK).score_answer(answer, entry))
    if not math.isfinite(found):
        raise ValueError(f"the verifier of {fields[0]} gave the score {found}")
    return found


def may_be_scored(name: str, answer: str) -> bool:
    """Return whether a data set's verifier does nothing but score when it is given an answer.

    Of what verifiers evaluate as Python, numbers, names, lists and arithmetic pass, and calls of functions such as sin.
    """
    if name not in BY_EVAL | BY_SYMPY:
        return True
    try:
        nodes = list(ast.walk(ast.parse(answer.strip(), mode="eval")))
    except SyntaxError:
        return name in BY_EVAL  # which `eval` refuses as well; sympy would edit it first
    except (ValueError, RecursionError, MemoryError):
        return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return all(isinstance(node, _INERT) for node in nodes) and all(
        isinstance(call.func, ast.Name) and call.func.id in _FUNCTIONS and not call.keywords for call in calls
    )


def system_prompts() -> dict[str, str]:
    """Return the library's system messages by name."""
    return dict(SYSTEM_PROMPTS)
