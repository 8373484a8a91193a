"""Whether what came out of a sandbox is what a test expects. This is where a pass is decided, outside the sandbox.

What came out was written by untrusted code, so it is read as bytes that may be anything. This module must never run
any of it, and never send an expected value to where it runs.
"""

import json
import math
from typing import Any


def same_output(output: bytes, expected: str, tolerance: float) -> bool:
    """Whether a program printed what was expected.

    Both are split into lines and the lines at white space. Empty lines at the end do not count. Words have to be the
    same; where the expected one is a number with a decimal point or an exponent, a number within the tolerance will do.

    Args:
        output: standard output; anything but UTF-8 is wrong.
        expected: the expected text.
        tolerance: the largest difference, absolute or relative to the larger number.
    """
    try:
        found = _words(output.decode("utf-8"))
    except UnicodeDecodeError:
        return False
    wanted = _words(expected)
    return len(found) == len(wanted) and all(
        len(line) == len(wanted_line)
        and all(_same_word(*pair, tolerance) for pair in zip(line, wanted_line, strict=True))
        for line, wanted_line in zip(found, wanted, strict=True)
    )


def same_result(output: bytes, expected: Any, tolerance: float) -> bool:
    """Whether a call returned what was expected.

    Values are compared as Python's == compares them, so 1, 1.0 and True are the same. Where either of two numbers
    has a decimal point or an exponent, a difference within the tolerance will do.

    Args:
        output: the returned value as JSON and nothing else; anything but one JSON value is wrong.
        expected: a JSON value.
        tolerance: the largest difference, absolute or relative to the larger number.
    """
    try:
        found = json.loads(output.decode("utf-8"))
    except (ValueError, RecursionError):  # all that text can make the parser raise
        return False
    return _same_value(found, expected, tolerance)


def _words(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]


def _same_word(found: str, wanted: str, tolerance: float) -> bool:
    if found == wanted:
        return True
    if not set(wanted) & set(".eE"):
        return False
    try:
        return _close(float(found), float(wanted), tolerance)
    except ValueError:
        return False


def _same_value(found: Any, wanted: Any, tolerance: float) -> bool:
    """Goes no deeper than the expected value does, whatever was found."""
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(_same_value(*pair, tolerance) for pair in zip(found, wanted, strict=True))
        )
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(_same_value(found[key], value, tolerance) for key, value in wanted.items())
        )
    numbers = isinstance(found, int | float) and isinstance(wanted, int | float)
    if numbers and float in (type(found), type(wanted)):
        return _close(found, wanted, tolerance)
    return found == wanted


def _close(found: float, wanted: float, tolerance: float) -> bool:
    try:
        return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an int beyond the range of a float
        return found == wanted
