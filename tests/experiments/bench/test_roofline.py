"""The bound that a device sets, and the peak rates behind it."""

import math
from types import SimpleNamespace

import pytest

from experiments.bench import roofline
from experiments.compilers.chips import find_chip


def device(kind, platform):
    return SimpleNamespace(device_kind=kind, platform=platform)


def test_roofline_by_hand():
    peak = roofline.Peak(flops_per_second=2e12, bytes_per_second=5e11, source="")
    assert roofline.roofline(4e12, 5e11, peak) == (2.0, "compute")
    assert roofline.roofline(1e12, 2e12, peak) == (4.0, "memory")
    assert roofline.roofline(0, 1e9, peak) == (0.002, "memory")


def test_peaks_come_from_the_table_or_not_at_all():
    assert roofline.peak_of(device("TPU7x", "tpu"), 1).flops_per_second * 2 == 2.307e15
    assert roofline.peak_of(device("a device of the future", "tpu"), 1) is None
    assert find_chip("TPU v5") is find_chip("TPU v5p") and find_chip("NVIDIA H200").bytes_per_second == 4.8e12


@pytest.mark.slow
def test_the_peak_of_a_cpu_is_measured():
    cpu = roofline.peak_of(device("cpu", "cpu"), 1000)
    assert math.isfinite(cpu.flops_per_second) and cpu.flops_per_second > 0 and cpu.bytes_per_second > 0
    assert roofline.peak_of(device("cpu", "cpu"), 2000) == cpu  # measured once for working sets of like size
