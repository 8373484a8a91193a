"""Equality of numbers: exact values, decimals that are roundings of them, and what percent and degree signs allow."""

from fractions import Fraction
from typing import NamedTuple

from experiments.tasks.mathematics.grammar import Node
from experiments.tasks.mathematics.identity import are_equal, names_of
from experiments.tasks.mathematics.values import Evaluator, Undefined, Value, is_real

FEWEST_DIGITS = 6
"""Smallest number of digits with which a decimal may stand for the value that it is a rounding of."""
_PRECISION = 256


class Decimal(NamedTuple):
    """A decimal: its value, the size of one unit in its last place, and its number of digits."""

    value: Fraction
    last_place: Fraction
    digits: int


def decimal_of(node: Node) -> Decimal | None:
    """Return an expression that is a decimal, with a sign, a percent sign or a power of ten; None for others."""
    if node.op == "number":
        return Decimal(*node.args) if node.args[1] else None
    if node.op == "neg":
        inner = decimal_of(node.args[0])
        return inner and inner._replace(value=-inner.value)
    scale = None
    if node.op == "percent":
        inner, scale = decimal_of(node.args[0]), Fraction(1, 100)
    elif node.op == "mul":
        inner, scale = decimal_of(node.args[0]), _power_of_ten(node.args[1])
    return Decimal(inner.value * scale, inner.last_place * scale, inner.digits) if scale and inner else None


def _power_of_ten(node: Node) -> Fraction | None:
    if node.op != "pow" or node.args[0].op != "number" or node.args[0].args[0] != 10:
        return None
    try:
        exponent = Evaluator().value(node.args[1], 64) if not names_of(node.args[1]) else None
    except Undefined:
        return None
    if not isinstance(exponent, Fraction) or exponent.denominator != 1 or abs(exponent) > 1_000:
        return None
    return Fraction(10) ** int(exponent)


def rounds_to(exact: Node, rounded: Node, fewest: int = 1) -> bool:
    """Return whether a decimal is an exact value rounded to its own digits, which must be `fewest` or more."""
    decimal = decimal_of(rounded) or _whole(rounded, fewest)
    if decimal is None or decimal.digits < fewest or names_of(exact):
        return False
    try:
        value = Evaluator().value(exact, _PRECISION)
    except Undefined:
        return False
    if not is_real(value):
        return False
    low, high = (value, value) if isinstance(value, Fraction) else (value.a, value.b)
    half = decimal.last_place / 2
    bounds = [decimal.value - half, decimal.value + half]
    if isinstance(value, Fraction):
        return bounds[0] <= value <= bounds[1]
    return _at_least(low, bounds[0]) and _at_least(-high, -bounds[1])


def _at_least(end: Value, bound: Fraction) -> bool:
    return bool(end * bound.denominator >= bound.numerator)


def _whole(node: Node, fewest: int) -> Decimal | None:
    """Return a whole number as a rounding to units, where a rounding is announced."""
    if fewest > 1 or node.op != "number" or node.args[0].denominator != 1:
        return None
    return Decimal(node.args[0], Fraction(1), node.args[2])


def same_number(reference: Node, given: Node) -> bool:
    """Return whether two expressions are the same, or one is a decimal that rounds the other.

    50 % equals 50 as well as 1/2, and 90 degrees equal 90 as well as π/2, but 50 % and 5000 % differ.
    """
    marks, nodes = zip(*map(_marked, (reference, given)), strict=True)
    if marks[0] == marks[1]:
        return _equal_or_rounded(*nodes)
    if marks[0] and marks[1]:
        return _equal_or_rounded(reference, given)
    return _equal_or_rounded(reference, given) or _equal_or_rounded(*nodes)


def is_marked(node: Node) -> bool:
    """Return whether a percent or degree sign is behind an expression."""
    return bool(_marked(node)[0])


def _marked(node: Node) -> tuple[str, Node]:
    """Return the percent or degree sign behind an expression, and the expression without it."""
    if node.op in ("percent", "degree"):
        return node.op, node.args[0]
    if node.op == "neg" and node.args[0].op in ("percent", "degree"):
        return node.args[0].op, Node("neg", node.args[0].args)
    return "", node


def _equal_or_rounded(left: Node, right: Node) -> bool:
    return are_equal(left, right) or rounds_to(left, right, FEWEST_DIGITS) or rounds_to(right, left, FEWEST_DIGITS)
