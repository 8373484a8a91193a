"""Memory of a compiled TPU program, read from the compiler's lists of its buffers, even if they do not fit.

Sizes are those of the TPU's layouts, padding included.
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
    """A buffer that is alive at the peak."""

    size: int
    """Bytes."""
    shape: str
    op_name: str
    """Name of the operation that makes it, or its own name in the program."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's main memory."""

    arguments: Mapping[str, int]
    """Path of each argument, as `state.params['head']` -> its bytes."""
    results: int
    """Bytes of the results that do not take the place of a donated argument."""
    temporaries: int
    constants: int
    largest: tuple[Buffer, ...]
    """The buffers at the peak, arguments left out, the largest first."""

    @property
    def peak(self) -> int:
        return sum(self.arguments.values()) + self.results + self.temporaries + self.constants

    def of(self, *prefixes: str) -> int:
        """Return the bytes of the arguments whose path begins with one of the prefixes."""
        return sum(size for path, size in self.arguments.items() if path.startswith(prefixes))


def read_memory(program: Program, buffers: str, peak: str = "") -> Memory:
    """Read the compiler's lists of buffers.

    Args:
      program: the optimized program.
      buffers: text of the buffer assignment.
      peak: text of the live ranges; without it, `largest` is empty.

    Raises:
      ValueError: if the buffer assignment names no allocation.
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
    """Return the largest buffers that the live ranges list at the peak, the program's parameters left out."""
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
