"""Clusters of real processes on this machine: how they join, and how all of them end when one does. Every scenario is
started once, all of them at the same time; each process then does what its scenario says."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from rspo_jax.hosts import ClusterConfig, ClusterError, joined
from rspo_jax.hosts import cluster as distributed

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 240  # after which a process is taken to hang
WAY_OUT = "press the button again"

MEMBER = f"""
import os, signal, sys, time
import jax
from rspo_jax.hosts import ClusterConfig, joined
scenario, process, processes, port = sys.argv[1], *map(int, sys.argv[2:])

def happens():
    if scenario == "leaves" or process == 0 and scenario == "alone":
        print("process", jax.process_index(), "of", jax.process_count(), jax.config.jax_enable_preemption_service)
        return
    if scenario == "dies in a collective":
        import numpy as np
        mesh = jax.make_mesh((jax.device_count(),), ("rows",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
        total = jax.jit(jax.numpy.sum, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        x = jax.make_array_from_callback((jax.device_count(),), rows, lambda _: np.ones(1, np.float32))
        for count in range(100_000):
            assert float(total(x)) == jax.device_count()
            if count == 20 and process == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    if scenario == "dies" and process == 2 or scenario == "process 0 dies" and process == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if scenario == "hangs" and process == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if scenario == "raises" and process == 1:
        raise ValueError("a bad row")
    if scenario == "gives up" and process == 1:
        membership.give_up("no such file", 2)
    if scenario == "exits" and process == 0:
        sys.exit(7)
    time.sleep({SECONDS})

waits, silence = (3 if scenario == "others are missing" else 200), (10 if scenario == "hangs" else 100)
config = ClusterConfig(f"localhost:{{port}}", processes, process, silence, waits)
with joined(config, way_out={WAY_OUT!r}) as membership:
    happens()
print("left in good order")
"""

PROCESSES = {
    "leaves": 2,
    "alone": 1,
    "dies": 3,
    "process 0 dies": 3,
    "dies in a collective": 2,
    "hangs": 2,
    "raises": 2,
    "gives up": 3,
    "exits": 2,
    "others are missing": 2,
}


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def environment():
    return {name: value for name, value in os.environ.items() if name not in distributed.SIGNS} | {
        "JAX_PLATFORMS": "cpu"
    }


class Member:
    def __init__(self, log, *arguments):
        self.log = log
        with open(log, "w") as file:
            command = [sys.executable, "-c", MEMBER, *map(str, arguments)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)

    @property
    def output(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """The processes of each scenario, when all but those that were stopped have ended."""
    folder = tmp_path_factory.mktemp("logs")
    started = {}
    for scenario, processes in PROCESSES.items():
        port = free_port()
        present = range(1) if scenario == "others are missing" else range(processes)
        started[scenario] = [
            Member(folder / f"{scenario}-{process}", scenario, process, processes, port) for process in present
        ]
    deadline = time.monotonic() + SECONDS
    try:
        for scenario, members in started.items():
            for member in members[:1] if scenario == "hangs" else members:
                member.process.wait(max(0.1, deadline - time.monotonic()))
        yield started
    finally:
        for members in started.values():
            for member in members:
                member.process.kill()
                member.process.wait()


def codes(members):
    return [member.process.returncode for member in members]


def sentence(member):
    """What a member says on stderr of the end of another."""
    (line,) = re.findall("^error: .*$", member.output, re.MULTILINE)
    return line


@pytest.mark.slow
def test_processes_join_and_leave_together(scenarios):
    members = scenarios["leaves"]
    assert codes(members) == [0, 0]
    for process, member in enumerate(members):
        assert f"process {process} of 2 False" in member.output  # SIGTERM is ours: see preemption.py
        assert member.output.endswith("left in good order\n")


@pytest.mark.slow
def test_a_cluster_of_one(scenarios):
    (member,) = scenarios["alone"]
    assert codes([member]) == [0]
    assert "process 0 of 1" in member.output


@pytest.mark.slow
def test_the_death_of_a_process_ends_the_others_with_a_sentence(scenarios):
    members = scenarios["dies"]
    assert codes(members) == [1, 1, -signal.SIGKILL]
    for process in (0, 1):
        assert sentence(members[process]) == (
            f"error: process 2 of 3, on {socket.gethostname()}, died, and the run cannot go on without it: "
            f"process {process} stops too. To go on from the newest checkpoint, {WAY_OUT}."
        )


@pytest.mark.slow
def test_the_death_of_process_0_does_so_too(scenarios):
    members = scenarios["process 0 dies"]
    assert members[0].process.returncode == -signal.SIGKILL
    for process in (1, 2):
        assert members[process].process.returncode != 0
        assert "process 0 of 3, on localhost, died" in sentence(members[process])


@pytest.mark.slow
def test_so_does_a_death_that_a_collective_notices_first(scenarios):
    survivor, dead = scenarios["dies in a collective"]
    assert codes([survivor, dead]) == [1, -signal.SIGKILL]
    assert "process 1 of 2" in sentence(survivor)


@pytest.mark.slow
def test_a_process_that_hangs_as_a_whole_is_named_by_jax(scenarios):
    survivor, _ = scenarios["hangs"]
    assert codes([survivor]) == [-signal.SIGABRT]
    assert "Terminating process because the JAX distributed service detected fatal errors" in survivor.output
    assert re.search(r"unhealthy \(stopped sending heartbeats\):\n1\n", survivor.output)


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_and_is_told_to_all(scenarios):
    other, guilty = scenarios["raises"]
    assert codes([other, guilty]) == [1, 1]
    assert "process 1 of 2" in sentence(other)
    assert "gave up (ValueError: a bad row)" in sentence(other)
    assert "Traceback" in guilty.output
    assert guilty.output.endswith("ValueError: a bad row\n")


@pytest.mark.slow
def test_a_process_that_gives_up_takes_all_with_it_by_its_exit_code(scenarios):
    members = scenarios["gives up"]
    assert codes(members) == [2, 2, 2]
    for process in (0, 2):
        assert "process 1 of 3" in sentence(members[process])
        assert "gave up (no such file)" in sentence(members[process])


@pytest.mark.slow
def test_sys_exit_in_one_process_ends_all(scenarios):
    members = scenarios["exits"]
    assert codes(members) == [7, 7]
    assert "gave up (SystemExit: 7)" in sentence(members[1])


@pytest.mark.slow
def test_processes_that_do_not_come_are_waited_for_only_so_long(scenarios):
    (member,) = scenarios["others are missing"]
    assert codes([member]) == [1]
    assert "not all processes were there after 3 s" in sentence(member)


# --- in this process, which JAX already computes in ---


@pytest.fixture(autouse=True)
def no_signs(monkeypatch):
    for name in distributed.SIGNS:
        monkeypatch.delenv(name, raising=False)


def test_without_flags_and_signs_nothing_happens():
    with joined(ClusterConfig()) as membership:
        assert not membership.has_others
        assert membership.give_up("for this and that", 2) == 2
    assert not jax.distributed.is_initialized()


def test_a_single_process_passes_exceptions_on():
    with pytest.raises(ZeroDivisionError), joined(ClusterConfig()):
        _ = 1 / 0


def test_joining_too_late():
    assert jax.device_count()
    late = pytest.raises(ClusterError, match=r"cannot join the others: .*must be called before any JAX")
    with late, joined(ClusterConfig("localhost:1", 2, 0)):
        pass


def test_signs_of_a_cluster_in_which_jax_finds_none():
    program = "from rspo_jax.hosts.cluster import *\nwith joined(ClusterConfig()): print('joined')"
    for name in ("SLURM_STEP_NODELIST", "JOB_COMPLETION_INDEX"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=environment() | {name: "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert result.returncode == 1
        last = result.stderr.strip().splitlines()[-1]
        assert f"the environment has variables of {distributed.SIGNS[name]}, but JAX finds no cluster in it" in last
        assert f"give --cluster.coordinator, --cluster.num-processes and --cluster.process-id, or unset {name}" in last


def test_one_machine_with_tpus_may_be_alone():
    program = "from rspo_jax.hosts.cluster import *\nwith joined(ClusterConfig()) as m: print(m.has_others)"
    environ = environment() | {"TPU_ML_PLATFORM": "JAX"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SECONDS
    )
    assert (result.returncode, result.stdout) == (0, "False\n"), result.stderr


GIVEN = {"coordinator": "localhost:1234", "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coordinator": None}, "cluster.coordinator is missing: give coordinator, num_processes and process_id"),
        ({"num_processes": None}, "cluster.num_processes is missing"),
        ({"process_id": None}, "cluster.process_id is missing"),
        ({"num_processes": None, "process_id": None}, "cluster.num_processes is missing"),
        ({"coordinator": "localhost"}, "cluster.coordinator must be host:port, as in 10.0.0.2:8476, got 'localhost'"),
        ({"coordinator": ":1234"}, "must be host:port"),
        ({"coordinator": "localhost:"}, "must be host:port"),
        ({"coordinator": "localhost:http"}, "must be host:port"),
        ({"coordinator": "localhost:0"}, "must be host:port"),
        ({"coordinator": "localhost:65536"}, "must be host:port"),
        ({"coordinator": "http://localhost:1234"}, "must be host:port"),
        ({"process_id": 4}, "cluster.process_id must lie between 0 and num_processes − 1, got 4 with 4 processes"),
        ({"process_id": -1}, "cluster.process_id must lie between"),
        ({"num_processes": 0, "process_id": 0}, "cluster.process_id must lie between"),
        ({"heartbeat_timeout_seconds": 0}, "must be at least 1, got 0 and 300"),
        ({"initialization_timeout_seconds": 0}, "must be at least 1, got 45 and 0"),
    ],
    ids=str,
)
def test_mistakes_in_the_flags(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ClusterConfig(**(GIVEN | changes))


@pytest.mark.parametrize("coordinator", ["10.0.0.2:8476", "host-0.slice:8476", "[::1]:65535"])
def test_coordinators(coordinator):
    assert ClusterConfig(**(GIVEN | {"coordinator": coordinator})).coordinator == coordinator
