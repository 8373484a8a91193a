"""Read a whole answer as one of the kinds in `experiments.tasks.mathematics.readings`, or refuse it.

The text is split at the signs that bind least, first "or", then semicolons and commas, relations, unions; what is left
is read by `experiments.tasks.mathematics.terms`. Nothing is passed over but prose that introduces an answer, such as
"the answer is".
"""

import itertools
import re
from collections.abc import Sequence

from experiments.tasks.mathematics import relations
from experiments.tasks.mathematics.equality import same
from experiments.tasks.mathematics.readings import Bag, Named, Pieces, Reading, Row, Scalar, Word
from experiments.tasks.mathematics.terms import read_term, split, top_level, unwrapped
from experiments.tasks.mathematics.tokens import Token, Unreadable, normal_text, tokens_of

MOST_ITEMS = 100
"""Largest number of answers in a list."""
_MOST_SIGNS = 3
"""Largest number of ± in one answer, which stands for two answers each."""
_INTRODUCTION = re.compile(
    r"(?i)\b(?:is|are|be|equals?|equal to|answer|answers|therefore|so|thus|hence|about|approximately)$"
)
_NEGATION = re.compile(r"(?i)\b(?:not|never|no|isn't|aren't|n't|if|when|least|most)\b")
_PLACED = ("(", "[", r"\{")


def read(text: str) -> list[Reading]:
    """Return the possible readings of a text, none if it cannot be read.

    Most texts have one. 1,234 is a number or two, and 2e5 a number or a product with e.
    """
    normal = normal_text(text)
    found: list[Reading] = []
    seen: list[list[Token]] = []
    for grouped, scientific in itertools.product((True, False), (True, False)):
        try:
            tokens = _without_introduction(tokens_of(normal, grouped, scientific))
            if tokens not in seen:
                seen.append(tokens)
                found.append(_read_all(tokens))
        except (Unreadable, RecursionError):  # the latter in what is nested deeper than any answer
            continue
    # The commas between brackets separate entries: (1,234) is no number.
    bracketed = any(isinstance(reading, Row) or (isinstance(reading, Bag) and reading.is_set) for reading in found)
    return [reading for reading in found if not (bracketed and isinstance(reading, Scalar))]


def _without_introduction(tokens: list[Token]) -> list[Token]:
    """Leave out words before an answer that end with "is" and the like, or with a colon; and then ≈."""
    if len(tokens) > 1 and tokens[0].kind == "text" and not _NEGATION.search(tokens[0].text):
        if tokens[1].text == ":":
            tokens = tokens[2:]
        elif _INTRODUCTION.search(tokens[0].text.rstrip()) and tokens[1].text != "=":
            tokens = tokens[1:]
    return tokens[1:] if tokens and tokens[0].text == r"\approx" else tokens


def _read_all(tokens: Sequence[Token]) -> Reading:
    tokens = unwrapped(tokens)
    notations = split(tokens, ":")  # x < 2 : (-∞, 2)
    if len(notations) == 2 and notations[1] and notations[1][0].text in ("(", "["):
        condition, interval = notations
        if any(token.text in relations.SIGNS for token in condition):
            readings = _read_all(condition), _read_all(interval)
            if not same(*readings):
                raise Unreadable("an inequality and another interval")
            return readings[0]
    alternatives = split(tokens, "or")
    if len(alternatives) > 1:
        return _together([_read_list(part) for part in alternatives if part], either=True)
    return _read_list(tokens)


def _read_list(tokens: Sequence[Token], is_set: bool = False) -> Reading:
    """Read answers between semicolons, or between commas and "and"."""
    groups = [part for part in split(tokens, ";") if part]
    if len(groups) > 1:
        return _together([_read_list(group) for group in groups])
    parts = split(tokens, ",", "and")
    # The comma before "and" leaves an empty part.
    parts = [part for index, part in enumerate(parts) if part or not 0 < index < len(parts) - 1]
    if len(parts) > MOST_ITEMS:
        raise Unreadable("too many answers")
    items = [item for part in parts for item in _read_signs(part)]
    if len(items) == 1 and not is_set:
        return items[0]
    return _together(items, is_set=is_set)


def _read_signs(tokens: Sequence[Token]) -> list[Reading]:
    """Read one answer; with ± it stands for several."""
    places = [index for index, token in enumerate(tokens) if token.text in (r"\pm", r"\mp")]
    if not places:
        return [_read_item(tokens)]
    if len(places) > _MOST_SIGNS:
        raise Unreadable("too many ±")
    linked = any(tokens[place].text == r"\mp" for place in places)
    choices = [("+",) * len(places), ("-",) * len(places)] if linked else itertools.product("+-", repeat=len(places))
    readings = []
    for signs in choices:
        chosen = list(tokens)
        for place, sign in zip(places, signs, strict=True):
            turned = {"+": "-", "-": "+"}[sign] if tokens[place].text == r"\mp" else sign
            chosen[place] = Token("sign", turned, tokens[place].spaced)
        readings.append(_read_item(chosen))
    return readings


def _read_item(tokens: Sequence[Token]) -> Reading:
    """Read one answer."""
    tokens = unwrapped(tokens)
    signs = [token.text for _, token in top_level(tokens) if token.text in relations.SIGNS]
    if r"\equiv" in signs:
        return _read_congruence(tokens)
    if not signs:
        return _read_value(tokens)
    sides = [_read_side(side) for side in split(tokens, *relations.SIGNS)]
    return relations.related(sides, signs)


def _read_side(tokens: Sequence[Token]) -> relations.Side:
    reading = _read_value(tokens)
    tokens = unwrapped(tokens)
    if isinstance(reading, Word):
        return relations.Side(reading.letters, (), reading)
    if isinstance(reading, Row) and all(isinstance(item, Scalar) and item.node.op == "name" for item in reading.items):
        return relations.Side("tuple", (), reading)
    if isinstance(reading, Scalar) and not reading.unit:
        node = reading.node
        if node.op == "name":
            return relations.Side(node.args[0], (), reading)
        if node.op == "apply" and all(argument.op == "name" for argument in node.args[1:]):
            return relations.Side(node.args[0], tuple(argument.args[0] for argument in node.args[1:]), reading)
        if node.op == "apply":  # f(2) = 5
            return relations.Side("".join(token.text for token in tokens), (), reading)
    return relations.Side("", (), reading)


def _read_congruence(tokens: Sequence[Token]) -> Reading:
    """Read a ≡ b (mod m)."""
    sides = split(tokens, r"\equiv")
    marks = [index for index, token in enumerate(sides[-1]) if token.text in (r"\pmod", r"\mod", "mod")]
    if len(sides) != 2 or len(marks) != 1:
        raise Unreadable("a congruence without a modulus")
    right, modulus = sides[1][: marks[0]], list(sides[1][marks[0] + 1 :])
    if right and right[-1].text == "(" and modulus and modulus[-1].text == ")":
        right, modulus = right[:-1], modulus[:-1]
    return relations.congruent(read_term(sides[0]), read_term(right), read_term(modulus))


def _read_value(tokens: Sequence[Token]) -> Reading:
    """Read a set, a union, a tuple or interval, or a term."""
    tokens = unwrapped(tokens)
    if not tokens:
        raise Unreadable("an empty part")
    pieces = split(tokens, r"\cup")
    if len(pieces) > 1:
        return Pieces(tuple(_read_value(piece) for piece in pieces))
    parts = split(tokens, r"\setminus")
    if len(parts) == 2:
        return _without(*map(_read_value, parts))
    texts = [token.text for token in tokens]
    if texts == [r"\emptyset"]:
        return Bag((), is_set=True)
    if texts == [r"\mathbb:R"]:
        return Row("(", (relations.MINUS_INFINITY, relations.INFINITY), ")")
    if texts[0] in _PLACED and len(list(top_level(tokens))) == 1:
        if texts[0] == r"\{":
            return _read_set(tokens[1:-1])
        row = _read_row(tokens)
        if row is not None:
            return row
    return read_term(tokens)


def _read_row(tokens: Sequence[Token]) -> Reading | None:
    """Read a tuple, an interval, or equations in brackets; None without a comma between the brackets."""
    parts = split(tokens[1:-1], ",")
    opening, closing = tokens[0].text, tokens[-1].text
    if len(parts) < 2:
        return None
    if all("=" in [token.text for _, token in top_level(part)] for part in parts):
        return _read_list(tokens[1:-1])
    if closing not in (")", "]") or (len(parts) > 2 and (opening, closing) not in (("(", ")"), ("[", "]"))):
        raise Unreadable("brackets that do not fit")
    if len(parts) > MOST_ITEMS:
        raise Unreadable("too many entries")
    return Row(opening, tuple(_read_value(part) for part in parts), closing)


def _read_set(tokens: Sequence[Token]) -> Reading:
    """Read what stands between braces: elements, or a name and the inequality that it satisfies."""
    if not tokens:
        return Bag((), is_set=True)
    for sign in (r"\mid", "|", ":"):
        parts = split(tokens, sign)
        if len(parts) == 2:
            variable, condition = parts
            name = split(variable, r"\in")[0]
            member = "".join(token.text for token in variable[len(name) :])
            reading = _read_item(condition)
            if member not in ("", r"\in\mathbb:R") or not isinstance(reading, Named):
                raise Unreadable("a set of what is no interval")
            if reading.name != "".join(token.text for token in name):
                raise Unreadable("a set of one name with a condition on another")
            return reading.value if isinstance(reading.value, Row | Pieces) else Bag((reading.value,), is_set=True)
    return _read_list(tokens, is_set=True)


def _without(whole: Reading, removed: Reading) -> Reading:
    """Read all real numbers but one as two intervals, and other differences of sets as they are."""
    everything = Row("(", (relations.MINUS_INFINITY, relations.INFINITY), ")")
    if whole == everything and isinstance(removed, Bag) and len(removed.items) == 1:
        (point,) = removed.items
        return Pieces((Row("(", (relations.MINUS_INFINITY, point), ")"), Row("(", (point, relations.INFINITY), ")")))
    return Row("\\", (whole, removed), "")


def _together(items: list[Reading], is_set: bool = False, either: bool = False) -> Reading:
    """Return one reading of several: values of one name, a union, or a list."""
    flat: list[Reading] = []
    for item in items:
        listed = isinstance(item, Bag) and not item.is_set and not _has_names(item)
        flat += item.items if listed else [item]  # pyright: ignore[reportAttributeAccessIssue]
    first = flat[0] if flat else None
    if isinstance(first, Named) and len(flat) > 1 and all(isinstance(item, Scalar) for item in flat[1:]):
        flat = [first, *(Named(first.name, first.arguments, item) for item in flat[1:])]  # x = 1, 2
    names = {(item.name, item.arguments) for item in flat if isinstance(item, Named)}
    if len(names) == 1 and all(isinstance(item, Named) for item in flat) and len(flat) > 1:
        values = [item.value for item in flat if isinstance(item, Named)]
        ((name, arguments),) = names
        return Named(name, arguments, _together(values, is_set, either))
    if either and all(isinstance(item, Row | Pieces | Bag) for item in flat):
        return Pieces(tuple(flat))
    return Bag(tuple(flat), is_set)


def _has_names(item: Bag) -> bool:
    """Return whether a list holds names with their values, which belong together."""
    return any(isinstance(part, Named) for part in item.items)
