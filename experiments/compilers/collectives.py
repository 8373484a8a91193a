"""What moves between devices in a compiled program: each collective's kind, its bytes and the mesh axes it spans.

The convention: bytes that one device receives over its links, on average over the devices, with the algorithms that
move least (Thakur et al., "Optimization of collective communication operations in MPICH", 2005). With g devices in a
group and an operand of n bytes on each, an all-gather receives (g − 1) · n, a reduce-scatter (g − 1) / g · n, an
all-reduce both, 2 · (g − 1) / g · n, an all-to-all (g − 1) / g · n, a broadcast n, and a permutation n on each device
that gets something from another. Of a ragged all-to-all only the operand's size is known before it runs, and that
counts as if every row were in use. This file must never know what a program computes.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from experiments.compilers.hlo import Computation, Instruction

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
ALL_DEVICES = ("all devices",)
UNKNOWN_AXES = ("unknown",)


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    axes: tuple[str, ...]
    """The mesh axes along which the devices of a group differ; `UNKNOWN_AXES` without a mesh."""
    bytes_received: float
    """By a device, each time it runs."""
    times: float
    """How often it runs."""
    shape: str
    """What a device puts in."""
    op_name: str

    @property
    def total_bytes(self) -> float:
        return self.bytes_received * self.times


def kind_of(instruction: Instruction) -> str | None:
    """The kind of collective that an instruction begins, if any; what ends an asynchronous one is none."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def is_scattered(computation: Computation, all_reduce: Instruction) -> bool:
    """Whether the computation is the TPU compiler's form of a reduce-scatter: an all-reduce in a fusion of its own, of
    which each device keeps a slice."""
    root = computation.root
    return root.opcode == "dynamic-slice" and root.operands[:1] == (all_reduce.name,)


def read(
    computation: Computation, instruction: Instruction, mesh: Mapping[str, int], is_fused: bool = False
) -> Collective:
    """What a collective moves.

    Args:
      computation: where it stands.
      instruction: one for which `kind_of` is not None.
      mesh: axis -> size, in the order of the mesh's axes; empty where there is none.
      is_fused: whether the computation is that of a fusion.
    """
    kind = kind_of(instruction)
    assert kind is not None
    operands = [array for operand in computation.operands(instruction) for array in operand.arrays]
    if kind == "ragged-all-to-all":  # the output's buffer, offsets and sizes follow
        operands = operands[:1]
    if kind == "all-reduce" and is_fused and is_scattered(computation, instruction):
        kind = "reduce-scatter"
    size = sum(array.bytes for array in operands)
    shape = ", ".join(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in operands[:3])
    shape += f" and {len(operands) - 3} more" if len(operands) > 3 else ""
    if kind == "collective-permute":
        pairs = np.array(_pairs(instruction), int).reshape(-1, 2)
        share = _moving_share(pairs, math.prod(mesh.values()) if mesh else len(pairs))
        axes, received = _axes(pairs[pairs[:, 0] != pairs[:, 1]], mesh), share * size
    else:
        groups = _groups(instruction, mesh)
        axes, received = _axes(groups, mesh), _received(kind, size, groups.shape[1])
    return Collective(kind, axes, received, 1, shape, instruction.op_name)


def _pairs(instruction: Instruction) -> list[tuple[int, int]]:
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1] if found else "")]


def _moving_share(pairs: np.ndarray, devices: int) -> float:
    return float(np.sum(pairs[:, 0] != pairs[:, 1])) / max(devices, 1)


def _received(kind: str, size: float, group: int) -> float:
    match kind:
        case "all-gather":
            return size * (group - 1)
        case "all-reduce":
            return 2 * size * (group - 1) / group
        case "collective-broadcast":
            return size
    return size * (group - 1) / group


def _groups(instruction: Instruction, mesh: Mapping[str, int]) -> np.ndarray:
    """The groups of devices, [groups, devices of a group]; one of all devices where none are named.

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
    """Groups written as `mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'b','a':(2)4}`: the part of axis a that is of
    size 4, inside one of size 2, and all of b. Without an order the devices are counted in that of the axes."""
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
    """The axes along which the devices of a group differ."""
    if not mesh or not groups.size or groups.max() >= math.prod(mesh.values()):
        return UNKNOWN_AXES
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, devices]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)
    return ALL_DEVICES if len(axes) > 1 and groups.shape[1] == math.prod(mesh.values()) else axes
