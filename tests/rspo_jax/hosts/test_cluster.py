"""Clusters of real processes on this machine: they join, and all of them end when one does. Every scenario is started
once, all of them at the same time, and each process then plays its part in it."""

import os
import re
import signal
import socket

import jax
import pytest
from support.processes import SECONDS, Member, free_port

from rspo_jax.hosts import ClusterConfig, ClusterError, joined
from rspo_jax.hosts.cluster import SIGNS

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


def environment(**signs):
    return {name: value for name, value in os.environ.items() if name not in SIGNS} | signs


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """The processes of each scenario, once all but a stopped one have ended."""
    logs = tmp_path_factory.mktemp("logs")
    started, signless = {}, environment()
    try:
        for scenario, processes in PROCESSES.items():
            port = free_port()
            started[scenario] = [
                Member(
                    logs / f"{scenario}-{process}", MEMBER, *(scenario, process, processes, port), environment=signless
                )
                for process in range(1 if scenario == "others are missing" else processes)
            ]
        for scenario, members in started.items():
            for member in members[:1] if scenario == "hangs" else members:
                member.wait()
        yield started
    finally:
        for members in started.values():
            for member in members:
                member.kill()


def codes(members):
    return [member.code for member in members]


def sentence(member):
    """Return the one sentence with which a member reports the end of another."""
    (line,) = re.findall("^error: .*$", member.errors, re.MULTILINE)
    return line


@pytest.mark.slow
def test_processes_join_and_leave_together(scenarios):
    members = scenarios["leaves"]
    assert codes(members) == [0, 0]
    for process, member in enumerate(members):
        assert f"process {process} of 2 False" in member.printed  # SIGTERM is ours: see preemption.py
        assert member.printed.endswith("left in good order\n")


@pytest.mark.slow
def test_a_cluster_of_one(scenarios):
    (member,) = scenarios["alone"]
    assert codes([member]) == [0]
    assert "process 0 of 1" in member.printed


@pytest.mark.slow
def test_the_death_of_a_process_ends_the_others_with_a_sentence(scenarios):
    members = scenarios["dies"]
    assert codes(members) == [1, 1, -signal.SIGKILL]
    for process in (0, 1):
        assert sentence(members[process]) == (
            f"error: process 2 of 3, on {socket.gethostname()}, died, and the run cannot go on without it: "
            f"process {process} stops too. To continue from the newest checkpoint, {WAY_OUT}."
        )


@pytest.mark.slow
def test_the_death_of_process_0_does_so_too(scenarios):
    members = scenarios["process 0 dies"]
    assert members[0].code == -signal.SIGKILL
    for process in (1, 2):
        assert members[process].code != 0
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
    assert "Terminating process because the JAX distributed service detected fatal errors" in survivor.errors
    assert re.search(r"unhealthy \(stopped sending heartbeats\):\n1\n", survivor.errors)


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_and_is_told_to_all(scenarios):
    other, guilty = scenarios["raises"]
    assert codes([other, guilty]) == [1, 1]
    assert "process 1 of 2" in sentence(other)
    assert "gave up (ValueError: a bad row)" in sentence(other)
    assert "Traceback" in guilty.errors
    assert guilty.errors.endswith("ValueError: a bad row\n")


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
    assert "not all processes had joined after 3 s" in sentence(member)


# --- in this process, which JAX already computes in ---


@pytest.fixture(autouse=True)
def no_signs(monkeypatch):
    for name in SIGNS:
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


JOIN = "from rspo_jax.hosts import ClusterConfig, joined\nwith joined(ClusterConfig()) as m: print(m.has_others)"


def test_signs_of_a_cluster_in_which_jax_finds_none(tmp_path):
    names = ("SLURM_STEP_NODELIST", "JOB_COMPLETION_INDEX")
    members = [Member(tmp_path / name, JOIN, environment=environment(**{name: "1"})) for name in names]
    for name, member in zip(names, members, strict=True):
        assert member.wait() == 1
        last = member.errors.strip().splitlines()[-1]
        assert f"the environment has variables set by {SIGNS[name]}, but JAX finds no cluster in them" in last
        assert f"give --cluster.coordinator, --cluster.num-processes and --cluster.process-id, or unset {name}" in last


def test_one_machine_with_tpus_may_be_alone(tmp_path):
    member = Member(tmp_path / "log", JOIN, environment=environment(TPU_ML_PLATFORM="JAX"))
    assert (member.wait(), member.printed) == (0, "False\n"), member.errors


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
