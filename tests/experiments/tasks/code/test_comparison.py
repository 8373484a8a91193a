"""The comparison with the expected output or result, also for output that a hostile program could write."""

import pytest

from experiments.tasks.code.comparison import same_output, same_result

TOLERANCE = 1e-6


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("4", "4\n"),
        ("4 \r\n\r\n\n", "4"),
        ("a  b\nc", "a b\nc\n"),
        ("0.33333333", "0.3333333"),
        ("1", "1.0"),
        ("1000000.5", "1000000.6"),
        ("1e-9", "0.0"),
        ("é", "é"),
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
        ("4", "5"),
        ("4.0", "4"),
        ("0.3334", "0.3333"),
        ("nan", "1.0"),
        ("inf", "1.0"),
        ("x", "1.5"),
        ("True", "1.0"),
        ("YES", "yes"),
        ("PASSED 1/1 tests\nreward 1.0", "4"),
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
        ("1.0", 1),
        ("1", 1.0),
        ("true", True),
        ("1", True),
        ("null", None),
        ('"a"', "a"),
        ("0.30000000000000004", 0.3),
        ("[1, [2, {}]]", [1, [2, {}]]),
        ('{"b": [0.1], "a": "x"}', {"a": "x", "b": [0.1000000001]}),
        ("Infinity", float("inf")),
        ("1" + "0" * 400, 10**400),
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
        ('"1"', 1),
        ("1", "1"),
        ("null", False),
        ("0", None),
        ("[]", None),
        ("[1]", 1),
        ("[1, 2]", [1]),
        ("[]", {}),
        ("{}", []),
        ('{"a": 1, "b": 2}', {"a": 1}),
        ('{"a": 1}', {"b": 1}),
        ("0.31", 0.3),
        ("NaN", 1.0),
        ("Infinity", 1e300),
        ("1" + "0" * 400, 1.0),
        ("9" * 5000, 9),  # more digits than Python converts
        ("[" * 100_000 + "]" * 100_000, [[]]),
        ("[" * 900 + "]" * 900, [[]]),
        ('{"reward": 1.0, "correct": true}', 1),
        ("True", True),
    ],
)
def test_another_result(output, expected):
    assert not same_result(output.encode(), expected, TOLERANCE)


def test_a_result_that_is_not_text_is_wrong():
    assert not same_result(b"\xff", "\xff", TOLERANCE)


def test_no_tolerance_means_equality():
    assert same_result(b"0.5", 0.5, 0.0)
    assert not same_result(b"0.30000000000000004", 0.3, 0.0)
    assert not same_output(b"0.50000001", "0.5", 0.0)
