"""Conversations on eight devices, and in two processes, are those of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.conversation_program import conversations
from support.processes import free_port

TESTS = Path(__file__).parents[2]
PROGRAM = TESTS / "support" / "conversation_program.py"


def start(devices, *arguments):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(program):
    out, errors = program.communicate(timeout=600)
    assert program.returncode == 0, errors[-4000:]
    return json.loads(out.splitlines()[-1])


def check(found, processes, devices):
    expected = conversations()
    assert set(expected["turns"]) >= {1, 2, 3} and len(set(expected["lengths"])) > 3
    assert found[:2] == [processes, devices]
    assert {name: found[2][name] == values for name, values in expected.items()} == dict.fromkeys(expected, True)


def test_eight_devices_converse_like_one():
    check(finish(start(8)), 1, 8)


@pytest.mark.slow
def test_two_processes_converse_like_one():
    port = free_port()
    programs = [start(2, process, 2, port) for process in range(2)]
    for program in programs:
        check(finish(program), 2, 4)
