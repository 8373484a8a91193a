"""Checkpoints of a training run, from which it goes on bit for bit, or not at all.

All processes of a run save and restore together. Orbax writes each process's parts of the arrays in the background. A
manifest with their names, shapes, dtypes and fingerprints joins them, and one last act completes the checkpoint: it
gets its final name or, in a bucket, a file that marks it as complete. Thus a process killed at any moment leaves the
old checkpoint or the new one, and nothing is handed back that disagrees with its manifest.

Orbax's own CheckpointManager does not serve here: it returns arrays with flipped bits without an error (measured with
version 0.12: 19 of 20 flips in a data file), and when a checkpoint cannot be read it raises an error instead of falling
back, in all processes alike, to the checkpoint before.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rspo_jax.hosts import Agreement, is_primary
from rspo_jax.records.files import FilePath, as_path, is_bucket, replace_file
from rspo_jax.records.lock import LockLost
from rspo_jax.records.manifest import (
    CheckpointMismatch,
    Damage,
    check_contents,
    check_fit,
    check_metadata,
    check_specs,
    host_fingerprints,
    in_one_line,
    is_spread,
    join,
    make_manifest,
    named_leaves,
    parse_manifest,
)
from rspo_jax.records.trouble import trouble_of
from rspo_jax.types import Array

__all__ = ["CheckpointError", "CheckpointMismatch", "Checkpoints", "Restored"]

UNFINISHED = ocp.path.atomicity.TMP_DIR_SUFFIX
"""Suffix of a checkpoint that is still being written to a folder."""
COMPLETE = ocp.path.atomicity.COMMIT_SUCCESS_FILE
"""Name of the file that is written last. In a bucket, which cannot rename, a checkpoint without it is unfinished."""
SIGHT_SECONDS = 10
"""Time that a network may take to show one machine a folder that another has made."""
# Signs of trouble with a machine or a network, beside `Trouble.is_of_machine`: they tell nothing about the files.
NOT_DAMAGE = (MemoryError, PermissionError, ConnectionError, TimeoutError, jax.errors.JaxRuntimeError)
NOT_DAMAGE_TO_TENSORSTORE = re.compile("^(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED):")

_logger = logging.getLogger(__name__)


# Orbax reports much at level INFO, through the logger that all users of absl share, and logs with its traceback each
# error that it also raises.
logging.getLogger("absl").addFilter(
    lambda record: (
        (record.levelno >= logging.WARNING and not record.exc_info)
        or not record.pathname.startswith(os.path.dirname(ocp.__file__))
    )
)


def _without_late_writes(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    def quiet(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    return quiet


# When one write of a checkpoint fails, all others would complain that they cannot tell Orbax of their ends any more.
sys.unraisablehook = _without_late_writes(sys.unraisablehook)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or a folder of checkpoints none of which can be read."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that `Checkpoints.restore_newest` has read."""

    index: int
    state: Any
    """The pytree of the template, on device."""
    metadata: dict[str, Any]
    """Metadata from JSON: tuples have become lists."""


class Checkpoints:
    """The checkpoints in one folder, for one run at a time; a context manager that waits for the last save.

    A checkpoint is a subfolder named by its index. Once a new one is complete, all but the newest `keep` are deleted.
    Damaged ones are moved to the sibling folder `<directory>-damaged`, and never deleted.

    A run of several processes makes one of these objects in each process, with the same arguments, over the same
    folder, and calls the same methods at the same points. All processes get the same answer, or raise the same error.
    Arrays may be spread over processes; all others must be the same in every process. The first process scans, moves
    and deletes for all, and its metadata is the one that is kept.
    """

    def __init__(self, directory: FilePath, keep: int = 3, check: Callable[[], object] = lambda: None) -> None:
        """Open the folder, and create it if absent.

        Args:
          directory: a folder that all processes see, or an address that starts with gs://.
          keep: number of checkpoints to keep.
          check: called in the first process before a checkpoint is begun, completed or moved; raises an error, such as
            `LockLost`, if this run must not write.

        Raises:
          ValueError: if `keep` is not positive, or `directory` is an address that cannot be written to.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        directory = as_path(directory)
        self._in_bucket = is_bucket(directory)
        self._directory = directory if self._in_bucket else directory.absolute()  # TensorStore takes no relative paths
        self._keep, self._check = keep, check
        self._agreement = Agreement("checkpoints")
        self._agreement.from_primary(functools.partial(self._make_folder, self._directory))
        self._writing: tuple[int, Future[None]] | None = None
        self._newest: tuple[int, dict[str, int]] | None = None
        """Index and fingerprints of the last checkpoint that was saved or restored."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, index: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Start to write a checkpoint, after the last one is complete.

        This returns once the arrays are on the host, so that the caller may donate or overwrite `state` at once. Saving
        again what has just been saved or restored does nothing: its first metadata stays.

        Args:
          index: the checkpoint's number, 0 or more, higher than all in the folder.
          state: a pytree of arrays; keys as `jax.random.key_data`.
          metadata: a small dict for JSON.

        Raises:
          TypeError: if a leaf is not an array, or has an unsupported dtype, or JSON cannot hold `metadata`.
          ValueError: if the index does not increase, `state` is empty, or processes save different things.
          CheckpointError: if this checkpoint or the last one cannot be written, or the processes do not see the same
            folder.
        """
        index = operator.index(index)
        leaves = named_leaves(state)
        check_metadata(metadata)
        self.wait()
        found = host_fingerprints(leaves)
        self._check_all_save_the_same(index, found)
        if (index, found) == self._newest:
            return
        self._agreement.from_primary(functools.partial(self._prepare, index))
        self._check_all_see(self._place(index))
        manifest = make_manifest(index, leaves, found, metadata)
        # Orbax takes no empty arrays. An array that each of several processes has for itself goes in as NumPy, which
        # Orbax writes in the first process only.
        alone = jax.process_count() == 1
        item = {
            name: leaf if alone or is_spread(leaf) else np.asarray(leaf) for name, leaf in leaves.items() if leaf.size
        }
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        copying = writer.submit(_start_to_write, self._place(index) / "state", item)
        self._writing = index, writer.submit(self._finish, index, manifest, copying)
        self._newest = index, found
        writer.shutdown(wait=False)
        futures.wait([copying])  # if it failed, `_finish` raises its error in all processes

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
          CheckpointError: if it failed in any process.
        """
        if self._writing is None:
            return
        index, writing = self._writing
        error = writing.exception()
        self._writing = None
        if error is not None:
            self._newest = None
            if isinstance(error, LockLost):
                raise error
            trouble = trouble_of(error)
            reason = trouble.words if trouble else in_one_line(error)
            raise CheckpointError(
                f"{self._directory / str(index)} could not be written ({reason}); "
                "the checkpoints before it are unchanged"
            ) from error

    def restore_newest(self, template: Any, say: Callable[[str], object] = print) -> Restored | None:
        """Read the newest checkpoint that is sound in all processes.

        Args:
          template: a pytree of arrays or `jax.ShapeDtypeStruct`s like the state that was saved. Leaves with a sharding
            come back in it, whatever devices and processes saved them; uncommitted arrays and structs without a
            sharding come back uncommitted, on the default device of each process.
          say: called in the first process with a sentence for each unfinished checkpoint, which is skipped, for each
            damaged one, and for the place that a damaged one is moved to once a sound one has been read.

        Returns:
          The checkpoint, or None if there is none.

        Raises:
          CheckpointMismatch: if names, shapes or dtypes are not those of the template; nothing is read or moved then.
          CheckpointError: if there are checkpoints, but all are damaged; nothing is moved then.
          TypeError: if a leaf of the template is not an array, or has an unsupported dtype.
        """
        leaves = named_leaves(template)
        self.wait()
        self._newest = None
        say = say if is_primary() else lambda _: None
        indices, unfinished = self._agreement.from_primary(self._scan)
        for name in unfinished:
            path = self._directory / name
            say(f"{path} is unfinished, left by an interrupted run unless a run is writing it now: skipped.")
        damaged: list[int] = []
        for index in reversed(indices):
            path = self._directory / str(index)
            try:
                arrays, manifest = self._read(path, leaves)
            except Damage as damage:
                say(f"{path} is damaged or incomplete: {damage}.")
                damaged.append(index)
                continue
            self._agreement.from_primary(functools.partial(self._move_aside, damaged, path, say))
            self._newest = index, {name: manifest["leaves"][name]["fingerprint"] for name in leaves}
            state = jax.tree.unflatten(jax.tree.structure(template), list(arrays.values()))
            return Restored(index, state, manifest["metadata"])
        if damaged:
            raise CheckpointError(
                f"all checkpoints in {self._directory} are damaged or incomplete ({len(damaged)} in number), and none "
                "was moved or deleted: restore an intact copy of one, or start a new run folder"
            )
        return None

    # --- steps that all processes take together ---

    def _check_all_save_the_same(self, index: int, found: dict[str, int]) -> None:
        primary_index, primary_found = self._agreement.from_primary(lambda: (index, found))
        error = None
        if index != primary_index:
            error = ValueError(f"a process saves checkpoint {index} while the first saves {primary_index}")
        elif found != primary_found:
            names = [name for name in found | primary_found if found.get(name) != primary_found.get(name)]
            error = ValueError(
                f"{join(names)} differ between processes: spread an array over all of them, or give all the same one"
            )
        self._agreement.settle(error)

    def _check_all_see(self, path: epath.Path) -> None:
        """Check that all processes see a folder that the first has just made, so that they share one place."""
        if self._in_bucket:
            return
        end = time.monotonic() + SIGHT_SECONDS
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.1)
        error = None
        if not path.exists():
            error = CheckpointError(
                f"{self._directory} is not one folder for all processes: keep the run in a folder that all of them "
                "see, or under a gs:// address"
            )
        self._agreement.settle(error)

    def _finish(self, index: int, manifest: str, copying: Future[Sequence[Any]]) -> None:
        """Wait until each process has written its parts, then complete the checkpoint."""
        error = None
        try:
            for operation in copying.result():
                operation.result()
        except Exception as failure:
            error = failure
        self._agreement.settle(error)
        self._agreement.from_primary(functools.partial(self._complete, index, manifest))

    def _read(self, path: epath.Path, leaves: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
        """Read and verify a checkpoint; return its arrays by name, in the order of `leaves`, and its manifest.

        Raises:
          CheckpointMismatch: if it does not fit `leaves`.
          Damage: if a process cannot read it, or reads anything but what was saved.
        """
        manifest: dict[str, Any] = {}
        arrays: dict[str, Array] = {}
        with self._passed_by_all():
            manifest = _read_manifest(path)
            check_fit(path, manifest, leaves)
        with (
            self._passed_by_all(),
            _as_damage("arrays", path),
            contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler,
        ):
            # One after the other: when a read fails, those under way would complain to an event loop that is gone.
            arrays = {name: _read_array(handler, path / "state", name, leaf) for name, leaf in leaves.items()}
            check_specs(arrays, leaves)
        found = host_fingerprints(arrays)  # over all devices, so not before all have read
        with self._passed_by_all():
            check_contents(found, manifest)
        return arrays, manifest

    @contextlib.contextmanager
    def _passed_by_all(self) -> Iterator[None]:
        """Raise in all processes an error that one of them meets in a `with` block."""
        met = None
        try:
            yield
        except Exception as error:
            met = error
        self._agreement.settle(met, severity=_severity)

    # --- steps that the first process takes for all ---

    def _make_folder(self, path: epath.Path) -> None:
        if not self._in_bucket:  # a bucket has no folders
            path.mkdir(parents=True, exist_ok=True)

    def _place(self, index: int) -> epath.Path:
        """Return the path of a checkpoint while it is being written."""
        return self._directory / (str(index) if self._in_bucket else f"{index}{UNFINISHED}")

    def _scan(self) -> tuple[list[int], list[str]]:
        """Return the indices of all complete checkpoints in increasing order, and the names of the unfinished ones."""
        names = [path.name for path in self._directory.iterdir()] if self._directory.exists() else []
        indices = sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
        if not self._in_bucket:
            return indices, sorted(name for name in names if UNFINISHED in name)
        complete = [index for index in indices if (self._directory / str(index) / COMPLETE).exists()]
        return complete, [str(index) for index in indices if index not in complete]

    def _prepare(self, index: int) -> None:
        self._check()
        indices, _ = self._scan()
        newest = max([*indices, -1 if self._newest is None else self._newest[0]])
        if index < 0:
            raise ValueError(f"the index of a checkpoint must be 0 or more, got {index}")
        if index <= newest:
            raise ValueError(
                f"{self._directory} holds checkpoint {newest} already, and {index} is not higher: "
                "restore the newest one and go on from there, or start a new run folder"
            )
        self._place(index).rmtree(missing_ok=True)
        self._make_folder(self._place(index) / "state")

    def _complete(self, index: int, manifest: str) -> None:
        self._check()
        place = self._place(index)
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            handler.finalize(place / "state")
        self._make_folder(place / "manifest")
        replace_file(place / "manifest" / "metadata", manifest.encode())
        replace_file(place / COMPLETE, b"complete\n")
        if not self._in_bucket:
            place.rename(self._directory / str(index))
        try:
            self._delete_before(index)
        except Exception as error:  # the new one is complete all the same
            _logger.warning("An old checkpoint in %s could not be deleted: %s", self._directory, in_one_line(error))

    def _delete_before(self, newest: int) -> None:
        """Delete all checkpoints but the newest `keep`, and those that earlier processes left unfinished."""
        indices, unfinished = self._scan()
        for index in indices[: -self._keep]:
            path, place = self._directory / str(index), self._place(index)
            # If the process is killed in here, the checkpoint is unfinished and not damaged.
            if self._in_bucket:
                (path / COMPLETE).unlink()
            else:
                place.rmtree(missing_ok=True)
                path.rename(place)
            place.rmtree()
        for name in unfinished:
            if int(name.split(".")[0]) < newest:
                (self._directory / name).rmtree(missing_ok=True)

    def _move_aside(self, damaged: Sequence[int], sound: epath.Path, say: Callable[[str], object]) -> None:
        """Move damaged checkpoints aside, so that their indices are free."""
        if not damaged:
            return
        self._check()
        folder = self._directory.parent / f"{self._directory.name}-damaged"
        folder = _first_free(folder, lambda path: path.exists() and not path.is_dir())
        if self._in_bucket:  # where a folder exists once there is something in it
            replace_file(folder / "README", b"Checkpoints that could not be read. No run needs them.\n")
        else:
            self._make_folder(folder)
        for index in damaged:
            path = self._directory / str(index)
            target = _first_free(folder / path.name, lambda path: path.exists())
            path.rename(target)
            say(f"{path} was moved to {target}, and {sound} is used instead.")


def _first_free(path: epath.Path, is_taken: Callable[[epath.Path], bool]) -> epath.Path:
    """Return the first of `path`, `path-2`, `path-3`, … that is not taken."""
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(place for name in names if not is_taken(place := path.with_name(name)))


def _severity(error: Exception) -> int:
    """Rate a fault of the machine above a mismatch, and that above damage, which another checkpoint may mend."""
    return 0 if isinstance(error, Damage) else 1 if isinstance(error, CheckpointMismatch) else 2


def _start_to_write(path: epath.Path, item: dict[str, Any]) -> Sequence[Any]:
    """Copy this process's parts of the arrays to the host, and return Orbax's futures of writing them."""
    writing = ocp.PyTreeCheckpointHandler().async_save(path, args=ocp.args.PyTreeSave(item))
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        return loop.run_until_complete(writing) or []


@contextlib.contextmanager
def _as_damage(part: str, place: epath.Path) -> Iterator[None]:
    """Turn errors over a broken file into `Damage`: Orbax and TensorStore raise all sorts of them."""
    try:
        yield
    except (Damage, *NOT_DAMAGE):
        raise
    except Exception as error:
        trouble = trouble_of(error)
        # In a bucket, an error of the system other than a missing object is one of the connection.
        connection = is_bucket(place) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        if connection or (trouble and trouble.is_of_machine) or NOT_DAMAGE_TO_TENSORSTORE.search(str(error)):
            raise
        raise Damage(f"the {part} cannot be read ({in_one_line(error)})") from error


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint at a path, whose last part is its number."""
    with _as_damage("manifest", path):
        content = (path / "manifest" / "metadata").read_bytes()
        return parse_manifest(content.decode(), int(path.name))


def _read_array(handler: ocp.PyTreeCheckpointHandler, path: epath.Path, name: str, leaf: Any) -> Array:
    """Read an array to the devices of its leaf in the template, or uncommitted, without asking other processes."""
    uncommitted = isinstance(leaf, jax.Array) and not leaf.committed
    sharding: jax.sharding.Sharding | None = None if uncommitted else getattr(leaf, "sharding", None)
    if not leaf.size:
        empty = np.zeros(leaf.shape, leaf.dtype)
        if sharding is None:
            return jax.device_put(empty)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda part: empty[part])
    how = (
        # With no sharding at all, Orbax would commit the array to the devices that it was saved from.
        ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        if sharding is None
        else ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    )
    item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
    args = ocp.args.PyTreeRestore(item=item, restore_args={name: how}, partial_restore=True)
    value = handler.restore(path, args=args)[name]
    return jax.device_put(value) if sharding is None else value
