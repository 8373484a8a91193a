"""The comparison with the expected output or result, also for output that a hostile program could write."""

import json

import pytest

from experiments.tasks.code.comparison import same_output, same_result

TOLERANCE = 1e-6
LONG = "1" + "0" * 400


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("4", "4\n"),
        ("4 \r\n\r\n\n", "4"),
        ("a  b\nc", "a b\nc\n"),
        ("é", "é"),
        # an integer
        ("4.0", "4"),
        ("4.", "4"),
        ("-4.000", "-4"),
        ("-0.0", "0"),
        ("1000000007.0", "1000000007"),
        ("9" * 5000 + ".0", "9" * 5000),
        # a number with a point
        ("1", "1.0"),
        ("1.1", "1.10"),
        (".5", "0.5"),
        ("0.33333333", "0.3333333"),
        ("1000000.5", "1000000.6"),
        ("0.000000001", "0.0"),
        (LONG + ".5", LONG + ".0"),
        # text
        ("1e3", "1e3"),
        ("007 +5 nan", "007 +5 nan"),
    ],
)
def test_the_same_output(output, expected):
    assert same_output(output.encode(), expected, TOLERANCE)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", "4"),
        ("4\n4", "4"),
        ("4 4", "4"),
        ("\n4", "4"),
        ("4\n\n5", "4\n5"),
        ("1\n2\n3\n4\n5", "4"),
        ("a b", "ab"),
        ("x", "1.5"),
        ("True", "1.0"),
        ("YES", "yes"),
        ("PASSED 1/1 tests\nreward 1.0", "4"),
        # an integer
        ("4", "5"),
        ("4.0000001", "4"),
        ("1000000007.5", "1000000007"),
        ("1000000000.0", "1000000007"),
        ("9" * 5000 + ".0", "9" * 4999 + "8"),
        # a number with a point
        ("0.3334", "0.3333"),
        ("1", "1.5"),
        ("nan", "1.0"),
        ("inf", "1.0"),
        ("2" + LONG[1:] + ".0", LONG + ".0"),  # both are infinite as floats
        # text
        ("1000", "1e3"),
        ("1000.0", "1e3"),
        ("1e3", "1000"),
        ("1e3", "1000.0"),
        ("1e9", "1000000000"),
        ("1e-9", "0.0"),
        ("inf", "1e999"),
        ("7", "007"),
        ("007", "7"),
        ("101", "0101"),
        ("01.5", "1.5"),
        ("5", "+5"),
        ("+1.5", "1.5"),
        ("1_000.0", "1000.0"),
        ("1,5", "1.5"),
        ("\u0661.5", "1.5"),  # an Arabic digit
        ("0x10", "16"),
        ("1.2.3", "1.2.30"),
        ("-", "0"),
        (".", "0.0"),
    ],
)
def test_another_output(output, expected):
    assert not same_output(output.encode(), expected, TOLERANCE)


def test_output_that_is_not_text_is_wrong():
    assert not same_output(b"4\xff", "4", TOLERANCE)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("1", 1),
        (" 1 ", 1),
        ("-0", 0),
        (LONG, 10**400),
        ("1", 1.0),
        ("1.0", 1.0),
        ("0.30000000000000004", 0.3),
        ("1000000.6", 1000000.5),
        ("true", True),
        ("false", False),
        ("null", None),
        ('"a"', "a"),
        ("[1, [2, {}]]", [1, [2, {}]]),
        ('{"b": [0.1], "a": "x"}', {"a": "x", "b": [0.1000000001]}),
        (r'"\ud800"', "\ud800"),
    ],
)
def test_the_same_result(output, expected):
    assert same_result(output.encode(), expected, TOLERANCE)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", None),
        ("1 1", 1),
        ("1\n2", 2),
        ("2", 1),
        # another type
        ("1.0", 1),
        ("1e9", 10**9),
        ("1e9", 1_000_000_007),
        ("1000000007.0", 1_000_000_007),
        ("true", 1),
        ("true", 1.0),
        ("false", 0),
        ("1", True),
        ("0", False),
        ("1.0", True),
        ('"1"', 1),
        ("1", "1"),
        ("null", False),
        ("0", None),
        ('""', None),
        ("[]", None),
        ("[1]", 1),
        ("1", [1]),
        ("[1.0]", [1]),
        ("[[true]]", [[1]]),
        ('{"a": 1.0}', {"a": 1}),
        # another value
        ("[1, 2]", [1]),
        ("[2, 1]", [1, 2]),
        ("[]", {}),
        ("{}", []),
        ('{"a": 1, "b": 2}', {"a": 1}),
        ('{"a": 1}', {"b": 1}),
        ("0.31", 0.3),
        (LONG, 1.0),
        ("1e999", 1.0),
        ("9" * 5000, 9),
        # no JSON value
        ("NaN", 1.0),
        ("Infinity", 1e300),
        ("Infinity", float("inf")),
        ("True", True),
        ("[" * 100_000 + "]" * 100_000, [[]]),
        ("[" * 900 + "]" * 900, [[]]),
        ('{"reward": 1.0, "correct": true}', 1),
    ],
)
def test_another_result(output, expected):
    assert not same_result(output.encode(), expected, TOLERANCE)


def test_integers_have_more_digits_than_python_converts():
    sevens = 7 * (10**6000 - 1) // 9
    assert same_result(b"7" * 6000, sevens, TOLERANCE)
    assert not same_result(b"7" * 5999 + b"8", sevens, TOLERANCE)


def test_numbers_as_long_as_an_output_can_be():
    digits = "7" * 2**20
    for output, expected in ((digits, "7.0"), (digits + ".5", digits[1:] + ".5"), (digits, "7")):
        assert not same_output(output.encode(), expected, TOLERANCE)
    assert same_output(f"{digits}.5".encode(), f"{digits}.0", TOLERANCE)
    assert not same_result(digits.encode(), 7.0, TOLERANCE) and not same_result(digits.encode(), 7, TOLERANCE)


def test_a_result_may_be_nested_as_deep_as_json_can_be():
    text = "[" * 900 + "]" * 900
    assert same_result(text.encode(), json.loads(text), TOLERANCE)


def test_a_result_that_is_not_text_is_wrong():
    assert not same_result(b"\xff", "\xff", TOLERANCE)


def test_no_tolerance_means_equality():
    assert same_result(b"0.5", 0.5, 0.0)
    assert not same_result(b"0.30000000000000004", 0.3, 0.0)
    assert not same_output(b"0.50000001", "0.5", 0.0)
