"""Checkers that come with the library: functions that a problem names where its answers are not unique.

A checker is called with the test's input, with what a response gave for it, and with what the test expects: texts for a
program, JSON values for a function. It returns True or False. This file, like one of your own, is read as text and runs
in a sandbox in which nothing of the response runs: only Python's library is there, and names that begin with an
underscore are no checkers.
"""

import json


def exact(given, found, expected):
    """Accept the same words, also where they look like numbers (versions, say), or the same value to the last digit."""
    if isinstance(given, str):
        return _lines(found) == _lines(expected)
    return _canonical(found) == _canonical(expected)


def any_order(given, found, expected):
    """Accept the expected lines, or the items of an expected list, in any order; each as `exact` would."""
    if isinstance(given, str):
        return sorted(_lines(found)) == sorted(_lines(expected))
    if not isinstance(found, list) or not isinstance(expected, list):
        return False
    return sorted(map(_canonical, found)) == sorted(map(_canonical, expected))


def _lines(text):
    return [line.split() for line in text.rstrip().split("\n")]


def _canonical(value):
    return json.dumps(value, sort_keys=True)
