"""References tried on the judge: which are earned by themselves, and which by an answer with another number too."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments.tasks.mathematics.problems import Problem
from experiments.tasks.mathematics.verifier import is_readable, is_same_answer, limited_work


class Finding(NamedTuple):
    """The outcome of trying the references of one set.

    Attributes:
        count: the number of references.
        unreadable: the references that nothing but their own text earns.
        raised: the number of answers that were made by raising one number of a reference by one.
        paid: those of them that are judged right, as the reference, the answer and the reason.
    """

    count: int
    unreadable: list[str]
    raised: int
    paid: list[tuple[str, str, str]]


def unreadable_answers(problems: Sequence[Problem]) -> list[str]:
    """Return the references that the judge cannot read, each once."""
    answers = dict.fromkeys(answer for problem in problems for answer in problem.references)
    return [answer for answer in answers if not is_readable(answer)]


def try_references(problems: Sequence[Problem]) -> Finding:
    """Judge every reference against itself, not as text, and against itself with one number raised by one."""
    references = [answer for problem in problems for answer in problem.references]
    raised, paid = 0, []
    for reference in references:
        for answer, reason in raised_by_one(reference):
            raised += 1
            with limited_work():
                if is_same_answer(reference, answer):
                    paid.append((reference, answer, reason))
    unreadable = set(unreadable_answers(problems))
    return Finding(len(references), [answer for answer in references if answer in unreadable], raised, paid)


def raised_by_one(answer: str) -> Iterator[tuple[str, str]]:
    """Yield an answer with each of its numbers raised by one, and why that might mean the same, "" if it may not."""
    for number in re.finditer(r"[0-9]+", answer):
        before, after = answer[: number.start()], answer[number.end() :]
        reason = ""
        if re.search(r"[0-9]_\{?$", before):
            reason = "the base of a numeral"
        elif re.search(r"[A-Za-z]\s*\}\s*\^\s*\{?$", before) and re.search(r"\\(?:text|mbox|mathrm)", before):
            reason = "the exponent of a unit"
        yield f"{before}{str(int(number.group()) + 1).zfill(len(number.group()))}{after}", reason
