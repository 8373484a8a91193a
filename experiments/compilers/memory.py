"""The memory of a compiled TPU program, read from what the compiler says of its buffers, also where they do not fit.

Sizes are those of the TPU's layouts, padding included. This file must never know what the arguments mean.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.compilers.hlo import Program

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(?:, color (\d+))?[^\n]*", re.MULTILINE)
_PARAMETER = re.compile(r"\bparameter (\d+)")
_PEAK = re.compile(r"^ *Live ranges at \d+ \(peak\):\n((?:    [^\n]*\n)*)", re.MULTILINE)
_LIVE = re.compile(r"^ *([^\s{]+)(\{[\d,]*\}): (\d+) bytes", re.MULTILINE)


@dataclass(frozen=True)
class Buffer:
    """Something that is alive when most is."""

    size: int
    """Bytes."""
    shape: str
    op_name: str
    """Of the operation that makes it, or its name in the program."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's main memory."""

    arguments: Mapping[str, int]
    """Path of each argument, as `state.params['head']` -> its bytes."""
    results: int
    """Those that do not take the place of a donated argument."""
    temporaries: int
    constants: int
    largest: tuple[Buffer, ...]
    """What is alive when most is, arguments left out, the largest first."""

    @property
    def peak(self) -> int:
        return sum(self.arguments.values()) + self.results + self.temporaries + self.constants

    def of(self, *prefixes: str) -> int:
        """Bytes of the arguments whose path begins with one of the prefixes."""
        return sum(size for path, size in self.arguments.items() if path.startswith(prefixes))


def read(program: Program, buffers: str, peak: str = "") -> Memory:
    """Reads the compiler's lists of buffers.

    Args:
      program: the optimized program.
      buffers: the buffer assignment.
      peak: the live ranges; nothing is known of the largest buffers without them.

    Raises:
      ValueError: if there is no allocation in the text.
    """
    paths = {
        int(instruction.constant): instruction.op_name or instruction.name
        for instruction in program.entry.instructions.values()
        if instruction.opcode == "parameter"
    }
    arguments: dict[str, int] = {}
    sums = {"results": 0, "temporaries": 0, "constants": 0}
    found = list(_ALLOCATION.finditer(buffers))
    if not found:
        raise ValueError("the compiler's list of buffers names no allocation")
    for match in found:
        line, size = match.group(), int(match.group(1))
        if match.group(2) or "thread-local" in line:  # another memory than the main one, or a part of a temporary
            continue
        parameter = _PARAMETER.search(line)
        if parameter:
            path = paths.get(int(parameter.group(1)), f"parameter {parameter.group(1)}")
            arguments[path] = arguments.get(path, 0) + size
        else:
            kind = "results" if "maybe-live-out" in line else "constants" if ", constant" in line else "temporaries"
            sums[kind] += size
    return Memory(arguments, **sums, largest=_largest(program, peak))


def _largest(program: Program, peak: str, count: int = 12) -> tuple[Buffer, ...]:
    listed = _PEAK.search(peak)
    instructions = {
        name: i for computation in program.computations.values() for name, i in computation.instructions.items()
    }
    buffers = []
    for name, index, size in _LIVE.findall(listed.group(1) if listed else ""):
        instruction = instructions.get(name)
        if instruction is not None and instruction.opcode == "parameter" and name in program.entry.instructions:
            continue
        place = int((re.findall(r"\d+", index) or ["0"])[-1])
        shape, op_name = "", name
        if instruction is not None:
            array = instruction.arrays[place if place < len(instruction.arrays) else 0]
            shape, op_name = f"{array.dtype}[{','.join(map(str, array.dims))}]", instruction.op_name or name
        buffers.append(Buffer(int(size), shape, op_name))
    return tuple(sorted(buffers, key=lambda buffer: -buffer.size)[:count])
