"""Turns SIGTERM and SIGINT into a flag that the training loop reads between steps, so that it can save and leave.

With several processes, a signal to any one of them stops all of them at the same step. What a cloud says before it
takes a machine away comes as SIGTERM: GKE sends it to the pods of a node that is drained, preempted or due for
maintenance, SLURM to the steps of a job that is preempted or (`--signal`) near its time limit, and an operating system
that shuts down to every process. This file must never know what is being saved.

Why not JAX's preemption sync point, `multihost_utils.reached_preemption_sync_point(step)`: it has no other source than
SIGTERM either, for which it takes the place of our handler; it knows no SIGINT; a signal that comes before its first
call is lost in a run that is resumed, as the agreed step is then counted from 0; and Orbax's CheckpointManager, which
calls it with step numbers of its own while it writes in the background, can move the agreed step into the past.
`rspo_jax.hosts.cluster` therefore switches JAX's service off.
"""

import signal
from types import FrameType
from typing import Self

from rspo_jax.hosts.agreement import Agreement


class StopSignal:
    """A context manager; `requested` becomes the name of the signal that asked this process to stop.

    A second SIGINT interrupts at once, as usual.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class Preemption(StopSignal):
    """A `StopSignal` of which all processes hear."""

    def __init__(self) -> None:
        super().__init__()
        self._agreement = Agreement("preemption")

    def agreed(self) -> str | None:
        """The name of a signal that asked any of the processes to stop; the same in all of them.

        To be called by every process at the same points of the program, and nowhere else. It waits for the other
        hosts to get there, but not for any device.
        """
        requests = self._agreement.gather(self.requested)
        return requests[min(requests)] if requests else None
