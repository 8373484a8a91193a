"""The verifier of Countdown, against an oracle built on Python's parser, and with hostile answers."""

import ast
import operator
import re
import time
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks.countdown.problems import Problem
from experiments.tasks.countdown.verifier import CountdownReward, Verdict, verify

NUMBERS = (3, 17, 25)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PROPERTY = settings(deadline=None, max_examples=400, database=None)


# --- an oracle: Python's own grammar, narrowed --------------------------------------------------


def oracle_value(node: ast.expr) -> Fraction:
    """Return the value of a parsed expression; raise SyntaxError for syntax that Countdown does not have."""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    symbols = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
    if not isinstance(node, ast.BinOp) or type(node.op) not in symbols:
        raise SyntaxError
    return OPERATIONS[symbols[type(node.op)]](oracle_value(node.left), oracle_value(node.right))


def oracle(text: str, numbers: tuple[int, ...], target: int, use_all: bool) -> tuple[bool, bool]:
    """Return (correct, well_formed) for a text of digits, operators, parentheses and spaces."""
    if re.search(r"\b0\d", text):
        return False, False
    try:
        value = oracle_value(ast.parse(text.strip(" "), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return False, False
    used, given_counts = Counter(map(int, re.findall(r"\d+", text))), Counter(numbers)
    if used != given_counts if use_all else used - given_counts:
        return False, False
    return value == target, True


# Trees are nested (left, operation, right) with int leaves.
trees = st.recursive(
    st.integers(0, 12),
    lambda children: st.tuples(children, st.sampled_from("+-*/"), children),
    max_leaves=7,
)


def tree_value(tree) -> Fraction | None:
    """Return the exact value, or None after a division by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = tree_value(tree[0]), tree_value(tree[2])
    if left is None or right is None or (tree[1] == "/" and right == 0):
        return None
    return OPERATIONS[tree[1]](left, right)


def tree_leaves(tree) -> list[int]:
    return [tree] if isinstance(tree, int) else tree_leaves(tree[0]) + tree_leaves(tree[2])


def render(tree, draw) -> str:
    """Return the text of a tree, with parentheses around each pair and more, and random spaces."""
    if isinstance(tree, int):
        text = str(tree)
        extra = draw(st.integers(0, 2))
    else:
        text = render(tree[0], draw) + tree[1] + render(tree[2], draw)
        extra = draw(st.integers(1, 3))
    for _ in range(extra):
        text = "(" + text + ")"
    return draw(st.sampled_from(["", " ", "  "])) + text + draw(st.sampled_from(["", " "]))


@PROPERTY
@given(st.data())
def test_the_value_of_a_random_expression_is_exact(data):
    tree = data.draw(trees)
    text, value, leaves = render(tree, data.draw), tree_value(tree), tree_leaves(tree)
    numbers = data.draw(st.permutations(leaves))
    if value is None:
        assert verify(text, numbers, 1)[:2] == (False, False)
        return
    near = data.draw(st.integers(-1, 1)) + value.numerator // value.denominator
    assert verify(text, numbers, near)[:2] == (value == near, True)
    # one number more than is used
    assert verify(text, [*numbers, 3], near)[:2] == (False, False)
    assert verify(text, [*numbers, 3], near, use_all=False)[:2] == (value == near, True)
    # one number fewer than is used
    assert verify(text, numbers[1:], near, use_all=False)[:2] == (False, False)


@st.composite
def token_rows(draw) -> str:
    """Return an expression with one pair of parentheses and up to two tokens at random places."""
    values = draw(st.permutations(["3", "17", "25"]))[: draw(st.integers(1, 3))]
    first, last = sorted(draw(st.integers(0, len(values) - 1)) for _ in range(2))
    values[first] = "(" + values[first]
    values[last] += ")"
    text = values[0] + "".join(draw(st.sampled_from("+-*/")) + value for value in values[1:])
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from("()+-*/03   ")) + text[place:]
    return text


@PROPERTY
@given(
    token_rows(),
    st.sampled_from([NUMBERS, (3, 17), (3,), (3, 3, 17, 17, 25, 25), ()]),
    st.sampled_from([3, 17, 20, 45, 51]),
    st.booleans(),
)
def test_any_row_of_tokens_is_judged_as_pythons_parser_would(text, numbers, target, use_all):
    assert verify(text, numbers, target, use_all)[:2] == oracle(text, numbers, target, use_all)


@PROPERTY
@given(trees, st.integers(0, 60), st.sampled_from("+-*/() 0379"), st.booleans())
def test_one_changed_character_is_judged_as_pythons_parser_would(tree, place, character, insert):
    text = ast.unparse(ast.parse(as_python(tree), mode="eval")).replace(" ", "")
    place %= len(text)
    text = text[:place] + character + text[place + (not insert) :]
    numbers = tuple(tree_leaves(tree))
    target = int(tree_value(tree) or 0)
    assert verify(text, numbers, target)[:2] == oracle(text, numbers, target, True)


def as_python(tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    return f"({as_python(tree[0])}{tree[1]}{as_python(tree[2])})"


@PROPERTY
@given(st.text(st.characters(), max_size=30), st.booleans())
def test_no_text_raises(text, use_all):
    verdict = verify(text, NUMBERS, 42, use_all)
    assert verdict.well_formed or not verdict.correct
    assert verdict.reason


# --- answers one by one -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers", "target"),
    [
        ("25+17*3", NUMBERS, 76),
        ("(25+17)*3", NUMBERS, 126),
        (" ( 25+17 ) * 3  ", NUMBERS, 126),
        ("((((25))+(17)))*3", NUMBERS, 126),
        ("17-3-25", NUMBERS, -11),
        ("17-(3-25)", NUMBERS, 39),
        ("12/6/2", (2, 6, 12), 1),
        ("12/(6/2)", (2, 6, 12), 4),
        ("12/6*2", (2, 6, 12), 4),
        ("2*3-4/2", (2, 2, 3, 4), 4),
        # intermediate fractions are exact: the classic 24 from 3, 3, 8, 8
        ("8/(3-8/3)", (3, 3, 8, 8), 24),
        ("1/3*3", (1, 3, 3), 1),
        ("0*5", (0, 5), 0),
        ("7", (7,), 7),
        ("100000000000000000001-100000000000000000000", (10**20, 10**20 + 1), 1),
    ],
)
def test_right_answers(text, numbers, target):
    verdict = verify(text, numbers, target)
    assert verdict[:2] == (True, True), verdict
    assert verify(text, numbers, target + 1)[:2] == (False, True)


def test_a_value_beside_the_target_by_less_than_float_precision_is_wrong():
    numbers = (10**20, 1, 10**20)
    assert verify(f"{10**20}+1-{10**20}", numbers, 1).correct
    assert not verify(f"{10**20}+1-{10**20}", numbers, 0).correct


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing at the end"),
        ("   ", "missing at the end"),
        ("25+17*", "missing at the end"),
        ("(", "missing at the end"),
        ("25+17+()3", "no value before ')'"),
        ("()", "no value before ')'"),
        ("(25+17*3", "never closed"),
        ("25+17*3)", "has no '('"),
        ("25)+(17*3", "has no '('"),
        ("25+17*3 25", "no operator between"),
        ("25 17 3", "no operator between"),
        ("2 5+17*3", "no operator between"),
        ("25(17+3)", "no operator before '('"),
        ("(25)(17+3)", "no operator before '('"),
        ("(25+17)3", "no operator between"),
        ("-25+17*3", "no value before '-'"),
        ("+25+17*3", "no value before '+'"),
        ("25+-17*3", "no value before '-'"),
        ("25--17*3", "no value before '-'"),
        ("(-25)+17*3", "no value before '-'"),
        ("25**17*3", "no value before '*'"),
        ("25//17*3", "no value before '/'"),
        ("25+17*3=76", "'=' is not allowed"),
        ("25+17*3\n", r"'\n' is not allowed"),
        ("25+17*3\0", r"'\x00' is not allowed"),
        ("\t25+17*3", r"'\t' is not allowed"),
        ("25\xa0+17*3", r"'\xa0' is not allowed"),
        ("25+17*3 # yes", "'#' is not allowed"),
        ("25+17×3", r"'\xd7' is not allowed"),
        ("25−17*3", r"'\u2212' is not allowed"),
        ("２５+17*3", r"'\uff12' is not allowed"),
        ("25+17*٣", r"'\u0663' is not allowed"),
        ("25+17*³", r"'\xb3' is not allowed"),
        ("25+17*3\ud800", r"'\ud800' is not allowed"),
        ("25.0+17*3", "'.' is not allowed"),
        ("2_5+17*3", "'_' is not allowed"),
        ("0x19+17*3", "'x' is not allowed"),
        ("25+17*3e0", "'e' is not allowed"),
        ("25+17*03", "leading zero"),
        ("00+17*3", "leading zero"),
        ("025+17*3", "longer than every given number"),
        ("999+17*3", "longer than every given number"),
        ("25+17*3+3", "more literals"),
        ("25+17*4", "4 is not a given number"),
        ("25+17*25", "25 is used more often"),
        ("25+17*17", "17 is used more often"),
        ("25+17", "not every given number is used"),
        ("25/(17-17)", "17 is used more often"),
        ("__import__('os')", "'_' is not allowed"),
    ],
)
def test_answers_that_are_not_well_formed(text, reason):
    verdict = verify(text, NUMBERS, 76)
    assert verdict[:2] == (False, False)
    assert reason in verdict.reason


@pytest.mark.parametrize("text", ["5/(3-3)", "0/0*(5+3+3)", "5/(3*0-3*0)", "5/(0*3)"])
def test_division_by_zero_is_not_well_formed(text):
    numbers = [int(literal) for literal in re.findall(r"\d+", text)]
    verdict = verify(text, numbers, 0)
    assert verdict == Verdict(False, False, "there is a division by zero")


@pytest.mark.parametrize(
    ("text", "numbers", "use_all", "well_formed"),
    [
        ("4+4", (4, 4), True, True),
        ("4+4", (4,), True, False),
        ("4+4", (4, 5), True, False),
        ("4+4", (4, 5), False, False),
        ("4+4", (4, 4, 4), True, False),
        ("4+4", (4, 4, 4), False, True),
        ("4", (4, 4), False, True),
        ("4", (4, 4), True, False),
        ("4+5", (5, 4), True, True),
        ("4*5", (5, 4, 9), False, True),
        ("4", (), True, False),
        ("4", (), False, False),
        ("", (), True, False),
    ],
)
def test_how_often_numbers_may_be_used(text, numbers, use_all, well_formed):
    assert verify(text, numbers, 77, use_all)[:2] == (False, well_formed)


def test_numbers_and_target_may_be_numpy_integers():
    numbers: Any = np.array([3, 17, 25], dtype=np.int32)
    target: Any = np.int32(76)
    assert verify("25+17*3", numbers, target).correct


def test_a_value_with_more_digits_than_python_prints_raises_nothing():
    numbers = range(1, 2_001)
    assert verify("*".join(map(str, numbers)), numbers, 1)[:2] == (False, True)


# --- hostile answers ----------------------------------------------------------------------------

LENGTH = 100_000
HALF = LENGTH // 2
HOSTILE = {
    "open": "(" * LENGTH,
    "close": ")" * LENGTH,
    "unclosed value": "(" * LENGTH + "3",
    "open and space": "( " * HALF,
    "pairs": "()" * HALF,
    "values in pairs": "(3)" * (LENGTH // 3),
    "open, literal, plus": "(3+" * (LENGTH // 3),
    "one literal of nines": "9" * LENGTH,
    "one literal of zeros": "0" * LENGTH,
    "nines after an expression": "3+17+" + "9" * LENGTH,
    "a long sum": "1+" * HALF + "1",
    "a long product": "3*" * HALF + "3",
    "a tower": "3**" * (LENGTH // 3) + "3",
    "a long quotient": "3/" * HALF + "3",
    "minus": "-" * LENGTH,
    "literals and spaces": "3 " * HALF,
    "spaces": " " * LENGTH,
    "spaces before garbage": " " * LENGTH + "x",
    "unicode digits": "٣" * LENGTH,
    "full-width digits": "３+" * HALF,
    "superscripts": "3²" * HALF,
    "surrogates": "\ud800" * LENGTH,
    "null": "\0" * LENGTH,
    "newlines": "3+17+25" + "\n" * LENGTH,
    "letters": "a" * LENGTH,
    "empty": "",
}
HARMLESS = {
    "deep": "(" * HALF + "3" + ")" * HALF + "+17+25",
    "deep with spaces": "( " * (HALF // 2) + "3" + " )" * (HALF // 2) + "+17+25",
    "deep on the right": "3+" + "(" * HALF + "17+25" + ")" * HALF,
    "trailing spaces": "3+17+25" + " " * LENGTH,
    "inner spaces": "3+17+" + " " * LENGTH + "25",
}


def best_time(text: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        verify(text, NUMBERS, 45)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("name", [*HOSTILE, *HARMLESS])
def test_long_texts_are_answered_in_a_millisecond_per_kilobyte(name):
    text = {**HOSTILE, **HARMLESS}[name]
    verdict = verify(text, NUMBERS, 45)
    assert verdict[:2] == ((False, False) if name in HOSTILE else (True, True)), verdict
    assert len(verdict.reason) < 100
    assert best_time(text) <= 1e-3 * max(1.0, len(text) / 1_000)


# --- rewards ------------------------------------------------------------------------------------

PROBLEM = Problem(NUMBERS, 76, "25+17*3")


@pytest.mark.parametrize(
    ("reward", "text", "expected"),
    [
        (CountdownReward(), "25+17*3", 1.0),
        (CountdownReward(), "25+17+3", 0.0),
        (CountdownReward(), "25+17*", 0.0),
        (CountdownReward(), "25+17", 0.0),
        (CountdownReward(format_reward=0.1), "25+17*3", 1.0),
        (CountdownReward(format_reward=0.1), "25+17+3", 0.1),
        (CountdownReward(format_reward=0.1), "25+17*", 0.0),
        (CountdownReward(format_reward=0.1), "25+17", 0.0),
        (CountdownReward(format_reward=0.1), "25/(17-17)", 0.0),
        (CountdownReward(format_reward=0.1, use_all=False), "25+17", 0.1),
        (CountdownReward(use_all=False), "25*3", 0.0),
    ],
)
def test_reward(reward, text, expected):
    value = reward(PROBLEM, text)
    assert type(value) is float
    assert value == expected


def test_an_answer_that_leaves_numbers_out_is_right_only_if_that_is_allowed():
    problem = Problem(NUMBERS, 42, "25+17")
    assert CountdownReward(format_reward=0.1)(problem, "25+17") == 0.0
    assert CountdownReward(use_all=False)(problem, "25+17") == 1.0


@pytest.mark.parametrize("format_reward", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
def test_a_format_reward_outside_of_its_range_is_refused(format_reward):
    with pytest.raises(ValueError, match="set format_reward to at least 0 and below 1"):
        CountdownReward(format_reward=format_reward).check()


@pytest.mark.parametrize("format_reward", [0.0, 0.1, 0.99])
def test_a_format_reward_inside_of_its_range_is_accepted(format_reward):
    CountdownReward(format_reward=format_reward).check()
