"""Many hosts: the train command in one, two and four processes, four devices in all, with gloo between them. The number
of processes changes nothing, and process 0 alone writes and prints. Each process compiles for itself."""

import os

import numpy as np
import pytest
from support.commands import QUICK, SMALL, TIMINGS, flags, start_training
from support.processes import finish, free_port

from rspo_jax.records import read_metrics
from rspo_jax.records.samples import read_samples

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
    """Train in so many processes; return metrics without timings, sample responses, and what each process printed."""
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
    return rows, read_samples(folder / "run"), printed


def assert_same_metrics(found, expected):
    assert len(found) == len(expected)
    for row, expected_row in zip(found, expected, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in expected_row.items():
            assert row[name] == value or np.isclose(row[name], value, rtol=ROUNDING, atol=ROUNDING), (name, row, value)


def assert_same_samples(found, expected):
    """Of a sample nothing but its numbers may be rounded in another way."""
    assert found.keys() == expected.keys()
    for step in expected:
        for sample, other in zip(found[step], expected[step], strict=True):
            assert (sample.prompt, sample.tokens, sample.reward) == (other.prompt, other.tokens, other.reward)
            np.testing.assert_allclose(sample.gamma, other.gamma, atol=1e-3)
            np.testing.assert_allclose(sample.log_probs, other.log_probs, atol=1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data):
    """The metrics and samples of a run in one process."""
    rows, samples, _ = train(1, tmp_path_factory.mktemp("one"), data)
    assert any(row.get("grad_norm") for row in rows if row["phase"] == "rl")  # it learns from rewards that differ
    assert min(gamma for of_step in samples.values() for sample in of_step for gamma in sample.gamma) < 1
    return rows, samples


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing(processes, one_process, data, tmp_path):
    rows, samples, printed = train(processes, tmp_path, data)
    assert_same_metrics(rows, one_process[0])
    assert_same_samples(samples, one_process[1])
    assert all(not text for text in printed[1:])
