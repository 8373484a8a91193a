"""Decide whether a reading of a response is the same answer as a reading of the reference."""

from collections.abc import Callable, Sequence

from experiments.tasks.mathematics.grammar import Node, whole
from experiments.tasks.mathematics.identity import are_equal, names_of, ratio_is_constant
from experiments.tasks.mathematics.numbers import is_marked, same_number
from experiments.tasks.mathematics.readings import (
    Bag,
    Based,
    Clock,
    Congruence,
    Dots,
    Matrix,
    Named,
    Pieces,
    Ratio,
    Reading,
    Relation,
    Row,
    Scalar,
    Word,
)
from experiments.tasks.mathematics.relations import difference_of
from experiments.tasks.mathematics.units import factor_between


def same(reference: Reading, given: Reading) -> bool:
    """Return whether two readings are the same answer.

    A response may leave out what the reference says beside the value, a name, a unit or a base, or add it where the
    reference has none; where both have it, it must be the same.
    """
    reference, given = _simplest(reference), _simplest(given)
    if isinstance(reference, Named) or isinstance(given, Named):
        return _same_named(reference, given)
    for (first, second), compare in _PAIRS.items():
        if isinstance(reference, first) and isinstance(given, second):
            return compare(reference, given)
    return False


def _simplest(reading: Reading) -> Reading:
    """Return one element for a set or a union of one."""
    while isinstance(reading, Bag | Pieces) and len(reading.items) == 1:
        reading = reading.items[0]
    return reading


def _same_named(reference: Reading, given: Reading) -> bool:
    if isinstance(reference, Named) and isinstance(given, Named):
        if reference.name == given.name and len(reference.arguments) == len(given.arguments):
            value = _with_arguments(given, reference.arguments)
            return value is not None and same(reference.value, value)
        first, second = difference_of(reference), difference_of(given)  # y = 2x and x = y/2
        return first is not None and second is not None and _same_relations(first, second)
    for named, other, swap in ((reference, given, False), (given, reference, True)):
        if not isinstance(named, Named):
            continue
        if isinstance(other, Relation):
            relation = difference_of(named)
            return relation is not None and same(other, relation)
        if isinstance(other, Bag) and any(isinstance(item, Named) for item in other.items):
            return False
        return same(other, named.value) if swap else same(named.value, other)
    return False


def _with_arguments(function: Named, arguments: tuple[str, ...]) -> Reading | None:
    """Return the value of f(n) = 2n with x for n; None if another x is in it, or no n, as in E(N) = 2."""
    if function.arguments == arguments:
        return function.value
    if not isinstance(function.value, Scalar):
        return None
    letters = names_of(function.value.node)
    names = dict(zip(function.arguments, arguments, strict=True))
    changed = {old for old, new in names.items() if old != new}
    if not changed <= letters or (letters - names.keys()) & set(arguments):
        return None

    def rename(node: Node) -> Node:
        if node.op == "name":
            return Node("name", (names.get(node.args[0], node.args[0]),))
        return Node(node.op, tuple(rename(arg) if isinstance(arg, Node) else arg for arg in node.args))

    return Scalar(rename(function.value.node), function.value.unit)


def _same_scalars(reference: Scalar, given: Scalar) -> bool:
    infinite = [_infinity(scalar.node) for scalar in (reference, given)]
    if any(infinite):
        return infinite[0] == infinite[1]
    if reference.unit and given.unit:
        factor = factor_between(given.unit, reference.unit)
        if factor is None:
            return False
        if factor != 1:
            return are_equal(reference.node, Node("mul", (Node("number", (factor, factor * 0, 1)), given.node)))
    elif reference.needs_unit or given.needs_unit:
        return False
    elif (reference.unit and is_marked(given.node)) or (given.unit and is_marked(reference.node)):
        return False  # 36 degrees and 36 dollars
    return same_number(reference.node, given.node)


def _infinity(node: Node) -> int:
    """Return 1 for ∞, -1 for -∞ and 0 for others."""
    if node.op == "neg":
        return -_infinity(node.args[0])
    return int(node.op == "infinity")


def _same_words(reference: Word, given: Word) -> bool:
    """Compare words; case counts in short ones that no \\text marks as words, where it may tell names apart."""
    first, second = reference.letters, given.letters
    if first == second:
        return True
    if reference.is_text or given.is_text:
        return first.casefold() == second.casefold()
    long_enough = len(first) >= 3 or first.casefold() == "no"
    return long_enough and first[1:] == second[1:] and first[1:].islower() and first[0].lower() == second[0].lower()


def _same_rows(reference: Row, given: Row) -> bool:
    brackets = (reference.opening, reference.closing) == (given.opening, given.closing)
    return brackets and _same_in_order(reference.items, given.items)


def _same_in_order(reference: Sequence[Reading], given: Sequence[Reading]) -> bool:
    return len(reference) == len(given) and all(map(same, reference, given))


def _same_in_any_order(reference: Sequence[Reading], given: Sequence[Reading]) -> bool:
    if len(reference) != len(given):
        return False
    left = list(given)
    for item in reference:
        match = next((index for index, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_bags(reference: Bag, given: Bag) -> bool:
    if any(isinstance(item, Dots) for item in reference.items):
        return _same_in_order(reference.items, given.items)
    return _same_in_any_order(reference.items, given.items)


def _same_pieces(reference: Pieces, given: Pieces) -> bool:
    return _same_in_any_order(reference.items, given.items)


def _bag_and_row(reference: Bag, given: Row) -> bool:
    """Compare a list with a tuple, in order; names with values count in the order of the alphabet."""
    if reference.is_set or (given.opening, given.closing) != ("(", ")"):
        return False
    return _same_in_order(_values(reference), given.items)


def _row_and_bag(reference: Row, given: Bag) -> bool:
    if given.is_set or (reference.opening, reference.closing) != ("(", ")"):
        return False
    return _same_in_order(reference.items, _values(given))


def _values(bag: Bag) -> Sequence[Reading]:
    """Return the values of names in the order of the alphabet, and of a list in its own."""
    named = [item for item in bag.items if isinstance(item, Named)]
    if len(named) < len(bag.items):
        return () if named else bag.items
    return [item.value for item in sorted(named, key=lambda item: item.name)]


def _named_values(reference: Bag, given: Bag) -> bool:
    """Compare lists of which one may have names for its values: then the other has them in alphabetical order."""
    named = [any(isinstance(item, Named) for item in bag.items) for bag in (reference, given)]
    if named[0] == named[1] or reference.is_set or given.is_set:
        return named[0] == named[1] and _same_bags(reference, given)
    return _same_in_order(_values(reference), _values(given))


def _same_matrices(reference: Matrix, given: Matrix) -> bool:
    shapes = [(len(matrix.rows), len(matrix.rows[0])) for matrix in (reference, given)]
    return shapes[0] == shapes[1] and all(
        same_number(first, second)
        for row, other in zip(reference.rows, given.rows, strict=True)
        for first, second in zip(row, other, strict=True)
    )


def _vector(matrix: Matrix) -> Row | None:
    """Return a matrix of one row or one column as a tuple."""
    entries = [entry for row in matrix.rows for entry in row]
    if len(entries) < 2 or 1 not in (len(matrix.rows), len(matrix.rows[0])):
        return None
    return Row("(", tuple(Scalar(entry) for entry in entries), ")")


def _matrix_and_row(reference: Matrix, given: Row) -> bool:
    vector = _vector(reference)
    return vector is not None and _same_rows(vector, given)


def _row_and_matrix(reference: Row, given: Matrix) -> bool:
    vector = _vector(given)
    return vector is not None and _same_rows(reference, vector)


def _same_relations(reference: Relation, given: Relation) -> bool:
    if reference.sign != given.sign:
        return False
    return ratio_is_constant(reference.difference, given.difference, positive=reference.sign not in ("=", "!="))


def _same_congruences(reference: Congruence, given: Congruence) -> bool:
    pairs = ((reference.left, given.left), (reference.right, given.right), (reference.modulus, given.modulus))
    return all(are_equal(*pair) for pair in pairs)


def _same_ratios(reference: Ratio, given: Ratio) -> bool:
    first, second = reference.parts, given.parts
    if len(first) != len(second):
        return False
    return all(
        are_equal(Node("div", (first[index], first[0])), Node("div", (second[index], second[0])))
        for index in range(1, len(first))
    )


def _ratio_and_quotient(reference: Ratio, given: Scalar) -> bool:
    return len(reference.parts) == 2 and are_equal(Node("div", reference.parts), given.node)


def _same_times(reference: Clock, given: Clock) -> bool:
    return reference.minutes == given.minutes and (reference.half == given.half or not (reference.half and given.half))


def _based_and_plain(reference: Based, given: Scalar) -> bool:
    """Compare the digits of a number in a base with a number whose base is missing."""
    digits = int(reference.digits)
    expected = Node("neg", (whole(-digits),)) if digits < 0 else whole(digits)
    return not given.unit and given.node.op == expected.op and are_equal(given.node, expected)


_PAIRS: dict[tuple[type, type], Callable[..., bool]] = {
    (Scalar, Scalar): _same_scalars,
    (Scalar, Word): lambda reference, given: (
        given.product is not None and are_equal(reference.node, given.product) and not _infinity(reference.node)
    ),
    (Word, Word): _same_words,
    (Row, Row): _same_rows,
    (Bag, Bag): _named_values,
    (Bag, Row): _bag_and_row,
    (Row, Bag): _row_and_bag,
    (Pieces, Pieces): _same_pieces,
    (Matrix, Matrix): _same_matrices,
    (Matrix, Row): _matrix_and_row,
    (Row, Matrix): _row_and_matrix,
    (Relation, Relation): _same_relations,
    (Congruence, Congruence): _same_congruences,
    (Ratio, Ratio): _same_ratios,
    (Ratio, Scalar): _ratio_and_quotient,
    (Scalar, Ratio): lambda reference, given: _ratio_and_quotient(given, reference),
    (Clock, Clock): _same_times,
    (Based, Based): lambda reference, given: reference == given,
    (Based, Scalar): _based_and_plain,
    (Dots, Dots): lambda reference, given: True,
}
"""Kinds of reference and response -> their comparison. Kinds that are missing are never the same."""
