"""The verifier of answers to Countdown problems, and their rewards.

Answers come from a model that is rewarded for them, so nothing is trusted: the verifier parses a small grammar of its
own, in one pass and without recursion, accepts text of any length, and never calls eval.

    expression = value { ("+" | "-" | "*" | "/") value }       * and / bind tighter; left to right
    value      = literal | "(" expression ")"
    literal    = "0" | one of 1-9 followed by any of 0-9       ASCII digits only

ASCII spaces may stand anywhere but inside a literal. A value has no sign, and nothing may stand before or after the
expression.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from experiments.tasks.countdown.problems import Problem

# A run of parentheses is one token, so that a text has few tokens per literal; and only a few literals are allowed.
_TOKEN = re.compile(
    r"(?P<open>[( ]+)|(?P<close>\)[) ]*)|(?P<literal>[0-9]+)|(?P<operator>[-+*/])|(?P<other>.)",
    re.DOTALL,
)
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}


class Verdict(NamedTuple):
    """The result of `verify`.

    Attributes:
        correct: True if the answer is well formed and its value is the target.
        well_formed: True if the answer is an expression of the grammar, uses the numbers as often as allowed, and does
            not divide by zero.
        reason: the reason in a few words.
    """

    correct: bool
    well_formed: bool
    reason: str


class _Refused(Exception):
    """The answer is not well formed; the message is the reason."""


def verify(text: str, numbers: Sequence[int], target: int, use_all: bool = True) -> Verdict:
    """Check an answer to a Countdown problem, in exact rational arithmetic.

    Intermediate values may be negative or fractions. The time grows linearly with the length of the text.

    Args:
        text: the answer; any string.
        numbers: the given numbers, none negative; a number given twice may be used twice.
        target: the value to reach.
        use_all: if True, every number must be used; otherwise some may be left out.

    Returns:
        A `Verdict`; no text raises an error.
    """
    try:
        postfix = _parse(text, numbers)
        _check_usage(postfix, numbers, use_all)
        value = _evaluate(postfix)
    except _Refused as refusal:
        return Verdict(correct=False, well_formed=False, reason=str(refusal))
    if value != target:
        return Verdict(correct=False, well_formed=True, reason="the value is not the target")
    return Verdict(correct=True, well_formed=True, reason="the value is the target")


@dataclasses.dataclass(frozen=True)
class CountdownReward:
    """The reward of an answer.

    Attributes:
        format_reward: the reward of an answer that is well formed but wrong; at least 0, below 1.
        use_all: if True, an answer must use every number.
    """

    format_reward: float = 0.0
    use_all: bool = True

    def check(self) -> None:
        """Raise ValueError if a wrong answer would earn less than 0 or as much as a right one."""
        if not 0 <= self.format_reward < 1:
            raise ValueError(
                f"format_reward is {self.format_reward}, but a right answer earns 1; set format_reward to at least 0 "
                "and below 1."
            )

    def __call__(self, problem: Problem, text: str) -> float:
        """Return 1 for a right answer, format_reward for a well-formed wrong one, and 0 otherwise."""
        verdict = verify(text, problem.numbers, problem.target, self.use_all)
        if verdict.correct:
            return 1.0
        return float(self.format_reward) if verdict.well_formed else 0.0


def _parse(text: str, numbers: Sequence[int]) -> list[int | str]:
    """Return an expression in postfix order: literals as int, operators as str.

    This is the shunting-yard algorithm. It stops at the first error, and also before it converts a literal longer than
    any given number or accepts more literals than there are numbers.
    """
    longest = max((len(str(number)) for number in numbers), default=0)
    literals = 0
    postfix: list[int | str] = []
    pending: list[str] = []  # operators and "(" that wait for their right operand
    needs_value = True
    for match in _TOKEN.finditer(text):
        token = match.group()
        if match.lastgroup == "open":
            opened = token.count("(")
            if opened and not needs_value:
                raise _Refused("there is no operator before '('")
            pending.extend("(" * opened)
        elif match.lastgroup == "close":
            if needs_value:
                raise _Refused("there is no value before ')'")
            for _ in range(token.count(")")):
                _close(pending, postfix)
        elif match.lastgroup == "literal":
            if not needs_value:
                raise _Refused("there is no operator between two values")
            literals += 1
            if literals > len(numbers):
                raise _Refused("there are more literals than given numbers")
            postfix.append(_literal(token, longest))
            needs_value = False
        elif match.lastgroup == "operator":
            if needs_value:
                raise _Refused(f"there is no value before '{token}'")
            while pending and _PRECEDENCE[pending[-1]] >= _PRECEDENCE[token]:
                postfix.append(pending.pop())
            pending.append(token)
            needs_value = True
        else:
            raise _Refused(f"the character {token!a} is not allowed")
    if needs_value:
        raise _Refused("a value is missing at the end")
    if "(" in pending:
        raise _Refused("a '(' is never closed")
    return postfix + pending[::-1]


def _close(pending: list[str], postfix: list[int | str]) -> None:
    """Move the operators since the last "(" to the postfix order and drop that "("."""
    while pending:
        operator = pending.pop()
        if operator == "(":
            return
        postfix.append(operator)
    raise _Refused("a ')' has no '('")


def _literal(digits: str, longest: int) -> int:
    if len(digits) > longest:
        raise _Refused("a literal is longer than every given number")
    if digits[0] == "0" and len(digits) > 1:
        raise _Refused("a literal has a leading zero")
    return int(digits)


def _check_usage(postfix: list[int | str], numbers: Sequence[int], use_all: bool) -> None:
    used = Counter(item for item in postfix if isinstance(item, int))
    given = Counter(int(number) for number in numbers)
    for number in used:
        if not given[number]:
            raise _Refused(f"{number} is not a given number")
        if used[number] > given[number]:
            raise _Refused(f"{number} is used more often than it is given")
    if use_all and used != given:
        raise _Refused("not every given number is used")


def _evaluate(postfix: list[int | str]) -> Fraction:
    values: list[Fraction] = []
    for item in postfix:
        if isinstance(item, int):
            values.append(Fraction(item))
            continue
        right = values.pop()
        left = values.pop()
        if item == "+":
            values.append(left + right)
        elif item == "-":
            values.append(left - right)
        elif item == "*":
            values.append(left * right)
        elif right == 0:
            raise _Refused("there is a division by zero")
        else:
            values.append(left / right)
    return values.pop()
