"""Many hosts: the train command in one, two and four processes, four devices in all, with gloo between them. The number
of processes changes nothing, and process 0 alone writes and prints. Each process compiles for itself."""

import os

import numpy as np
import pytest
from support.commands import QUICK, SMALL, TIMINGS, flags, start_training
from support.processes import finish, free_port

from rspo_jax.records import read_metrics

pytestmark = pytest.mark.slow
DEVICES = 4
FLAGS = flags(
    SMALL,
    prompts=8,
    group_size=4,
    learned_groups=4,
    rollout_chunks=2,
    mesh__expert=2,
    warm_start__steps=2,
    warm_start__batch_size=8,
    checkpoint__every=1,
    steps=4,
)
ROUNDING = 1e-5


def train(processes, folder, data):
    """Train in so many processes; return the metrics without timings, and what each process has printed."""
    port, devices = free_port(), DEVICES // processes
    environment = os.environ | {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}"}
    members = []
    for index in range(processes):
        cluster = ("--cluster.coordinator", f"localhost:{port}", "--cluster.num-processes", processes)
        cluster = (*cluster, "--cluster.process-id", index) if processes > 1 else ()
        arguments = ("--run-dir", folder / "run", "--data-dir", data, *FLAGS, *cluster)
        members.append(start_training(folder / str(index), *arguments, environment=environment))
    printed = finish(members)
    rows = [{name: row[name] for name in row if name not in TIMINGS} for row in read_metrics(folder / "run")]
    return rows, printed


def assert_same_metrics(found, expected):
    assert len(found) == len(expected)
    for row, expected_row in zip(found, expected, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in expected_row.items():
            assert row[name] == value or np.isclose(row[name], value, rtol=ROUNDING, atol=ROUNDING), (name, row, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data):
    """The metrics of a run in one process."""
    rows, _ = train(1, tmp_path_factory.mktemp("one"), data)
    assert any(row.get("grad_norm") for row in rows if row["phase"] == "rl")  # it learns from rewards that differ
    return rows


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing(processes, one_process, data, tmp_path):
    rows, printed = train(processes, tmp_path, data)
    assert_same_metrics(rows, one_process)
    assert all(not text for text in printed[1:])
