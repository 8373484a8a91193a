"""The variables of a chat template, read from its syntax tree: their names, and those that are flags."""

import re
from collections.abc import Iterator

import jinja2
from jinja2 import nodes

_GENERATION = re.compile(
    r"\{%-?\s*(?:end)?generation\s*-?%\}"
)  # a tag of transformers' own, without effect on the text
_FLAG_TESTS = ("true", "false", "boolean")
_PRESENCE_TESTS = ("defined", "undefined", "none")


class TemplateVariables:
    """The variables of a template.

    Attributes:
      names: all names that the template reads.
      flags: those that it treats as booleans: it compares them with true or false, gives them one of the two as their
        default, or does nothing with them but ask whether they hold.
    """

    def __init__(self, template: str) -> None:
        """Read the template; raise `jinja2.TemplateSyntaxError` if it has none that Jinja understands."""
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        self.names: set[str] = set()
        self._asked: set[str] = set()
        self._used_otherwise: set[str] = set()
        self._beside_boolean: set[str] = set()
        self._visit(environment.parse(_GENERATION.sub("", template)), as_condition=False)
        self.flags = self._beside_boolean | (self._asked - self._used_otherwise)

    def _visit(self, node: nodes.Node, as_condition: bool) -> None:
        """Note the uses of names below a node; `as_condition` says that only the truth of its value matters."""
        self._note_pair(node)
        if isinstance(node, nodes.Name):
            if node.ctx == "load":
                self.names.add(node.name)
                (self._asked if as_condition else self._used_otherwise).add(node.name)
        elif isinstance(node, nodes.Test) and isinstance(node.node, nodes.Name) and node.name in _PRESENCE_TESTS:
            self.names.add(node.node.name)
        else:
            for child, is_condition in _children(node, as_condition):
                self._visit(child, is_condition)

    def _note_pair(self, node: nodes.Node) -> None:
        """Note a name that stands where a boolean could: beside one, or in a test for one."""
        sides: list[nodes.Node | None] = []
        match node:
            case nodes.Test(node=name) if node.name in _FLAG_TESTS:
                sides = [name, nodes.Const(True)]
            case nodes.Compare(expr=left, ops=[nodes.Operand(expr=right)]):
                sides = [left, right]
            case nodes.Filter(node=name, name="default" | "d", args=[default, *_]):
                sides = [name, default]
            case nodes.Assign(target=target, node=value):
                sides = [target, value]
            case nodes.CondExpr(expr1=first, expr2=second):
                sides = [first, second]
            case nodes.And(left=left, right=right) | nodes.Or(left=left, right=right):
                sides = [left, right]
        if any(isinstance(side, nodes.Const) and isinstance(side.value, bool) for side in sides):
            self._beside_boolean |= {side.name for side in sides if isinstance(side, nodes.Name)}


def _children(node: nodes.Node, as_condition: bool) -> Iterator[tuple[nodes.Node, bool]]:
    """Return the parts of a node, each with whether only its truth matters."""
    test = node.test if isinstance(node, nodes.If | nodes.CondExpr) else None
    passes_on = isinstance(node, nodes.And | nodes.Or | nodes.CondExpr) and as_condition
    for child in node.iter_child_nodes():
        yield child, child is test or isinstance(node, nodes.Not) or passes_on
