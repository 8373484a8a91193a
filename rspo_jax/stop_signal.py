"""Turns SIGTERM and SIGINT into a name that a loop looks at when it can stop. It must never know what is stopped."""

import signal
from types import FrameType
from typing import Self


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
