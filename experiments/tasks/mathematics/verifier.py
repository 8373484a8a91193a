"""The judge of one mathematical answer, which the worker processes of the pool run.

Reference and response go the same way: normal text and tokens, the grammar, a reading, a comparison of readings. A
text that cannot be read as a whole equals its own text and nothing else. docs/models.md states the rules.
"""

import re
from collections.abc import Sequence
from typing import Any

from experiments.tasks.mathematics.boxes import last_box
from experiments.tasks.mathematics.equality import same
from experiments.tasks.mathematics.names import name_of
from experiments.tasks.mathematics.reader import read
from experiments.tasks.mathematics.tokens import Unreadable, normal_text, tokens_of
from experiments.tasks.mathematics.values import limited_work

LONGEST_ANSWER = 2_000
"""Largest number of characters in a box. The longest answer of the sets in `problems.py` has 200."""
LONGEST_TAIL = 2_000
"""Number of characters at the end of a response that are searched for an answer without a box."""

_FORMULA = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?%?(?!\w)")


def judge(item: tuple[str | Sequence[str], str, bool]) -> dict[str, Any]:
    """Judge one response.

    Args:
        item: the right answer as LaTeX, or several of which any is right; the response; and whether the response's
            answer must be in a box.

    Returns:
        "answered": whether there is an answer, in a box if it must be; "correct": whether it is right; "answer": a text
        that is the same for answers that are found to mean the same, None without an answer.
    """
    right, response, must_be_boxed = item
    answers = [right] if isinstance(right, str) else right
    box = last_box(response)
    nothing = {"answered": False, "correct": False, "answer": None}
    if box is None and (must_be_boxed or "\\boxed" in response):
        return nothing
    given = box if box is not None else _last_answer(response[-LONGEST_TAIL:])
    if not given.strip() or len(given) > LONGEST_ANSWER:
        return nothing
    with limited_work():
        met = next((one for one in answers if is_same_text(one, given) or is_same_answer(one, given)), None)
        return {"answered": True, "correct": met is not None, "answer": _name(given) if met is None else met}


def is_same_text(answer: str, given: str) -> bool:
    """Return whether two texts have the same tokens, read or not."""
    return _text_key(answer) == _text_key(given)


def is_same_answer(answer: str, given: str) -> bool:
    """Return whether two texts can be read and mean the same."""
    given_readings = read(given)
    try:
        return bool(given_readings) and any(
            same(reference, other) for reference in read(answer) for other in given_readings
        )
    except RecursionError:  # products of more factors than any answer has
        return False


def is_readable(answer: str) -> bool:
    """Return whether a reference is earned by itself as it is read. If not, nothing but its own text earns it."""
    with limited_work():
        return is_same_answer(answer, answer)


def _text_key(text: str) -> Any:
    normal = normal_text(text)
    try:
        return [(token.kind, token.text) for token in tokens_of(normal)]
    except (Unreadable, RecursionError):
        return re.sub(r"\s+", " ", normal)


def _name(given: str) -> str:
    readings = read(given)
    try:
        return name_of(readings[0]) if readings else normal_text(given)
    except RecursionError:
        return normal_text(given)


def _last_answer(tail: str) -> str:
    """Return what follows the last ####, as in GSM8K, or else the last formula or number of a text."""
    before, mark, after = tail.rpartition("####")
    if mark:
        return after
    formulas, numbers = list(_FORMULA.finditer(before + after)), list(_NUMBER.finditer(before + after))
    if formulas and (not numbers or formulas[-1].end() > numbers[-1].start()):
        return next(group for group in formulas[-1].groups() if group is not None)
    return numbers[-1].group() if numbers else ""


def _warm_up() -> None:
    """Judge a few typical answers: workers are forked from a process that has computed what is computed once."""
    for answer, given in (
        (r"\frac{14}{3}", r"\frac{-7}{2}"),
        (r"3\sqrt{13} + \pi", r"2^{10} - \sqrt[3]{5} \cdot 7"),
        (r"\left( 3, \frac{\pi}{2} \right)", "(3, 4)"),
        ("x^5 - 3x + 1", "(x - 1)(x + 2)"),
        (r"\begin{pmatrix} 1 & -2 \\ 3 & \frac12 \end{pmatrix}", r"\begin{pmatrix} 0 & 1 \\ 1 & 0 \end{pmatrix}"),
    ):
        judge((answer, f"\\boxed{{{given}}}", True))


_warm_up()
