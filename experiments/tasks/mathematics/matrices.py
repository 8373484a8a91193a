"""Arithmetic of matrices in expressions: what is left is one matrix of expressions, or one expression."""

from experiments.tasks.mathematics.grammar import Node, whole
from experiments.tasks.mathematics.tokens import Unreadable

Rows = tuple[tuple[Node, ...], ...]
_LARGEST_DETERMINANT = 4


def lowered(node: Node) -> Node:
    """Return an expression without sums, products and determinants of matrices; a matrix stays at the top alone.

    Raises:
        Unreadable: if shapes do not fit, or if a matrix stands where none can be computed with.
    """
    if node.op == "matrix":
        if any(_holds_matrix(entry) for row in node.args for entry in row):
            raise Unreadable("a matrix in a matrix")
        return node
    if not _holds_matrix(node):
        return node
    args = tuple(lowered(argument) if isinstance(argument, Node) else argument for argument in node.args)
    matrices = [argument for argument in args if isinstance(argument, Node) and argument.op == "matrix"]
    if not matrices:
        return Node(node.op, args)
    if node.op == "determinant":
        return _determinant(args[0].args)
    if node.op == "neg":
        return _entrywise(lambda entry: Node("neg", (entry,)), args[0].args)
    if node.op == "add" and len(matrices) == len(args):
        return _sum(args)
    if node.op == "mul":
        return _product(*args)
    if node.op == "div" and args[0].op == "matrix" and len(matrices) == 1:
        return _entrywise(lambda entry: Node("div", (entry, args[1])), args[0].args)
    raise Unreadable(f"{node.op} of a matrix")


def _holds_matrix(node: Node) -> bool:
    return node.op in ("matrix", "determinant") or any(
        _holds_matrix(argument) for argument in node.args if isinstance(argument, Node)
    )


def _entrywise(operation, rows: Rows) -> Node:
    return Node("matrix", tuple(tuple(operation(entry) for entry in row) for row in rows))


def _sum(matrices: tuple[Node, ...]) -> Node:
    if len({(len(matrix.args), len(matrix.args[0])) for matrix in matrices}) != 1:
        raise Unreadable("a sum of matrices of different shapes")
    rows = zip(*(matrix.args for matrix in matrices), strict=True)
    return Node("matrix", tuple(tuple(Node("add", entries) for entries in zip(*row, strict=True)) for row in rows))


def _product(left: Node, right: Node) -> Node:
    if left.op != "matrix" or right.op != "matrix":
        factor, matrix = (left, right) if right.op == "matrix" else (right, left)
        return _entrywise(lambda entry: Node("mul", (factor, entry)), matrix.args)
    if len(left.args[0]) != len(right.args):
        raise Unreadable("a product of matrices whose shapes do not fit")
    columns = list(zip(*right.args, strict=True))

    def entry(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
        return Node("add", tuple(Node("mul", pair) for pair in zip(row, column, strict=True)))

    return Node("matrix", tuple(tuple(entry(row, column) for column in columns) for row in left.args))


def _determinant(rows: Rows) -> Node:
    """Return the determinant, expanded along the first row."""
    if len(rows) != len(rows[0]) or len(rows) > _LARGEST_DETERMINANT:
        raise Unreadable("a determinant of a matrix that is not square, or is large")
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for index, entry in enumerate(rows[0]):
        minor = _determinant(tuple(row[:index] + row[index + 1 :] for row in rows[1:]))
        terms.append(Node("mul", (whole((-1) ** index), Node("mul", (entry, minor)))))
    return Node("add", tuple(terms))
