"""Starts one program on many hosts, and ends all of its processes when one of them ends.

JAX finds the cluster in the environment of Cloud TPU, GKE, SLURM and Open MPI; elsewhere three flags name it. Beside
JAX's own heartbeats, which end a process by an abort and a stack trace, a lifeline says in one sentence who died. This
file must never know what the processes compute.
"""

import contextlib
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

# The only door to the coordinator's address and to its key-value store; Orbax uses it as well.
from jax._src import distributed

from rspo_jax.hosts import lifeline
from rspo_jax.hosts.lifeline import Lifeline, Loss

SIGNS = {
    "JAX_COORDINATOR_ADDRESS": "JAX",
    "TPU_ML_PLATFORM": "Cloud TPU",  # JAX itself sets it where it finds chips and libtpu
    "TPU_WORKER_HOSTNAMES": "Cloud TPU on GKE",
    "TPU_PROCESS_ADDRESSES": "Cloud TPU on GKE",
    "SLURM_STEP_NODELIST": "SLURM",
    "OMPI_MCA_orte_hnp_uri": "Open MPI",
    "JOB_COMPLETION_INDEX": "Kubernetes",
}
"""Variables of the environment in which JAX can find a cluster, and who sets them."""
_MAY_BE_ALONE = {"Cloud TPU", "Cloud TPU on GKE"}
_LIFELINE_SECONDS = 60
_LIFELINE_KEY = "rspo_jax/lifeline"
_SECOND_THOUGHT_SECONDS = 3
"""How long an error waits for word that another process died, which would explain it."""
_SHUTDOWN_SECONDS = 600


class ClusterError(RuntimeError):
    """This process cannot join the others; the message says what to change."""


@dataclass(frozen=True)
class ClusterConfig:
    """The processes of the run. On Cloud TPU, GKE, SLURM and Open MPI the environment says it all; elsewhere give the
    first three to every process, or none of them for a single one."""

    coordinator: str | None = None
    """host:port of process 0, as the others reach it; any port that is free there."""
    num_processes: int | None = None
    process_id: int | None = None
    """Of this process: 0, 1, ... num_processes − 1."""
    heartbeat_timeout_seconds: int = 45
    """Without a sign of life a process is dead after this time; most deaths are noticed at once."""
    initialization_timeout_seconds: int = 300
    """How long processes wait for one another at the start."""

    def __post_init__(self) -> None:
        given = {
            "coordinator": self.coordinator,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(
                f"cluster.{missing[0]} is missing: give coordinator, num_processes and process_id together, or none of "
                "them where the environment names the cluster"
            )
        if self.heartbeat_timeout_seconds < 1 or self.initialization_timeout_seconds < 1:
            raise ValueError(
                "heartbeat_timeout_seconds and initialization_timeout_seconds must be at least 1, got "
                f"{self.heartbeat_timeout_seconds} and {self.initialization_timeout_seconds}"
            )
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or "/" in host or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 2**16:
            raise ValueError(f"cluster.coordinator must be host:port, as in 10.0.0.2:8476, got {self.coordinator!r}")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"cluster.process_id must lie between 0 and num_processes − 1, got {self.process_id} with "
                f"{self.num_processes} processes"
            )


class Membership:
    """This process's place among the others."""

    def __init__(self, own_lifeline: Lifeline | None) -> None:
        self._lifeline = own_lifeline

    @property
    def has_others(self) -> bool:
        return self._lifeline is not None

    def give_up(self, reason: str, code: int) -> int:
        """Ends this process and, telling them why, all others. Returns `code` where there are no others.

        An ordinary exit would not do: it waits for the others, which wait for this one in a collective operation.
        """
        if self._lifeline is not None:
            self._lifeline.give_up(reason, code)
            _exit(code)
        return code

    def leave(self) -> None:
        """Waits until all processes do so, and lets go of them."""
        if self._lifeline is not None:
            jax.distributed.shutdown()
            self._lifeline.leave()


@contextlib.contextmanager
def joined(config: ClusterConfig, way_out: str = "start all processes again") -> Iterator[Membership]:
    """Joins the other processes, if any, for the time of a `with` block; all of them leave it together.

    To be entered before JAX computes anything or lists its devices. Without flags and without a sign of a cluster in
    the environment this is a single process, and nothing happens. An exception that leaves the block in one process
    ends all, as does the death of any. Where a process dies, by a signal, with its machine, or of an error, the others
    say on stderr which one it was, and exit with a code that is not 0:

    * at once if it was the process, as the kernel then closes its connection;
    * within about 25 s if it was the machine or the network, by TCP's own probes;
    * within `heartbeat_timeout_seconds` if it hangs as a whole (SIGSTOP). This is JAX's own heartbeat: the exit code
      is 134 (SIGABRT), and what is on stderr is a stack trace under "Terminating process because the JAX distributed
      service detected fatal errors", which names the process as "Task 1 heartbeat timeout".

    A process that computes for ever is not noticed.

    Args:
      config: which processes.
      way_out: what to do after a loss, as the end of a sentence.

    Raises:
      ClusterError: if this process cannot join.
    """
    membership = Membership(_join(config, way_out))
    try:
        yield membership
    except BaseException as error:
        code = _exit_code(error)
        if code and membership.has_others:
            time.sleep(_SECOND_THOUGHT_SECONDS)  # where another one died, the lifeline ends this process meanwhile
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            membership.give_up(f"{type(error).__name__}: {error}", code)
        membership.leave()
        raise
    membership.leave()


def _join(config: ClusterConfig, way_out: str) -> Lifeline | None:
    """Joins, by flags or by the environment; the lifeline to the other processes, or None if there are none."""
    by_flags = config.coordinator is not None
    setters = {setter for name, setter in SIGNS.items() if os.environ.get(name)}
    if not (by_flags or setters):
        return None
    # Else JAX would take SIGTERM for itself; see rspo_jax/preemption.py.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(config.initialization_timeout_seconds, _say_that_others_are_missing, (config,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if by_flags else None,
            # JAX ends the process by an abort after this time, so it comes after our own sentence.
            initialization_timeout=config.initialization_timeout_seconds + 30,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if setters <= _MAY_BE_ALONE and "coordinator_address" in str(error):
            return None
        raise ClusterError(
            f"the environment has variables of {', '.join(sorted(setters))}, but JAX finds no cluster in it ({error}): "
            "give --cluster.coordinator, --cluster.num-processes and --cluster.process-id, or unset "
            + ", ".join(name for name in SIGNS if os.environ.get(name))
        ) from error
    except RuntimeError as error:
        raise ClusterError(f"this process cannot join the others: {error}") from error
    finally:
        late.cancel()
    return _open_lifeline(way_out)


def _open_lifeline(way_out: str) -> Lifeline | None:
    state: Any = distributed.global_state
    processes, process = state.num_processes, state.process_id
    if processes == 1:
        return None

    def stop(loss: Loss) -> None:
        what = "died" if loss.reason is None else f"gave up ({loss.reason})"
        _say(
            f"process {loss.process} of {processes}, on {loss.host}, {what}, and the run cannot go on without it: "
            f"process {process} stops too. To go on from the newest checkpoint, {way_out}."
        )
        _exit(loss.code)

    try:
        peers = _meet(state)
    except OSError as error:
        _say(
            f"process {process} has no connection to process 0 of its own ({error}): a death is noticed by JAX's "
            "heartbeat only. Let the processes reach all ports of one another."
        )
        return Lifeline(process, {}, stop)
    absent = sorted(set(range(processes)) - {process} - set(peers)) if process == 0 else []
    if absent:
        _say(f"processes {absent} have no connection to process 0 of their own: JAX's heartbeat alone watches them.")
    return Lifeline(process, peers, stop)


def _meet(state: Any) -> dict[int, tuple[str, socket.socket]]:
    """The connections of the lifeline: by a port that process 0 tells the others through JAX's key-value store."""
    if state.process_id == 0:
        listener, token = lifeline.open_listener(), secrets.token_hex()
        state.client.key_value_set(_LIFELINE_KEY, f"{listener.getsockname()[1]} {token}")
        return lifeline.accept(listener, state.num_processes, token, _LIFELINE_SECONDS)
    port, token = state.client.blocking_key_value_get(_LIFELINE_KEY, 1000 * _LIFELINE_SECONDS).split()
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    return lifeline.connect(host, int(port), state.process_id, token, _LIFELINE_SECONDS)


def _say_that_others_are_missing(config: ClusterConfig) -> None:
    _say(
        f"not all processes were there after {config.initialization_timeout_seconds} s: start all of them at about the "
        "same time, with one coordinator that each can reach, or raise --cluster.initialization-timeout-seconds."
    )
    _exit(1)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def _say(sentence: str) -> None:
    """One write, past all buffers: the main thread may be holding their locks."""
    os.write(2, f"error: {sentence}\n".encode())


def _exit(code: int) -> None:
    """Ends the process whatever its other threads are waiting for."""
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flush.start()
    flush.join(1.0)
    os._exit(code)
