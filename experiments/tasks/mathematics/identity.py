"""Decide whether two expressions are equal wherever both have a value.

Letters get rational values that are drawn from the digest of both expressions, and equal expressions have equal values
at every one of these points. Rational values are compared exactly, others by intervals of rising precision: disjoint
intervals prove that values differ. Values count as equal when their intervals still overlap at a precision well beyond
every number in the expressions; where such a precision would be too high, they do not.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from hashlib import sha256

from experiments.tasks.mathematics.grammar import Node
from experiments.tasks.mathematics.values import Evaluator, TooMuchWork, Undefined, Value, is_real, iv

POINTS = 8
"""Number of points at which expressions with letters are compared; all points where floors make steps between them."""
_TRIED = 40
_FEWEST = 3
_WHOLE = {"k", "l", "m", "n", "N"}
"""Letters that stand for whole numbers; all others stand for real numbers."""
_PRECISIONS = (64, 256)
_MARGIN = 256
_MOST_PRECISION = 2**13


def are_equal(left: Node, right: Node) -> bool:
    """Return whether two expressions are equal at all points at which both have a value, of which there are enough.

    Roots and logarithms are taken for positive letters; letters of either sign count where both values are real.
    """
    letters = names_of(left) | names_of(right)
    enough = _TRIED if _holds_steps(left) or _holds_steps(right) else POINTS
    seen = 0
    for point, is_positive in _points(left, right, letters):
        found = _equal_at(left, right, point, is_positive)
        if found is False:
            return False
        seen += found is True
        if seen >= (enough if letters else 1):
            return True
    return seen >= (_FEWEST if letters else 1)


def has_value(node: Node) -> bool:
    """Return whether an expression has a value, and is thus equal to itself."""
    return are_equal(node, node)


def ratio_is_constant(left: Node, right: Node, positive: bool) -> bool:
    """Return whether one expression is a constant other than zero times the other, above zero if it must be positive.

    Equations and inequalities mean the same if their differences of sides are such multiples.
    """
    letters = names_of(left) | names_of(right)
    for point, _ in _points(left, right, letters):
        values = []
        for node in (left, right):
            try:
                values.append(Evaluator(point).value(node, 128))
            except Undefined:
                break
        if len(values) < 2 or any(not is_real(value) for value in values):
            continue
        numbers = [value if isinstance(value, Fraction) else Fraction(float(value.mid)) for value in values]
        if not all(numbers) or any(not isinstance(value, Fraction) and 0 in value for value in values):
            return False
        factor = (numbers[0] / numbers[1]).limit_denominator(10**6)
        if factor == 0 or (positive and factor < 0):
            return False
        scaled = Node("mul", (Node("number", (factor, Fraction(0), 1)), right))
        return are_equal(left, scaled)
    return False


def names_of(node: Node) -> set[str]:
    """Return the names of the letters and of the unknown functions in an expression."""
    own = {node.args[0]} if node.op in ("name", "apply") else set()
    return own.union(*(names_of(argument) for argument in node.args if isinstance(argument, Node)))


def name_points(letters: Sequence[str]) -> list[Mapping[str, Fraction]]:
    """Return the points at which values name an expression with these letters."""
    if not letters:
        return [{}]
    draw = random.Random("names")
    return [{name: Fraction(draw.randint(20, 999), 101) for name in letters} for _ in range(2)]


def _holds_steps(node: Node) -> bool:
    """Return whether an expression rounds something to whole numbers."""
    return node.op in ("floor", "ceil") or any(_holds_steps(arg) for arg in node.args if isinstance(arg, Node))


def _counted_names(node: Node) -> set[str]:
    """Return the letters that stand in factorials and binomial coefficients, and so count something."""
    if node.op in ("factorial", "binomial"):
        return names_of(node)
    return {name for argument in node.args if isinstance(argument, Node) for name in _counted_names(argument)}


def _points(left: Node, right: Node, letters: set[str]) -> Iterator[tuple[Mapping[str, Fraction], bool]]:
    """Yield points, and whether all letters are positive there."""
    if not letters:
        yield {}, True
        return
    whole = _WHOLE | _counted_names(left) | _counted_names(right)
    has_steps = _holds_steps(left) or _holds_steps(right)
    draw = random.Random(sha256(repr((left, right)).encode()).digest())
    for index in range(_TRIED):
        positive = index % 2 == 0 or letters <= whole
        point = {}
        for name in sorted(letters):
            if name in whole:
                one_by_one = has_steps and len(letters) == 1
                point[name] = Fraction(index + 1 if one_by_one else draw.randint(1, 12 if index % 2 else 60))
            else:
                point[name] = Fraction(draw.randint(20, 999), draw.choice((101, 211, 307, 1009)))
        if not positive:
            real = sorted(letters - whole)
            for name in draw.sample(real, draw.randint(1, len(real))):
                point[name] = -point[name]
        yield point, positive


def _equal_at(left: Node, right: Node, point: Mapping[str, Fraction], is_positive: bool) -> bool | None:
    """Return whether two expressions are equal at a point; None where one has no value, or where it does not count."""
    evaluator = Evaluator(point)
    precision = 0
    for step in (*_PRECISIONS, None):
        if step is None:
            step = 2 * evaluator.height + _MARGIN
            if step > _MOST_PRECISION:
                return False
        if step <= precision:
            continue
        precision = step
        try:
            values = [evaluator.value(node, precision) for node in (left, right)]
        except TooMuchWork:
            return None
        except Undefined:
            values = None
            continue
        if all(isinstance(value, Fraction) for value in values):
            return values[0] == values[1]
        if not is_positive and not all(map(is_real, values)):
            return None
        if not _overlap(*values):
            return False
        evaluator.note_zero(*values)
    return None if values is None else True if _is_narrow(*values) else None


def _overlap(left: Value, right: Value) -> bool:
    return all(
        first.a <= second.b and second.a <= first.b
        for first, second in zip(_real_and_imaginary(left), _real_and_imaginary(right), strict=True)
    )


def _real_and_imaginary(value: Value) -> tuple[Value, Value]:
    if isinstance(value, Fraction):
        return iv.mpf(value.numerator) / iv.mpf(value.denominator), iv.mpf(0)
    return (value, iv.mpf(0)) if is_real(value) else (value.real, value.imag)


def _is_narrow(*values: Value) -> bool:
    """Return whether intervals tell a value to 30 digits, or tell zero to as many places."""
    for value in values:
        parts = _real_and_imaginary(value)
        size = max(abs(end) for part in parts for end in (part.a, part.b))
        if any(part.a <= 0 <= part.b for part in parts):
            size = max(size, iv.mpf(1))
        if not all(part.delta <= size * iv.mpf(2) ** -100 for part in parts):
            return False
    return True
