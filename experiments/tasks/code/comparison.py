"""The comparison of a sandbox's output with what a test expects: a pass is decided here, outside the sandbox.

Untrusted code wrote the output, so it is read as arbitrary bytes and never executed, and expected values are never
sent to where that code runs.
"""

import json
import math
from typing import Any


def same_output(output: bytes, expected: str, tolerance: float) -> bool:
    """Return whether a program printed what was expected.

    Both texts are split into lines, and lines into words at white space. Empty lines at the end do not count. Words
    must be equal; where the expected word is a number with a decimal point or an exponent, a number within the
    tolerance is accepted.

    Args:
        output: standard output; text that is not UTF-8 is wrong.
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
    """Return whether a call returned what was expected.

    Values are compared with Python's ==, so 1, 1.0 and True are equal. Where either of two numbers has a decimal point
    or an exponent, a difference within the tolerance is accepted.

    Args:
        output: the returned value as JSON and nothing else; anything but one JSON value is wrong.
        expected: a JSON value.
        tolerance: the largest difference, absolute or relative to the larger number.
    """
    try:
        found = json.loads(output.decode("utf-8"))
    except (ValueError, RecursionError):  # everything that text can make the parser raise
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
    """Compare two JSON values, no deeper than the expected one is nested."""
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
