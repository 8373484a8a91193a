"""Plans of the tensors of a checkpoint's files that make up the parameters, for both directions.

A plan lists for every parameter the pieces that fill it. It is checked before any file is opened: every place of every
parameter, and of every tensor named, belongs to exactly one piece. So a checkpoint that can be read can be written, and
what is written reads back bit for bit (of a NaN, only that it is one).
"""

import contextlib
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

Path = tuple[str, ...]
"""The keys that lead to a parameter, such as ("layers", "moe", "gate_up")."""

SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Dtypes that a weight may be stored in: safetensors' name -> NumPy's."""
CHUNK_BYTES = 32 * 2**20
"""Bytes that move between host and device at a time. Beyond the parameters, the host holds a few such chunks."""


class Within(NamedTuple):
    """The places start, start + step, … that a piece takes of a longer axis in the file."""

    start: int
    whole: int
    """Length of the axis in the file."""
    step: int = 1


@dataclass(frozen=True)
class Piece:
    """One tensor of the files, or a part of one, and the part of a parameter that it fills.

    `axes` lists the axes of the tensor, an arrow, and the axes of the parameter. Axes in parentheses are one axis in
    the file, the first of them the slowest. Sizes are not given: they are those of the parameter. `1` is an axis of
    size 1 that only the file has. Without `axes` the two have the same axes.

    Examples, for the layer 3 of stacked parameters::

        # [N·H, D] in the file, [L, D, N, H] in the model
        Piece("model.layers.3.self_attn.q_proj.weight", "(N H) D -> D N H", at=(3,))
        # the gate of expert 5: [F, D] in the file, [L, E, D, 2, F] in the model
        Piece("model.layers.3.mlp.experts.5.gate_proj.weight", "F D -> D F", at=(3, 5, None, 0))
        # all experts in one tensor [E, D, F·2], gates and ups in turn
        Piece("model.layers.3.mlp.experts.gate_up_proj", "E D (F G) -> E D G F", at=(3,))
        # the rows of keys in a projection [(N + K + K)·H, D] of N = 32 query, K = 4 key and 4 value heads
        Piece("model.layers.3.attn.qkv.weight", "(K H) D -> D K H", at=(3,), within={"K": Within(32, 40)})
    """

    name: str
    """Name of the tensor."""
    axes: str = ""
    """Axes of the tensor and of the parameter, as above."""
    at: tuple[int | slice | None, ...] = ()
    """Places that the piece fills along each axis of the parameter: an int for one (the piece then lacks this axis), a
    slice for some, None for all. Axes left out at the end are filled whole."""
    within: Mapping[str, Within] = field(default_factory=dict)
    """Axis -> its places in the file, for axes that are longer there."""


Plan = Mapping[Path, Sequence[Piece]]
"""Path of each parameter -> the pieces that fill it."""


class Placed(NamedTuple):
    """A piece, or a part of one, with sizes."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    split: tuple[int, ...]
    """Shape of the same tensor with one axis for each name in `Piece.axes`."""
    split_axes: tuple[int | None, ...]
    """Axis of the parameter that each axis of `split` becomes; None for an axis that only the file has."""
    theirs: tuple[range, ...]
    """Places along the axes of `split`."""
    ours: tuple[range, ...]
    """Places along the axes of the parameter, each without gaps."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the part, with the axes of the parameter."""
        return tuple(len(places) for places in self.ours)

    @property
    def start(self) -> tuple[int, ...]:
        """Index of the part's first place in the parameter."""
        return tuple(places.start for places in self.ours)

    @property
    def order(self) -> tuple[int, ...]:
        """Permutation that brings the result of `view` into the order of the parameter.

        After it a reshape to `sizes` is enough, because axes that only one side has are of size 1.
        """
        return tuple(
            sorted(range(len(self.split)), key=lambda axis: -1 if (own := self.split_axes[axis]) is None else own)
        )

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """Return a view of the part of a whole tensor, in the order of the file; writing to it writes to the tensor."""
        parts = tuple(slice(places.start, places.stop, places.step) for places in self.theirs)
        return tensor.reshape(self.split)[parts]

    def cut(self, box: Sequence[range]) -> "Placed | None":
        """Return the intersection of the part with a box of the parameter, or None if it is empty."""
        theirs, ours = list(self.theirs), list(self.ours)
        for axis, (places, wanted) in enumerate(zip(self.ours, box, strict=True)):
            first, last = max(places.start, wanted.start), min(places.stop, wanted.stop)
            if first >= last:
                return None
            ours[axis] = range(first, last)
        for axis, own in enumerate(self.split_axes):
            if own is not None:
                skipped = ours[own].start - self.ours[own].start
                theirs[axis] = theirs[axis][skipped : skipped + len(ours[own])]
        return self._replace(theirs=tuple(theirs), ours=tuple(ours))

    def chunks(self, elements: int) -> Iterator["Placed"]:
        """Split into parts of at most so many elements, each as contiguous in the file as possible."""
        axis = next((own for own in self.split_axes if own is not None and len(self.ours[own]) > 1), None)
        total = math.prod(self.sizes)
        if total <= elements or axis is None:
            yield self
            return
        places, parts = self.ours[axis], -(-total // elements)
        length = -(-len(places) // parts)
        for first in range(places.start, places.stop, length):
            box = (*self.ours[:axis], range(first, first + length), *self.ours[axis + 1 :])
            part = self.cut(box)
            assert part is not None
            yield from part.chunks(elements)


def flat(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the leaves of a nested dict by their paths, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """Return a context without `jax.set_mesh`, under which nothing may run on one device alone; enter it at once."""
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def some(names: Iterable[str]) -> str:
    """List the first few names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def natural_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a key that sorts names as a reader would: layer 2 before layer 10."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name))


def place_pieces(plan: Plan, shapes: Mapping[Path, tuple[int, ...]]) -> dict[Path, list[Placed]]:
    """Give each piece its sizes, and check the plan as a whole.

    Args:
      plan: the pieces of each parameter.
      shapes: the shape of each parameter.

    Raises:
      ValueError: if plan and shapes name different parameters, a piece does not fit its parameter, a parameter or a
        tensor is not filled by its pieces, or a place in one of them belongs to two pieces.
    """
    without, unknown = shapes.keys() - plan.keys(), plan.keys() - shapes.keys()
    if without:
        raise ValueError(f"the plan has no pieces for {some(sorted(map('/'.join, without)))}")
    if unknown:
        raise ValueError(f"the plan has pieces for {some(sorted(map('/'.join, unknown)))}, which is not a parameter")
    placed = {path: [_place(piece, path, shape) for piece in plan[path]] for path, shape in shapes.items()}
    for path, pieces in placed.items():
        _check_filled(f"the parameter {'/'.join(path)}", shapes[path], [piece.ours for piece in pieces])
    _check_tensors(piece for pieces in placed.values() for piece in pieces)
    return placed


@functools.lru_cache(maxsize=1024)
def _parse(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]] | None:
    """Parse "(N H) D -> D N H" into ((N, H), (D,)) and (D, N, H), or return None if that is impossible."""
    theirs, arrow, ours = axes.partition("->")
    if not arrow or not re.fullmatch(r"(\s*(\w+|\((\s*\w+)+\s*\)))*\s*", theirs) or not re.fullmatch(r"[\w\s]*", ours):
        return None
    groups = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\w+", theirs))
    names = [name for group in groups for name in group if name != "1"]
    own = tuple(ours.split())
    if len(set(names)) != len(names) or len(set(own)) != len(own) or set(names) != set(own):
        return None
    return groups, own


def _place(piece: Piece, path: Path, shape: tuple[int, ...]) -> Placed:
    where = f"the piece {piece.name} of {'/'.join(path)} {list(shape)}"
    if len(piece.at) > len(shape):
        raise ValueError(f"{where} has more entries in at, {piece.at}, than the parameter has axes")
    at = (*piece.at, *(None,) * (len(shape) - len(piece.at)))
    ours = []
    for entry, size in zip(at, shape, strict=True):
        if isinstance(entry, int):
            ours.append(range(entry, entry + 1) if 0 <= entry < size else range(0))
        else:
            ours.append(range(size) if entry is None else range(size)[entry])
    if not all(len(places) and places.step == 1 for places in ours):
        raise ValueError(f"{where} has at={piece.at}, which is outside the parameter or leaves gaps")
    left = [axis for axis, entry in enumerate(at) if not isinstance(entry, int)]
    same = " ".join(f"axis{axis}" for axis in left)
    parsed = _parse(piece.axes or f"{same} -> {same}")
    if parsed is None:
        raise ValueError(f"{where} has axes {piece.axes!r}, which are not of the form '(N H) D -> D N H'")
    groups, names = parsed
    if len(names) != len(left):
        raise ValueError(f"{where} names {len(names)} axes of the parameter, but at={piece.at} leaves {len(left)}")
    if unknown := piece.within.keys() - set(names):
        raise ValueError(f"{where} has a part within {some(sorted(unknown))}, which is not one of its axes")
    axis_of = dict(zip(names, left, strict=True))
    theirs, whole = {"1": range(1)}, {"1": 1}
    for name, axis in axis_of.items():
        size = len(ours[axis])
        start, whole[name], step = piece.within.get(name, Within(0, size))
        theirs[name] = range(start, start + size * step, step) if step > 0 else range(0)
        if start < 0 or step < 1 or theirs[name][-1] >= whole[name]:
            raise ValueError(f"{where} takes {size} places of {name} {piece.within[name]}, which does not have so many")
    flat_names = [name for group in groups for name in group]
    return Placed(
        piece.name,
        tuple(math.prod(whole[name] for name in group) for group in groups),
        tuple(whole[name] for name in flat_names),
        tuple(axis_of.get(name) for name in flat_names),
        tuple(theirs[name] for name in flat_names),
        tuple(ours),
    )


def _check_tensors(pieces: Iterable[Placed]) -> None:
    by_name: dict[str, list[Placed]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    for name, parts in by_name.items():
        first = parts[0]
        for part in parts[1:]:
            if (part.shape, part.split) != (first.shape, first.split):
                raise ValueError(
                    f"the pieces of the tensor {name} do not split it alike: {list(first.split)} and {list(part.split)}"
                )
        if len(parts) > 1 or first.theirs != tuple(map(range, first.split)):
            _check_filled(f"the tensor {name}", first.split, [part.theirs for part in parts])


def _check_filled(what: str, shape: tuple[int, ...], parts: Sequence[tuple[range, ...]]) -> None:
    """Check that each place of an array belongs to exactly one part. Places that no part tells apart count as one."""
    firsts, members = [], []
    for axis, size in enumerate(shape):
        distinct = dict.fromkeys(part[axis] for part in parts)
        held = np.zeros((len(distinct) + 1, size), bool)  # the last row keeps NumPy from having nothing to compare
        for row, places in enumerate(distinct):
            held[row, places.start : places.stop : places.step] = True
        kinds, first = np.unique(held, axis=1, return_index=True)
        firsts.append(first)
        members.append({places: np.flatnonzero(kinds[row]) for row, places in enumerate(distinct)})
    counts = np.zeros([len(first) for first in firsts], np.int32)
    for part in parts:
        counts[np.ix_(*(member[places] for member, places in zip(members, part, strict=True)))] += 1
    wrong = np.argwhere(counts != 1)
    if len(wrong):
        place = [int(first[kind]) for first, kind in zip(firsts, wrong[0], strict=True)]
        how_many = "no piece fills" if counts[tuple(wrong[0])] == 0 else "more than one piece fills"
        raise ValueError(f"{what} {list(shape)} is not what its pieces make up: {how_many} the place {place}")
