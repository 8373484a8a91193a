"""Files of a run, in a folder or in a bucket (gs://): paths, whole-file writes, and files that grow.

A bucket knows no renaming and no appending; it replaces an object whole, at once. This file must never know what is
in the files, and nothing of JAX.
"""

import importlib.util
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
from typing import Self

import fsspec
from etils import epath

FilePath = str | os.PathLike[str]

_logger = logging.getLogger(__name__)


def as_path(place: FilePath) -> epath.Path:
    """A path that reads and writes where `place` is: a folder or file, or an address that starts with gs://.

    Raises:
      ValueError: if `place` is an address that cannot be written to.
    """
    text = os.fspath(place)
    if re.match(r"\w\w+:/(?!/)", text):
        raise ValueError(f"{text} was an address until pathlib took a slash: pass it as text, or as etils.epath.Path")
    if "://" in text and not text.startswith("gs://"):
        raise ValueError(f"a run is kept in a folder or under gs://, not under {text}: mount that place as a folder")
    path = epath.Path(text)
    if is_bucket(path) and not _can_reach_buckets():
        raise ValueError(f"{text} is in a bucket, and the package that reaches buckets is missing: install gcsfs")
    return path


def is_bucket(path: epath.Path) -> bool:
    """Whether a path is in a bucket, where nothing can be renamed at once or appended to."""
    return os.fspath(path).startswith("gs://")


def _can_reach_buckets() -> bool:
    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError:
        return importlib.util.find_spec("tensorflow") is not None  # which etils takes first
    return True


def replace_file(path: FilePath, content: bytes) -> None:
    """Writes a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

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


class GrowingFiles:
    """A folder to append to files in: `target` itself, or for a bucket a folder on this machine that is copied there.

    Files are copied whole, as often as takes at most a twentieth of the time, and at most once a second, which is what
    Google Cloud Storage allows for one object. What is not copied yet is lost with the machine: `copy` where that
    matters.
    """

    _SHARE = 1 / 20
    _PAUSE_SECONDS = 1.0

    def __init__(self, target: epath.Path) -> None:
        self._target = target
        self._copied: dict[str, tuple[int, int]] = {}
        """Size and time of change of each file when it was last copied."""
        self._not_before = 0.0
        self._temporary = tempfile.mkdtemp(prefix="rspo_jax-") if is_bucket(target) else None
        self.folder = pathlib.Path(self._temporary or os.fspath(target))

    def copy_soon(self) -> None:
        """Copies what has changed if it is time to; where that fails it is said, and tried again later."""
        if time.monotonic() < self._not_before:
            return
        try:
            self.copy()
        except Exception as error:  # each way to a bucket has errors of its own
            _logger.warning("%s could not be written to, and will be once more: %s", self._target, error)
            self._not_before = time.monotonic() + self._PAUSE_SECONDS

    def copy(self) -> None:
        """Copies what has changed, now."""
        if self._temporary is None:
            return
        started = time.monotonic()
        for file in sorted(self.folder.rglob("*")):
            if file.is_file():
                self._copy_if_changed(file)
        now = time.monotonic()
        self._not_before = now + max(self._PAUSE_SECONDS, (now - started) / self._SHARE)

    def close(self) -> None:
        """Copies what has changed and removes the folder if it was temporary; a second call does nothing."""
        if self._temporary is None:
            return
        try:
            self.copy()
        except Exception as error:
            error.add_note(f"What could not be copied is still in {self._temporary}.")
            raise
        shutil.rmtree(self._temporary)
        self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy_if_changed(self, file: pathlib.Path) -> None:
        name, state = file.relative_to(self.folder).as_posix(), file.stat()
        version = state.st_size, state.st_mtime_ns
        if self._copied.get(name) != version:
            (self._target / name).write_bytes(file.read_bytes())
            self._copied[name] = version
