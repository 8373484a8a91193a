"""Equations, inequalities and congruences: what their sides say together."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from experiments.tasks.mathematics.grammar import Node
from experiments.tasks.mathematics.identity import are_equal, names_of
from experiments.tasks.mathematics.numbers import rounds_to
from experiments.tasks.mathematics.readings import Bag, Congruence, Named, Pieces, Reading, Relation, Row, Scalar, Word
from experiments.tasks.mathematics.tokens import Unreadable

SIGNS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx", r"\equiv", r"\in")
INFINITY = Scalar(Node("infinity"))
MINUS_INFINITY = Scalar(Node("neg", (Node("infinity"),)))
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


class Side(NamedTuple):
    """One side of a relation.

    Attributes:
        name: the name that it is, "" if it is none.
        arguments: the arguments of the name, if it is a function.
        reading: what it is read as.
    """

    name: str
    arguments: tuple[str, ...]
    reading: Reading


def related(sides: Sequence[Side], signs: Sequence[str]) -> Reading:
    """Return the reading of sides with the signs of relations between them.

    Raises:
        Unreadable: if they have none, as the false 2 + 3 = 6.
    """
    sides, signs = _without_roundings(list(sides), list(signs))
    if not signs:
        return sides[0].reading
    if set(signs) == {"="}:
        return _equation(sides)
    if signs == [r"\in"]:
        return _named(sides[0], sides[1].reading)
    if signs == [r"\ne"]:
        return _unequal(*sides)
    if set(signs) <= {"<", ">", r"\le", r"\ge"}:
        return _inequality(sides, signs)
    raise Unreadable("these relations do not go together")


def differs(left: Reading, right: Reading, sign: str) -> Relation:
    """Return the relation of the difference of two sides and zero."""
    if not (isinstance(left, Scalar | Word) and isinstance(right, Scalar | Word)):
        raise Unreadable("a relation of what are no expressions")
    first, second = _expression(left), _expression(right)
    if sign in (">", r"\ge"):
        first, second, sign = second, first, _TURNED[sign]
    sign = {r"\le": "<=", r"\ne": "!="}.get(sign, sign)
    return Relation(sign, Node("add", (first, Node("neg", (second,)))))


def _expression(side: Scalar | Word) -> Node:
    node = side.product if isinstance(side, Word) else side.node
    if node is None or node.op == "infinity":
        raise Unreadable("a relation with words")
    return node


def _without_roundings(sides: list[Side], signs: list[str]) -> tuple[list[Side], list[str]]:
    """Leave out what follows ≈ if it is the side before, rounded."""
    while r"\approx" in signs:
        place = signs.index(r"\approx")
        exact, rounded = sides[place].reading, sides[place + 1].reading
        if sides[place].name and place == 0:
            signs[place] = "="
        elif isinstance(exact, Scalar) and isinstance(rounded, Scalar) and rounds_to(exact.node, rounded.node):
            del signs[place], sides[place + 1]
        else:
            raise Unreadable("a rounding that is not one")
    return sides, signs


def _named(side: Side, value: Reading) -> Reading:
    if not side.name:
        raise Unreadable("only a name equals a set or lies in one")
    if isinstance(side.reading, Row) and isinstance(value, Row):  # (x, y) = (2, 1)
        names = [item.node.args[0] for item in side.reading.items if isinstance(item, Scalar)]
        if len(names) != len(value.items) or value.opening != "(":
            raise Unreadable("a tuple of names and values that do not fit")
        return Bag(tuple(Named(name, (), item) for name, item in zip(names, value.items, strict=True)))
    return Named(side.name, side.arguments, value)


def _is_constant(reading: Reading) -> bool:
    return isinstance(reading, Scalar) and not names_of(reading.node)


def _is_same_expression(left: Reading, right: Reading) -> bool:
    if not (isinstance(left, Scalar) and isinstance(right, Scalar)):
        return False
    return left.unit == right.unit and are_equal(left.node, right.node)


def _equation(sides: Sequence[Side]) -> Reading:
    """Return the reading of sides that are all equal."""
    readings = [side.reading for side in sides]
    named = [side for side in sides[:-1] if side.name]
    if not named:
        if all(map(_is_constant, readings)):
            _check_chain(readings)
            return readings[-1]
        if all(map(_is_same_expression, readings, readings[1:])):  # (x + 1)² = x² + 2x + 1
            return readings[-1]
        if sides[-1].name and len(sides) == 2:
            return _equation(sides[::-1])
        if len(sides) == 2:
            return differs(readings[0], readings[1], "=")
        raise Unreadable("a chain of equations without a name")
    value = sides[-1]
    rest = [side.reading for side in sides if side not in named]
    if len(named) == 1 and isinstance(readings[0], Word) and isinstance(value.reading, Word):  # SRMC = LRMC
        return Bag((readings[0], value.reading), is_set=True)
    _check_chain(rest)
    if not sides[0].name or any(names & _names(value.reading) for names in ({side.name} for side in named)):
        if len(sides) == 2:
            return differs(readings[0], readings[1], "=")
        raise Unreadable("a chain of equations in which a name returns")
    answers = tuple(_named(side, value.reading) for side in named)
    return answers[0] if len(answers) == 1 else Bag(answers)


def _names(reading: Reading) -> set[str]:
    return names_of(reading.node) if isinstance(reading, Scalar) else set()


def _check_chain(readings: Sequence[Reading]) -> None:
    """Raise Unreadable if a = b = c says what is not true."""
    scalars = [reading for reading in readings if isinstance(reading, Scalar)]
    constants = [scalar for scalar in scalars if _is_constant(scalar)]
    compared = constants if scalars and _is_constant(scalars[-1]) else scalars
    for first, second in itertools.pairwise(compared):
        if (first.unit and second.unit and first.unit != second.unit) or not are_equal(first.node, second.node):
            raise Unreadable("an equation that is not true")


def _unequal(left: Side, right: Side) -> Reading:
    if right.name and not left.name:
        left, right = right, left
    if left.name and _is_constant(right.reading):
        value = right.reading
        below, above = Row("(", (MINUS_INFINITY, value), ")"), Row("(", (value, INFINITY), ")")
        return Named(left.name, left.arguments, Pieces((below, above)))
    return differs(left.reading, right.reading, r"\ne")


def _inequality(sides: Sequence[Side], signs: Sequence[str]) -> Reading:
    """Return a name in an interval where there is one, otherwise the relations between neighbours."""
    rising = all(sign in ("<", r"\le") for sign in signs)
    if not rising:
        if not all(sign in (">", r"\ge") for sign in signs):
            raise Unreadable("inequalities in both directions")
        sides, signs = sides[::-1], [_TURNED[sign] for sign in signs[::-1]]
    brackets = {"<": "()", r"\le": "[]"}
    if len(sides) == 3 and sides[1].name and _is_constant(sides[0].reading) and _is_constant(sides[2].reading):
        ends = (sides[0].reading, sides[2].reading)
        return _named(sides[1], Row(brackets[signs[0]][0], ends, brackets[signs[1]][1]))
    if len(sides) == 2 and sides[0].name and _is_constant(sides[1].reading):
        return _named(sides[0], Row("(", (MINUS_INFINITY, sides[1].reading), brackets[signs[0]][1]))
    if len(sides) == 2 and sides[1].name and _is_constant(sides[0].reading):
        return _named(sides[1], Row(brackets[signs[0]][0], (sides[0].reading, INFINITY), ")"))
    found = [differs(a.reading, b.reading, sign) for a, b, sign in zip(sides, sides[1:], signs, strict=False)]
    return found[0] if len(found) == 1 else Bag(tuple(found), is_set=True)


def congruent(left: Reading, right: Reading, modulus: Reading) -> Congruence:
    """Return the congruence of two expressions."""
    if not all(isinstance(part, Scalar) for part in (left, right, modulus)):
        raise Unreadable("a congruence of what are no expressions")
    return Congruence(left.node, right.node, modulus.node)  # pyright: ignore[reportAttributeAccessIssue]


def difference_of(answer: Named) -> Relation | None:
    """Return x = 5 as the relation x - 5 = 0; None for names that are no letters of an expression."""
    if answer.arguments or not isinstance(answer.value, Scalar) or answer.value.unit:
        return None
    return Relation("=", Node("add", (Node("name", (answer.name,)), Node("neg", (answer.value.node,)))))
