"""The code of a response: its last block of Python between fences, as Markdown writes them.

Models are freer than CommonMark: they indent blocks in lists, put a fence right behind the code, and quote fences in
docstrings. The code is only searched for texts and comments, in one pass; nothing here parses it, so that no response
can keep the trainer busy.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_PYTHON = re.compile(r"\{?\.?i?py(?:thon)?(?![a-z]).*")
_TRANSPARENT = ("markdown", "md")  # around a whole answer, with blocks of code inside
_OPENING = re.compile(r"(?P<mark>\s*(?:(?:[-*+]|\d+[.)])\s+)*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[^`\n]*")
_AFTER_WORDS = re.compile(r"[^`\n]*(?P<fence>`{3,})[ \t]*(?:python3?|py)[ \t]*", re.IGNORECASE)
_CLOSING = re.compile(r"\s*(?P<fence>`{3,}|~{3,})\s*")
_GLUED = re.compile(r"[^\n]*?[^`~\s][ \t]*(?P<fence>`{3,}|~{3,})\s*")
_QUOTATION = re.compile(r"\"{3}.*?\"{3}|'{3}.*?'{3}", re.DOTALL)
# Comments and texts may hide a fence. A quote that nothing closes hides none, but its line is searched no further.
_HIDING = re.compile(
    r"""#[^\n]*|(?P<quotes>\"{3}|'{3})|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|(?P<unclosed>["'][^\n]*)"""
)


class _Opening(NamedTuple):
    fence: str
    language: str
    indentation: int


class _Hidden(NamedTuple):
    kind: str
    """Its first character: "#" for a comment, a quote for a text."""
    start: int
    end: int


def extract_code(response: str) -> str:
    """Return the code of a response.

    It is the last block of Python; without one, the last block that names no language; without any, the whole response.
    A block may lack its end. Its first line of code begins in the first column: what lines are indented by in a list is
    left out.
    """
    text = response.replace("\r\n", "\n")
    last: dict[bool, str] = {}
    start = 0
    quotations = _QUOTATION.finditer(text)
    quotation = next(quotations, None)
    while start < len(text):
        if quotation is not None and quotation.start() < start:
            # Code that stands in no block may quote whole blocks, too.
            if start < quotation.end() and _left_open(text, quotation.start(), quotation.end()) is False:
                start = _next_line(text, quotation.end())
            quotation = next(quotations, None)
            continue
        opening, start = _opening(text, start) or _opening_after_words(text, start), _next_line(text, start)
        if opening is not None and opening.language not in _TRANSPARENT:
            end, following = _end_of_block(text, start, opening)
            is_python = _PYTHON.fullmatch(opening.language) is not None
            if is_python or (not opening.language and text[start:end].strip()):
                last[is_python] = text[start:end].removesuffix("\n")
            start = following
    return _dedented(last[max(last)]) if last else response


def fenced(code: str) -> str:
    """Return the code as a block of Python, between fences that are longer than all within it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}python\n{code}\n{fence}"


def _next_line(text: str, start: int) -> int:
    return 1 + text.find("\n", start) or len(text) + 1


def _opening(text: str, start: int) -> _Opening | None:
    """Return the fence with which this line begins, apart from the mark of a list."""
    found = _OPENING.fullmatch(text, start, _next_line(text, start) - 1)
    if found is None:
        return None
    return _Opening(found["fence"], found["language"].lower(), len(found["mark"]))


def _opening_after_words(text: str, start: int) -> _Opening | None:
    """Return the fence with which this line ends, if it names Python."""
    found = _AFTER_WORDS.fullmatch(text, start, _next_line(text, start) - 1)
    return None if found is None else _Opening(found["fence"], "python", 0)


def _end_of_block(text: str, start: int, opening: _Opening) -> tuple[int, int]:
    """Return where the code of a block ends, and where the search for the next block goes on."""
    behind_comment: tuple[int, int] | None = None
    line = hidden_to = start
    while line < len(text):
        following = _next_line(text, line)
        hidings = list(_hidings(text, max(line, hidden_to), following - 1, opening))
        if hidden_to <= line:
            if _closes(_CLOSING.fullmatch(text, line, following - 1), opening):
                return line, following
            other = _opening(text, line)
            if other is not None and other.fence.startswith(opening.fence):
                return behind_comment or (line, line)
        glued = _GLUED.fullmatch(text, line, following - 1)
        if glued is not None and _closes(glued, opening) and hidden_to <= glued.start("fence"):
            place = glued.start("fence")
            kind = next((one.kind for one in hidings if one.start < place < one.end), None)
            if kind is None:
                return place, following
            if kind == "#":
                behind_comment = behind_comment or (place, following)
        hidden_to = max([hidden_to, *(one.end for one in hidings)])
        line = following
    return behind_comment or (len(text), len(text))


def _closes(found: re.Match[str] | None, opening: _Opening) -> bool:
    return found is not None and found["fence"].startswith(opening.fence)


def _hidings(text: str, start: int, end: int, opening: _Opening) -> Iterator[_Hidden]:
    """Find the comments and texts that begin in a part of a line; a text may end in a later line."""
    while found := _HIDING.search(text, start, end):
        start = found.end()
        if found["quotes"] is not None:
            closing = text.find(found["quotes"], start)
            # Fences that are indented as an inner block would be belong to the text. Others may also be the end of this
            # block and the start of the next, if a quote was left open by mistake.
            if closing < 0 or _left_open(text, start, closing, opening.fence, opening.indentation + 3) is None:
                continue
            start = closing + 3
        if found["unclosed"] is None:
            yield _Hidden(found[0][0], found.start(), start)


def _left_open(text: str, start: int, end: int, fence: str = "", deepest: int | None = None) -> bool | None:
    """Return whether the fences in a part of the text leave a block open; None if one begins in another.

    Args:
        text: the response.
        start: begin of the part; fences count from the next line on.
        end: end of the part.
        fence: fences that do not begin with this one do not count.
        deepest: fences that are indented deeper do not count, in columns.
    """
    is_open = False
    line = _next_line(text, start)
    while line < end:
        found = _opening(text, line)
        if found is not None and found.fence.startswith(fence) and (deepest is None or found.indentation <= deepest):
            if is_open and found.language:
                return None
            is_open = not is_open
        line = _next_line(text, line)
    return is_open


def _dedented(code: str) -> str:
    """Leave out what the first line of code is indented by, from every line that is indented as far."""
    lines = code.split("\n")
    first = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    margin = first[: len(first) - len(first.lstrip())]
    if not margin:
        return code
    return "\n".join(line.removeprefix(margin) if line.startswith(margin) else line.lstrip(" \t") for line in lines)
