"""Files of rows, one JSON object a line, each with the phase and the step of a run that it belongs to.

A row is `{"phase": "rl", "step": 12, ...}`; phases come one after the other, and steps count from 1 in each. Such a
file only grows, except when a run goes on from an earlier step: then it is rolled back to that step first.
"""

import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import IO, Any, Literal, get_args

from etils import epath

from rspo_jax.records.files import replace_file
from rspo_jax.types import check_choice

Phase = Literal["warm_start", "rl"]
PHASES = get_args(Phase)
"""The phases of a run, in the order in which they happen."""
POSITION_NAMES = ("phase", "step")
_logger = logging.getLogger(__name__)

CheckValues = Callable[[Mapping[str, Any]], Any]
"""A function that raises ValueError or TypeError for values that a row cannot hold beside its position."""


def position(phase: str, step: int) -> tuple[int, int]:
    """Return the place of a row in a run; places are ordered as the run is.

    Raises:
      ValueError: if the phase is unknown, or the step is not an int from 0.
    """
    check_choice("phase", phase, Phase)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be a Python int from 0, got {step!r}")
    return PHASES.index(phase), step


def read_rows(path: epath.Path, check: CheckValues) -> list[tuple[bytes, dict[str, Any]]]:
    """Read each row as its line and its content, without a last line that was cut, which the log mentions.

    Args:
      path: the file.
      check: checks the values of each row.

    Raises:
      ValueError: if any other line is not a row.
    """
    *lines, last = path.read_bytes().split(b"\n")
    rows = [(line, _parse(path, number, line, check)) for number, line in enumerate(lines, 1)]
    if last:  # the newline is written last, so a line without one may have been cut
        try:
            json.loads(last)
        except ValueError:
            _logger.warning("%s: dropped the last line, which was cut while it was written.", path)
        else:
            rows.append((last, _parse(path, len(lines) + 1, last, check)))
    return rows


def _parse(path: epath.Path, number: int, line: bytes, check: CheckValues) -> dict[str, Any]:
    try:
        row = json.loads(line)
        position(row["phase"], row["step"])
        check({name: value for name, value in row.items() if name not in POSITION_NAMES and value is not None})
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path}, line {number} is not a row of {path.stem}: repair or remove the line {line[:80]!r}"
        ) from None
    return row


class RowFile:
    """A file of rows that grows in a folder of this machine; a run in a bucket copies it from there."""

    def __init__(self, path: epath.Path, check: CheckValues) -> None:
        """Prepare the file; nothing is read or written yet.

        Args:
          path: the place of the file, in the run's folder or bucket.
          check: checks the values of each row that is read.
        """
        self._path, self._check = path, check
        self._content = b""
        self._local: pathlib.Path | None = None
        self._file: IO[bytes] | None = None

    def refuse_old_rows(self) -> None:
        """Check that a new run may use the file.

        Raises:
          FileExistsError: if there are rows already.
        """
        if self._path.exists() and self._path.read_bytes():
            raise FileExistsError(f"{self._path} already holds a run: resume that run, or choose another folder")

    def roll_back(self, last: tuple[int, int]) -> tuple[int, int] | None:
        """Remove the rows after a position from which a run goes on.

        Args:
          last: the position of the last row to keep.

        Returns:
          The position of the last row that remains, or None if there is none.

        Raises:
          ValueError: if a line is not a row.
        """
        if not self._path.exists():
            return None
        rows = [(line, position(row["phase"], row["step"])) for line, row in read_rows(self._path, self._check)]
        kept = [(line, at) for line, at in rows if at <= last]
        self._content = b"".join(line + b"\n" for line, _ in kept)
        replace_file(self._path, self._content)
        return kept[-1][1] if kept else None

    def open_in(self, folder: pathlib.Path, make: bool) -> None:
        """Choose the folder to write rows in.

        Args:
          folder: the run's own, or one that is copied to the run's bucket and gets the rows so far.
          make: if True, make the file now; otherwise its first row makes it.
        """
        self._local = folder / self._path.name
        if self._content and not self._local.exists():
            self._local.write_bytes(self._content)
        if make:
            self._file = open(self._local, "ab")  # noqa: SIM115, closed by close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row that JSON can hold."""
        assert self._local is not None, f"{self._path} is closed"
        if self._file is None:
            self._file = open(self._local, "ab")  # noqa: SIM115, closed by close()
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._local = None
        if self._file is not None:
            self._file.close()
            self._file = None
