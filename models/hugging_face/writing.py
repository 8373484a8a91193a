"""Writing of parameters to a folder of safetensors, as Hugging Face lays it out.

Tensors are fetched one after the other, each cut and cast where the parameters lie, and the first of all processes
writes them as they come. The folder gets its name once it is complete: whatever happens, there is a whole checkpoint or
none.
"""

import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from models.hugging_face.reading import INDEX_FILE, SINGLE_FILE
from models.hugging_face.tensors import (
    CHUNK_BYTES,
    SAFETENSORS_DTYPES,
    Placed,
    Plan,
    flat,
    natural_order,
    place_pieces,
    without_mesh,
)

Array = jax.Array

UNFINISHED = ".unfinished"
"""Suffix to the name of a folder that is still being written."""
_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}


class _Tensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: list[tuple[Array, Placed]]
    """The parameters that it is made from, each with the piece that it fills."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_params(
    folder: str | os.PathLike[str],
    plan: Plan,
    params: Mapping[str, Any],
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the parameters of a model.

    This takes host memory for the largest tensor and a few chunks of `CHUNK_BYTES`. In a run of several processes all
    of them call it, and the first one writes.

    Args:
      folder: the folder to write, absent or empty. It is written under another name and then renamed, so that it
        appears as a whole.
      plan: the pieces of each parameter.
      params: a nested dict of arrays, in any sharding over a mesh, or on one device.
      dtype: dtype of all tensors, or a nested dict of dtypes like `params`: float32, bfloat16 or float16. By default
        those of the parameters.
      max_shard_bytes: largest size of a file. A tensor that is larger has a file of its own.
      files: contents of small files that belong to the checkpoint, such as `config.json`, by name.

    Raises:
      ValueError: if plan and parameters do not fit, or a dtype cannot be written.
      FileExistsError: if the folder holds something.
      OSError: if it cannot be written. In other processes than the first, this stands for any error of the first.
    """
    if "://" in os.fspath(folder):
        raise ValueError(f"checkpoints are written to folders, not to {os.fspath(folder)}: mount that place as one")
    target = pathlib.Path(os.path.realpath(folder))
    shards = _in_shards(_list_tensors(plan, params, dtype), max_shard_bytes)
    with without_mesh():
        _do_for_all(lambda: _prepare(target))
        tensors = _fetch(shards)
        _do_for_all(lambda: _write_folder(target, shards, tensors, files or {}), with_all=tensors)


def _do_for_all(task: Callable[[], None], with_all: Iterable[Any] = ()) -> None:
    """Run a task in the first process, and raise in every process if it fails.

    Args:
      task: the task.
      with_all: an iterable whose steps need all processes. The task consumes it in the first process; the others, and
        the first if it has failed, go through whatever is left of it.
    """
    failure = None
    try:
        if jax.process_index() == 0:
            task()
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        collections.deque(with_all, maxlen=0)
        words = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()[:1000]
        told = multihost_utils.broadcast_one_to_all(np.frombuffer(words.ljust(1000), np.uint8)).tobytes().strip()
        if failure is None and told:
            raise OSError(f"process 0 could not write: {told.decode(errors='replace')}")
    if failure is not None:
        raise failure


def _list_tensors(plan: Plan, params: Mapping[str, Any], dtype: Any) -> list[_Tensor]:
    """Return all tensors, in the order of their names."""
    leaves = flat(params)
    given = flat(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(leaves, dtype)
    dtypes = {path: leaf.dtype if dtype is None else given[path] for path, leaf in leaves.items()}
    placed = place_pieces(plan, {path: leaf.shape for path, leaf in leaves.items()})
    tensors: dict[str, _Tensor] = {}
    for path, leaf in leaves.items():
        stored_as = jnp.dtype(dtypes[path])
        if stored_as.name not in _CODES:
            raise ValueError(f"{'/'.join(path)} cannot be written as {stored_as}: choose among {', '.join(_CODES)}")
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{'/'.join(path)} is a {type(leaf).__name__}: give it as a jax.Array")
        if not (leaf.is_fully_replicated or isinstance(leaf.sharding, NamedSharding)):
            raise ValueError(f"{'/'.join(path)} lies as {leaf.sharding}: put it into a NamedSharding first")
        for piece in placed[path]:
            tensor = tensors.setdefault(piece.name, _Tensor(piece.name, piece.shape, stored_as, []))
            if tensor.dtype != stored_as:
                raise ValueError(
                    f"{piece.name} would be {tensor.dtype} and, by {'/'.join(path)}, {stored_as}: choose one"
                )
            tensor.parts.append((leaf, piece))
    return sorted(tensors.values(), key=lambda tensor: natural_order(tensor.name))


def _in_shards(tensors: Sequence[_Tensor], max_bytes: int) -> list[list[_Tensor]]:
    """Distribute the tensors over files. Within a file wide dtypes come first, so that each tensor is aligned."""
    shards: list[list[_Tensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


# --- the files, in the first process ---


def _unfinished(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(target.name + UNFINISHED)


def _prepare(target: pathlib.Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already and is not an empty folder: choose another one")
    shutil.rmtree(_unfinished(target), ignore_errors=True)  # what an interrupted run left
    _unfinished(target).mkdir(parents=True)


def _write_folder(
    target: pathlib.Path,
    shards: Sequence[Sequence[_Tensor]],
    tensors: Iterator[np.ndarray],
    files: Mapping[str, bytes],
) -> None:
    place = _unfinished(target)
    try:
        file_of: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            file_of |= {tensor.name: file for tensor in shard}
            with _new_file(place / file) as opened:
                opened.write(_header(shard))
                for _ in shard:
                    opened.write(next(tensors).reshape(-1).view(np.uint8).data)
        if len(shards) > 1:
            total = sum(tensor.size for shard in shards for tensor in shard)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
            files = {INDEX_FILE: (json.dumps(index, indent=2) + "\n").encode(), **files}
        for file, content in files.items():
            with _new_file(place / file) as opened:
                opened.write(content)
        os.replace(place, target)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


@contextlib.contextmanager
def _new_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Open a new file, and flush it to the disk at the end."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _header(shard: Sequence[_Tensor]) -> bytes:
    """Return the header of a file of safetensors (https://huggingface.co/docs/safetensors)."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.size
        code = _CODES[tensor.dtype.name]
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- the arrays, in all processes ---


def _fetch(shards: Sequence[Sequence[_Tensor]]) -> Iterator[np.ndarray]:
    """Yield each tensor, whole in the first process and empty in the others."""
    primary = jax.process_index() == 0
    for tensor in (tensor for shard in shards for tensor in shard):
        content = np.empty(tensor.shape if primary else 0, tensor.dtype)
        for array, part in tensor.parts:
            for chunk in part.chunks(CHUNK_BYTES // max(array.dtype.itemsize, tensor.dtype.itemsize)):
                # Cut and cast on a device of this process.
                start = tuple(np.int32(place) for place in chunk.start)
                if array.is_fully_replicated:
                    block = _cut_one(array.addressable_data(0), start, chunk.sizes, tensor.dtype.name)
                else:
                    block = _cut_spread(array, start, chunk.sizes, tensor.dtype.name, array.sharding)
                    block = block.addressable_data(0)
                jax.block_until_ready(block)
                if primary:
                    transposed = tuple(len(chunk.theirs[axis]) for axis in chunk.order)
                    to_theirs = tuple(map(int, np.argsort(chunk.order)))
                    chunk.view(content)[...] = np.asarray(_arrange(block, transposed, to_theirs))
        yield content


# Apart from cutting: on a CPU, XLA would make one slow loop of both.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _arrange(block: Array, shape: tuple[int, ...], order: tuple[int, ...]) -> Array:
    return block.reshape(shape).transpose(order)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cut_one(array: Array, start: tuple[Any, ...], sizes: tuple[int, ...], dtype: str) -> Array:
    return jax.lax.dynamic_slice(array, start, sizes).astype(dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _cut_spread(
    array: Array, start: tuple[Any, ...], sizes: tuple[int, ...], dtype: str, sharding: NamedSharding
) -> Array:
    """Return the result of `_cut_one` for an array that lies on several devices, on each of them.

    Each device contributes its part of the block and nothing else moves; left to XLA, whole axes would be gathered
    first. Blocks are summed as uint32 bits, which keeps the sign of a zero and works on all devices.
    """
    unsigned = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else jnp.uint32
    spec = [(part,) if isinstance(part, str) else tuple(part or ()) for part in sharding.spec]
    names_of = {axis: names for axis, names in enumerate(spec) if names}

    def local(array: Array, start: tuple[Array, ...]) -> Array:
        begin, window = list(start), list(sizes)
        for axis, names in names_of.items():
            own = array.shape[axis]
            window[axis] = min(own, sizes[axis])
            first = start[axis] - jax.lax.axis_index(names) * own
            begin[axis] = jnp.clip(first, 0, own - window[axis])
        block = jax.lax.dynamic_slice(array, begin, window).astype(dtype)
        bits = jax.lax.bitcast_convert_type(block, unsigned).astype("uint32")
        for axis, names in names_of.items():
            first = start[axis] - jax.lax.axis_index(names) * array.shape[axis] - begin[axis]
            places = first + jnp.arange(sizes[axis], dtype=jnp.int32)
            here = (places >= 0) & (places < window[axis])
            bits = jnp.take(bits, places, axis, mode="clip")
            bits = jnp.where(jnp.expand_dims(here, [other for other in range(bits.ndim) if other != axis]), bits, 0)
        bits = jax.lax.psum(bits, [name for names in names_of.values() for name in names])
        return jax.lax.bitcast_convert_type(bits.astype(unsigned), jnp.dtype(dtype))

    whole = PartitionSpec()
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=(sharding.spec, whole), out_specs=whole, check_vma=False)(
        array, start
    )
