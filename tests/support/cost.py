"""A pytest plugin that prints the CPU seconds of every file and of the twenty most expensive tests.

    make test ARGS="-p support.cost"

Seconds are those of the process that runs a test and of the processes that it waited for, so they hardly depend on what
else the machine is doing. A fixture counts for the test that sets it up.
"""

import collections
import os

import pytest

_PROPERTY = "cpu_seconds"
_seconds: dict[str, float] = {}


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.config.stash[_start] = _cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.user_properties.append((_PROPERTY, _cpu_seconds() - item.config.stash[_start]))
    return report


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        _seconds[report.nodeid] = dict(report.user_properties).get(_PROPERTY, 0.0)


def pytest_terminal_summary(terminalreporter):
    by_file = collections.Counter()
    for test, seconds in _seconds.items():
        by_file[test.split("::")[0]] += seconds
    terminalreporter.section("CPU seconds")
    for test, seconds in collections.Counter(_seconds).most_common(20):
        terminalreporter.write_line(f"{seconds:8.1f}  {test}")
    terminalreporter.write_line("")
    for file, seconds in by_file.most_common():
        terminalreporter.write_line(f"{seconds:8.1f}  {file}")
    terminalreporter.write_line(f"{sum(by_file.values()):8.1f}  in all")


_start = pytest.StashKey[float]()
