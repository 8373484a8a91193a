"""The peak of memory: that of devices which count it, and of the process elsewhere."""

import jax
import numpy as np
import pytest

from rspo_jax.records.memory import peak_memory_gib


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_the_fullest_device_counts(monkeypatch):
    devices = [Device({"peak_bytes_in_use": 2**30}), Device({"peak_bytes_in_use": 3 * 2**29}), Device({})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory_gib() == 1.5


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 1}])
def test_without_such_devices_it_is_the_process_whose_peak_never_falls(monkeypatch, stats):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(stats)])
    before = peak_memory_gib()
    held = np.ones(2**24)  # 128 MiB
    during = peak_memory_gib()
    del held
    assert 0.05 < before <= during <= peak_memory_gib() < 1024
