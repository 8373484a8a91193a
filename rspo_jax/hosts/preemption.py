"""SIGTERM and SIGINT as a flag that a loop reads between steps, so that it can save and leave.

With several processes, a signal to any one of them stops all of them at the same step. A machine that is about to be
taken away announces it by SIGTERM: GKE sends one to the pods of a node that is drained, preempted or due for
maintenance, SLURM to the steps of a job that is preempted or (`--signal`) near its time limit, and an operating system
to every process when it shuts down.

JAX's preemption sync point, `multihost_utils.reached_preemption_sync_point(step)`, would not do: SIGTERM is its only
source too, and it takes our handler's place there; it ignores SIGINT; in a resumed run it loses a signal that comes
before its first call, as it then counts the agreed step from 0; and Orbax's CheckpointManager, which calls it with step
numbers of its own while it writes in the background, can move the agreed step into the past. `rspo_jax.hosts.cluster`
therefore switches JAX's service off.
"""

import signal
import threading
from types import FrameType
from typing import Self

from rspo_jax.hosts.agreement import Agreement


class StopSignal:
    """A context manager that catches SIGTERM and SIGINT; `requested` becomes the name of the signal.

    A SIGINT after that interrupts at once, as usual. Outside the main thread signals cannot be caught, and none is.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT) if in_main_thread else ():
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
    """A `StopSignal` that all processes of a run agree on."""

    def __init__(self) -> None:
        super().__init__()
        self._agreement = Agreement("preemption")

    def agreed(self) -> str | None:
        """Return the name of a signal that any process has received, the same in all of them, or None.

        Every process must call this at the same points of the program, and nowhere else. It waits for the other hosts
        to get there, but not for any device.
        """
        requests = self._agreement.gather(self.requested)
        return requests[min(requests)] if requests else None
