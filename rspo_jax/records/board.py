"""Event files of TensorBoard, written at once and in the caller's thread.

The SummaryWriter of tensorboardX hands its events to a thread, which ends at the first error: on a full disk, the run
would then wait for ever to hand it the next event. It also flushes by the clock of the wall, which may jump.
"""

import pathlib
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

_FLUSH_SECONDS = 2.0


class Board:
    """An event file in a folder of TensorBoard."""

    def __init__(self, folder: pathlib.Path, number: int, purge_step: int | None = None) -> None:
        """Open the file.

        Args:
          folder: a folder of this machine, which is made if it does not exist.
          number: part of the file's name, to tell files of the same second apart.
          purge_step: hide the points of earlier files in the folder from this step on.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._flush_at = time.monotonic()
        self._events = EventsWriter(str(folder / "events"), f".{number:04d}")
        if purge_step is not None:
            # TensorBoard looks for a restart in files that tell their version.
            self._events.write_event(Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"))
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers by tag; they can be seen after two seconds at most, or with the next ones."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if time.monotonic() >= self._flush_at:
            self.sync()

    def sync(self) -> None:
        """Wait until all events are on the disk."""
        self._events.flush()
        self._flush_at = time.monotonic() + _FLUSH_SECONDS

    def close(self) -> None:
        """Close the file."""
        self._events.close()
