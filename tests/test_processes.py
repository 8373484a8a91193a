"""Many hosts: the train command in one, two and four real processes, four devices in all, with gloo between them. The
number of processes changes nothing, and process 0 alone writes. Slow: each process compiles for itself."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow
DEVICES = 4
SIZES = {
    "--task.train": 64,
    "--task.validation": 8,
    "--task.test": 8,
    "--evaluation.problems": 8,
    "--warm-start.steps": 2,
    "--warm-start.batch-size": 16,
    "--prompts": 8,
    "--group-size": 4,
    "--learned-groups": 4,
    "--mini-batches": 2,
    "--rollout-chunks": 2,
    "--model.hidden-size": 16,
    "--model.num-layers": 1,
    "--model.expert-size": 8,
    "--mesh.expert": 2,
    "--checkpoint.every": 1,
    "--steps": 4,
}
TIMINGS = {"step_seconds", "tokens_per_second"}
ROUNDING = 1e-5
SECONDS = 600  # after which a process is taken to hang


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(processes, run_dir, data_dir, *flags):
    """Starts the command in so many processes; their output goes to files beside the run's folder."""
    port, started = free_port(), []
    for index in range(processes):
        cluster = ["--cluster.coordinator", f"localhost:{port}", "--cluster.num-processes", processes]
        arguments = ["countdown", "--run-dir", run_dir, "--data-dir", data_dir, *sum(SIZES.items(), ()), *flags]
        arguments += [*cluster, "--cluster.process-id", index] if processes > 1 else []
        devices = DEVICES // processes
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_llvm_disable_expensive_passes=true",
            "JAX_PLATFORMS": "cpu",
            "PYTHONFAULTHANDLER": "1",
        }
        command = [sys.executable, "-m", "experiments.train", *map(str, arguments)]
        with open(f"{run_dir}-{processes}-{index}.txt", "w") as output:
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return started


def output_of(run_dir, processes, index):
    with open(f"{run_dir}-{processes}-{index}.txt") as output:
        return output.read()


def finish(started, run_dir):
    """Waits for all of them. Where one hangs, all say where they are, and end."""
    try:
        codes = [process.wait(timeout=SECONDS) for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.send_signal(signal.SIGABRT)  # faulthandler then writes the stacks of all threads
        codes = ["hung"] + [process.wait() for process in started]
    said = "\n".join(output_of(run_dir, len(started), index)[-20_000:] for index in range(len(started)))
    assert codes == [0] * len(started), f"{codes}\n{said}"


def metrics_of(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


def assert_same_metrics(found, expected):
    assert len(found) == len(expected)
    for row, expected_row in zip(found, expected, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in expected_row.items():
            assert row[name] == value or np.isclose(row[name], value, rtol=ROUNDING, atol=ROUNDING), (name, row, value)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data_dir):
    """The metrics of an uninterrupted run in one process."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    finish(start(1, run_dir, data_dir), run_dir)
    return metrics_of(run_dir)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_nothing(processes, one_process, data_dir, tmp_path):
    finish(start(processes, tmp_path / "run", data_dir), tmp_path / "run")
    assert_same_metrics(metrics_of(tmp_path / "run"), one_process)
    for index in range(1, processes):
        assert "test_sampled" not in output_of(tmp_path / "run", processes, index)
