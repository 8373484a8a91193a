"""Reading of parameters from a folder of safetensors, straight to where they belong.

The folder is checked against the plan by its headers alone. Then every device's part of every parameter is made on that
device and filled piece by piece with the part that it needs of each tensor. So the host holds a few chunks and never a
whole parameter, and each of many processes reads only what its own devices hold. Processes do not communicate.
"""

import contextlib
import fnmatch
import functools
import json
import math
import os
import pathlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from models.hugging_face.tensors import (
    CHUNK_BYTES,
    SAFETENSORS_DTYPES,
    Path,
    Placed,
    Plan,
    flat,
    natural_order,
    place_pieces,
    some,
    without_mesh,
)
from rspo_jax.sharding import platform

Array = jax.Array

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointFilesError(ValueError):
    """Error for a folder that does not hold the checkpoint it should, or whose files cannot be read."""


class StoredTensor(NamedTuple):
    """Entry of a tensor in the header of a file."""

    file: pathlib.Path
    dtype: str
    """Its dtype by safetensors' name, such as "BF16"."""
    shape: tuple[int, ...]
    offset: int
    """Offset of its first byte in the file."""


def read_params(
    folder: str | os.PathLike[str], plan: Plan, template: Mapping[str, Any], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Read the parameters of a model.

    This takes host memory for a few chunks of `CHUNK_BYTES` per device, whatever the sizes of tensors and parameters.
    In a run of several processes, each calls it and reads what its own devices need.

    Args:
      folder: the folder, with `model.safetensors`, or `model.safetensors.index.json` and the files that it names.
      plan: the pieces of each parameter.
      template: a nested dict like the parameters, of `jax.ShapeDtypeStruct`s or arrays. Leaves with a sharding are read
        into it, others to the default device of each process, uncommitted. Each parameter gets the dtype of its leaf,
        float32, bfloat16 or float16, whatever that of the files.
      ignored: patterns (`fnmatch`) of names of tensors that the folder may hold beyond the plan.

    Returns:
      A nested dict of arrays like `template`.

    Raises:
      ValueError: if plan and template do not fit, or a dtype of the template is not supported.
      CheckpointFilesError: if the folder does not hold what is planned, or a file cannot be read. In either case no
        data has been read.
    """
    leaves = flat(template)
    for path, leaf in leaves.items():
        if jnp.dtype(leaf.dtype).name not in SAFETENSORS_DTYPES.values():
            raise ValueError(
                f"{'/'.join(path)} cannot be read as {leaf.dtype}: give it a float dtype of at most 32 bits"
            )
    placed = place_pieces(plan, {path: leaf.shape for path, leaf in leaves.items()})
    tensors = list_tensors(folder)
    _check_against_plan(pathlib.Path(folder), tensors, placed, ignored)
    files = _MappedFiles(tensors)
    params = [_read_param(files, placed[path], leaf) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(template), params)


def list_tensors(folder: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Return the tensors that the headers of a checkpoint's files list, by name.

    Raises:
      CheckpointFilesError: if there is no checkpoint, or its files are damaged or do not match its index.
    """
    folder = pathlib.Path(folder)
    if (folder / SINGLE_FILE).is_file():
        return _read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" (convert {some(others)} to safetensors first)" if others else ""
        raise CheckpointFilesError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    names_of = _read_index(folder / INDEX_FILE)
    if absent := [file for file in names_of if not (folder / file).is_file()]:
        raise CheckpointFilesError(
            f"{folder / INDEX_FILE} names {some(absent)}, which the folder lacks: download it again"
        )
    tensors: dict[str, StoredTensor] = {}
    for file, names in names_of.items():
        found = _read_header(folder / file)
        if absent := [name for name in names if name not in found]:
            raise CheckpointFilesError(f"{folder / file} lacks {some(absent)}, which the index says it holds")
        if twice := [name for name in found if name in tensors]:
            raise CheckpointFilesError(f"{folder / file} holds {some(twice)}, as {tensors[twice[0]].file.name} does")
        tensors |= found
    return tensors


def _read_index(path: pathlib.Path) -> dict[str, list[str]]:
    """Return the names of the tensors of each file."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names_of: dict[str, list[str]] = defaultdict(list)
        for name, file in weight_map.items():
            if pathlib.PurePath(file).name != file:
                raise ValueError(f"{file!r} is not the name of a file in the folder")
            names_of[file].append(name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointFilesError(f"{path} cannot be read as an index ({error!r}): download it again") from error
    return dict(sorted(names_of.items()))


def _read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks that the header fits the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFilesError(
            f"{path} cannot be read ({error}): it is damaged or incomplete, download it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _check_against_plan(
    folder: pathlib.Path,
    tensors: Mapping[str, StoredTensor],
    placed: Mapping[Path, Sequence[Placed]],
    ignored: Collection[str],
) -> None:
    planned = {piece.name: piece.shape for pieces in placed.values() for piece in pieces}
    extra = [
        name
        for name in sorted(tensors.keys() - planned.keys(), key=natural_order)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    ]
    for name in sorted([*(planned.keys() & tensors.keys()), *extra], key=natural_order):
        if tensors[name].dtype not in SAFETENSORS_DTYPES:
            raise CheckpointFilesError(
                f"{name} in {tensors[name].file} is of dtype {tensors[name].dtype}, and only "
                f"{', '.join(SAFETENSORS_DTYPES)} can be read: convert quantized weights first"
            )
    missing = sorted(planned.keys() - tensors.keys(), key=natural_order)
    faults = [f"lacks {some(missing)}, which the model needs"] if missing else []
    faults += [f"holds {some(extra)}, which the model does not know"] if extra else []
    if faults:
        raise CheckpointFilesError(f"{folder} does not fit its config.json: it {', and it '.join(faults)}")
    for name, shape in planned.items():
        if tensors[name].shape != shape:
            raise CheckpointFilesError(
                f"{name} in {tensors[name].file} has shape {list(tensors[name].shape)}, where the model needs "
                f"{list(shape)}"
            )


class _MappedFiles:
    """Tensors as views of memory-mapped files. Only the parts in use are read, and the system may evict their pages."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._bytes = functools.cache(lambda file: np.memmap(file, np.uint8, "r"))

    def tensor(self, name: str) -> np.ndarray:
        stored = self._tensors[name]
        dtype = jnp.dtype(SAFETENSORS_DTYPES[stored.dtype])
        size = math.prod(stored.shape) * dtype.itemsize
        content = self._bytes(stored.file)[stored.offset : stored.offset + size]
        return content.view(dtype).reshape(stored.shape)


def _read_param(files: _MappedFiles, pieces: Sequence[Placed], leaf: Any) -> Array:
    shape = tuple(leaf.shape)
    sharding = None if isinstance(leaf, jax.Array) and not leaf.committed else leaf.sharding
    if sharding is None:
        return _read_shard(files, pieces, tuple(map(range, shape)), leaf.dtype, None)
    boxes = {
        device: tuple(range(*part.indices(size)) for part, size in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    # Each device compiles and waits for itself.
    with ThreadPoolExecutor(len(boxes), thread_name_prefix="reading") as pool:
        read = functools.partial(_read_shard, files, pieces)
        shards = list(pool.map(lambda device: read(boxes[device], leaf.dtype, device), boxes))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_shard(
    files: _MappedFiles, pieces: Iterable[Placed], box: tuple[range, ...], dtype: Any, device: Any
) -> Array:
    """Return the part of a parameter that one device holds."""
    with without_mesh():
        # Given the device itself, `jnp.zeros` would make the array on the default one and move it. `device_put` copies
        # nothing here: it commits the array to its device, without which the first chunk would need its own program.
        with contextlib.nullcontext() if device is None else jax.default_device(device):
            shard = jax.device_put(jnp.zeros(tuple(map(len, box)), dtype), device)
        under_way = 0
        for piece in pieces:
            part = piece.cut(box)
            if part is None:
                continue
            tensor = files.tensor(piece.name)
            for chunk in part.chunks(CHUNK_BYTES // tensor.itemsize):
                # Transposed on the way to the device, which JAX does several times faster than NumPy, or XLA on a CPU.
                content = np.require(chunk.view(tensor).transpose(chunk.order), requirements="A")
                start = tuple(np.int32(place - places.start) for place, places in zip(chunk.start, box, strict=True))
                shard = _fill(shard, jax.device_put(content, device), start, chunk.sizes)
                under_way += content.nbytes
                if under_way >= CHUNK_BYTES:  # chunks stay on the host until they are used
                    jax.block_until_ready(shard)
                    under_way = 0
        return jax.block_until_ready(shard)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _fill(shard: Array, content: Array, start: tuple[Any, ...], sizes: tuple[int, ...]) -> Array:
    """Write `content`, in blocks of the given sizes, into `shard` at `start`; in place, as the shard is donated."""
    block = content.reshape(sizes).astype(shard.dtype)
    if platform() != "cpu":  # on a TPU, XLA would copy the whole shard for the sake of its bits
        return jax.lax.dynamic_update_slice(shard, block, start)
    # On a CPU, XLA would convert all of a bfloat16 array to float32 and back to update a part of it.
    bits = jnp.uint16 if shard.dtype.itemsize == 2 else jnp.uint32
    return jax.lax.dynamic_update_slice(shard.view(bits), block.view(bits), start).view(shard.dtype)
