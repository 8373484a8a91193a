"""Files of rows, one JSON object a line, each with the phase and the step of a run that it belongs to.

A row is `{"phase": "rl", "step": 12, ...}`; phases come one after the other, and steps count up in each. A step has one
row, or several in files of which that is said. Such a file only grows, except when a run goes on from an earlier step:
then it is rolled back to that step first.
"""

import hashlib
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Literal, get_args

from etils import epath

from rspo_jax.records.files import replace_file, sync_folder
from rspo_jax.types import check_choice

Phase = Literal["warm_start", "rl"]
PHASES = get_args(Phase)
"""The phases of a run, in the order in which they happen."""
POSITION_NAMES = ("phase", "step")
_logger = logging.getLogger(__name__)


class DamagedRows(ValueError):
    """A file of rows that a run cannot go on with; the message names the file, the line and the way out."""


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


def read_rows(path: epath.Path, check: CheckValues, several: bool = False) -> list[tuple[bytes, dict[str, Any]]]:
    """Read each row as its line and its content, without a last line that was cut, which the log mentions.

    Args:
      path: the file.
      check: checks the values of each row.
      several: if True, a step may have several rows, one after the other.

    Raises:
      DamagedRows: if any other line is not a row, or rows are doubled or in a wrong order.
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
    places = [position(row["phase"], row["step"]) for _, row in rows]
    for number, (before, after) in enumerate(itertools.pairwise(places), 2):
        if after < before or (after == before and not several):
            what = "is there twice" if after in places[: number - 1] else f"comes after that of {_name(before)}"
            raise DamagedRows(
                f"{path}, line {number}: the row of {_name(after)} {what}; put the rows in order, or remove wrong ones"
            )
    return rows


def missing_rows(places: Sequence[tuple[int, int]], first_steps: Mapping[str, int]) -> str:
    """Return the steps between rows, or before the first of a phase, that have no row, in words.

    Args:
      places: the positions of all rows, in their order.
      first_steps: phase -> the step of its first row.

    Returns:
      As in "warm_start 3, rl 5 to 7"; empty if none is missing.
    """
    gaps = []
    for index, phase in enumerate(PHASES):
        steps = [first_steps[phase] - 1, *(step for at, step in places if at == index)]
        for before, after in itertools.pairwise(steps):
            if after > before + 1:
                last = f" to {after - 1}" if after > before + 2 else ""
                gaps.append(f"{phase} {before + 1}{last}")
    return ", ".join(gaps)


def _name(place: tuple[int, int]) -> str:
    return f"{PHASES[place[0]]} step {place[1]}"


def _parse(path: epath.Path, number: int, line: bytes, check: CheckValues) -> dict[str, Any]:
    try:
        row = json.loads(line)
        position(row["phase"], row["step"])
        check({name: value for name, value in row.items() if name not in POSITION_NAMES and value is not None})
    except (ValueError, TypeError, KeyError):
        raise DamagedRows(
            f"{path}, line {number} is not a row of {path.stem}: repair or remove the line {line[:80]!r}"
        ) from None
    return row


class RowFile:
    """A file of rows that grows in a folder of this machine; a run in a bucket copies it from there."""

    def __init__(self, path: epath.Path, check: CheckValues, several: bool = False) -> None:
        """Prepare the file; nothing is read or written yet.

        Args:
          path: the place of the file, in the run's folder or bucket.
          check: checks the values of each row that is read.
          several: if True, a step may have several rows.
        """
        self._path, self._check, self._several = path, check, several
        self._content = b""
        self._local: pathlib.Path | None = None
        self._file: IO[bytes] | None = None
        self._size = 0
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """The SHA-256 of all rows so far."""
        return self._digest.hexdigest()

    def refuse_old_rows(self) -> None:
        """Check that a new run may use the file.

        Raises:
          FileExistsError: if there are rows already.
        """
        if self._path.exists() and self._path.read_bytes():
            raise FileExistsError(f"{self._path} already holds a run: resume that run, or choose another folder")

    def check_rows(self) -> None:
        """Raise DamagedRows if a line is not a row, or rows are doubled or in a wrong order."""
        if self._path.exists():
            read_rows(self._path, self._check, self._several)

    def last_position(self) -> tuple[int, int] | None:
        """Return the position of the last row; None if there is none.

        Raises:
          DamagedRows: if a line is not a row, or rows are doubled or in a wrong order.
        """
        rows = read_rows(self._path, self._check, self._several) if self._path.exists() else []
        return position(rows[-1][1]["phase"], rows[-1][1]["step"]) if rows else None

    def roll_back(self, last: tuple[int, int]) -> list[tuple[int, int]]:
        """Remove the rows after a position from which a run goes on.

        Args:
          last: the position of the last row to keep.

        Returns:
          The positions of the rows that remain.

        Raises:
          DamagedRows: if a line is not a row, or rows are doubled or in a wrong order.
        """
        if not self._path.exists():
            return []
        rows = read_rows(self._path, self._check, self._several)
        places = [(line, position(row["phase"], row["step"])) for line, row in rows]
        kept = [(line, at) for line, at in places if at <= last]
        self._content = b"".join(line + b"\n" for line, _ in kept)
        self._digest.update(self._content)
        replace_file(self._path, self._content)
        return [at for _, at in kept]

    def open_in(self, folder: pathlib.Path, make: bool) -> None:
        """Choose the folder to write rows in.

        Args:
          folder: the run's own, or one that is copied to the run's bucket and gets the rows so far.
          make: if True, make the file now; otherwise its first row makes it.
        """
        self._local = folder / self._path.name
        if self._content and not self._local.exists():
            self._local.write_bytes(self._content)
        if make or self._content:
            self._open()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row that JSON can hold.

        Raises:
          DamagedRows: if the file has been moved, deleted or written to by something else; the row is not written.
        """
        file = self._file or self._open()
        assert self._local is not None
        try:
            there, opened = os.stat(self._local), os.fstat(file.fileno())
            untouched = os.path.samestat(there, opened) and there.st_size == self._size
        except FileNotFoundError:
            untouched = False
        if not untouched:
            raise DamagedRows(
                f"{self._local} was deleted, replaced or changed by something else while the run wrote to it: put it "
                "back as it was, and resume the run"
            )
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        file.write(line)
        file.flush()
        self._size += len(line)
        self._digest.update(line)

    def sync(self) -> None:
        """Wait until the rows are on the disk, so that a loss of power cannot undo them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._local = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        assert self._local is not None, f"{self._path} is closed"
        self._file = open(self._local, "ab")  # noqa: SIM115, closed by close()
        self._size = self._file.tell()
        sync_folder(self._local.parent)
        return self._file
