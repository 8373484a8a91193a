"""The grammar of expressions: tokens become a tree, or the whole expression is refused.

    sum      = [±] product (± product)*
    product  = factor (times factor | / factor | factor)*     neighbours multiply; a/bc is refused unless a and b are
    factor   = base (^ exponent | ! | % | degree)*            whole numbers
    base     = number | name | (sum) | |sum| | \\frac | \\sqrt | \\binom | function | matrix | floor | ceiling

The tree keeps what was written. `experiments.tasks.mathematics.values` computes with it.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from experiments.tasks.mathematics.notation import FUNCTIONS
from experiments.tasks.mathematics.tokens import DEEPEST, Token, Unreadable


class Node(NamedTuple):
    """A node of an expression's tree.

    Attributes:
        op: "number" (value, unit of the last place or 0, digits), "name" (text), "constant" (pi, e or i), "infinity",
            "add", "neg", "mul", "div", "pow" (base, exponent), "root" (degree, radicand), "factorial", "binomial",
            "abs", "floor", "ceil", "call" (function, arguments…), "apply" (an unknown function's name, arguments…),
            "percent", "degree" or "matrix" (rows).
        args: its parts.
    """

    op: str
    args: tuple[Any, ...] = ()


_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_DECORATIONS = {
    rf"\{name}"
    for name in ["dot", "ddot", "vec", "hat", "bar", "tilde", "overline", "overrightarrow", "widehat", "underline"]
}
_MATRICES = {"pmatrix", "bmatrix", "matrix", "smallmatrix", "vmatrix", "array", "Bmatrix"}
_UNKNOWN_FUNCTIONS = {"f", "g", "F", "G"}
"""Letters before a bracket that are functions whatever is in the bracket; others may be factors."""
ZERO = Node("number", (Fraction(0), Fraction(0), 1))


def whole(value: int) -> Node:
    """Return the node of an integer."""
    return Node("number", (Fraction(value), Fraction(0), len(str(abs(value)))))


def parse(tokens: Sequence[Token]) -> Node:
    """Return the tree of an expression.

    Raises:
        Unreadable: if the grammar does not cover all tokens.
    """
    parser = Parser(tokens)
    tree = parser.sum()
    if parser.place < len(tokens):
        raise Unreadable(f"{parser.peek()} is not expected")
    return tree


class Parser:
    """A recursive descent over the tokens of one expression."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.place = 0
        self.depth = 0
        self.bars = 0

    def peek(self) -> str:
        return self.tokens[self.place].text if self.place < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.place].kind if self.place < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> Token:
        if self.place >= len(self.tokens) or (expected is not None and self.peek() != expected):
            raise Unreadable(f"{expected or 'more'} is expected, not {self.peek() or 'the end'}")
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("too many brackets")
        terms = [self.signed_product()]
        while self.peek() in ("+", "-") and self.kind() == "sign":
            terms.append(self.signed_product())
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def signed_product(self) -> Node:
        negative = False
        if self.peek() in ("+", "-"):
            negative = self.take().text == "-"
        product = self.product()
        return Node("neg", (product,)) if negative else product

    def product(self) -> Node:
        start = self.place
        value = self.factor()
        mixed = self._mixed_number(start)
        if mixed is not None:
            value = Node("add", (value, mixed))
        plain_quotient, divided = False, False
        while True:
            if self.peek() == "*":
                self.take()
                value, plain_quotient = Node("mul", (value, self._signed_factor())), False
                divided = False
            elif self.peek() == "/":
                self.take()
                divisor = self._signed_factor()
                plain_quotient = _is_whole(value) and _is_whole(divisor)
                value, divided = Node("div", (value, divisor)), True
            elif self._begins_factor():
                if divided and not plain_quotient:
                    raise Unreadable("a/bc has two meanings")
                value = Node("mul", (value, self.factor()))
            else:
                return value

    def _signed_factor(self) -> Node:
        if self.peek() == "-":
            self.take()
            return Node("neg", (self.factor(),))
        return self.factor()

    def _begins_factor(self) -> bool:
        """Return whether a factor without a sign of multiplication follows."""
        text, kind = self.peek(), self.kind()
        if kind == "number":
            if self.tokens[self.place].spaced and self.tokens[self.place - 1].text == ")":
                return True
            raise Unreadable("a number follows without a sign")
        if text == "|":
            return self.bars == 0
        return kind == "letter" or text in _CLOSING or (kind == "command" and self._is_base_command(text))

    @staticmethod
    def _is_base_command(text: str) -> bool:
        return (
            text[1:] in FUNCTIONS
            or text in _DECORATIONS
            or text in (r"\frac", r"\sqrt", r"\binom", r"\pi", r"\infty", r"\angle", r"\triangle")
            or text.startswith("\\beg")
        )

    def _mixed_number(self, start: int) -> Node | None:
        """Read the fraction of 1\\frac12 or 1 1/2 if there is one after the whole number at `start`."""
        number = self.tokens[start]
        if number.kind != "number" or not number.text.isdigit() or self.place != start + 1:
            return None
        before = self.tokens, self.place
        if self.kind() == "number" and self.tokens[self.place].spaced:
            above, slash, below = (self.take().text if self.kind() else "" for _ in range(3))
            parts = (above, below) if slash == "/" else ("", "")
        elif self.peek() == r"\frac":
            self.take()
            parts = self.digits(), self.digits()
        else:
            return None
        if not (parts[0].isdigit() and parts[1].isdigit()):
            self.tokens, self.place = before
            return None
        if not int(parts[0]) < int(parts[1]):
            raise Unreadable("a whole number and an improper fraction side by side have two meanings")
        return Node("div", (whole(int(parts[0])), whole(int(parts[1]))))

    def digits(self) -> str:
        """Take an argument of \\frac if it is a whole number; return "" otherwise."""
        argument = self.argument_tokens()
        return argument[0].text if len(argument) == 1 and argument[0].kind == "number" else ""

    def argument_tokens(self) -> Sequence[Token]:
        """Take the argument of a command: a group in braces, or one token, or one digit of a number."""
        token = self.take()
        if token.text == "{":
            return self._until_closing("{")
        if token.kind == "number" and len(token.text) > 1:
            if not token.text.isdigit():
                raise Unreadable("a decimal without braces after a command")
            self.place -= 1
            self.tokens = [*self.tokens[: self.place], *_digits(token), *self.tokens[self.place + 1 :]]
            token = self.take()
        return [token]

    def _until_closing(self, opening: str) -> Sequence[Token]:
        start, depth = self.place, 1
        while depth:
            text = self.take().text
            depth += (text == opening) - (text == _CLOSING[opening])
        return self.tokens[start : self.place - 1]

    def argument(self) -> Node:
        """Take and parse the argument of a command."""
        tokens = self.argument_tokens()
        inner = Parser(tokens)
        inner.depth = self.depth
        tree = inner.base() if len(tokens) == 1 else inner.sum()
        if inner.place < len(inner.tokens):
            raise Unreadable("an argument is not read to its end")
        return tree

    def factor(self) -> Node:
        value, previous = self.base(), ""
        while True:
            text = self.peek()
            if text in ("^", "!") and text == previous:
                raise Unreadable("two exponents or a double factorial")
            previous = text
            if text == "^":
                self.take()
                value = Node("pow", (value, self._exponent()))
            elif text == "!":
                self.take()
                value = Node("factorial", (value,))
            elif text in (r"\%", r"\degree"):
                self.take()
                value = Node("percent" if text == r"\%" else "degree", (value,))
            else:
                return value

    def _exponent(self) -> Node:
        if self.peek() == "-":  # x^-2
            self.take()
            return Node("neg", (self.base(),))
        if self.peek() == "(" or (
            self.kind() == "number" and len(self.peek()) > 1 and not self.tokens[self.place].spaced
        ):
            return self.base()  # Python's notation: x^(1/2), 2^10
        return self.argument()

    def base(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return number_node(token.text)
        if token.kind == "letter":
            return self._name(token.text)
        if token.text == "|":
            return self._bars()
        if token.text in ("(", "[", "{"):
            inner = self.sum()
            self.take(_CLOSING[token.text])
            return inner
        if token.text in (r"\lfloor", r"\lceil"):
            inner = self.sum()
            self.take(_CLOSING[token.text])
            return Node("floor" if token.text == r"\lfloor" else "ceil", (inner,))
        if token.kind == "command":
            return self._command(token.text)
        raise Unreadable(f"{token.text} is not expected")

    def _bars(self) -> Node:
        self.bars += 1
        inner = self.sum()
        self.bars -= 1
        self.take("|")
        return Node("abs", (inner,))

    def _command(self, text: str) -> Node:
        if text == r"\pi":
            return Node("constant", ("pi",))
        if text == r"\infty":
            return Node("infinity")
        if text == r"\frac":
            return self._fraction()
        if text == r"\sqrt":
            return self._root()
        if text == r"\binom":
            return Node("binomial", (self.argument(), self.argument()))
        if text in _DECORATIONS:
            inner = self.argument_tokens()
            if not inner or any(token.kind != "letter" for token in inner):
                raise Unreadable(f"{text} of more than letters")
            return self._name(f"{text}{{{''.join(token.text for token in inner)}}}")
        if text in (r"\angle", r"\triangle"):
            letters = []
            while self.kind() == "letter":
                letters.append(self.take().text)
                letters += self._subscript()
            return Node("name", (text + "".join(letters),))
        if text.startswith("\\beg:"):
            return self._matrix(text.removeprefix("\\beg:"))
        if text[1:] in FUNCTIONS:
            return self._function(text[1:])
        raise Unreadable(f"{text} is not known")

    def _subscript(self) -> list[str]:
        if self.peek() != "_":
            return []
        self.take()
        return ["_" + "".join(token.text for token in self.argument_tokens())]

    def _name(self, text: str) -> Node:
        """Return a letter with its subscript and primes, applied to what is in brackets if it must be a function."""
        bare = text
        text += "".join(self._subscript())
        while self.peek() == "'":
            text += self.take().text
        text += "".join(self._subscript()) if "_" not in text else ""
        if text in ("e", "i"):
            return Node("constant", (text,))
        if self.peek() == "(" and not text.startswith(r"\math"):
            inner = self.tokens[self.place + 1 :]
            alone = len(inner) > 1 and inner[1].text == ")" and inner[0].kind in ("number", "letter")
            listed = self._has_comma()
            if alone or listed or bare in _UNKNOWN_FUNCTIONS:
                return Node("apply", (text, *self._arguments()))
        return Node("name", (text,))

    def _has_comma(self) -> bool:
        depth = 0
        for token in self.tokens[self.place :]:
            depth += (token.text in _CLOSING) - (token.text in _CLOSING.values())
            if depth == 0:
                return False
            if depth == 1 and token.text == ",":
                return True
        return False

    def _arguments(self) -> list[Node]:
        self.take("(")
        arguments = [self.sum()]
        while self.peek() == ",":
            self.take()
            arguments.append(self.sum())
        self.take(")")
        return arguments

    def _fraction(self) -> Node:
        above, below = self.argument_tokens(), self.argument_tokens()
        derivative = _derivative(above, below)
        if derivative:
            return Node("name", (derivative,))
        return Node("div", (self._inner(above), self._inner(below)))

    def _inner(self, tokens: Sequence[Token]) -> Node:
        inner = Parser(tokens)
        inner.depth = self.depth
        tree = inner.sum()
        if inner.place < len(inner.tokens):
            raise Unreadable("an argument is not read to its end")
        return tree

    def _root(self) -> Node:
        degree = whole(2)
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        radicand = self.base() if self.peek() == "(" or self._is_long_number() else self.argument()
        return Node("root", (degree, radicand))

    def _is_long_number(self) -> bool:
        """Return whether a number of more than one digit follows white space or was written without LaTeX: sqrt 12."""
        return self.kind() == "number" and len(self.peek()) > 1

    def _function(self, name: str) -> Node:
        below = self.argument_after("_")
        power = self.argument_after("^")
        if self.peek() in ("(", "{", "[", r"\{"):
            opening = self.take().text
            arguments = [self.sum()]
            while self.peek() == ",":
                self.take()
                arguments.append(self.sum())
            self.take(_CLOSING[opening])
            if self.peek() in ("^", "!"):
                raise Unreadable("a power after a function's bracket has two meanings")
        else:
            arguments = [self._bare_argument()]
        if name == "lg":
            name, below = "log", whole(10)
        if power is not None and power == Node("neg", (whole(1),)) and f"arc{name}" in FUNCTIONS:
            name, power = f"arc{name}", None
        if below is not None and name != "log":
            raise Unreadable("a subscript of a function")
        call = Node("call", (name, *arguments, *([below] if below else [])))
        return call if power is None else Node("pow", (call, power))

    def argument_after(self, sign: str) -> Node | None:
        if self.peek() != sign:
            return None
        self.take()
        if sign == "_" and self._is_long_number():
            return self.base()  # log_10
        return self._exponent() if sign == "^" else self.argument()

    def _bare_argument(self) -> Node:
        """Read the argument of a function without brackets: factors side by side, up to the next function."""
        negative = self.peek() == "-"
        if negative:
            self.take()
        start = self.place
        value = self.factor()
        mixed = self._mixed_number(start)
        value = value if mixed is None else Node("add", (value, mixed))
        while self._begins_factor() and not (self.kind() == "command" and self.peek()[1:] in FUNCTIONS):
            value = Node("mul", (value, self.factor()))
        if self.peek() == "/" and self._after_slash() not in FUNCTIONS:
            raise Unreadable("sin x/y has two meanings")
        return Node("neg", (value,)) if negative else value

    def _after_slash(self) -> str:
        return self.tokens[self.place + 1].text[1:] if self.place + 1 < len(self.tokens) else ""

    def _matrix(self, name: str) -> Node:
        if name not in _MATRICES:
            raise Unreadable(f"{name} is no matrix")
        rows: list[list[Node]] = [[]]
        closing = f"\\end:{name}"
        while True:
            rows[-1].append(self.sum())
            sign = self.take().text
            if sign == r"\\":
                if self.peek() == closing:
                    sign = self.take().text
                else:
                    rows.append([])
            if sign == closing:
                break
            if sign not in ("&", r"\\"):
                raise Unreadable(f"{sign} in a matrix")
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different lengths")
        matrix = Node("matrix", tuple(tuple(row) for row in rows))
        return Node("determinant", (matrix,)) if name == "vmatrix" else matrix


def number_node(text: str) -> Node:
    """Return the node of a number such as 12, 0.50, 0.1(6) or 6.02e23, all of them exact."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 6:
        raise Unreadable("too large an exponent")
    scale = Fraction(10) ** int(exponent or 0)
    before, _, repeated = mantissa.rstrip(")").partition("(")
    whole_part, _, places = before.partition(".")
    value = Fraction(int((whole_part + places) or "0"), 10 ** len(places))
    if repeated:
        value += Fraction(int(repeated), 10 ** len(places) * (10 ** len(repeated) - 1))
    is_decimal = (places or exponent) and not repeated
    last_place = scale / 10 ** len(places) if is_decimal else Fraction(0)
    digits = len((whole_part + places).lstrip("0"))
    return Node("number", (value * scale, last_place, digits))


def _digits(token: Token) -> list[Token]:
    """Return a number's first digit and the rest as tokens: \\frac14 has the arguments 1 and 4."""
    return [Token("number", token.text[0], token.spaced), Token("number", token.text[1:])]


def _is_whole(node: Node) -> bool:
    return node.op == "number" and node.args[0].denominator == 1 and not node.args[1]


def _derivative(above: Sequence[Token], below: Sequence[Token]) -> str:
    """Return a name for \\frac{dx}{dt} and the like, which are no quotients of products; "" for anything else."""
    marks = ("d", r"\partial")
    if not (above and len(below) >= 2 and above[0].text in marks and below[0].text in marks):
        return ""
    if any(token.text in ("+", "-", "*", "/") for token in (*above, *below)):
        return ""
    return "".join(("D", *(token.text for token in above), "/", *(token.text for token in below)))
