"""A finder of the answer that a text puts into a box: \\boxed{...}."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_box(text: str) -> str | None:
    """Find the content of the last box of a text, in one pass over the text.

    Returns:
        The content without the braces. None if there is no box, or if the last one is never closed, as in a truncated
        response.
    """
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, starts[-1]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[starts[-1] : brace.start()]
    return None
