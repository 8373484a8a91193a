"""The comparison of a sandbox's output with what a test expects: a pass is decided here, outside the sandbox.

Untrusted code wrote the output, so it is read as arbitrary bytes and never executed, and expected values are never
sent to where that code runs.
"""

import decimal
import json
import math
import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|-?\.[0-9]+")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
# Numbers are exact however long they are; only their difference is rounded.
_ARITHMETIC = decimal.Context(prec=50, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)


def same_output(output: bytes, expected: str, tolerance: float) -> bool:
    """Return whether a program printed what was expected.

    Both texts are split into lines, and lines into words at white space. Empty lines at the end do not count. Words
    must be equal, except for plain decimal numbers, such as 5, -0.5 and 1.10: an expected integer takes the same
    integer with zeros behind a point, and an expected number with a point takes numbers within the tolerance. Anything
    else is text: 1e3, 007, +5, 1_000, nan.

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

    The type of the expected value decides. An integer takes the same integer, but neither a float nor a boolean; a
    float takes floats and integers within the tolerance; everything else takes its equal of the same type.

    Args:
        output: the returned value as JSON and nothing else; anything but one JSON value is wrong.
        expected: a JSON value.
        tolerance: the largest difference, absolute or relative to the larger number.
    """
    try:
        found = _read(output.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    pairs = [(found, expected)]
    while pairs:
        found, wanted = pairs.pop()
        if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
            pairs += zip(found, wanted, strict=True)
        elif isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
            pairs += [(found[key], value) for key, value in wanted.items()]
        elif isinstance(wanted, list | dict) or not _same_leaf(found, wanted, tolerance):
            return False
    return True


def is_result(text: str) -> bool:
    """Return whether the text is one JSON value and nothing else."""
    try:
        _read(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read(text: str) -> Any:
    """Read a JSON value; its integers become Decimals.

    Python would refuse an integer of thousands of digits, or take seconds to read one of a million. ValueError and
    RecursionError are everything that a text can make this raise.
    """
    return json.loads(text, parse_int=Decimal, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value.")


def _words(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]


def _same_word(found: str, wanted: str, tolerance: float) -> bool:
    if found == wanted:
        return True
    if not _NUMBER.fullmatch(found) or not _NUMBER.fullmatch(wanted):
        return False
    if _INTEGER.fullmatch(wanted):
        return Decimal(found) == Decimal(wanted)
    return _close(Decimal(found), Decimal(wanted), tolerance)


def _close(found: Decimal, wanted: Decimal, tolerance: float) -> bool:
    # copy_abs and comparisons are exact, where abs() would round, or overflow at a million digits.
    allowed = _ARITHMETIC.multiply(Decimal(tolerance), max(found.copy_abs(), wanted.copy_abs(), Decimal(1)))
    return _ARITHMETIC.subtract(found, wanted).copy_abs() <= allowed


def _same_leaf(found: Any, wanted: Any, tolerance: float) -> bool:
    """Compare two values without parts. Integers of `found` are of type Decimal."""
    if isinstance(wanted, float):
        return isinstance(found, float | Decimal) and math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return isinstance(found, Decimal) and found == wanted
    return type(found) is type(wanted) and found == wanted
