"""The kinds of answers: what a whole text can be read as."""

from dataclasses import dataclass
from typing import TypeAlias

from experiments.tasks.mathematics.grammar import Node


@dataclass(frozen=True)
class Scalar:
    """An expression, with the one spelling of its unit, "" without one. A sum of units cannot go without them."""

    node: Node
    unit: str = ""
    needs_unit: bool = False


@dataclass(frozen=True)
class Word:
    """Letters alone. `product` is their product, where they are no words of a language."""

    letters: str
    is_text: bool
    product: Node | None = None


@dataclass(frozen=True)
class Row:
    """A tuple, a point, an interval: items in order between two brackets."""

    opening: str
    items: tuple["Reading", ...]
    closing: str


@dataclass(frozen=True)
class Matrix:
    """A matrix of expressions."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Bag:
    """Several answers: a set or a list whose order does not count, unless it has dots.

    Attributes:
        items: the answers, each as often as it was written.
        is_set: whether braces stand around them.
    """

    items: tuple["Reading", ...]
    is_set: bool = False


@dataclass(frozen=True)
class Pieces:
    """A union of intervals and sets."""

    items: tuple["Reading", ...]


@dataclass(frozen=True)
class Dots:
    """The dots of 1, 2, …, n."""


@dataclass(frozen=True)
class Named:
    """A name and what it equals, or the set that it lies in. A function has the names of its arguments."""

    name: str
    arguments: tuple[str, ...]
    value: "Reading"


@dataclass(frozen=True)
class Relation:
    """An equation or inequality, as "=", "<", "<=" or "!=" of a difference and zero."""

    sign: str
    difference: Node


@dataclass(frozen=True)
class Congruence:
    """Two expressions that are congruent to a modulus."""

    left: Node
    right: Node
    modulus: Node


@dataclass(frozen=True)
class Clock:
    """A time of day: minutes after 0:00 or 12:00, and "am", "pm" or "" if neither is said."""

    minutes: int
    half: str


@dataclass(frozen=True)
class Ratio:
    """A ratio a : b or a : b : c."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Based:
    """Digits in a base that is written as a subscript."""

    digits: str
    base: str


Reading: TypeAlias = (
    Scalar | Word | Row | Matrix | Bag | Pieces | Dots | Named | Relation | Congruence | Clock | Ratio | Based
)
