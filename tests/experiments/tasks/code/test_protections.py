"""The trials of the sandbox: where the kernel forbids what a protection needs, nothing runs unless that is accepted.

A seccomp filter in a process of its own makes the kernel forbid it, as in a container.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.sandbox import skip_unless_it_holds

from experiments.tasks.code import protections
from experiments.tasks.code.protections import PROTECTIONS, missing_protections, require_protections
from experiments.tasks.code.sandbox import PROTECTIONS_OF_STEP, SandboxError

ROOT = Path(__file__).resolve().parents[4]
LANDLOCK = [444]
SECCOMP = [317, 277]
"""Its numbers on both architectures. Nothing here makes the call that has the other one's number."""

# Forbids system calls by number, and prctl(PR_SET_SECCOMP), which is 22, if the last argument says so. Then it tries
# the protections and reports the results.
FORBIDDING = """
import ctypes, json, os, struct, sys
forbidden, forbid_filters = json.loads(sys.argv[1])
prctl = {"x86_64": 157, "aarch64": 167}[os.uname().machine]
refuse, allow = struct.pack("<HBBI", 6, 0, 0, 0x50000 | 1), struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)
program = struct.pack("<HBBI", 0x20, 0, 0, 0)
for number in forbidden:
    program += struct.pack("<HBBI", 0x15, 0, 1, number) + refuse
if forbid_filters:
    program += struct.pack("<HBBI", 0x15, 0, 3, prctl) + struct.pack("<HBBI", 0x20, 0, 0, 16)
    program += struct.pack("<HBBI", 0x15, 0, 1, 22) + refuse
program += allow
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]
from experiments.tasks.code.protections import PROTECTIONS, missing_protections, require_protections
from experiments.tasks.code.sandbox import Limits, Request, SandboxError, run
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0) == 0
report = {}
def attempt(name, function, *arguments):
    try:
        report[name] = function(*arguments)
    except SandboxError as error:
        report[name] = f"refused: {error}"
request = Request("open('ran', 'w'); print(1)")
attempt("missing", missing_protections)
attempt("required", require_protections, ())
attempt("strict run", run, request, Limits(seconds=60.0))
if isinstance(report["missing"], tuple):
    accepted = report["missing"]
    attempt("one accepted", require_protections, accepted[:1])
    attempt("all accepted", require_protections, accepted)
    attempt("run", lambda: run(request, Limits(seconds=60.0), frozenset(accepted)).output.decode())
print(json.dumps(report))
"""


def report_where(forbidden: list[int], forbid_filters: bool = False) -> dict:
    command = [sys.executable, "-c", FORBIDDING, json.dumps([forbidden, forbid_filters])]
    process = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module", autouse=True)
def _filters_can_be_set():
    skip_unless_it_holds(lambda: require_protections(()))


def test_without_landlock_the_sandbox_is_refused_until_that_is_accepted():
    report = report_where(LANDLOCK)
    assert report["missing"] == ["files"]
    assert report["required"].startswith("refused: The sandbox is not safe on this machine")
    assert "'files' does not hold" in report["required"] and "Landlock" in report["required"]
    assert "accept_missing=('files',)" in report["required"]
    assert "closed at its step 'landlock' (" in report["strict run"]
    assert report["one accepted"] is None and report["all accepted"] is None
    assert report["run"] == "1\n"


def test_without_filters_the_sandbox_is_refused_until_all_that_rests_on_them_is_accepted():
    report = report_where(SECCOMP, forbid_filters=True)
    assert report["missing"] == ["files", "network", "processes", "disk"]
    for name in report["missing"]:
        assert f"{name!r} does not hold" in report["required"]
    assert "closed at its step 'seccomp' (" in report["strict run"]
    assert "'files' does" not in report["one accepted"] and "'network' does not hold" in report["one accepted"]
    assert report["all accepted"] is None
    assert report["run"] == "1\n"


def test_where_processes_cannot_be_watched_nothing_can_be_accepted():
    report = report_where([434])  # pidfd_open
    assert set(report) == {"missing", "required", "strict run"}
    for refusal in report.values():
        assert refusal.startswith("refused: The sandbox needs pidfd_open to watch a process")


@pytest.mark.parametrize("name", PROTECTIONS)
def test_every_protection_that_fails_its_trial_is_refused_by_name(monkeypatch, name):
    monkeypatch.setattr(protections, "missing_protections", lambda: (name,))
    with pytest.raises(SandboxError, match=f"'{name}' does not hold; it guarantees .*accept_missing=\\('{name}',\\)"):
        require_protections(())
    with pytest.raises(SandboxError, match=f"'{name}' does not hold"):
        require_protections([other for other in PROTECTIONS if other != name])
    require_protections([name])


@pytest.mark.parametrize("name", PROTECTIONS)
def test_a_failed_trial_is_a_missing_protection(monkeypatch, name):
    trials = {other: f"_{other}_{'hold' if other in ('files', 'processes') else 'holds'}" for other in PROTECTIONS}
    for trial in trials.values():
        monkeypatch.setattr(protections, trial, lambda: True)
    for outcome in (lambda: False, lambda: os.stat("/no such file")):
        monkeypatch.setattr(protections, trials[name], outcome)
        assert missing_protections.__wrapped__() == (name,)


def test_a_name_that_is_no_protection_is_refused():
    with pytest.raises(ValueError, match="accept_missing names 'filse'; the protections are files, network"):
        require_protections(["filse"])


def test_steps_name_protections_that_exist():
    assert set().union(*PROTECTIONS_OF_STEP.values()) <= set(PROTECTIONS)


def test_other_systems_and_machines_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux, but this is darwin"):
        missing_protections.__wrapped__()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(protections.platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="x86_64 and aarch64, but this machine is riscv64"):
        missing_protections.__wrapped__()


def test_a_sandbox_in_which_nothing_runs_is_refused(monkeypatch):
    monkeypatch.setattr(protections, "_printed", lambda code: "")
    with pytest.raises(SandboxError, match="cannot run even a harmless program"):
        missing_protections.__wrapped__()
