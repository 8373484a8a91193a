"""The verifier of mathematical answers, by math-verify; the worker processes of the pool run it.

Nothing here has a time limit. Responses are hostile and can make SymPy compute forever, so only a process that may be
killed should call `judge`.
"""

import functools
import logging
import math
import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Expr, Integer

from experiments.tasks.mathematics.boxes import last_box

LONGEST_ANSWER = 2_000
"""Largest number of characters in a box. The longest answer of the sets in `problems.py` has 200."""
LONGEST_TAIL = 2_000
"""Number of characters at the end of a response that are searched for an answer without a box."""

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_BOLD = re.compile(r"\\(?:textbf|mathbf|boldsymbol|bm)\s*\{([^{}]*)\}")
_DIGITS = 6
"""Number of digits to which a decimal fraction must agree."""

# It warns that it sets no time limits; the pool does.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def judge(item: tuple[str, str, bool]) -> dict[str, Any]:
    """Judge one response.

    Args:
        item: the right answer as LaTeX, the response, and whether the response's answer must be in a box.

    Returns:
        "answered": whether there is an answer, in a box if it must be; "correct": whether it is right; "answer": a text
        that is the same for answers that are found to mean the same, None without an answer.
    """
    answer, response, must_be_boxed = item
    box = last_box(response)
    nothing = {"answered": False, "correct": False, "answer": None}
    if box is None and (must_be_boxed or "\\boxed" in response):
        return nothing
    # GSM8K puts #### before its answers, and so does a model that was trained on it.
    given = box if box is not None else response[-LONGEST_TAIL:].rpartition("####")[2]
    if not given.strip() or len(given) > LONGEST_ANSWER:
        return nothing
    parsed = _readings(given) if box is not None else _parse(given)
    if not parsed:
        return nothing
    correct = _is_same(_gold(answer), parsed)
    return {"answered": True, "correct": correct, "answer": answer if correct else _name(parsed[0])}


def _name(value: Any) -> str:
    """Return one text for a value, however it was written: 1/2 and 0.5 have the same."""
    if _is_number(value):
        try:
            return f"{complex(value.evalf()):.{_DIGITS}g}"
        except (TypeError, OverflowError):  # the value has no size
            pass
    return str(value)


def is_readable(answer: str) -> bool:
    """Return whether math-verify understands a right answer. If not, no other way of writing it is judged right."""
    return any(not isinstance(reading, str) for reading in _gold(answer))


def _parse(text: str) -> list[Any]:
    return parse(text, _EXTRACTION, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _readings(answer: str) -> list[Any]:
    """Return the possible meanings of a box's content.

    A number such as 4.5e33 is read both in Python's notation and as LaTeX's 4.5·e·33; one of them must be right.
    """
    answer = _BOLD.sub(r"\1", answer.strip().removesuffix("."))
    answer = re.sub(r"(\d)\.(?!\d)", r"\1", answer)  # 1./3
    parsed = _parse(f"\\boxed{{{answer}}}")
    number = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))[eE]([+-]?\d+)", answer, re.ASCII)
    if number:
        parsed += _parse(f"\\boxed{{{number[1]} \\times 10^{{{number[2]}}}}}")
    return parsed


@functools.lru_cache(maxsize=1024)
def _gold(answer: str) -> tuple[Any, ...]:
    return tuple(_parse(f"\\boxed{{{answer}}}"))


def _is_same(gold: tuple[Any, ...], given: list[Any]) -> bool:
    """Return math-verify's verdict, with the numbers scaled if the right one is small.

    math-verify compares decimals to a number of places and takes tiny numbers for zero, so that 4.6e-24 would equal
    4.7e-24. Scaled to between 1 and 10, they are compared to as many digits.
    """
    scale = _scale(gold[0]) if gold else None
    if scale is not None:
        gold = (gold[0] * scale,)
        given = [one * scale for one in given if _is_number(one)]
    return verify(list(gold), given, float_rounding=_DIGITS, timeout_seconds=None)


def _scale(gold: Any) -> Expr | None:
    if not _is_number(gold):
        return None
    try:
        size = abs(complex(gold.evalf()))
    except (TypeError, OverflowError):  # a percentage, or a value without a size
        return None
    if not 0 < size < 0.01:  # 8 % and 8 stay equal, as their form says
        return None
    return Integer(10) ** math.ceil(-math.log10(size))


def _is_number(value: Any) -> bool:
    return isinstance(value, Expr) and value.is_number


def _warm_up() -> None:
    """Judge a few typical answers.

    The parser caches what it has read, and SymPy loads parts of itself on demand. Workers are forked from a process
    that has imported this module, so that none of them has to repeat this.
    """
    for answer, given in (
        (r"\frac{14}{3}", r"\frac{-7}{2}"),
        ("18", r"\$18.50"),
        (r"3\sqrt{13} + \pi", r"2^{10} - \sqrt[3]{5} \cdot 7"),
        (r"\left( 3, \frac{\pi}{2} \right)", "(3, 4)"),
        (r"1 \pm \sqrt{19}", "1, -2, 5"),
        ("x^5 - 3x + 1", "(x - 1)(x + 2)"),
        (r"(-\infty, 2) \cup (3, \infty)", "[2, 3]"),
        (r"\begin{pmatrix} 1 & -2 \\ 3 & \frac12 \end{pmatrix}", r"\begin{pmatrix} 0 & 1 \\ 1 & 0 \end{pmatrix}"),
        ("y = 2x + 3", r"x \in [-2, 7]"),
        ("6 - 5i", "52_8"),
        (r"90^\circ", r"15\%"),
        (r"\text{east}", r"\sin x"),
    ):
        for must_be_boxed, response in ((True, f"\\boxed{{{given}}}"), (False, f"It is ${given}$.")):
            judge((answer, response, must_be_boxed))


_warm_up()
