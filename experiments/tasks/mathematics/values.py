"""Values of expressions at a point: exact rational numbers where possible, else intervals that hold the value.

An interval is real (`mpmath.iv.mpf`) or complex (`mpmath.iv.mpc`). Nothing is rounded: an interval gets narrower with
the precision, and a value that lies in two disjoint intervals does not exist. The work is counted, and an expression
that would take too much of it has no value.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from hashlib import sha256
from typing import Any

import mpmath
from mpmath.libmp import mpf_floor, to_int

from experiments.tasks.mathematics.grammar import Node

iv: Any = mpmath.iv
Value = Any
"""A `Fraction`, a real or a complex interval."""


class Undefined(ArithmeticError):
    """Raised where an expression has no value: a division by zero, a logarithm of zero, a value that is too large."""


class TooMuchWork(Undefined):
    """Raised where a value takes more work than any answer needs."""


MOST_BITS = 2**16
"""Largest size of an exact number, in bits."""
MOST_WORK = 40_000.0
"""Largest amount of work for one judgement, in operations on short intervals."""
_LARGEST_EXPONENT = 2**12
"""Size in bits of the largest exponent of two in an interval."""
_LARGEST_ANGLE = 2**9
"""Size in bits of the largest argument of a trigonometric function."""
_GAMMA_PRECISION = 2**9
"""Largest precision of the gamma function, which takes long beyond it."""


_work_left = math.inf


@contextlib.contextmanager
def limited_work(work: float = MOST_WORK) -> Iterator[None]:
    """Let all that is computed inside take so many operations; after them no expression has a value."""
    global _work_left
    _work_left, before = work, _work_left
    try:
        yield
    finally:
        _work_left = before


class Evaluator:
    """Values of the nodes of a tree.

    Attributes:
        point: the values of the names.
        height: the number of bits that separated the operands of a sum, or that an exact operand had: intervals of
            fewer bits could take different values for the same.
    """

    def __init__(self, point: Mapping[str, Fraction] | None = None) -> None:
        self.point = point or {}
        self.height = 0

    def value(self, node: Node, precision: int) -> Value:
        """Return the value of a tree.

        Args:
            node: the tree, without matrices.
            precision: bits of the intervals.

        Raises:
            Undefined: if there is none, or it cannot be told at this precision.
        """
        iv.prec = precision
        try:
            return self._value(node)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError, NotImplementedError, RecursionError) as error:
            raise Undefined(str(error)) from error

    def note_zero(self, left: Value, right: Value) -> None:
        """Let the height tell a value from zero where the other one may be zero."""
        for first, second in ((left, right), (right, left)):
            if not isinstance(first, Fraction) and _holds_zero(first):
                self.height = max(self.height, abs(_exponent(second) or 0))

    @staticmethod
    def spend(work: float) -> None:
        global _work_left
        _work_left -= work
        if _work_left < 0:
            raise TooMuchWork("too much work")

    def _value(self, node: Node) -> Value:
        if node.op == "number":
            return node.args[0]
        if node.op == "name":
            return self.point[node.args[0]]
        if node.op == "constant":
            return {"pi": lambda: iv.pi + 0, "e": lambda: iv.exp(1), "i": lambda: iv.mpc(0, 1)}[node.args[0]]()
        if node.op == "call":
            return self._call(node.args[0], [self._value(argument) for argument in node.args[1:]])
        if node.op == "apply":
            function = (node.args[0], self.point[node.args[0]])  # another function at every point
            return _unknown(function, [self._value(argument) for argument in node.args[1:]])
        operation = getattr(self, f"_{node.op}", None)
        if operation is None:
            raise Undefined(f"{node.op} has no value")
        return self._checked(operation(*map(self._value, node.args)))

    def _checked(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            bits = _bits(value)
            self.spend(1 + bits / 2_000)
            if bits > MOST_BITS:
                raise TooMuchWork("too large a number")
            return value
        self.spend(1 + iv.prec / 500)
        for part in (value.real, value.imag) if _is_complex(value) else (value,):
            if not (part.a > -iv.inf and part.b < iv.inf):
                raise Undefined("the value is infinite")
            for end in part._mpi_:
                if end[1] and abs(end[2]).bit_length() > _LARGEST_EXPONENT:
                    raise TooMuchWork("too large an exponent")
        return value

    # Arithmetic

    def _add(self, *terms: Value) -> Value:
        if all(isinstance(term, Fraction) for term in terms):
            return sum(terms, Fraction(0))
        sizes = [size for size in map(_exponent, terms) if size is not None]
        if sizes:
            self.height = max(self.height, max(sizes) - min(sizes))
        total = self._interval(terms[0])
        for term in terms[1:]:
            total = total + self._interval(term)
        return total

    def _neg(self, value: Value) -> Value:
        return -value

    def _mul(self, left: Value, right: Value) -> Value:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left * right
        return Fraction(0) if left == 0 or right == 0 else self._interval(left) * self._interval(right)

    def _div(self, left: Value, right: Value) -> Value:
        if isinstance(right, Fraction):
            if right == 0:
                raise Undefined("a division by zero")
            return left / right if isinstance(left, Fraction) else left / self._interval(right)
        if _holds_zero(right):
            raise Undefined("a division by what may be zero")
        return self._interval(left) / right

    def _percent(self, value: Value) -> Value:
        return self._div(value, Fraction(100))

    def _degree(self, value: Value) -> Value:
        return self._interval(value) * iv.pi / 180

    def _pow(self, base: Value, exponent: Value) -> Value:
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return self._whole_power(base, int(exponent))
        if isinstance(base, Fraction):
            if base == 0:
                raise Undefined("a power of zero")
            if isinstance(exponent, Fraction) and exponent.denominator <= 64 and base > 0:
                root = _exact_root(base, exponent.denominator)
                if root is not None:
                    return self._whole_power(root, exponent.numerator)
        self.spend(2 + iv.prec / 30)
        logarithm = self._log(base)
        return self._exp(self._interval(exponent) * logarithm)

    def _whole_power(self, base: Value, exponent: int) -> Value:
        if isinstance(base, Fraction):
            if base == 0 and exponent <= 0:
                raise Undefined("0 to the power of 0 or less")
            if base in (0, 1, -1) or _bits(base) * abs(exponent) <= MOST_BITS:
                return base ** (exponent % 2 + 2 if base in (-1, 0, 1) else exponent)
            sign = -1 if base < 0 and exponent % 2 else 1
            return sign * self._exp(self._interval(Fraction(exponent)) * self._log(abs(base)))
        if _holds_zero(base) and exponent <= 0:
            raise Undefined("0 to the power of 0 or less")
        if abs(exponent) > 1_000:
            return self._exp(self._interval(Fraction(exponent)) * self._log(base))
        power, factor = iv.mpf(1), base
        for bit in bin(abs(exponent))[:1:-1]:
            power = power * factor if bit == "1" else power
            factor = factor * factor
        return 1 / power if exponent < 0 else power

    def _root(self, degree: Value, radicand: Value) -> Value:
        if isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2 == 1 and degree > 0:
            negative = radicand < 0 if isinstance(radicand, Fraction) else not _is_complex(radicand) and radicand.b < 0
            if negative:  # an odd root of a negative number is real
                return -self._root(degree, -radicand)
        if isinstance(radicand, Fraction) and radicand == 0 and degree == 2:
            return radicand
        return self._pow(radicand, self._div(Fraction(1), degree))

    def _abs(self, value: Value) -> Value:
        return abs(value)

    # Whole numbers

    def _factorial(self, value: Value) -> Value:
        if isinstance(value, Fraction) and value.denominator == 1:
            if value < 0:
                raise Undefined("a factorial of a negative number")
            if value <= 4_000:
                self.spend(float(value) ** 1.5 / 100)
                return Fraction(math.factorial(int(value)))
        number = self._interval(value)
        if _is_complex(number) or not (number.a >= 0 and number.b < 10**6):
            raise Undefined("a factorial of what is not a number of moderate size")
        if iv.prec > _GAMMA_PRECISION:
            raise TooMuchWork("too many digits of a factorial that is no whole number")
        self.spend(500)
        return iv.gamma(number + 1)

    def _binomial(self, above: Value, below: Value) -> Value:
        if not (isinstance(above, Fraction) and isinstance(below, Fraction)):
            raise Undefined("a binomial coefficient of what is not rational")
        if below.denominator == above.denominator == 1 and below >= 0 and 0 <= above <= 4_000:
            self.spend(float(above) ** 1.5 / 100)
            return Fraction(math.comb(int(above), int(below)))
        bottom = self._mul(self._factorial(below), self._factorial(above - below))
        return self._div(self._factorial(above), bottom)

    def _floor(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            return Fraction(math.floor(value))
        if _is_complex(value):
            raise Undefined("the floor of a complex number")
        if (_exponent(value) or 0) > MOST_BITS:
            raise TooMuchWork("too large a number")
        low, high = (to_int(mpf_floor(end)) for end in value._mpi_)
        if low != high:
            raise Undefined("a floor that this precision does not decide")
        return Fraction(int(low or 0))

    def _ceil(self, value: Value) -> Value:
        return -self._floor(-value)

    # Functions

    def _call(self, name: str, arguments: list[Value]) -> Value:
        if name in ("gcd", "lcm", "max", "min"):
            return _of_rationals(name, arguments)
        if name == "log" and len(arguments) == 2:
            return self._checked(self._div(self._log(arguments[0]), self._log(arguments[1])))
        (argument,) = arguments
        self.spend(2 + iv.prec / 30)
        if name in ("ln", "log"):
            return self._checked(self._log(argument))
        if name == "exp":
            return self._checked(self._exp(self._interval(argument)))
        number = self._interval(argument)
        if (_exponent(number) or 0) > _LARGEST_ANGLE:
            raise TooMuchWork("too large an angle")
        return self._checked(_FUNCTIONS[name](number))

    def _log(self, value: Value) -> Value:
        number = self._interval(value)
        if _is_complex(number):
            crosses = number.imag.a <= 0 <= number.imag.b and number.real.a <= 0
            if crosses:
                raise Undefined("a logarithm on its branch cut")
            return iv.log(number)
        if number.a > 0:
            return iv.log(number)
        if number.b < 0:
            return iv.mpc(iv.log(-number), iv.pi)
        raise Undefined("a logarithm of what may be zero")

    def _exp(self, value: Value) -> Value:
        real = value.real if _is_complex(value) else value
        if not (real.b < 2**_LARGEST_EXPONENT and real.a > -(2**_LARGEST_EXPONENT)):
            raise TooMuchWork("too large an exponent")
        if _is_complex(value) and (_exponent(value.imag) or 0) > _LARGEST_ANGLE:
            raise TooMuchWork("too large an angle")
        self.spend((iv.prec + abs(_exponent(value) or 0)) / 100)
        return iv.exp(value)

    def _interval(self, value: Value) -> Value:
        if not isinstance(value, Fraction):
            return value
        self.height = max(self.height, _bits(value))
        return iv.mpf(value.numerator) / iv.mpf(value.denominator)


def is_real(value: Value) -> bool:
    """Return whether a value is a real number for certain."""
    return isinstance(value, Fraction) or not _is_complex(value)


def _is_complex(value: Value) -> bool:
    return isinstance(value, iv.mpc)


def _parts(value: Value) -> tuple[Value, ...]:
    return (value.real, value.imag) if _is_complex(value) else (value,)


def _holds_zero(value: Value) -> bool:
    return all(part.a <= 0 <= part.b for part in _parts(value))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _exponent(value: Value) -> int | None:
    """Return the exponent of two of a value's size; None for zero."""
    if isinstance(value, Fraction):
        return value.numerator.bit_length() - value.denominator.bit_length() if value else None
    sizes = [end[2] + end[3] for part in _parts(value) for end in part._mpi_ if end[1]]
    return max(sizes, default=None)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Return the rational root of a positive number, or None if it is irrational."""
    roots = []
    for number in (value.numerator, value.denominator):
        root = _whole_root(number, degree)
        if root**degree != number:
            return None
        roots.append(root)
    return Fraction(*roots)


def _whole_root(number: int, degree: int) -> int:
    """Return the whole part of a root, by Newton's iteration from above."""
    if degree == 2:
        return math.isqrt(number)
    root = 1 << -(-number.bit_length() // degree)
    while True:
        smaller = ((degree - 1) * root + number // root ** (degree - 1)) // degree
        if smaller >= root:
            return root
        root = smaller


def _of_rationals(name: str, arguments: list[Value]) -> Fraction:
    if not all(isinstance(argument, Fraction) for argument in arguments):
        raise Undefined(f"{name} of what is not rational")
    if name in ("max", "min"):
        return (max if name == "max" else min)(arguments)
    if any(argument.denominator != 1 for argument in arguments):
        raise Undefined(f"{name} of what is not whole")
    return Fraction((math.gcd if name == "gcd" else math.lcm)(*map(int, arguments)))


def _unknown(function: tuple[str, Fraction], arguments: list[Value]) -> Fraction:
    """Return a value for an unknown function, which depends on nothing but the function and its arguments."""
    if not all(isinstance(argument, Fraction) for argument in arguments):
        raise Undefined(f"{function[0]} of what is not rational")
    digest = sha256(repr((function, arguments)).encode()).digest()
    return Fraction(1 + int.from_bytes(digest[:2], "big"), 2**14)


def _arcsin(value: Value) -> Value:
    rest = 1 - value * value
    if _is_complex(value) or not rest.a >= 0:
        raise Undefined("arcsin beyond 1")
    return iv.atan2(value, iv.sqrt(rest))


def _arctan(value: Value) -> Value:
    if _is_complex(value):
        raise Undefined("arctan of a complex number")
    return iv.atan2(value, iv.mpf(1))


def _over(divisor: Callable[[Value], Value], dividend: Callable[[Value], Value] = lambda value: iv.mpf(1)) -> Any:
    def quotient(value: Value) -> Value:
        below = divisor(value)
        if _holds_zero(below):
            raise Undefined("a division by what may be zero")
        return dividend(value) / below

    return quotient


def _sinh(value: Value) -> Value:
    return (iv.exp(value) - iv.exp(-value)) / 2


def _cosh(value: Value) -> Value:
    return (iv.exp(value) + iv.exp(-value)) / 2


_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sin": iv.sin,
    "cos": iv.cos,
    "tan": _over(iv.cos, iv.sin),
    "cot": _over(iv.sin, iv.cos),
    "sec": _over(iv.cos),
    "csc": _over(iv.sin),
    "sinh": _sinh,
    "cosh": _cosh,
    "tanh": _over(_cosh, _sinh),
    "coth": _over(_sinh, _cosh),
    "arcsin": _arcsin,
    "arccos": lambda value: iv.pi / 2 - _arcsin(value),
    "arctan": _arctan,
}
