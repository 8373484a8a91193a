"""One name for answers that mean the same, by which votes are counted."""

from fractions import Fraction

from mpmath.libmp import from_rational, to_str

from experiments.tasks.mathematics.grammar import Node
from experiments.tasks.mathematics.identity import name_points, names_of
from experiments.tasks.mathematics.readings import Bag, Named, Pieces, Reading, Row, Scalar, Word
from experiments.tasks.mathematics.values import Evaluator, Undefined, Value, is_real

_DIGITS = 15


def name_of(reading: Reading) -> str:
    """Return a text that is the same for readings with the same values, however they are written."""
    match reading:
        case Scalar():
            return _name_of_value(reading.node)
        case Word():
            return reading.letters
        case Named():
            return name_of(reading.value)
        case Row():
            return f"{reading.opening}{', '.join(map(name_of, reading.items))}{reading.closing}"
        case Bag() | Pieces():
            return "; ".join(sorted(map(name_of, reading.items)))
    return str(reading)


def _name_of_value(node: Node) -> str:
    """Return the digits of an expression's values: of a constant its value, of others their values at fixed points."""
    letters = sorted(names_of(node))
    values = []
    for point in name_points(letters):
        try:
            values.append(_digits(Evaluator(point).value(node, 128)))
        except Undefined:
            values.append("undefined")
    return " ".join([*letters, *values])


def _digits(value: Value) -> str:
    if isinstance(value, Fraction):
        short = max(map(abs, value.as_integer_ratio())) < 10**_DIGITS
        return str(value) if short else str(to_str(from_rational(*value.as_integer_ratio(), 64), _DIGITS))
    parts = (value,) if is_real(value) else (value.real, value.imag)
    return " ".join(str(to_str(part.mid._mpi_[0], _DIGITS)) for part in parts)
