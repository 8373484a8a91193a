"""Collectives of a compiled program: their kinds, the bytes that they move, and the mesh axes that they span.

Bytes are those that one device receives over its links, on average over the devices, by the algorithms that move least
(Thakur et al., "Optimization of collective communication operations in MPICH", 2005). With g devices in a group and an
operand of n bytes on each, an all-gather receives (g − 1) · n, a reduce-scatter (g − 1) / g · n, an all-reduce both,
2 · (g − 1) / g · n, an all-to-all (g − 1) / g · n, a broadcast n, and a permutation n on each device that gets bytes of
another. Only the operand's size of a ragged all-to-all is known before it runs; it counts as if every row were used.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from experiments.compilers.hlo import Computation, Instruction

CollectiveKind = Literal[
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]
ALL_DEVICES = ("all devices",)
UNKNOWN_AXES = ("unknown",)


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ; `UNKNOWN_AXES` without a mesh."""
    bytes_received: float
    """Bytes that a device receives each time it runs."""
    times: float
    """Number of times that it runs."""
    shape: str
    """Shapes of a device's operands."""
    op_name: str

    @property
    def total_bytes(self) -> float:
        return self.bytes_received * self.times


def kind_of(instruction: Instruction) -> CollectiveKind | None:
    """Return the kind of collective that an instruction begins, or None; the end of an asynchronous one is None."""
    opcode = instruction.opcode.removesuffix("-start")
    return next((kind for kind in get_args(CollectiveKind) if kind == opcode), None)


def read_collective(
    computation: Computation, instruction: Instruction, mesh: Mapping[str, int], is_fused: bool = False
) -> Collective:
    """Read a collective.

    Args:
      computation: the computation that holds it.
      instruction: an instruction for which `kind_of` is not None.
      mesh: axis -> size, in the order of the mesh's axes; empty if there is no mesh.
      is_fused: if true, the computation is that of a fusion.
    """
    kind = kind_of(instruction)
    assert kind is not None
    operands = [array for operand in computation.operands(instruction) for array in operand.arrays]
    if kind == "ragged-all-to-all":  # the other operands are the output's buffer, offsets and sizes
        operands = operands[:1]
    if kind == "all-reduce" and is_fused:
        # The TPU compiler's reduce-scatter is such a fusion: each device keeps a slice of the all-reduce.
        root = computation.root
        if root.opcode == "dynamic-slice" and root.operands[:1] == (instruction.name,):
            kind = "reduce-scatter"
    size = sum(array.bytes for array in operands)
    shape = ", ".join(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in operands[:3])
    shape += f" and {len(operands) - 3} more" if len(operands) > 3 else ""
    if kind == "collective-permute":
        listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
        pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", listed[1] if listed else ""), int).reshape(-1, 2)
        moving = pairs[pairs[:, 0] != pairs[:, 1]]
        share = len(moving) / max(math.prod(mesh.values()) if mesh else len(pairs), 1)
        axes, received = _axes(moving, mesh), share * size
    else:
        groups = _groups(instruction, mesh)
        axes, group = _axes(groups, mesh), groups.shape[1]
        match kind:
            case "all-gather":
                received = size * (group - 1)
            case "all-reduce":
                received = 2 * size * (group - 1) / group
            case "collective-broadcast":
                received = size
            case _:
                received = size * (group - 1) / group
    return Collective(kind, axes, received, 1, shape, instruction.op_name)


def _groups(instruction: Instruction, mesh: Mapping[str, int]) -> np.ndarray:
    """Return the groups of devices, [groups, devices of a group]; one group of all devices if none is named.

    XLA writes them as a list, as an iota over all devices that is reshaped and transposed, or as axes of a mesh.
    """
    text = instruction.attributes
    if found := re.search(r"replica_groups=mesh\[(.*?)\]([^{]*)\{(.*?)\}", text):
        return _groups_of_axes(found[1], found[2], found[3])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
        assert shape is not None and dims is not None
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    found = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text)
    if found is None:
        return np.arange(max(1, math.prod(mesh.values()))).reshape(1, -1)
    return np.array([[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])


def _groups_of_axes(axes: str, order: str, grouped: str) -> np.ndarray:
    """Return groups written as axes of a mesh.

    `mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'b','a':(2)4}` groups over all of b, and over the part of a that has
    size 4 inside a part of size 2. Without `device_ids`, the devices are counted in the order of the axes.

    Args:
      axes: text between the brackets after `mesh`.
      order: text between those brackets and the braces.
      grouped: text between the braces.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    parts, inner = [], []
    names = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped)
    for name, size in sizes.items():
        of_axis = [(int(before), int(part)) for other, before, part in names if other == name and part]
        whole = any(other == name and not part for other, _, part in names)
        bounds = sorted({1, size, *(before for before, _ in of_axis), *(before * part for before, part in of_axis)})
        for low, high in itertools.pairwise(bounds):
            parts.append(high // low)
            inner.append(whole or any(before <= low and high <= before * part for before, part in of_axis))
    devices = np.arange(math.prod(sizes.values()))
    if found := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        dims, transposed = (tuple(map(int, part.split(","))) if part else None for part in found.groups())
        devices = devices.reshape(dims).transpose(transposed)
    outer = [i for i, grouped in enumerate(inner) if not grouped]
    moved = devices.reshape(parts or [1]).transpose(outer + [i for i, grouped in enumerate(inner) if grouped])
    return moved.reshape(math.prod(parts[i] for i in outer), -1)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes along which the devices of a group differ."""
    if not mesh or not groups.size or groups.max() >= math.prod(mesh.values()):
        return UNKNOWN_AXES
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, devices]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)
    return ALL_DEVICES if len(axes) > 1 and groups.shape[1] == math.prod(mesh.values()) else axes
