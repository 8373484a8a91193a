"""Read answers without commas and relations: words, times, ratios, numbers in a base, expressions with units."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from experiments.tasks.mathematics.grammar import Node, parse, whole
from experiments.tasks.mathematics.matrices import lowered
from experiments.tasks.mathematics.readings import Based, Clock, Dots, Matrix, Ratio, Reading, Scalar, Word
from experiments.tasks.mathematics.tokens import Token, Unreadable
from experiments.tasks.mathematics.units import MULTIPLES, factor_between, unit_of

OPENING = {"(", "[", "{", r"\{", r"\lfloor", r"\lceil"}
CLOSING = {")", "]", "}", r"\}", r"\rfloor", r"\rceil"}

_LONGEST_PRODUCT = 4
"""Largest number of letters that may be a product; more are a word."""


def top_level(tokens: Sequence[Token]) -> Iterator[tuple[int, Token]]:
    """Yield the tokens that stand in no bracket, with their indices."""
    depth = 0
    for index, token in enumerate(tokens):
        if token.text in CLOSING or token.text.startswith("\\end:"):
            depth -= 1
        elif depth == 0:
            yield index, token
        if token.text in OPENING or token.text.startswith("\\beg:"):
            depth += 1


def split(tokens: Sequence[Token], *signs: str) -> list[Sequence[Token]]:
    """Split at signs that stand in no bracket."""
    cuts = [index for index, token in top_level(tokens) if token.kind != "text" and token.text in signs]
    return [tokens[start:end] for start, end in zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(tokens)], strict=True)]


def unwrapped(tokens: Sequence[Token], opening: str = "{", closing: str = "}") -> Sequence[Token]:
    """Return what is inside of brackets around all tokens, or the tokens."""
    while len(tokens) > 2 and tokens[0].text == opening and tokens[-1].text == closing:
        if len(list(top_level(tokens))) != 1:  # the bracket closes before the end
            break
        tokens = tokens[1:-1]
    return tokens


def read_term(tokens: Sequence[Token]) -> Reading:
    """Return the reading of tokens without commas and relations.

    Raises:
        Unreadable: if there is none.
    """
    tokens = unwrapped(tokens)
    if not tokens:
        raise Unreadable("an empty part")
    if [token.text for token in tokens] == [r"\ldots"]:
        return Dots()
    return _word(tokens) or _clock(tokens) or _based(tokens) or _ratio(tokens) or _measure(tokens)


def _word(tokens: Sequence[Token]) -> Word | None:
    inner = unwrapped(tokens, "(", ")")
    if any(token.kind not in ("letter", "text") for token in inner):
        return None
    is_text = any(token.kind == "text" for token in inner)
    if len(inner) == 1 and not is_text:
        return None  # a single letter is a name
    letters = re.sub(r"[\s.'-]", "", "".join(token.text for token in inner))
    product = None
    if not is_text and len(inner) <= _LONGEST_PRODUCT:
        product = parse(inner)
    return Word(letters, is_text, product)


def _clock(tokens: Sequence[Token]) -> Clock | None:
    texts = [token.text for token in tokens]
    half = ""
    if len(texts) > 1 and re.fullmatch(r"(?i)[ap]\.?\s?m\.?", texts[-1]):
        half = texts.pop()[0].lower() + "m"
    if len(texts) == 1 and half and texts[0].isdigit():
        texts += [":", "00"]
    if len(texts) != 3 or texts[1] != ":" or not re.fullmatch(r"\d{1,2} [0-5]\d", f"{texts[0]} {texts[2]}"):
        if half:
            raise Unreadable("am or pm without a time")
        return None
    hour, minute = int(texts[0]), int(texts[2])
    if hour > 24 or (half and not 1 <= hour <= 12):
        if half:
            raise Unreadable("no such time")
        return None
    if hour > 12 or hour == 0:
        half = "pm" if 12 < hour < 24 else "am"
    return Clock(60 * (hour % 12) + minute, half)


def _based(tokens: Sequence[Token]) -> Based | None:
    if tokens[0].text == "-" and len(tokens) > 1:
        positive = _based(tokens[1:])
        return positive and Based(f"-{positive.digits}", positive.base)
    if len(tokens) < 3 or tokens[0].kind != "number":
        return None
    base = unwrapped(tokens[2:])
    if tokens[1].text != "_" or len(base) != 1:
        return None
    words = {"two": "2", "three": "3", "five": "5", "eight": "8", "ten": "10", "twelve": "12", "sixteen": "16"}
    name = words.get(base[0].text, base[0].text)
    if not (tokens[0].text.isdigit() and name.isdigit() and 2 <= int(name[:3]) <= 36):
        return None
    if any(int(digit) >= int(name) for digit in tokens[0].text):
        raise Unreadable("a digit that the base does not have")
    return Based(tokens[0].text.lstrip("0") or "0", name)


def _ratio(tokens: Sequence[Token]) -> Ratio | None:
    parts = split(tokens, ":")
    return Ratio(tuple(lowered(parse(part)) for part in parts)) if len(parts) > 1 else None


def _measure(tokens: Sequence[Token]) -> Scalar | Matrix:
    """Read an expression with its unit, or a sum such as 2 hours 15 minutes."""
    sign, rest = [], list(tokens)
    if len(rest) > 2 and rest[0].text in ("-", "+") and rest[1].text == r"\dollar":
        sign, rest = rest[:1], rest[1:]
    if rest[0].text == r"\dollar":
        if any(token.kind == "text" for token in rest):
            raise Unreadable("two units")
        return _with_unit([*sign, *rest[1:]], "dollar")
    if rest[-1].text == r"\dollar":
        return _with_unit(rest[:-1], "dollar")
    parts = _measured_parts(rest)
    if len(parts) == 1:
        return _with_unit(*parts[0])
    return _total([_with_unit(value, unit) for value, unit in parts])


def _measured_parts(tokens: Sequence[Token]) -> list[tuple[Sequence[Token], str]]:
    """Split 2 hours 15 minutes into values and units."""
    parts, start = [], 0
    while start < len(tokens):
        words = [index for index, token in top_level(tokens) if index >= start and token.kind == "text"]
        if not words:
            parts.append((tokens[start:], ""))
            break
        begin, end = words[0], words[0]
        while end < len(tokens) and _belongs_to_unit(tokens, end):
            end += 1
        unit = unit_of("".join(_unit_text(token) for token in tokens[begin:end]))
        if unit is None or begin == start:
            raise Unreadable("words that are no unit")
        parts.append((tokens[start:begin], unit))
        start = end + (end < len(tokens) and tokens[end].text == "and")
    return parts


def _belongs_to_unit(tokens: Sequence[Token], index: int) -> bool:
    token = tokens[index]
    if token.kind == "number":  # an exponent, not the next value
        return tokens[index - 1].text in ("^", "{", "-")
    if token.kind == "letter":
        return tokens[index - 1].text in ("*", "/")
    return token.kind == "text" or token.text in ("^", "{", "}", "/", "*", "-")


def _unit_text(token: Token) -> str:
    if token.kind == "text":
        return f" {token.text}"
    return "" if token.text in ("{", "}") else token.text


def _with_unit(tokens: Sequence[Token], unit: str) -> Scalar | Matrix:
    node = lowered(parse(unwrapped(tokens)))
    multiple, _, rest = unit.partition("*")
    if multiple in MULTIPLES:
        node, unit = Node("mul", (node, whole(MULTIPLES[multiple]))), rest
    if unit in ("degree", "percent"):
        node, unit = Node(unit, (node,)), ""
    if node.op == "matrix":
        if unit:
            raise Unreadable("a matrix with a unit")
        return Matrix(node.args)
    return Scalar(node, unit)


def _total(parts: Sequence[Scalar | Matrix]) -> Scalar:
    """Return the sum of values in units of one kind, in the last of the units."""
    unit = parts[-1].unit if isinstance(parts[-1], Scalar) else ""
    terms = []
    for part in parts:
        factor = factor_between(part.unit, unit) if isinstance(part, Scalar) and part.unit and unit else None
        if factor is None or not isinstance(part, Scalar):
            raise Unreadable("values in units of different kinds")
        terms.append(Node("mul", (Node("number", (factor, Fraction(0), 1)), part.node)))
    return Scalar(Node("add", tuple(terms)), unit, needs_unit=True)
