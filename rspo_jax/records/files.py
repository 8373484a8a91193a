"""Files of a run, in a folder or in a bucket (gs://): paths, whole-file writes, and files that grow.

A bucket can neither rename nor append; it replaces a whole object at once.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Self

import fsspec
from etils import epath

FilePath = str | os.PathLike[str]

_logger = logging.getLogger(__name__)


def as_path(place: FilePath) -> epath.Path:
    """Return a path that reads and writes at a place.

    Args:
      place: a folder or file, or an address that starts with gs://.

    Raises:
      ValueError: if `place` is an address that cannot be written to.
    """
    text = os.fspath(place)
    if re.match(r"\w\w+:/(?!/)", text):
        raise ValueError(f"{text} was an address until pathlib took a slash: pass it as text, or as etils.epath.Path")
    if "://" in text and not text.startswith("gs://"):
        raise ValueError(f"a run is kept in a folder or under gs://, not under {text}: mount that place as a folder")
    path = epath.Path(text)
    if is_bucket(path):
        try:
            fsspec.get_filesystem_class("gcs")
        except ImportError as error:
            if importlib.util.find_spec("tensorflow") is None:  # which etils tries first
                raise ValueError(f"{text} is in a bucket, which needs another package: install gcsfs") from error
    return path


def is_bucket(path: epath.Path) -> bool:
    """Return whether a path is in a bucket, which can neither rename at once nor append."""
    return os.fspath(path).startswith("gs://")


def replace_file(path: FilePath, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Args:
      path: the file, in a folder that exists, or in a bucket.
      content: all of its bytes.
    """
    path = as_path(path)
    if is_bucket(path):
        path.write_bytes(content)  # an object appears once all of it has arrived
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: renaming is atomic only within one
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_leftover(path: FilePath) -> bool:
    """Return whether a path is named as `replace_file` names a file that it has not finished."""
    return re.fullmatch(r"\..+\.\d+\.tmp", as_path(path).name) is not None


def sync_folder(path: FilePath) -> None:
    """Wait until the names in a folder are on the disk, so that a loss of power cannot undo them, where it can be."""
    with contextlib.suppress(OSError):  # some file systems do this by themselves, and refuse
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class GrowingFiles:
    """A folder to append to files in: `target` itself, or for a bucket a folder on this machine that is copied there.

    Files are copied whole. Copying takes at most a twentieth of the time, and happens at most once a second, the limit
    of Google Cloud Storage for one object. Rows that are not copied yet are lost with the machine, so call `copy` where
    that matters.
    """

    _SHARE = 1 / 20
    _PAUSE_SECONDS = 1.0

    def __init__(self, target: epath.Path, check: Callable[[], object] = lambda: None) -> None:
        """Choose the folder to append in.

        Args:
          target: the folder or the address.
          check: called before files are copied; raises an error if this process must not write to `target`.
        """
        self._target, self._check = target, check
        self._copied: dict[str, tuple[int, int]] = {}
        """Name of each file -> its size and its time of change when it was last copied."""
        self._not_before = 0.0
        self._temporary = tempfile.mkdtemp(prefix="rspo_jax-") if is_bucket(target) else None
        self.folder = pathlib.Path(self._temporary or os.fspath(target))

    def copy_soon(self) -> None:
        """Copy the files that have changed if it is time to; a failure is logged, and tried again later."""
        if time.monotonic() < self._not_before:
            return
        try:
            self.copy()
        except Exception as error:  # each way to a bucket has errors of its own
            _logger.warning("%s could not be written to; the next attempt follows: %s", self._target, error)
            self._not_before = time.monotonic() + self._PAUSE_SECONDS

    def copy(self) -> None:
        """Copy the files that have changed, now."""
        if self._temporary is None:
            return
        self._check()
        started = time.monotonic()
        for file in sorted(self.folder.rglob("*")):
            if not file.is_file():
                continue
            name, state = file.relative_to(self.folder).as_posix(), file.stat()
            version = state.st_size, state.st_mtime_ns
            if self._copied.get(name) != version:
                (self._target / name).write_bytes(file.read_bytes())
                self._copied[name] = version
        now = time.monotonic()
        self._not_before = now + max(self._PAUSE_SECONDS, (now - started) / self._SHARE)

    def close(self) -> None:
        """Copy the files that have changed, and remove a temporary folder; a second call does nothing."""
        if self._temporary is None:
            return
        try:
            self.copy()
        except Exception as error:
            error.add_note(f"The files that could not be copied are still in {self._temporary}.")
            raise
        shutil.rmtree(self._temporary)
        self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
