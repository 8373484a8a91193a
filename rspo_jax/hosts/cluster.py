"""One program on many hosts: its processes join at the start, and all of them end when one does.

JAX finds the cluster in the environment of Cloud TPU, GKE, SLURM and Open MPI; elsewhere three flags describe it. JAX's
own heartbeats end a process by an abort and a stack trace, so a lifeline beside them says in one sentence which process
died.
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

# JAX offers no public access to the coordinator's address and key-value store; Orbax takes this way as well.
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
"""Environment variables in which JAX can find a cluster -> the system that sets them."""
_MAY_BE_ALONE = {"Cloud TPU", "Cloud TPU on GKE"}
"""Systems that set their variables for a single process, too."""
_LIFELINE_SECONDS = 60
_LIFELINE_KEY = "rspo_jax/lifeline"
_SECOND_THOUGHT_SECONDS = 3
"""Time that an error waits for news of another process's death, which would explain it."""
_SHUTDOWN_SECONDS = 600


class ClusterError(RuntimeError):
    """This process cannot join the others; the message names the way out."""


@dataclass(frozen=True)
class ClusterConfig:
    """The processes of the run. On Cloud TPU, GKE, SLURM and Open MPI the environment describes them; elsewhere give
    the first three options to every process, or none of them for a single process."""

    coordinator: str | None = None
    """host:port of process 0, as the others reach it; any port that is free there."""
    num_processes: int | None = None
    process_id: int | None = None
    """Index of this process: 0, 1, ... num_processes − 1."""
    heartbeat_timeout_seconds: int = 45
    """A process that gives no sign of life for this time is taken for dead; most deaths are noticed at once."""
    initialization_timeout_seconds: int = 300
    """Time that processes wait for one another at the start."""

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
                "them where the environment describes the cluster"
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
    """The tie of this process to the others, if there are any."""

    def __init__(self, own_lifeline: Lifeline | None) -> None:
        self._lifeline = own_lifeline

    @property
    def has_others(self) -> bool:
        return self._lifeline is not None

    def give_up(self, reason: str, code: int) -> int:
        """End this process and, telling them the reason, all others; without others, return `code`.

        An ordinary exit would hang: it waits for the others, which wait for this one in a collective operation.
        """
        if self._lifeline is not None:
            self._lifeline.give_up(reason, code)
            _exit(code)
        return code

    def leave(self) -> None:
        """Part from the other processes once all of them leave."""
        if self._lifeline is not None:
            jax.distributed.shutdown()
            self._lifeline.leave()


@contextlib.contextmanager
def joined(config: ClusterConfig, way_out: str = "start all processes again") -> Iterator[Membership]:
    """Join the other processes, if any, for the duration of a `with` block, which all of them leave together.

    Enter it before JAX computes anything or lists its devices. Without flags and without signs of a cluster in the
    environment this is a single process, and nothing happens. An exception that leaves the block in one process ends
    all, as does the death of any. When a process dies by a signal, with its machine, or of an error, the others name it
    on stderr and exit with a code other than 0:

    * at once if the process died, as the kernel then closes its connection;
    * within about 25 s if the machine or the network failed, by TCP's own probes;
    * within `heartbeat_timeout_seconds` if the whole process hangs (SIGSTOP). This is JAX's own heartbeat: the exit
      code is 134 (SIGABRT), and stderr holds a stack trace under "Terminating process because the JAX distributed
      service detected fatal errors", which names the process as "Task 1 heartbeat timeout".

    A process that computes for ever is not noticed.

    Args:
      config: the processes.
      way_out: the advice after a loss, as the end of a sentence.

    Raises:
      ClusterError: if this process cannot join.
    """
    membership = Membership(_join(config, way_out))
    try:
        yield membership
    except BaseException as error:
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and membership.has_others:
            time.sleep(_SECOND_THOUGHT_SECONDS)  # if another process died, the lifeline ends this one meanwhile
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            membership.give_up(f"{type(error).__name__}: {error}", code)
        membership.leave()
        raise
    membership.leave()


def _join(config: ClusterConfig, way_out: str) -> Lifeline | None:
    """Join by flags or by the environment; return the lifeline to the other processes, or None without any."""
    by_flags = config.coordinator is not None
    setters = {setter for name, setter in SIGNS.items() if os.environ.get(name)}
    if not (by_flags or setters):
        return None
    # Otherwise JAX would take SIGTERM for itself; see rspo_jax/hosts/preemption.py.
    jax.config.update("jax_enable_preemption_service", False)

    def stop_waiting() -> None:
        _print_error(
            f"not all processes had joined after {config.initialization_timeout_seconds} s: start all of them at about "
            "the same time, with a coordinator that each of them can reach, or raise "
            "--cluster.initialization-timeout-seconds."
        )
        _exit(1)

    late = threading.Timer(config.initialization_timeout_seconds, stop_waiting)
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if by_flags else None,
            # After this time JAX aborts the process, so it has to be later than our own sentence.
            initialization_timeout=config.initialization_timeout_seconds + 30,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if setters <= _MAY_BE_ALONE and "coordinator_address" in str(error):
            return None
        raise ClusterError(
            f"the environment has variables set by {', '.join(sorted(setters))}, but JAX finds no cluster in them "
            f"({error}): give --cluster.coordinator, --cluster.num-processes and --cluster.process-id, or unset "
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
        event = "died" if loss.reason is None else f"gave up ({loss.reason})"
        _print_error(
            f"process {loss.process} of {processes}, on {loss.host}, {event}, and the run cannot go on without it: "
            f"process {process} stops too. To continue from the newest checkpoint, {way_out}."
        )
        _exit(loss.code)

    try:
        peers = _meet(state)
    except OSError as error:
        _print_error(
            f"process {process} could not open its own connection to process 0 ({error}), so only JAX's heartbeat "
            "notices a death. Let the processes reach one another on all ports."
        )
        return Lifeline(process, {}, stop)
    absent = sorted(set(range(processes)) - {process} - set(peers)) if process == 0 else []
    if absent:
        _print_error(f"processes {absent} opened no connection of their own, so only JAX's heartbeat watches them.")
    return Lifeline(process, peers, stop)


def _meet(state: Any) -> dict[int, tuple[str, socket.socket]]:
    """Open the connections of the lifeline, at a port that process 0 announces in JAX's key-value store."""
    if state.process_id == 0:
        listener, token = lifeline.open_listener(), secrets.token_hex()
        state.client.key_value_set(_LIFELINE_KEY, f"{listener.getsockname()[1]} {token}")
        return lifeline.accept(listener, state.num_processes, token, _LIFELINE_SECONDS)
    port, token = state.client.blocking_key_value_get(_LIFELINE_KEY, 1000 * _LIFELINE_SECONDS).split()
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    return lifeline.connect(host, int(port), state.process_id, token, _LIFELINE_SECONDS)


def _print_error(sentence: str) -> None:
    """Print to stderr in a single write past all buffers, whose locks the main thread may hold."""
    os.write(2, f"error: {sentence}\n".encode())


def _exit(code: int) -> None:
    """End the process, whatever its other threads are waiting for."""
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flush.start()
    flush.join(1.0)
    os._exit(code)
