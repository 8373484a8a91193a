"""Checkpoints of a training run, from which it goes on bit for bit, or not at all.

Orbax writes a checkpoint in the background and gives it its final name in one rename at the end, so a process killed
at any moment leaves the old one or the new one. Beside the arrays lies a manifest with their names, shapes, dtypes and
fingerprints, itself under a checksum; nothing is handed back that does not agree with it. This file must never know
what the state of a run consists of.
"""

import contextlib
import hashlib
import json
import logging
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from rspo_jax.types import Array

FORMAT = 1
UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}
"""Bits of a dtype -> the words that it is read as; 64 bits are two words."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax adds to the name of a checkpoint that it is still writing."""
MAX_NAMES = 5
MAX_REASON = 300
# Signs of a machine in trouble: they say nothing about the files, and another attempt may succeed.
NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not record.pathname.startswith(os.path.dirname(ocp.__file__))


# Orbax reports every rename at level INFO, through the logger that all users of absl share.
logging.getLogger("absl").addFilter(_is_worth_showing)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or there are checkpoints but none that can be read."""


class CheckpointMismatch(ValueError):
    """A sound checkpoint holds other arrays than the run expects."""


class _Damage(Exception):
    """Why a checkpoint cannot be trusted."""


@dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore_newest` found."""

    index: int
    state: Any
    """The same pytree as the template, on device."""
    metadata: dict[str, Any]
    """As JSON gives it back: tuples have become lists."""


class Checkpoints:
    """The checkpoints in one folder, for one process at a time; a context manager that waits for the last save.

    A checkpoint is a subfolder named by its index. Older ones than the newest `keep` are deleted once a new one is
    complete. Damaged ones are moved to the sibling folder `<directory>-damaged`, and never deleted.
    """

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        """Opens the folder, and creates it if absent.

        Raises:
          ValueError: if `keep` is not positive, or `directory` is the address of a bucket.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if re.match(r"\w\w+:/", str(directory)):
            raise ValueError(f"checkpoints need a folder, not an address: mount the bucket of {directory} first")
        self._directory = Path(directory).absolute()  # TensorStore takes no relative paths
        self._directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._newest: tuple[int, dict[str, int]] | None = None  # index and fingerprints of the last saved or restored

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def save(self, index: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint, after the one before it is complete.

        Returns once the arrays are on the host, so that the caller may donate or overwrite `state` at once. To save
        again what has just been saved or restored does nothing: its first metadata stays.

        Args:
          index: higher than all in the folder, 0 or more.
          state: a pytree of arrays; keys as `jax.random.key_data`.
          metadata: a small dict for JSON.

        Raises:
          TypeError: if a leaf is no array, or of a dtype that is not supported, or `metadata` is not for JSON.
          ValueError: if the index does not increase, or `state` is empty.
          CheckpointError: if this checkpoint, or the one before it, could not be written.
        """
        index = operator.index(index)
        leaves = _named_leaves(state)
        _check_metadata(metadata)
        self.wait()
        found = _host_fingerprints(leaves)
        if (index, found) == self._newest:
            return
        self._check_increases(index)
        # Orbax would replace it too, but not without a warning.
        shutil.rmtree(self._directory / f"{index}{UNFINISHED}", ignore_errors=True)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave({name: leaf for name, leaf in leaves.items() if leaf.size}),
            manifest=ocp.args.JsonSave(_make_manifest(leaves, found, metadata)),
        )
        with self._named_failure(index):
            if self._manager is None:
                self._manager = _open_manager(self._directory, self._keep)
            self._manager.save(index, args=items, force=True)
        self._newest = index, found

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          CheckpointError: if it failed.
        """
        if self._manager is not None and self._newest is not None:
            with self._named_failure(self._newest[0]):
                self._manager.wait_until_finished()

    def restore_newest(self, template: Any, say: Callable[[str], object] = print) -> Restored | None:
        """Reads the newest checkpoint that is sound.

        Args:
          template: a pytree of arrays or `jax.ShapeDtypeStruct`s like the state that was saved. Leaves with a sharding
            come back in it; uncommitted arrays and structs without a sharding come back uncommitted, on the default
            device.
          say: is told, in a sentence each, of unfinished checkpoints, which are skipped, of damaged ones, and of where
            they are moved to once a sound one has been read.

        Returns:
          The checkpoint, or None if there is none.

        Raises:
          CheckpointMismatch: if names, shapes or dtypes are not those of the template; nothing is read or moved then.
          CheckpointError: if there are checkpoints, and all are damaged; nothing is moved then.
          TypeError: if a leaf of the template is no array, or of a dtype that is not supported.
        """
        leaves = _named_leaves(template)
        self._close()  # Orbax lists the folder once, when it is opened
        self._newest = None
        for path in sorted(self._directory.glob(f"*{UNFINISHED}*")):
            say(f"{path} is unfinished, by an interrupted run unless one is writing it now: skipped.")
        damaged: list[Path] = []
        for index in sorted(self._indices(), reverse=True):
            path = self._directory / str(index)
            try:
                arrays, manifest = _read(path, leaves)
            except _Damage as damage:
                say(f"{path} is damaged or incomplete: {damage}.")
                damaged.append(path)
                continue
            for broken in damaged:
                target = _move_aside(broken)
                say(f"{broken} was moved to {target}, and {path} is used instead.")
            self._newest = index, {name: manifest["leaves"][name]["fingerprint"] for name in leaves}
            state = jax.tree.unflatten(jax.tree.structure(template), list(arrays.values()))
            return Restored(index, state, manifest["metadata"])
        if damaged:
            raise CheckpointError(
                f"all checkpoints in {self._directory} are damaged or incomplete ({len(damaged)} in number), and none "
                "was moved or deleted: put back an intact copy of one, or start a new run folder"
            )
        return None

    def _indices(self) -> list[int]:
        return [int(path.name) for path in self._directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]

    def _check_increases(self, index: int) -> None:
        newest = max([*self._indices(), -1 if self._newest is None else self._newest[0]])
        if index < 0:
            raise ValueError(f"the index of a checkpoint must be 0 or more, got {index}")
        if index <= newest:
            raise ValueError(
                f"{self._directory} holds checkpoint {newest} already, and {index} is not higher: "
                "restore the newest one and go on from there, or start a new run folder"
            )

    @contextlib.contextmanager
    def _named_failure(self, index: int) -> Iterator[None]:
        """Turns any error of Orbax into one that names the checkpoint, and leaves room for another attempt."""
        try:
            yield
        except Exception as error:
            manager, self._manager, self._newest = self._manager, None, None
            if manager is not None:
                with contextlib.suppress(Exception):  # the same error once more
                    manager.close()
            raise CheckpointError(
                f"{self._directory / str(index)} could not be written ({_reason(error)}); "
                "the checkpoints before it are as they were"
            ) from error

    def _close(self) -> None:
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def _open_manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=LatestN(keep),
        lightweight_initialize=True,  # there are no metrics to be read from checkpoints, which may be damaged
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(directory, options=options)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their names, as in `state.params['embedding']`, in the order of the tree."""
    leaves = {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"{name} is a {type(leaf).__name__}, not an array: wrap it, as in jnp.int32(3)")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed PRNG key: pass jax.random.key_data of it, and wrap that again later")
        is_real = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
        if not is_real or jax.dtypes.itemsize_bits(leaf.dtype) not in UNSIGNED:
            raise TypeError(f"{name} is {leaf.dtype}: checkpoints hold bool, integers and floats of 8 to 64 bits")
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(f"{name} is {leaf.dtype}, which JAX would narrow: convert it, or set jax_enable_x64")
    if not any(leaf.size for leaf in leaves.values()):
        raise ValueError("the state holds no arrays with elements, so there is nothing to checkpoint")
    return leaves


def _spec(leaf: Any) -> str:
    """Dtype and shape, as in `float32[2, 3]`."""
    return f"{jnp.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"


def _host_fingerprints(leaves: Mapping[str, Any]) -> dict[str, int]:
    return dict(zip(leaves, np.asarray(fingerprints(list(leaves.values()))).tolist(), strict=True))


@jax.jit
def fingerprints(leaves: Sequence[Array]) -> Array:
    """One number for each array, which any change of one element changes.

    Changes of several elements, their order included, go unnoticed once in 2^32. Sums of integers that wrap around come
    out the same in any order, hence under any sharding.

    Args:
      leaves: n arrays.

    Returns:
      uint32 [n].
    """
    return jnp.stack([_fingerprint(leaf) for leaf in leaves])


def _fingerprint(leaf: Array) -> Array:
    """Σ_i mix(word_i ⊕ mix(i)) mod 2^32; mix is a bijection, so a change of a single word always shows."""
    unsigned = UNSIGNED[jax.dtypes.itemsize_bits(leaf.dtype)]
    words = leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, unsigned)
    words = words.astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ _mix(position)), dtype=jnp.uint32)


def _mix(word: Array) -> Array:
    """The finalizer of MurmurHash3 (Appleby, 2008), on uint32."""
    word = (word ^ (word >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> jnp.uint32(16))


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be a dict of what JSON knows: {error}") from error


def _make_manifest(leaves: Mapping[str, Any], found: Mapping[str, int], metadata: Mapping[str, Any]) -> dict[str, Any]:
    described = {name: {"array": _spec(leaf), "fingerprint": found[name]} for name, leaf in leaves.items()}
    # A copy: Orbax writes it in the background.
    content = json.loads(json.dumps({"format": FORMAT, "metadata": dict(metadata), "leaves": described}))
    return content | {"checksum": _checksum(content)}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path, leaves: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Reads and verifies one checkpoint: the arrays by name, in the order of `leaves`, and the manifest.

    Raises:
      CheckpointMismatch: if it is not like `leaves`.
      _Damage: if it cannot be read, or what is read is not what was saved.
    """
    with _as_damage("manifest"):
        manifest = _read_manifest(path / "manifest")
    _check_fit(path, manifest, leaves)
    with _as_damage("arrays"):
        arrays = _read_arrays(path / "state", leaves)
        _verify(arrays, manifest, leaves)
    return arrays, manifest


@contextlib.contextmanager
def _as_damage(part: str) -> Iterator[None]:
    """Takes errors for signs of damage: Orbax and TensorStore raise all sorts over a broken file."""
    try:
        yield
    except (_Damage, *NOT_DAMAGE):
        raise
    except Exception as error:
        raise _Damage(f"the {part} cannot be read ({_reason(error)})") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        content = dict(reader.restore(path, args=ocp.args.JsonRestore()))
    if content.pop("checksum", None) != _checksum(content):
        raise _Damage("the manifest does not agree with its checksum")
    return content


def _check_fit(path: Path, manifest: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Compares names, shapes and dtypes."""
    if manifest["format"] != FORMAT:
        raise CheckpointMismatch(
            f"{path} is of format {manifest['format']}, and this version reads format {FORMAT} only: "
            "resume with the version it was written with, or start a new run folder"
        )
    saved = {name: leaf["array"] for name, leaf in manifest["leaves"].items()}
    expected = {name: _spec(leaf) for name, leaf in leaves.items()}
    changed = [name for name in expected if name in saved and saved[name] != expected[name]]
    missing = [name for name in expected if name not in saved]
    extra = [name for name in saved if name not in expected]
    differences = []
    if changed:
        name, *others = changed
        more = f", and so on for {_join(others)}" if others else ""
        differences.append(f"{name} was saved as {saved[name]}, but {expected[name]} is expected{more}")
    if missing:
        differences.append(f"it lacks {_join(missing)}")
    if extra:
        differences.append(f"it also holds {_join(extra)}")
    if differences:
        raise CheckpointMismatch(
            f"{path} does not fit this run: {'; '.join(differences)}. "
            "Resume with the configuration it was written with, or start a new run folder."
        )


def _read_arrays(path: Path, leaves: Mapping[str, Any]) -> dict[str, Array]:
    """Reads each leaf to where the leaf of the template is, or would be."""
    arrays = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        # One after the other, as reads that are under way when another fails complain to an event loop that is gone.
        for name, leaf in leaves.items():
            value = _read_array(reader, path, name, leaf) if leaf.size else np.zeros(leaf.shape, leaf.dtype)
            arrays[name] = jax.device_put(value, _sharding(leaf))
    return arrays


def _read_array(reader: ocp.Checkpointer, path: Path, name: str, leaf: Any) -> Array | np.ndarray:
    """Reads one array: to the host, unless the leaf says on which devices it belongs."""
    sharding = _sharding(leaf)
    how = (
        # With no sharding at all, Orbax would commit it to the devices that it was saved from.
        ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        if sharding is None
        else ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    )
    item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
    args = ocp.args.PyTreeRestore(item=item, restore_args={name: how}, partial_restore=True)
    return reader.restore(path, args=args)[name]


def _verify(arrays: Mapping[str, Array], manifest: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    wrong = [name for name, leaf in leaves.items() if _spec(arrays[name]) != _spec(leaf)]
    if not wrong:
        found = _host_fingerprints(arrays)
        wrong = [name for name in leaves if found[name] != manifest["leaves"][name]["fingerprint"]]
    if wrong:
        raise _Damage(f"the contents of {_join(wrong)} are not what was saved")


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _move_aside(path: Path) -> Path:
    """Moves a checkpoint out of the way of the next one with its index; its new path."""
    folder = path.parent.with_name(f"{path.parent.name}-damaged")
    folder.mkdir(exist_ok=True)
    target = folder / path.name
    others = 1
    while target.exists():
        others += 1
        target = folder / f"{path.name}-{others}"
    shutil.move(path, target)
    return target


def _join(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _reason(error: Exception) -> str:
    """An error in one line, without the appendices of TensorStore."""
    text = re.split(r" \[(?:tensorstore_spec|source locations)", f"{type(error).__name__}: {error}")[0]
    text = " ".join(text.split())
    half = MAX_REASON // 2
    return text if len(text) <= MAX_REASON else f"{text[:half]} … {text[-half:]}"
