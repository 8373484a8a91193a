"""The tokens of an answer: the first stage of reading, the same for references and responses.

Notations that mean the same become one here: Unicode and LaTeX, \\dfrac and \\frac, spacing, fonts, groups of three
digits. Upper and lower case stay, and nothing is left out that could change a meaning.
"""

import re
from typing import NamedTuple

from experiments.tasks.mathematics.notation import (
    FUNCTIONS,
    LETTERS,
    PROSE,
    REWRITES,
    SAME,
    SPELLED,
    UNICODE,
    UNIT_LETTERS,
)
from experiments.tasks.mathematics.units import UNITS


class Unreadable(ValueError):
    """Raised for a text that the grammar does not cover as a whole; no part of it counts."""


class Token(NamedTuple):
    """One token.

    Attributes:
        kind: "number", "letter", "command", "text" (words) or "sign".
        text: a number without separators of thousands; a letter, Greek ones as \\alpha; a command with its backslash.
        spaced: whether white space precedes it.
    """

    kind: str
    text: str
    spaced: bool = False


LONGEST_NUMBER = 1_000
"""Largest number of digits of a number."""
MOST_TOKENS = 1_000
DEEPEST = 40
"""Largest number of brackets inside each other."""

_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]
_TEXT = r"\\(?:text|mbox|hbox|textrm|textbf|textit|textsf|texttt|textnormal|emph|mathrm|operatorname\*?|mathop|rm)"
_PIECE = re.compile(
    rf"(?P<space>\s+)|(?P<text>{_TEXT}\s*(?=\{{))|(?P<begin>\\(?:begin|end)\s*\{{\s*(?P<name>\w+)\*?\s*\}})"
    r"|(?P<blackboard>\\math(?:bb|cal|frak|scr)\s*(?:\{\s*(?P<double>\w)\s*\}|(?P<single>\w)))"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<number>[0-9]|\.[0-9])|(?P<run>[A-Za-z]+)|(?P<sign><=|>=|\*\*|\.\.\.|.)",
    re.DOTALL,
)
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII)
_REPEATING = re.compile(r"[0-9]*\.[0-9]*\([0-9]+\)")
_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+(?![0-9])(?!,[0-9])|(?: [0-9]{3})+(?![0-9]))(?:\.[0-9]+)?")
_EXPONENT = re.compile(r"[eE][+-]?[0-9]+(?![0-9A-Za-z.])")
_OPENING, _CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
_WORDS = re.compile(r"[A-Za-z][A-Za-z'./-]*(?:\s+[A-Za-z][A-Za-z'./-]*)*")


def normal_text(text: str) -> str:
    """Return a text in the notation that all later stages read."""
    text = text.translate(UNICODE)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".,;").strip()


def tokens_of(text: str, grouped: bool = True, scientific: bool = True, in_text: bool = False) -> list[Token]:
    """Split a normal text into tokens.

    Args:
        text: what `normal_text` returned.
        grouped: whether 1,234 is one number; otherwise it is two.
        scientific: whether 2e5 is one number; otherwise it is a product with e.
        in_text: whether the text was inside \\text{}, where letters form words.

    Raises:
        Unreadable: if braces are not closed, or if there are more tokens or digits than any answer needs.
    """
    tokens: list[Token] = []
    place, spaced = 0, False
    while place < len(text):
        piece = _PIECE.match(text, place)
        assert piece is not None
        place, kind, found = piece.end(), piece.lastgroup, piece.group()
        if kind == "space":
            spaced = True
            continue
        if piece["text"]:
            end = closing_brace(text, place)
            tokens += _text_tokens(text[place + 1 : end], spaced, tokens[-1:])
            place = end + 1
        elif piece["begin"]:
            edge = r"\beg:" if found[1] == "b" else r"\end:"
            tokens.append(Token("command", edge + piece["name"], spaced))
            if piece["name"] == "array" and found.startswith("\\begin") and text.startswith("{", place):
                place = closing_brace(text, place) + 1  # the columns' alignment
        elif piece["blackboard"]:
            tokens.append(Token("letter", f"{found[:7]}:{piece['double'] or piece['single']}", spaced))
        elif piece["number"]:
            number = _number_at(text, piece.start(), grouped, scientific)
            place = piece.start() + len(number)
            if re.match(r"\.(?![0-9.])", text[place : place + 2]):  # 1./3
                place += 1
            number = number.replace(",", "").replace(" ", "")
            tokens.append(Token("number", number, spaced))
        elif piece["run"]:
            words = _WORDS.match(text, piece.start()) if in_text else None
            if words is not None and words.group() in ("and", "or"):
                place = words.end()
                tokens.append(Token("sign", words.group(), True))
            elif words is not None and re.search("[A-Za-z]{2}", words.group()):  # not the p- of 13p-30
                place = words.end()
                tokens.append(Token("text", words.group(), spaced))
            else:
                tokens += _run_tokens(found, spaced, text[place : place + 1], tokens[-1:])
        else:
            name = SAME.get(found, found)
            is_letter = name.startswith("\\") and name[1:] in LETTERS
            kind = "letter" if is_letter else "command" if name[:1] == "\\" and name[1:].isalpha() else "sign"
            tokens.append(Token(kind, name, spaced))
        spaced = False
        if len(tokens) > MOST_TOKENS:
            raise Unreadable("too many tokens")
    return _joined(tokens)


def closing_brace(text: str, opening: int) -> int:
    """Return the index of the brace that closes the one at `opening`."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[opening:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return opening + brace.start()
    raise Unreadable("a brace is not closed")


def _number_at(text: str, place: int, grouped: bool, scientific: bool) -> str:
    repeating = _REPEATING.match(text, place)
    found = repeating or (_GROUPED.match(text, place) if grouped else None) or _NUMBER.match(text, place)
    assert found is not None
    exponent = _EXPONENT.match(text, found.end()) if scientific and not repeating else None
    number = text[place : exponent.end() if exponent else found.end()]
    if len(number) > LONGEST_NUMBER:
        raise Unreadable("too many digits")
    return number


def _text_tokens(content: str, spaced: bool, before: list[Token]) -> list[Token]:
    """Return the tokens of what stands inside \\text{} or \\mathrm{}."""
    words = content.strip()
    if words in ("and", "or"):
        return [Token("sign", words, True)]
    measured = bool(before) and (before[0].kind == "number" or before[0].text in ("}", ")", r"\pi"))
    after_unit = bool(before) and (before[0].text == "/" or before[0].text in UNIT_LETTERS)  # L/min, J K
    measured = measured or (after_unit and (before[0].kind == "text" or len(words) > 1))
    if words in FUNCTIONS and not (measured and words in UNITS):  # 5 min
        return [Token("command", f"\\{words}", spaced)]
    if _WORDS.fullmatch(words) and (len(words) > 1 or (measured and words in UNIT_LETTERS)):
        return [Token("text", words.strip(" ."), spaced or content[:1] == " ")]
    tokens = tokens_of(content, in_text=True)
    return [tokens[0]._replace(spaced=spaced or tokens[0].spaced), *tokens[1:]] if tokens else []


def _run_tokens(run: str, spaced: bool, following: str, before: list[Token]) -> list[Token]:
    """Return the tokens of letters that stand together: a name, words, or a product of letters."""
    apart = (spaced or not before) and (not following or following.isspace() or following in ",.")
    if run in ("and", "or") and apart:
        return [Token("sign", run, True)]
    after_number = bool(before) and before[0].kind == "number"
    if run in SPELLED and not (after_number and run in UNITS and (not following or following in " .,")):
        letter = run in LETTERS
        return [Token("letter" if letter else "command", f"\\{run}", spaced)]
    if run.lower() in ("inf", "infinity"):
        return [Token("command", r"\infty", spaced)]
    if len(run) >= 5 or (apart and run.lower() in PROSE) or (after_number and len(run) > 2 and run in UNITS):
        return [Token("text", run, spaced)]
    if after_number and run.lower() in ("am", "pm", "cm"):
        return [Token("text", run, spaced)]
    if before and before[0].kind == "text" and (run == "per" or (len(run) > 1 and run in UNITS)):  # miles per hour
        return [Token("text", run, spaced)]
    return [Token("letter", letter, spaced and index == 0) for index, letter in enumerate(run)]


def _joined(tokens: list[Token]) -> list[Token]:
    """Join neighbouring words, and refuse brackets that are nested deeper than in any answer."""
    joined: list[Token] = []
    depth = 0
    for token in tokens:
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth > DEEPEST:
            raise Unreadable("too many brackets")
        if token.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = joined[-1]._replace(text=f"{joined[-1].text} {token.text}")
        else:
            joined.append(token)
    return joined
