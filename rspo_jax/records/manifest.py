"""Manifest of a checkpoint: names, shapes, dtypes and fingerprints of its arrays, under a checksum.

It decides whether a checkpoint fits a run, and whether the arrays that were read are those that were saved.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from rspo_jax.types import Array

FORMAT = 1
UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}
"""Bits of a dtype -> the dtype of the words that it is read as; 64 bits are two words."""
MAX_NAMES = 5
MAX_REASON = 300


class CheckpointMismatch(ValueError):
    """A sound checkpoint holds other arrays than the run expects."""


class Damage(Exception):
    """A checkpoint that cannot be trusted; the message says why."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by name, as in `state.params['embedding']`, in the order of the tree.

    Raises:
      TypeError: if a leaf is not an array, or has an unsupported dtype.
      ValueError: if no leaf has an element.
    """
    leaves = {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"{name} is of type {type(leaf).__name__}, not an array: wrap it, as in jnp.int32(3)")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{name} is a typed PRNG key: pass its jax.random.key_data, and wrap that again later")
        is_real = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
        if not is_real or jax.dtypes.itemsize_bits(leaf.dtype) not in UNSIGNED:
            raise TypeError(f"{name} is {leaf.dtype}: checkpoints hold bool, integers and floats of 8 to 64 bits")
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(f"{name} is {leaf.dtype}, which JAX would narrow: convert it, or set jax_enable_x64")
    if not any(leaf.size for leaf in leaves.values()):
        raise ValueError("no array of the state has an element, so there is nothing to checkpoint")
    return leaves


def is_spread(leaf: Any) -> bool:
    """Return whether an array has parts that only other processes can read."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def host_fingerprints(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Return the fingerprint of each array, in every process; all processes must call this together."""
    found = {}
    for spread in (False, True):  # one computation cannot take arrays of one process and arrays of all
        group = {name: leaf for name, leaf in leaves.items() if is_spread(leaf) == spread}
        if group:
            numbers = fingerprints(list(group.values()))
            gathered = multihost_utils.process_allgather(numbers, tiled=True) if is_spread(numbers) else numbers
            found |= dict(zip(group, np.asarray(gathered).tolist(), strict=True))
    return found


@jax.jit
def fingerprints(leaves: Sequence[Array]) -> Array:
    """Return a number for each array that any change of a single element changes.

    A change of several elements, or of their order, goes unnoticed once in 2^32. Sums of integers that wrap around are
    the same in any order, hence under any sharding.

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


def make_manifest(index: int, leaves: Mapping[str, Any], found: Mapping[str, int], metadata: Mapping[str, Any]) -> str:
    """Return the manifest of arrays as text.

    Args:
      index: the checkpoint's number.
      leaves: the arrays by name.
      found: the fingerprint of each.
      metadata: for JSON; kept beside the arrays.

    Raises:
      TypeError: if JSON cannot hold `metadata`.
    """
    described = {name: {"array": _spec(leaf), "fingerprint": found[name]} for name, leaf in leaves.items()}
    content = {"format": FORMAT, "index": index, "metadata": dict(metadata), "leaves": described}
    content = json.loads(json.dumps(content))  # as a reader will have it: tuples become lists
    return json.dumps(content | {"checksum": _checksum(content)})


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise TypeError if JSON cannot hold `metadata`."""
    try:
        json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata must be a dict that JSON can hold: {error}") from error


def parse_manifest(text: str, index: int) -> dict[str, Any]:
    """Read the text of a manifest.

    Args:
      text: the text.
      index: the number under which the checkpoint is kept. Manifests of earlier versions do not tell their own.

    Raises:
      Damage: if it is not as `make_manifest` wrote it, or the checkpoint belongs under another number.
    """
    content = dict(json.loads(text))
    if content.pop("checksum", None) != _checksum(content):
        raise Damage("the manifest does not agree with its checksum")
    if content.get("index", index) != index:
        raise Damage(f"the manifest is of checkpoint {content['index']}, which is kept under a wrong number")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_fit(where: object, manifest: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes of a checkpoint with those of a run.

    Args:
      where: the checkpoint's path, for the message.
      manifest: the checkpoint's manifest.
      leaves: the run's arrays by name.

    Raises:
      CheckpointMismatch: if they differ.
    """
    if manifest["format"] != FORMAT:
        raise CheckpointMismatch(
            f"{where} has format {manifest['format']}, but this version reads format {FORMAT} only: "
            "resume with the version that wrote it, or start a new run folder"
        )
    saved = {name: leaf["array"] for name, leaf in manifest["leaves"].items()}
    expected = {name: _spec(leaf) for name, leaf in leaves.items()}
    changed = [name for name in expected if name in saved and saved[name] != expected[name]]
    missing = [name for name in expected if name not in saved]
    extra = [name for name in saved if name not in expected]
    differences = []
    if changed:
        name, *others = changed
        more = f", and so on for {join(others)}" if others else ""
        differences.append(f"{name} was saved as {saved[name]}, but {expected[name]} is expected{more}")
    if missing:
        differences.append(f"it lacks {join(missing)}")
    if extra:
        differences.append(f"it also holds {join(extra)}")
    if differences:
        raise CheckpointMismatch(
            f"{where} does not fit this run: {'; '.join(differences)}. "
            "Resume with the configuration that it was written with, or start a new run folder."
        )


def check_specs(arrays: Mapping[str, Array], leaves: Mapping[str, Any]) -> None:
    """Raise Damage if what was read is not arrays with the shapes and dtypes of `leaves`."""
    # Where a name is damaged, Orbax hands back the ShapeDtypeStruct that it was asked with.
    missing = [name for name in leaves if not isinstance(arrays[name], jax.Array)]
    if missing:
        raise Damage(f"the arrays of {join(missing)} are not in it")
    _check_none([name for name, leaf in leaves.items() if _spec(arrays[name]) != _spec(leaf)])


def check_contents(found: Mapping[str, int], manifest: Mapping[str, Any]) -> None:
    """Raise Damage if the fingerprints `found` are not those of the manifest."""
    _check_none([name for name in found if found[name] != manifest["leaves"][name]["fingerprint"]])


def _check_none(wrong: Sequence[str]) -> None:
    if wrong:
        raise Damage(f"the contents of {join(wrong)} are not those that were saved")


def _spec(leaf: Any) -> str:
    """Return dtype and shape, as in `float32[2, 3]`."""
    return f"{jnp.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"


def join(names: Sequence[str]) -> str:
    """List the first names, and the number of others."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def in_one_line(error: BaseException) -> str:
    """Return an error's type and text in one line, without the appendices of TensorStore."""
    text = re.split(r" \[(?:tensorstore_spec|source locations)", f"{type(error).__name__}: {error}")[0]
    text = " ".join(text.split())
    half = MAX_REASON // 2
    return text if len(text) <= MAX_REASON else f"{text[:half]} … {text[-half:]}"
