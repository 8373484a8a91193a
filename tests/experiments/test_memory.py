"""Freed memory is kept: in a process of its own, as the setting is for good."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
import numpy as np
from experiments.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    np.ones(1 << 23)  # 64 MiB
fill()
before = faults()
for _ in range(4):
    fill()
print(faults() - before)
"""


def page_faults(how):
    run = [sys.executable, "-c", COUNT_FAULTS, how]
    return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_large_buffers_are_mapped_once():
    assert page_faults("kept") < 100
    assert page_faults("given back") > 1000


def test_other_systems_are_left_alone(monkeypatch):
    from experiments import memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()
