"""Turns SIGTERM and SIGINT into a flag that the training loop reads between steps, so that it can save and leave.

A second SIGINT interrupts at once, as usual. This file must never know what is being saved.
"""

import signal
from types import FrameType


class Preemption:
    """A context manager; `requested` becomes the name of the signal that asked to stop."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
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
